"""One run, from a config to a fine-tuned model: ``torchrun -m liftdist.train CONFIG [key=value ...]`` on every rank.

    claim the run directory -> inputs -> newest checkpoint, or none -> model, principal weights -> steps -> export

The same command continues a run that was stopped, killed or preempted, from its newest valid checkpoint. Exit codes of a rank:
0 finished, 2 an error that the user can correct, 75 stopped on request and saved, 1 any other error.
"""

from __future__ import annotations

import gc

from liftdist import failures, output
from liftdist.runs.stop import CancellationPoint, StopRequests

_early = StopRequests()
if __name__ == "__main__":
    output.take_over()
    _early.catch()  # the imports below take seconds, in which a signal must be neither lost nor fatal
    failures.start()
    gc.disable()  # as `importing` does, which ends it

import argparse
import contextlib
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from liftdist import config as configs
from liftdist import environment, signals
from liftdist.console import Console
from liftdist.distributed import mesh as meshes
from liftdist.errors import EXIT_STOPPED, EXIT_USER_ERROR, PeerError, Stopped, UserError
from liftdist.options import add_continuation_flags, add_harness_flags, allowed_by, harness_of
from liftdist.processes import die_with_parent, importing
from liftdist.redaction import redact
from liftdist.runs.context import RunContext


def main(arguments: Sequence[str] | None = None, stop: StopRequests | None = None) -> None:
    """Entry point of a rank; ``stop`` has its signal handlers installed already."""
    stop = stop or StopRequests()
    parser = argparse.ArgumentParser(prog="python -m liftdist.train", description="Fine-tune; started on every rank.")
    parser.add_argument("config", help="YAML file")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--only", choices=("select", "eval"), help="do this instead of training, and exit")
    add_continuation_flags(parser)
    add_harness_flags(parser)
    options = parser.parse_intermixed_args(arguments)
    if environment.AGENT_RUN_ID.is_set():
        die_with_parent(environment.AGENT.get(os.getppid()))  # no rank outlives its agent
    joined = False  # whether all ranks have met, so that they end with the same error
    try:
        config, text = configs.load(options.config, options.overrides, several=options.only is None)
        runs = configs.load_runs(options.config, options.overrides) if options.only is None else []
        harness = harness_of(options)
        if harness is not None and options.only != "eval":
            raise UserError("--harness: is only used with --only eval; leave it out")
        stop.catch(config.train.stop_signals)
        with meshes.start(config.mesh.layout, config.mesh.timeout) as mesh:
            joined = True
            with importing():  # transformers, which takes seconds, in which other nodes may still be starting
                from liftdist.evaluation.evaluate import evaluate
                from liftdist.planning import fit
                from liftdist.training import setup
                from liftdist.training.run import train_all
            pictures = None
            if any(one.metrics.images for one, _ in runs):
                from liftdist.report import images

                pictures = images.of_selection
            drawn = [Path(one.run_dir).expanduser() for one, _ in runs if one.metrics.images and mesh.is_main]
            console = Console(mesh.is_main)
            if config.train.fit_memory and options.only is None:  # of one run
                config = fit.to_memory(config, mesh, console)
                runs = [(config, text)]
            context = RunContext(config, mesh, console, CancellationPoint(stop))
            if options.only == "select":
                setup.select_only(context)
            elif options.only == "eval":
                evaluate(context, text, harness)
            else:
                with fit.itemised(config, mesh.world_size) if len(runs) == 1 else contextlib.nullcontext():
                    train_all(runs, mesh, allowed_by(options.flags), stop, config.train.turn, pictures)
        for run_dir in drawn:
            _draw(run_dir)
    except UserError as error:
        if not failures.say(str(error), failures.USER_ERROR):
            _say(str(error))
        _leave(EXIT_USER_ERROR, joined)
    except Stopped as reason:
        typed = environment.COMMAND.get([])
        how = (
            f"the same command with run_dir={config.run_dir}, without --fresh,"
            if "--fresh" in typed
            else "the same command"
        )
        _say(f"stopped ({reason}); {how} continues")
        _leave(EXIT_STOPPED)
    except PeerError as error:
        failures.say(str(error), failures.LOST_PEERS)
        sys.exit(1)  # the rank that failed shows its traceback
    except BaseException as error:  # SystemExit, too: a rank that exits early must not count as finished
        if not failures.record(error) or failures.is_apart():  # else the launcher or the job shows the first failure
            sys.excepthook(*sys.exc_info())
        output.drain()
        os._exit(1)  # at once: threads and libraries would wait for peers that may be gone


def _draw(run_dir: Path) -> None:
    """Images of the weights. The run has finished and stays so if they cannot be made."""
    try:
        from liftdist.report import images

        for note in images.write(run_dir):
            _say(f"images: {note} (of `liftdist report {run_dir}`, which draws them, too)")
    except Exception as error:
        _say(f"images: cannot be drawn: {type(error).__name__}: {error}")


def _say(message: str) -> None:
    if environment.LOCAL_RANK.get(0) == 0:
        print(f"liftdist: {redact(message)}", file=sys.stderr, flush=True)


def _leave(code: int, all_ranks: bool = True) -> None:
    """Exit with ``code``, which the launcher reads from a file: torchrun turns each code into 1, and restarts failed ranks.

    Args:
        all_ranks: whether all ranks exit with this code.
    """
    signals.ignore()
    if (status := environment.STATUS_FILE.get()) is not None:
        with contextlib.suppress(OSError):
            status.write_text(str(code))
            sys.exit(0 if all_ranks else code)
    if code == EXIT_STOPPED and environment.AGENT_MAX_RESTARTS.get(0) > 0:
        sys.exit(0)  # torchrun would restart ranks that were asked to stop
    time.sleep(1.0 if environment.LOCAL_RANK.get(0) > 0 else 0.0)  # let local rank 0 print its message first
    sys.exit(code)


if __name__ == "__main__":
    main(stop=_early)
