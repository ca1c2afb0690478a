"""The ``liftdist`` command: checks the input first, then starts the ranks. Imports torch only where needed."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from liftdist import __version__, cli_results, output, preflight, schema_tree
from liftdist import config as configs
from liftdist.cluster import cancel, launcher, nodes, submit
from liftdist.errors import EXIT_USER_ERROR, UserError
from liftdist.options import (
    add_continuation_flags,
    add_harness_flags,
    allowed_by,
    check_given_once,
    harness_of,
    harness_words,
)
from liftdist.redaction import redact
from liftdist.runs import changes, layout
from liftdist.schema import Config


def main(arguments: Sequence[str]) -> None:
    """Run the command that ``arguments`` begin with. Exit code 2 and one line for any error that the user can correct."""
    name = arguments[0] if arguments else "--help"
    if name == "--version":
        print(f"liftdist {__version__}")
        return
    if name not in COMMANDS:
        asked = name in ("--help", "-h")
        if not asked:
            print(f"liftdist: unknown command {name!r}", file=sys.stderr)
        print(_overview(), file=sys.stdout if asked else sys.stderr)
        sys.exit(0 if asked else EXIT_USER_ERROR)
    command = COMMANDS[name]
    about = f"{command.help[0].upper()}{command.help[1:]}."
    parser = argparse.ArgumentParser(prog=f"liftdist {name}", description=about, epilog=command.epilog)
    command.arguments(parser)
    options = parser.parse_intermixed_args(arguments[1:])
    try:
        check_given_once(getattr(options, "overrides", ()))
        command.run(options)
    except UserError as error:
        print(f"liftdist: {redact(str(error))}", file=sys.stderr)
        sys.exit(EXIT_USER_ERROR)


@dataclass(frozen=True)
class Command:
    help: str
    arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], None]
    epilog: str = ""


_RUN_EPILOG = (
    "`liftdist settings` lists the settings. Ctrl-C, SIGTERM, SIGHUP, SIGUSR1, SIGUSR2 or a file `stop-requested` in the run "
    "directory make a run save and stop, with exit code 75: the same command continues it. Exit code 2: an error that you can "
    "correct."
)


def _overview() -> str:
    lines = ["Fine-tune the principal weights of a language model (LIFT) on one or many GPUs.", ""]
    lines += [f"  liftdist {name:<10}{command.help}" for name, command in COMMANDS.items()]
    return "\n".join([*lines, "", "`liftdist COMMAND --help` describes a command."])


# ---------------------------------------------------------------------------------------------------------------------
# Runs.


def _config_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", help="YAML file, see configs/")
    parser.add_argument(
        "overrides",
        nargs="*",
        default=[],
        metavar="key=value",
        help="settings that override the file's; `key=` unsets one",
    )


def _train_arguments(parser: argparse.ArgumentParser) -> None:
    _config_arguments(parser)
    nodes.arguments(parser)
    _continuation_arguments(parser)


def _continuation_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--fresh", action="store_true", help="start again in a new directory beside run_dir instead of continuing"
    )
    add_continuation_flags(parser)


def _select_arguments(parser: argparse.ArgumentParser) -> None:
    _config_arguments(parser)
    nodes.arguments(parser)
    parser.add_argument("--prefetch", action="store_true", help="only fetch and check model and data")


def _check_started(config: Config, options: argparse.Namespace, training: bool) -> None:
    nodes.check(options)
    preflight.check(config, options.nproc and options.nproc * (options.nnodes or 1), training)


def _train(options: argparse.Namespace) -> None:
    _make_fresh(options)
    runs = configs.load_runs(options.config, options.overrides)
    for config, text in runs:
        changes.check_settings(config, text, allowed_by(options.flags))
        _check_started(config, options, training=True)
    _launch([config for config, _ in runs], options, [*options.flags, options.config, *options.overrides])


def _make_fresh(options: argparse.Namespace) -> None:
    """With ``--fresh``, replace run_dir by the next free directory beside it."""
    if not options.fresh:
        return
    run_dir = Path(configs.load(options.config, options.overrides, several=True)[0].run_dir).expanduser()
    if (free := layout.next_free(run_dir)) != run_dir:
        print(f"liftdist: run_dir {run_dir} is taken; starting in {free}", file=sys.stderr)
        options.overrides = [*options.overrides, configs.override("run_dir", str(free))]


def _settings_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "section", nargs="?", default="", help="only settings whose key begins with this, for example `data`"
    )


def _settings(options: argparse.Namespace) -> None:
    rows = [row for row in schema_tree.reference(Config) if row[0].startswith(options.section)]
    if not rows:
        raise UserError(f"settings {options.section}: no such setting; `liftdist settings` lists all")
    for key, default, meaning in rows:
        print(f"{key}  ({default.strip('`')})\n    {meaning.replace('`', '')}")


def _data_arguments(parser: argparse.ArgumentParser) -> None:
    _config_arguments(parser)
    parser.add_argument(
        "--samples", type=int, metavar="N", help="samples of each source, spread over it (default: 3; with --json all)"
    )
    parser.add_argument(
        "--record",
        action="append",
        default=[],
        metavar="PLACE",
        help="the samples of this record, also if it is left out, by its place as messages print it: data.jsonl:17; "
        "may be repeated",
    )
    parser.add_argument("--html", type=Path, metavar="FILE", help="write a page of figures and samples")
    parser.add_argument("--json", action="store_true", help="print the samples as JSON, one a line")


def _data(options: argparse.Namespace) -> None:
    from liftdist.training import preview  # imports torch

    for line in preview.lines(options):
        print(line)
        if output.reader_has_gone():
            return


def _plan_arguments(parser: argparse.ArgumentParser) -> None:
    _config_arguments(parser)
    parser.add_argument("--nodes", type=int, help="nodes (default: slurm.nodes)")
    parser.add_argument("--gpus-per-node", type=int, help="ranks per node (default: slurm.gpus_per_node, or 8)")
    parser.add_argument("--gpu", help="type of the GPUs: a100-80, h100, ...")
    parser.add_argument("--gpu-memory", type=float, metavar="GIB", help="memory of a GPU (default: that of --gpu)")
    parser.add_argument("--link-gbps", type=float, default=100.0, help="network of a node, Gbit/s (default: 100)")
    parser.add_argument("--json", action="store_true", help="print everything as JSON, in bytes and seconds")


def _plan(options: argparse.Namespace) -> None:
    from liftdist.planning import plan  # imports torch

    lines, fits = plan.run(options)
    print(*lines, sep="\n", flush=True)
    sys.exit(0 if fits else 1)


def _submit(options: argparse.Namespace) -> None:
    _make_fresh(options)
    submit.submit(options)


def _select(options: argparse.Namespace) -> None:
    if options.prefetch:
        _prefetch(options)
    else:
        config, _ = configs.load(options.config, options.overrides)
        _check_started(config, options, training=False)
        _launch([config], options, ["--only", "select", options.config, *options.overrides])


def _eval_arguments(parser: argparse.ArgumentParser) -> None:
    _config_arguments(parser)
    nodes.arguments(parser)
    add_harness_flags(parser)


def _eval(options: argparse.Namespace) -> None:
    harness_of(options)  # checked here, read by the ranks
    if (folder := Path(options.config).expanduser()).is_dir():
        layout.check_run(folder)
        options.config = str(folder / "config.yaml")
    config, _ = configs.load(options.config, options.overrides)
    if config.eval.server is not None:  # one rank asks it, on a machine whose GPUs may all be the server's
        os.environ["CUDA_VISIBLE_DEVICES"], options.nproc = "", options.nproc or 1
        options.overrides, config.mesh.dp_replicate = [*options.overrides, "mesh.dp_replicate=1"], 1
    _check_started(config, options, training=False)
    _launch([config], options, ["--only", "eval", *harness_words(options), options.config, *options.overrides])


def _launch(of_runs: Sequence[Config], options: argparse.Namespace, arguments: list[str]) -> None:
    """Start the ranks. Of several configs the first says where what the launcher writes is kept."""
    for config in of_runs:
        preflight.fetch(config, training="--only" not in arguments)  # at commits that the ranks inherit
    typed = ["liftdist", *sys.argv[1:]]
    first = of_runs[0]
    sys.exit(launcher.launch(first, options, nodes.place(first, options), arguments, typed))


def _prefetch(options: argparse.Namespace) -> None:
    config, _ = configs.load(options.config, options.overrides)
    from liftdist.console import Console
    from liftdist.models import build
    from liftdist.models.names import match
    from liftdist.models.weights import ModelFolder
    from liftdist.training.inputs import prepare_inputs

    console = Console(enabled=True)
    inputs = prepare_inputs(config, console)
    files = ModelFolder(inputs.folder)
    match(build.build(build.check_type(inputs.folder, config.model), config.model), files)
    console.say(f"model {config.model.path}: {len(files.file_of)} tensors in {inputs.folder}")


# ---------------------------------------------------------------------------------------------------------------------
# Jobs.


def _submit_arguments(parser: argparse.ArgumentParser) -> None:
    _config_arguments(parser)
    submit.arguments(parser)
    _continuation_arguments(parser)


def _run_dir_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_dir", type=Path, help="run directory of a submitted run, or of an array of them")


def _logs_arguments(parser: argparse.ArgumentParser) -> None:
    _run_dir_argument(parser)
    parser.add_argument("-f", "--follow", action="store_true", help="keep printing while the job runs")
    parser.add_argument("--rank", type=int, help="output of this rank (rank 0 writes to the job's output)")


def _cancel_arguments(parser: argparse.ArgumentParser) -> None:
    _run_dir_argument(parser)
    parser.add_argument("--now", action="store_true", help="end running jobs at once, without letting them save")


# ---------------------------------------------------------------------------------------------------------------------
# Reports.


def _runs_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "run_dirs", nargs="+", type=Path, metavar="run_dir", help="run directory; may go on, or have died"
    )


def _report_arguments(parser: argparse.ArgumentParser) -> None:
    _runs_argument(parser)
    parser.add_argument("--output", type=Path, default=Path("report.html"), help="page to write (default: report.html)")
    parser.add_argument(
        "--base", type=Path, help="folder of the base model (default: the run's model.path, if it is there)"
    )
    parser.add_argument(
        "--seconds",
        type=float,
        default=60.0,
        metavar="N",
        help="time for what changed in the weights of each run (default: 60); 0 leaves it out",
    )


def _report(options: argparse.Namespace) -> None:
    from liftdist.report import write  # imports numpy

    write.write(options)
    print(options.output)


def _compare(options: argparse.Namespace) -> None:
    from liftdist.report import compare, read

    print(*compare.lines(read.read_all(options.run_dirs)), sep="\n")


COMMANDS = {
    "train": Command(
        "select the principal weights and train them; continue a run", _train_arguments, _train, _RUN_EPILOG
    ),
    "eval": Command(
        "ask a model the questions of eval.tasks, or of the lm-evaluation-harness",
        _eval_arguments,
        _eval,
        "CONFIG may be a run directory: its newest checkpoint is asked. Of a run that has not begun, the model itself is.",
    ),
    "select": Command("select the principal weights and keep the selection", _select_arguments, _select),
    "settings": Command("list the settings of a config", _settings_arguments, _settings),
    "data": Command("show what a run would learn: figures of its data, and samples", _data_arguments, _data),
    "plan": Command("estimate memory, traffic and time of a run before it is submitted", _plan_arguments, _plan),
    "submit": Command("train as a SLURM job", _submit_arguments, _submit),
    "status": Command("show the state of a run's jobs, and why", _run_dir_argument, lambda o: submit.status(o.run_dir)),
    "logs": Command(
        "print the output of a run's newest job", _logs_arguments, lambda o: submit.logs(o.run_dir, o.follow, o.rank)
    ),
    "cancel": Command(
        "make the jobs of a run save and end", _cancel_arguments, lambda o: cancel.cancel(o.run_dir, o.now)
    ),
    "report": Command("write a page of what runs did: curves, restarts, scores, weights", _report_arguments, _report),
    "compare": Command("print runs side by side, with the best of each figure marked", _runs_argument, _compare),
    "export": Command(
        "write the result of a run as a model, delta, adapter or patch",
        cli_results.export_arguments,
        cli_results.export,
    ),
    "apply": Command(
        "apply a delta to a model folder, undo it, or swap it for another",
        cli_results.apply_arguments,
        cli_results.apply,
    ),
    "sync": Command(
        "publish what a run learns while it trains, as versions that others follow",
        cli_results.sync_arguments,
        cli_results.sync,
    ),
    "follow": Command(
        "keep a model folder at the newest version that a run has published",
        cli_results.follow_arguments,
        cli_results.follow,
    ),
    "serve": Command(
        "serve a base model and its deltas by vLLM, each as a model of its own",
        cli_results.serve_arguments,
        cli_results.serve,
        "Stands in for `vllm serve BASE`: an OpenAI-compatible server. The weights of a model are exchanged in the running "
        "engine when it has its turn.",
    ),
    "push": Command("publish a result on the hub, with a model card", cli_results.push_arguments, cli_results.push),
    "diff": Command("write the delta between two model folders", cli_results.diff_arguments, cli_results.diff),
    "show": Command(
        "show what a delta changes: of which model, where, how much", cli_results.show_arguments, cli_results.show
    ),
    "compress": Command(
        "write a delta smaller, exactly or within an error", cli_results.compress_arguments, cli_results.compress
    ),
    "merge": Command("merge several deltas of one base model into one", cli_results.merge_arguments, cli_results.merge),
}
