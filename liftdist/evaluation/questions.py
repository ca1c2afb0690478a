"""The questions of a task: prompts worded as in training, and the answers that are right.

    record -> format or prompt_template -> what stands before the last reply, and the reply
    the field `expected`, else the reply -> scorer -> the form in which answers are compared

:meth:`liftdist.data.chat.Encoder.prompt` makes tokens of a prompt. Must not know models.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from liftdist.data import records, replies, sources, wording
from liftdist.data.content import Content, Conversation, Text, last_reply, parted
from liftdist.data.sources import Record
from liftdist.evaluation.generators import Generated
from liftdist.evaluation_settings import GENERATION, MULTIPLE_CHOICE, PERPLEXITY, TaskConfig
from liftdist.registry import SCORERS


@dataclass(frozen=True)
class Question:
    id: int  # number of its record in the source, from 0
    prompt: Content  # up to where the reply begins
    expected: tuple[str, ...]  # right answers, as they are compared
    options: tuple[str, ...]  # of multiple choice
    record: Record
    place: str = ""  # of the record, as messages name it


def questions(task: TaskConfig, section: str) -> list[Question]:
    """The questions of a task, in the order of its source.

    Args:
        section: of its settings, such as ``eval.tasks.0``, for messages.

    Raises:
        UserError: as :func:`liftdist.data.sources.open_source`; or a record has no prompt, or no answer that could be right.
    """
    given = task.source(section)
    if task.generator is None:
        sources.check_split(given, "test")
    source = sources.open_records(given) if task.generator is None else Generated(task)
    read = records.reader(source, given) if task.prompt_template is None else _worded(task.prompt_template, section)
    if task.generator is not None:
        read = partial(_read_generated, read)
    compared = SCORERS.load(task.scored_by).make(task).expected if task.kind == GENERATION else str
    made = partial(_question, task, section, read, compared)
    places = source.read(0, task.limit or len(source))
    return [
        dataclasses.replace(records.at(where, partial(made, number), record), place=where)
        for number, (where, record) in enumerate(places)
    ]


def _read_generated(read: Callable[[Record], Content], record: Record) -> Content:
    return read({**record, "answer": record["answer"] or ""})


def _worded(template: str, section: str) -> Callable[[Record], Content]:
    parsed = wording.Template.parse(f"{section}.prompt_template", template)
    return lambda record: Text([(parsed.fill(record), False), ("", True)])


def _question(
    task: TaskConfig,
    section: str,
    read: Callable[[Record], Content],
    compared: Callable[[str], str],
    number: int,
    record: Record,
) -> Question:
    content = read(record)
    prompt, reply = parted(content)
    if task.kind != PERPLEXITY and isinstance(prompt, Text) and not any(text for text, _ in prompt.pieces):
        raise ValueError("has no prompt: all of the record is the reply")
    options = _options(task, section, record) if task.kind == MULTIPLE_CHOICE else []
    what = "the reply" if task.expected is None else f"field {task.expected!r} ({section}.expected)"
    if task.expected is not None and task.expected not in record:
        raise ValueError(f"{what} is missing (fields: {', '.join(record) or 'none'})")
    value = reply if task.expected is None else record[task.expected]
    expected = [_text(one, what, options) for one in (value if isinstance(value, list) else [value])]
    if not expected:
        raise ValueError(f"{what} holds no answer")
    if task.kind == PERPLEXITY:
        _check_measured(content if task.expected is None else None, expected, what)
    try:
        return Question(number, prompt, tuple(map(compared, expected)), tuple(options), record)
    except ValueError as error:
        raise ValueError(f"{what} {error}, got {value!r:.80}") from None


def _check_measured(content: Content | None, expected: Sequence[str], what: str) -> None:
    """Raises ``ValueError`` where the perplexity of a text would not be that of the reply.

    Args:
        content: of the record, if its last reply is what is expected.
    """
    said = replies.given(content.messages[last_reply(content)]) if isinstance(content, Conversation) else []
    if others := [key for key, _ in said if key != "content"]:
        raise ValueError(f"{what} has {others[0]} beside its text, of which no perplexity is measured; leave it out")
    if len(expected) > 1:
        raise ValueError(f"{what} holds {len(expected)} answers, and the perplexity is of one; give a text")
    if not expected[0]:
        raise ValueError(f"{what} is empty, and has no perplexity; leave the record out")


def _options(task: TaskConfig, section: str, record: Record) -> Sequence[str]:
    found = task.options if task.options_field is None else record.get(task.options_field)
    if not isinstance(found, list) or len(found) < 2 or not all(isinstance(one, str) for one in found):
        raise ValueError(f"field {task.options_field!r} ({section}.options_field) must be a list of two texts or more")
    if "" in found or len(set(found)) < len(found):
        what = (
            f"{section}.options"
            if task.options_field is None
            else f"field {task.options_field!r} ({section}.options_field)"
        )
        raise ValueError(f"{what}: options must be different, and none empty, got {found!r:.80}")
    return found


def _text(value: object, what: str, options: Sequence[str]) -> str:
    """An expected answer as text; of multiple choice one of the options, also by its number, from 0."""
    if options and isinstance(value, int) and not isinstance(value, bool):
        if not 0 <= value < len(options):
            raise ValueError(f"{what} is {value}, but the options have the numbers 0 to {len(options) - 1}")
        return options[value]
    if not isinstance(value, str | int | float):
        raise ValueError(f"{what} must be a text, a number, or a list of them, got {type(value).__name__}")
    text = str(value).lower() if isinstance(value, bool) else str(value)
    if options and text not in options:
        raise ValueError(f"{what} is none of the options {', '.join(options)}, got {text!r}")
    return text
