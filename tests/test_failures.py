"""Which failure of a job is the one to report."""

from liftdist import failures
from liftdist.failures import Failure


def test_the_first_failure_is_no_teardown():
    lost = Failure(0, 4, "a", 1.0, "RuntimeError: Connection closed by peer", "trace", failures.LOST_PEERS)
    bug = Failure(2, 4, "b", 2.0, "KeyError: 'x'", "Traceback", failures.BUG)
    late = Failure(1, 4, "a", 3.0, "KeyError: 'y'", "Traceback", failures.BUG)
    ordered = sorted([lost, late, bug], key=lambda failure: (failure.kind, failure.time))
    assert failures.summary(ordered).startswith("rank 2 on b failed first: KeyError: 'x'")
    assert failures.summary([lost]).startswith("ranks 1, 2, 3 ended without a message")
    assert failures.summary([]) is None
