"""What asks a run to stop, or several that share a model."""

import os
import signal

import pytest

from liftdist.errors import Stopped
from liftdist.runs.stop import CancellationPoint, StopRequests


def test_signals_that_are_not_to_stop_a_run_do_what_they_always_did():
    stop = StopRequests()
    before = {name: signal.getsignal(signal.Signals[name]) for name in ("SIGTERM", "SIGINT", "SIGUSR1", "SIGUSR2")}
    try:
        stop.catch()
        stop.catch(["SIGUSR2"])
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
        os.kill(os.getpid(), signal.SIGUSR2)
        with pytest.raises(Stopped, match="SIGUSR2"):
            stop.check()
    finally:
        for name, handler in before.items():
            signal.signal(signal.Signals[name], handler)


def test_a_file_for_one_of_several_runs_stops_all_and_an_error_of_one_that_alone(tmp_path):
    stop = StopRequests()
    points = [CancellationPoint(stop) for _ in range(2)]
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        stop.watch(tmp_path / name)
    points[0].fail(OSError("disk"))
    with pytest.raises(OSError, match="disk"):
        points[0].check()
    points[1].check()
    (tmp_path / "b" / "stop-requested").touch()
    stop._last_check = 0.0  # it looks once a second
    with pytest.raises(Stopped, match="stop-requested"):
        points[1].check()
    stop.done()
    assert not (tmp_path / "b" / "stop-requested").exists()
