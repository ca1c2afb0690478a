"""Arguments of a run's command: shared by the command line, the launcher and jobs."""

from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from liftdist.errors import UserError
from liftdist.schema_tree import COURSE, STATE

CONTINUATION_FLAGS = {
    "--allow-changes": (COURSE, "continue a run with changed data, batch size, steps or optimizer settings"),
    "--allow-state-changes": (
        STATE,
        "continue a run even with a changed base model, dtype or selection: principal weights are selected again",
    ),
}


def split_arguments(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Split the arguments of a command into positional ones, of which the config is the first, and flags."""
    flags = [word for word in arguments if word.startswith("--")]
    return [word for word in arguments if not word.startswith("--")], flags


def check_given_once(overrides: Sequence[str]) -> None:
    """Raises ``UserError`` for data that is named twice: the shell makes two words of ``data.path={a,b}.jsonl``."""
    for key in ("data.path", "data.eval_path"):
        given = [text for name, _, text in (word.partition("=") for word in overrides) if name == key]
        if len(given) > 1:
            raise UserError(
                f"{key} is given {len(given)} times ({', '.join(given)}), and one would count; give a folder, or a pattern in "
                f"quotes: {key}='data/*.jsonl'"
            )


def add_continuation_flags(parser: argparse.ArgumentParser) -> None:
    """The flags, collected in ``flags``."""
    for flag, (_, meaning) in CONTINUATION_FLAGS.items():
        parser.add_argument(flag, action="append_const", const=flag, dest="flags", default=[], help=meaning)


def allowed_by(flags: Sequence[str]) -> set[str]:
    """The kinds of changes that ``flags`` allow; allowing ``STATE`` allows ``COURSE``, too."""
    kinds = {CONTINUATION_FLAGS[flag][0] for flag in flags}
    return kinds | {COURSE} if STATE in kinds else kinds


HARNESS_FLAGS: dict[str, dict[str, Any]] = {
    "--harness": dict(
        metavar="TASKS",
        help="ask tasks of the lm-evaluation-harness in place of eval.tasks: names of tasks or groups, or patterns of them, "
        "with commas between them",
    ),
    "--harness-path": dict(
        metavar="FOLDER", type=Path, help="folder of task files (YAML) besides those of the harness"
    ),
    "--harness-limit": dict(metavar="N", type=int, help="questions of each task at most, the first ones"),
    "--harness-fewshot": dict(metavar="N", type=int, help="examples before each question (default: as the task says)"),
    "--harness-chat": dict(action="store_true", default=None, help="word questions by the chat template"),
}


@dataclass(frozen=True)
class Harness:
    """What the flags ask of the lm-evaluation-harness."""

    names: Sequence[str]  # of tasks or groups, or patterns of them
    path: Path | None  # folder of task files
    limit: int | None
    fewshot: int | None
    chat: bool


def add_harness_flags(parser: argparse.ArgumentParser) -> None:
    for flag, how in HARNESS_FLAGS.items():
        parser.add_argument(flag, **how)


def harness_words(options: argparse.Namespace) -> list[str]:
    """The flags as they were given, one word each, for the ranks."""
    given = {flag: getattr(options, flag.removeprefix("--").replace("-", "_")) for flag in HARNESS_FLAGS}
    return [flag if value is True else f"{flag}={value}" for flag, value in given.items() if value is not None]


def harness_of(options: argparse.Namespace) -> Harness | None:
    """What is asked of the harness, if anything. Raises ``UserError`` for flags that make no sense, or if it is not installed."""
    words = harness_words(options)
    if not words:
        return None
    if options.harness is None:
        raise UserError(f"{words[0]}: is only used with --harness TASKS, such as --harness gsm8k; leave it out")
    names = [name.strip() for name in options.harness.split(",") if name.strip()]
    if not names:
        raise UserError("--harness: names no task; give some, such as --harness gsm8k,arc_easy")
    for flag, value, least in (("limit", options.harness_limit, 1), ("fewshot", options.harness_fewshot, 0)):
        if value is not None and value < least:
            raise UserError(f"--harness-{flag} must be at least {least}, got {value}")
    if options.harness_path is not None and not options.harness_path.expanduser().is_dir():
        raise UserError(f"--harness-path {options.harness_path}: no such folder")
    spec = importlib.util.find_spec("lm_eval")
    if spec is None or spec.origin is None:  # a folder of this name is no library
        raise UserError("--harness: needs the lm-evaluation-harness: pip install 'liftdist[harness]'")
    path = options.harness_path and options.harness_path.expanduser()
    return Harness(names, path, options.harness_limit, options.harness_fewshot, bool(options.harness_chat))
