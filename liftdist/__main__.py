"""The process of the ``liftdist`` command: streams and signals first, then :mod:`liftdist.cli`, whose imports take a while."""

from __future__ import annotations

import os
import signal
import sys

from liftdist import environment, output, processes, signals
from liftdist.errors import EXIT_STOPPED

RUNS = ("train", "select", "eval")  # commands that start ranks


def main() -> None:
    """Entry point."""
    arguments = sys.argv[1:]
    runs = arguments[:1] and arguments[0] in RUNS
    try:
        processes.use_utf8()
        output.take_over(patient=not runs)  # first: the terminal may be gone when a signal says so
        signals.interrupt()
        for name in environment.internal():  # of the run whose shell this may be
            os.environ.pop(name, None)
        from liftdist import cli

        cli.main(arguments)
    except KeyboardInterrupt as interrupt:
        name = str(interrupt) or "SIGINT"
        if runs:
            print(f"liftdist: stopped ({name}) before training began; the same command starts it", file=sys.stderr)
            sys.exit(EXIT_STOPPED)
        print(f"liftdist: ended by {name}", file=sys.stderr)
        sys.exit(128 + signal.Signals[name])
    finally:
        if (problem := output.lost()) is not None:
            print(f"liftdist: the output is not complete: {problem.strerror}", file=sys.stderr)
            sys.exit(1)


if __name__ == "__main__":
    main()
