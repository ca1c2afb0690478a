"""The commands on results: deltas and models that runs have made. Imports torch only where needed."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from liftdist import schema
from liftdist.errors import UserError
from liftdist.registry import COMPRESSIONS, EXPORT_FORMATS, MERGE_RULES
from liftdist.runs import layout

if TYPE_CHECKING:  # imports torch
    from liftdist.deltas.delta import Delta


def _cache_argument(parser: argparse.ArgumentParser) -> None:
    default = schema.Config().cache_dir
    parser.add_argument("--cache-dir", type=Path, default=Path(default), help=f"folder that caches digests ({default})")


def _check_output(path: Path) -> None:
    if path.exists():
        raise UserError(f"{path}: exists already; give another --output")
    if not path.absolute().parent.is_dir():
        raise UserError(f"{path}: folder {path.absolute().parent} does not exist; create it first")


_BASE = "the base model: a folder, or NAME@REVISION on the hub (default: where the run found it)"


def export_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", type=Path, help="run directory, or delta file")
    parser.add_argument("--format", choices=tuple(EXPORT_FORMATS), default="hf", help="format to write (default: hf)")
    parser.add_argument("--output", type=Path, required=True, help="folder or file to write, which must not exist")
    parser.add_argument("--step", type=int, help="the checkpoint of this step (default: the newest)")
    parser.add_argument("--base", help=_BASE)
    _cache_argument(parser)


def _say(line: str) -> None:
    print(line, file=sys.stderr)


def export(options: argparse.Namespace) -> None:
    if not options.source.exists():
        raise UserError(f"{options.source}: no such run directory or delta")
    if options.source.is_dir():
        layout.check_run(options.source)
    _check_output(options.output)
    from liftdist.deltas.export import export, read

    made, base, dtype = read(options.source, options.step, options.base, _say)
    export(made, base, options.output, options.format, options.cache_dir, dtype)
    print(options.output)


def apply_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "delta",
        help="delta file, written by `liftdist export --format delta` or `liftdist diff`, or NAME[@REVISION] on the hub",
    )
    parser.add_argument(
        "folder", help="Hugging Face folder of its base model, or with --output NAME[@REVISION] on the hub"
    )
    parser.add_argument("--output", type=Path, help="folder to write, which must not exist (default: replace FOLDER)")
    parser.add_argument(
        "--beside",
        action="append",
        default=[],
        metavar="DELTA",
        help="a delta that FOLDER holds and keeps; may be repeated",
    )
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--undo", action="store_true", help="remove the delta from FOLDER")
    how.add_argument("--instead-of", metavar="DELTA", help="swap: remove this delta from FOLDER first")
    _cache_argument(parser)


def apply(options: argparse.Namespace) -> None:
    if options.output:
        _check_output(options.output)
    elif not Path(options.folder).is_dir():
        raise UserError(f"{options.folder}: no such folder; a model of the hub needs --output")
    # of torch, which is imported below: without huge pages a third of the time are page faults
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    from liftdist.deltas import file as delta_file
    from liftdist.deltas import folder as model_folders
    from liftdist.models import hub

    def read(text: str, argument: str) -> Delta:  # all of it is read before the folder appears
        return delta_file.read(hub.file_of(text, delta_file.NAME, argument), at_once=False)

    folder, _ = hub.model_of(options.folder, "FOLDER")
    given = read(options.delta, "DELTA")
    other = read(options.instead_of, "--instead-of") if options.instead_of else None
    apply, undo = (None, given) if options.undo else (given, other)
    beside = [read(text, "--beside") for text in options.beside]
    print(model_folders.change_folder(folder, options.cache_dir, apply, undo, options.output, beside))


def push_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", type=Path, help="run directory, delta file, or a folder that `liftdist export` wrote")
    parser.add_argument("repository", metavar="org/name", help="repository on the hub; made, private, if there is none")
    parser.add_argument(
        "--format",
        # but versions for a shared disk, and what is no model
        choices=[form for form in EXPORT_FORMATS if form not in ("sglang", "importance")],
        help="format to push (default: hf of a run, delta of a delta file)",
    )
    parser.add_argument("--step", type=int, help="of a run, the checkpoint of this step (default: the newest)")
    parser.add_argument("--base", help=_BASE)
    parser.add_argument("--revision", metavar="BRANCH", help="branch to push to, made if there is none (default: main)")
    parser.add_argument("--public", action="store_true", help="everyone may see the repository")
    parser.add_argument("--keep-readme", action="store_true", help="leave a README.md that is there as it is")
    parser.add_argument("--dry-run", action="store_true", help="print the model card and the files, and send nothing")
    _cache_argument(parser)


def push(options: argparse.Namespace) -> None:
    from liftdist.publishing import push  # imports torch

    print(*push.run(options, _say), sep="\n")


def diff_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("before", type=Path, help="Hugging Face folder of the base model")
    parser.add_argument("after", type=Path, help="Hugging Face folder of the changed model")
    parser.add_argument("--output", type=Path, required=True, help="delta to write")
    parser.add_argument(
        "--without-base", action="store_true", help="omit base values: a smaller delta that cannot be undone"
    )
    _cache_argument(parser)


def diff(options: argparse.Namespace) -> None:
    for folder in (options.before, options.after):
        if not folder.is_dir():
            raise UserError(f"{folder}: no such folder")
    _check_output(options.output)
    from liftdist.deltas import file as delta_file
    from liftdist.deltas import of_run
    from liftdist.models import weights

    base = weights.digest(options.before, options.cache_dir)
    weights.check_copies(weights.ModelFolder(options.after), options.cache_dir)
    delta_file.write(of_run.between(options.before, options.after, base), options.output, not options.without_base)
    print(options.output)


def sync_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_dir", type=Path, help="run directory; may go on, or not have begun")
    parser.add_argument(
        "--to", type=Path, required=True, metavar="DIR", help="folder of versions, made if there is none"
    )
    parser.add_argument(
        "--once", action="store_true", help="publish the newest checkpoint alone (default: each newer one, too)"
    )
    parser.add_argument(
        "--keep", type=_at_least_one, default=10, metavar="N", help="newest versions to keep (default: 10)"
    )
    parser.add_argument(
        "--full-interval",
        type=_at_least_one,
        default=1,
        metavar="N",
        help="write the full delta with every Nth version (default: 1)",
    )
    parser.add_argument("--base", help=_BASE)
    _cache_argument(parser)


def sync(options: argparse.Namespace) -> None:
    if options.run_dir.exists():
        layout.check_run(options.run_dir)
    elif options.once:
        raise UserError(f"{options.run_dir}: no such run directory")
    from liftdist.models import hub
    from liftdist.sync import checkpoints

    base = hub.model_of(options.base, "--base")[0] if options.base else None
    with contextlib.suppress(KeyboardInterrupt):
        checkpoints.publish(
            options.run_dir,
            options.to,
            base,
            options.cache_dir,
            options.keep,
            options.full_interval,
            options.once,
            _print,
        )


def follow_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=Path, metavar="DIR", help="folder of versions that `liftdist sync` writes")
    parser.add_argument("--base", required=True, help="the base model: a folder, or NAME@REVISION on the hub")
    parser.add_argument(
        "--output",
        type=Path,
        required=True,
        help="folder to keep at the newest version; a model is replaced in one step",
    )
    parser.add_argument(
        "--format",
        choices=("hf", "sglang"),
        default="hf",
        help="hf, or sglang: versions for its /pull_weights, of which none is replaced or removed (default: hf)",
    )
    parser.add_argument(
        "--once", action="store_true", help="write the newest version and end (default: each newer one, too)"
    )
    _cache_argument(parser)


def follow(options: argparse.Namespace) -> None:
    if not options.output.exists():
        _check_output(options.output)
    from liftdist.models import hub
    from liftdist.sync import folder

    base, _ = hub.model_of(options.base, "--base")
    with contextlib.suppress(KeyboardInterrupt):
        folder.follow(options.folder, base, options.output, options.format, options.cache_dir, options.once, _print)


def _print(line: str) -> None:
    print(line, flush=True)


def _at_least_one(text: str) -> int:
    if not text.isdigit() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r} must be a whole number of at least 1")
    return int(text)


def _numbers(text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no list of numbers, such as 1,0.5") from None


MERGE_OPTIONS: dict[str, tuple[Callable[[str], object], str]] = {
    "weights": (_numbers, "factor of each delta, as 1,0.5 (default: 1 each)"),
    "alpha": (float, "interpolate: 0 is the base model, 1 the fine-tuned one"),
    "density": (float, "ties, dare: share of each delta's changes that is kept"),
    "beta": (float, "breadcrumbs: share of the smallest changes to drop"),
    "gamma": (float, "breadcrumbs: share of the largest changes to drop"),
    "decay": (float, "ema: what remains of the average at each further delta"),
    "seed": (int, "dare: of what is drawn (default: 0)"),
}


GREEDY = "greedy"  # no rule of differences: which deltas, that tasks say


def merge_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "deltas",
        nargs="+",
        type=Path,
        metavar="delta",
        help="delta file, or run directory: all of its checkpoints in order",
    )
    parser.add_argument("--rule", choices=(*MERGE_RULES, GREEDY), required=True, help="how they become one")
    parser.add_argument("--output", type=Path, required=True, help="delta to write")
    for name, (kind, meaning) in MERGE_OPTIONS.items():
        parser.add_argument(f"--{name}", type=kind, metavar="W,W,..." if name == "weights" else "N", help=meaning)
    parser.add_argument(
        "--eval",
        type=Path,
        metavar="CONFIG",
        help=f"{GREEDY}: config whose eval.tasks each candidate is asked, or a run directory",
    )
    parser.add_argument(
        "--base",
        help="the base model, a folder or NAME@REVISION on the hub, for deltas without base values "
        f"({GREEDY}: default model.path)",
    )
    parser.add_argument(
        "--onto",
        help="another base model of the same architecture, a folder or NAME@REVISION on the hub, which the result is to be for",
    )
    _cache_argument(parser)


def merge(options: argparse.Namespace) -> None:
    _check_output(options.output)
    from liftdist.models import hub

    options.base, options.onto = (
        hub.model_of(text, f"--{name}")[0] if (text := getattr(options, name)) else None for name in ("base", "onto")
    )
    settings = {name: value for name in MERGE_OPTIONS if (value := getattr(options, name)) is not None}
    if options.rule == GREEDY:
        _greedy(options, settings)
        return
    if options.eval:
        raise UserError(f"--eval: --rule {options.rule} has no such option; --rule {GREEDY} asks tasks")
    from liftdist.deltas import file as delta_file
    from liftdist.deltas import merge, overlap
    from liftdist.models import weights

    given = merge.read(options.deltas, options.base, options.cache_dir)
    base = weights.ModelFolder(options.base) if options.base else None
    onto = (
        (weights.ModelFolder(options.onto), weights.digest(options.onto, options.cache_dir)) if options.onto else None
    )
    copies = None
    if options.onto:
        from liftdist.models import names  # with transformers, which takes seconds to import

        copies = names.of_folder(options.onto).copies
    made = merge.merged(given, options.rule, settings, options.output, base, onto, copies)
    print(*overlap.lines(given, base), sep="\n", file=sys.stderr)
    delta_file.write(made, options.output)
    print(options.output)


def _check_eval(path: Path) -> None:
    if not path.exists():
        raise UserError(f"--eval {path}: no such config or run directory")


def _greedy(options: argparse.Namespace, settings: Mapping[str, object]) -> None:
    if options.eval is None:
        raise UserError(f"--rule {GREEDY}: needs --eval CONFIG, whose eval.tasks say which deltas help")
    _check_eval(options.eval)
    if unused := [*settings, *(["onto"] if options.onto else [])]:
        raise UserError(f"--{unused[0]}: --rule {GREEDY} has no such option; it takes --eval and --base")
    from liftdist.deltas import file as delta_file
    from liftdist.deltas import merge, overlap
    from liftdist.evaluation import candidates, soup
    from liftdist.models import hub, weights

    path, config = candidates.settings(options.eval)
    folder = options.base or hub.resolve_model(config.model.path, config.model.revision)
    given, base = merge.read(options.deltas, folder, options.cache_dir), weights.ModelFolder(folder)
    print(*overlap.lines(given, base), sep="\n", file=sys.stderr)
    ask, titles = candidates.by_eval(path, config, folder, options.output), [task.title for task in config.eval.tasks]
    delta_file.write(soup.greedy(given, base, ask, titles, options.output, _say), options.output)
    print(options.output)


def compress_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("delta", type=Path, help="delta file")
    parser.add_argument(
        "--method",
        choices=tuple(COMPRESSIONS),
        default="exact",
        help="what is kept of it (default: exact, which is all)",
    )
    parser.add_argument("--output", type=Path, required=True, help="delta to write")
    for name, meaning in COMPRESSION_OPTIONS.items():
        parser.add_argument(f"--{name}", type=float, metavar="N", help=meaning)
    parser.add_argument(
        "--base",
        help="the base model, a folder or NAME@REVISION on the hub, for deltas without base values, and for --eval, where the "
        "default is model.path",
    )
    parser.add_argument(
        "--eval",
        type=Path,
        metavar="CONFIG",
        help="config whose eval.tasks the base model, the delta and the result are asked, or a run directory",
    )
    _cache_argument(parser)


COMPRESSION_OPTIONS = {
    "alpha": "t_switch: share of each tensor's changes that is dropped, of either sign",
    "budget": "flex_switch: bytes of the result, as a share of the delta's with base values",
}


def compress(options: argparse.Namespace) -> None:
    _check_output(options.output)
    from liftdist.deltas import compress, difference, export
    from liftdist.deltas import file as delta_file
    from liftdist.models import hub, weights

    base = hub.model_of(options.base, "--base")[0] if options.base else None
    if options.eval:
        _check_eval(options.eval)
        from liftdist.evaluation import candidates

        path, config = candidates.settings(options.eval)
        base = base or hub.resolve_model(config.model.path, config.model.revision)
        ask = candidates.by_eval(path, config, base, options.output)
    given = original = delta_file.read(options.delta)
    if base:
        export.check_base(base, given, options.cache_dir)
        given = difference.on(given, weights.ModelFolder(base))
    settings = {name: value for name in COMPRESSION_OPTIONS if (value := getattr(options, name)) is not None}
    compress.compress(given, options.method, settings, options.output, _say)
    if options.eval:
        _say(candidates.HEADING)
        candidates.scored(ask, None, "the base model", _say)
        for delta in (original, delta_file.read(options.output)):
            candidates.scored(ask, delta, delta.location.name, _say)
    print(options.output)


def show_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("delta", type=Path, help="delta file")
    parser.add_argument("--json", action="store_true", help="print everything as JSON, also of single tensors")


def show(options: argparse.Namespace) -> None:
    from liftdist.deltas import file as delta_file
    from liftdist.report import delta

    found = delta.figures(delta_file.read(options.delta))
    print(json.dumps(found, indent=1) if options.json else "\n".join(delta.lines(found)))


def serve_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("base", help="the base model: a folder, or NAME@REVISION on the hub")
    parser.add_argument(
        "vllm_arguments", nargs="*", default=[], metavar="-- argument", help="arguments of `vllm serve`, after --"
    )
    parser.add_argument(
        "--delta",
        action="append",
        default=[],
        metavar="NAME=DELTA",
        help="serve this delta as the model NAME: a file, or ORG/REPOSITORY@REVISION on the hub; may be repeated",
    )
    parser.add_argument(
        "--examples",
        action="append",
        default=[],
        metavar="NAME=FILE",
        help="records of what NAME, a delta or the base model, is asked: the model auto chooses by them; for two models or more",
    )
    parser.add_argument(
        "--host", default="127.0.0.1", help="address to listen on (default: 127.0.0.1, this machine alone)"
    )
    parser.add_argument("--port", type=int, default=8000, help="port to listen on (default: 8000)")
    parser.add_argument("--vllm", metavar="COMMAND", help="the command of vLLM's environment (default: vllm, in PATH)")
    parser.add_argument(
        "--turn",
        type=float,
        default=2.0,
        metavar="SECONDS",
        help="where requests for several models wait, each model has its turn at least so long (default: 2)",
    )
    _cache_argument(parser)


def serve(options: argparse.Namespace) -> None:
    from liftdist.serving import launch

    launch.serve(
        options.base,
        options.delta,
        options.examples,
        options.vllm,
        options.host,
        options.port,
        options.turn,
        options.vllm_arguments,
        options.cache_dir,
    )
