"""Errors that all ranks raise alike, and work that takes ranks differently long."""

import time

import pytest
import ranks

from liftdist.distributed.collectives import all_work, together
from liftdist.errors import Stopped, UserError


def together_differently(mesh):
    """Ranks that have different errors at once all raise of one kind."""
    kinds = {0: UserError("mine"), 1: Stopped("SIGTERM"), 2: None}
    seen = []
    for errors in (kinds, kinds | {2: ZeroDivisionError("a bug")}):
        try:
            with together():
                if errors[mesh.rank] is not None:
                    raise errors[mesh.rank]
        except Exception as error:
            seen.append(f"{type(error).__name__}: {error}")
    return seen


def test_ranks_with_different_errors_raise_of_one_kind():
    for rank, seen in enumerate(ranks.run(3, together_differently)):
        bug = "ZeroDivisionError: a bug" if rank == 2 else "PeerError: rank 2 failed: ZeroDivisionError: a bug"
        assert seen == ["UserError: mine", bug]


def work_apart(mesh, case):
    """Rank 1 has done its work at once. How the work ended, after how long, and how often the rank said that it lives."""
    beats, began = 0, time.monotonic()

    def alive():
        nonlocal beats
        beats += 1
        if case == "stopped while it waits" and mesh.rank == 1 and beats == 3:
            raise Stopped("SIGTERM")

    def work(check):
        ends = began + (1.5 if case == "finished" else 60.0)
        while mesh.rank != 1 and time.monotonic() < ends:
            if case == "bad record" and mesh.rank == 2:
                raise UserError("data.jsonl:7: bad")
            if case == "bug" and mesh.rank == 0:
                raise ZeroDivisionError("a bug")
            time.sleep(0.01)
            check()
        return mesh.rank

    try:
        outcome = str(all_work(work, alive))
    except Exception as error:
        outcome = f"{type(error).__name__}: {error}"
    return outcome, time.monotonic() - began, beats


@pytest.mark.parametrize(
    ("case", "outcomes"),
    [
        ("finished", ["0", "1", "2"]),
        ("bad record", ["UserError: data.jsonl:7: bad"] * 3),
        ("stopped while it waits", ["Stopped: SIGTERM"] * 3),
        ("bug", ["ZeroDivisionError: a bug", *["PeerError: rank 0 failed: ZeroDivisionError: a bug"] * 2]),
    ],
)
def test_ranks_wait_for_the_slowest_and_an_error_of_one_ends_the_work_of_all(case, outcomes):
    found = ranks.run(3, work_apart, case)
    assert [outcome for outcome, *_ in found] == outcomes
    assert all(seconds < 30 for _, seconds, _ in found)
    if case == "finished":
        assert all(seconds > 1.4 for _, seconds, _ in found)
        assert found[1][2] >= 3  # it waited, and said so


@pytest.mark.parametrize("error", [None, UserError("bad"), Stopped("SIGTERM")])
def test_work_of_a_single_process(error):
    def work(check):
        check()
        if error is not None:
            raise error
        return "done"

    if error is None:
        assert all_work(work, lambda: None) == "done"
    else:
        with pytest.raises(type(error), match=str(error)):
            all_work(work, lambda: None)
