"""What a chat template reads, by its text. Must not know tokenizers."""

from __future__ import annotations

import difflib
import functools
import re
from collections.abc import Collection, Mapping
from typing import Any

#: Names that liftdist passes to every template, or that the renderer gives a meaning of its own.
RESERVED = (
    "messages", "conversations", "tools", "chat_template", "add_generation_prompt", "continue_final_message",
    "return_assistant_tokens_mask", "raise_exception", "strftime_now", "bos_token", "eos_token", "unk_token", "pad_token",
    "sep_token", "cls_token", "mask_token",
)  # fmt: skip


@functools.lru_cache(maxsize=1024)
def mentions(template: str, name: str) -> bool:
    """Whether the name stands in the template's text, as a word."""
    return re.search(rf"\b{re.escape(name)}\b", template) is not None


@functools.lru_cache(maxsize=1024)
def reads(template: str, key: str) -> bool:
    """Whether the template's text asks for a key, ``message.KEY`` or ``message['KEY']``, of a message or of anything else."""
    return re.search(rf"\.\s*{re.escape(key)}\b|(['\"]){re.escape(key)}\1", template) is not None


@functools.lru_cache(maxsize=16)
def variables(template: str) -> tuple[frozenset[str], frozenset[str]]:
    """The variables that a template may take from outside, and those of them that look meant for it.

    Raises:
        ValueError: the template is malformed.
    """
    from jinja2 import Environment, TemplateSyntaxError, meta, nodes, parser
    from jinja2.ext import Extension

    class Generation(Extension):
        """``{% generation %}``, which marks replies, as nothing but what is in it."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: parser.Parser) -> list[nodes.Node]:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    try:
        tree = Environment(extensions=[Generation, "jinja2.ext.loopcontrols"]).parse(template)  # makes no HTML
        taken = frozenset(meta.find_undeclared_variables(tree))
    except TemplateSyntaxError as error:
        raise ValueError(f"the chat template is malformed: line {error.lineno}: {error.message}") from None
    own = {name.name for name in tree.find_all(nodes.Name) if name.ctx == "store"}
    asked = {
        test.node.name
        for test in tree.find_all(nodes.Test)
        if test.name == "defined" and isinstance(test.node, nodes.Name)
    }
    return taken, taken - (own - asked)


def check_arguments(arguments: Mapping[str, Any], template: str, reserved: Collection[str]) -> None:
    """Raises ``ValueError``, which begins with the argument's name, for one that the template does not read, or has already."""
    taken, free = variables(template) if arguments else (frozenset[str](), frozenset[str]())
    for name in arguments:
        if not template:
            raise ValueError(f"{name}: the tokenizer has no chat template that could read it; give data.chat_template")
        if name in RESERVED or name in reserved:
            raise ValueError(f"{name}: is given to every chat template by the records or the tokenizer; leave it out")
        if name not in taken:
            known = sorted(
                other for other in free if other not in RESERVED and other not in reserved and other != "namespace"
            )
            near = difflib.get_close_matches(name, taken - {*RESERVED, *reserved}, n=1)
            hint = f"did you mean {near[0]}?" if near else f"it takes {', '.join(known) or 'no arguments'}"
            raise ValueError(f"{name}: the chat template does not read it; {hint}")
