"""The ``liftdist`` command. Checks what can be checked first, then starts the ranks. Imports torch only when it must."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from liftdist import __version__, preflight
from liftdist import config as configs
from liftdist.config import UserError


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point. Exit code 2 and one line for anything the user can put right."""
    options = _parser().parse_intermixed_args(arguments)
    try:
        options.run(options)
    except UserError as error:
        sys.exit(_report(error))


def _report(error: UserError) -> int:
    print(f"liftdist: {configs.redact(str(error))}", file=sys.stderr)
    return configs.EXIT_USER_ERROR


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="liftdist",
        description="Fine-tune a language model by its principal weights, on as many GPUs as there are.",
        epilog="liftdist train CONFIG [key=value ...] [--nproc N]      select the principal weights and train them\n"
        "liftdist select CONFIG [key=value ...] [--nproc N]     select them and keep the selection, without training\n"
        "liftdist select CONFIG [key=value ...] --prefetch      fetch and check model and data, on a login node, say",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"liftdist {__version__}")
    parser.add_argument("command", choices=("train", "select"))
    parser.add_argument("config", help="YAML file, see configs/")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings in place of the file's")
    parser.add_argument("--nproc", type=int, help="ranks on this machine (default: one for each GPU, or one)")
    parser.add_argument(
        "--prefetch", action="store_true", help="with select: fetch and check everything, start nothing"
    )
    return parser


class _Parser(argparse.ArgumentParser):
    def parse_intermixed_args(self, *args, **kwargs):  # type: ignore[no-untyped-def]
        options = super().parse_intermixed_args(*args, **kwargs)
        if options.prefetch and options.command != "select":
            self.error("--prefetch goes with select")
        options.run = _prefetch if options.prefetch else _launch
        return options


def _launch(options: argparse.Namespace) -> None:
    """Check, then become ``launch/torchrun``."""
    if options.nproc is not None and options.nproc < 1:
        raise UserError(f"--nproc must be at least 1, got {options.nproc}")
    config, _ = configs.load(options.config, options.overrides)
    preflight.check(config, options.nproc, training=options.command == "train")
    preflight.resolve_model(config.model.path)  # one process fetches what all ranks will read
    command = [str(launcher())]
    if options.nproc is not None:
        command += ["--nproc", str(options.nproc)]
    if options.command == "select":
        command.append("--select-only")
    command += [options.config, *options.overrides]
    sys.stdout.flush()
    os.execve(
        "/usr/bin/env",
        ["env", "bash", *command],
        {
            **os.environ,
            "LIFTDIST_PYTHON": sys.executable,
            "LIFTDIST_COMMAND": json.dumps(["liftdist", *sys.argv[1:]]),
        },
    )


def _prefetch(options: argparse.Namespace) -> None:
    config, _ = configs.load(options.config, options.overrides)
    from liftdist import model, train
    from liftdist.metrics import Console

    console = Console(enabled=True)
    inputs = train.prepare(config, console)
    checkpoint = model.Checkpoint(inputs.folder)
    model.match(model.build(model.check_type(inputs.folder, config.model), config.model), checkpoint)
    console.say(f"model {config.model.path}: {len(checkpoint.file_of)} tensors in {inputs.folder}")


def launcher() -> Path:
    """``launch/torchrun``: beside the package in a checkout, inside it when installed."""
    package = Path(__file__).resolve().parent
    for folder in (package, package.parent):
        if (folder / "launch" / "torchrun").is_file():
            return folder / "launch" / "torchrun"
    raise UserError(f"launch/torchrun is missing beside {package}: install liftdist again")


if __name__ == "__main__":
    main()
