"""Errors that all ranks raise alike."""

import ranks

from liftdist.distributed.collectives import together
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
