"""Arguments of a run's command: shared by the command line, the launcher and jobs."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

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
