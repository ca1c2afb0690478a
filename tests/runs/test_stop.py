"""Signals that ask a run to stop."""

import os
import signal

import pytest

from liftdist.errors import Stopped
from liftdist.runs.stop import StopRequests


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
