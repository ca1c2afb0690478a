"""Tokens of one record and which of them are learned.

    Text           the pieces joined, encoded as one text: a token is learned if it holds a character that is
    Conversation   rendered by the chat template; its replies are found by :mod:`liftdist.data.replies`

A token that is learned weighs 1, unless the record says otherwise (:mod:`liftdist.data.weights`).

The text is encoded as a whole, so that what is learned, read back, is the reply to the character: no blank that a tokenizer puts
at the beginning of a text, and where the reply's first character merges with the prompt's last, that token is learned.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from liftdist.data import replies, templates, weights
from liftdist.data.content import Content, Conversation, Span, Text
from liftdist.data.replies import Message
from liftdist.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ALL, LAST = "all", "last"  # which replies of a conversation are learned
AUTO, WHOLE, SPLIT = "auto", "whole", "split"  # samples of a conversation: one, or one for each reply

Encoded = tuple[list[int], list[float]]  # token ids, and the weight by which each is learned; 0 if it is not

_GENERATION = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")
_DATE = re.compile(r"strftime_now\(\s*(['\"])(.*?)\1\s*\)")


class Encoder:
    """Encodes records for one tokenizer.

    Args:
        template: of conversations; the tokenizer's own if None.
        arguments: of the template, besides those of a record, which win; one that is None is not given to it.
        stops: tokens by which generation stops, besides the end of sequence.
        date: that the template is to write, instead of today's.
        learn: ``ALL`` or ``LAST``.
        turns: ``WHOLE``: a conversation is one sample; ``SPLIT``: each reply is one, as it was when it was asked for; ``AUTO``:
            ``WHOLE`` where the template shows all of every reply, else ``SPLIT``.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        template: str | None = None,
        arguments: Mapping[str, Any] | None = None,
        stops: Sequence[str] = (),
        date: Any = None,
        learn: str = ALL,
        turns: str = AUTO,
    ) -> None:
        if not tokenizer.is_fast:
            raise UserError(
                f"model.path: {type(tokenizer).__name__} is a slow tokenizer, which does not say where its tokens stand in the "
                "text; save it as a fast one (tokenizer.json)"
            )
        self.tokenizer = tokenizer
        self._arguments = {name: value for name, value in (arguments or {}).items() if value is not None}
        own = tokenizer.chat_template
        self.template = template or (own.get("default") if isinstance(own, dict) else own)
        #: Whether the template writes the date.
        self.writes_date = _DATE.search(self.template or "") is not None
        if self.template and date is not None:
            self.template = _DATE.sub(lambda match: repr(date.strftime(match[2])), self.template)
        try:
            templates.check_arguments(self._arguments, self.template or "", tokenizer.special_tokens_map)
        except ValueError as error:
            raise UserError(f"data.template_arguments.{error}") from None
        self._learn, self._turns = learn, turns
        #: Whether a reply of the last record does not follow the prompt that the template asks for a reply with.
        self.asked_otherwise = False
        #: Id of the token for text that the tokenizer does not know, if it has one of its own.
        self.unknown = tokenizer.unk_token_id
        if self.unknown in (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id):
            self.unknown = None
        eos = [str(tokenizer.eos_token)] if tokenizer.eos_token_id is not None else []
        self._stops = list(dict.fromkeys([*eos, *stops]))
        special = {str(token) for token in tokenizer.get_added_vocab()} | set(self._stops)
        self._special = re.compile(
            "|".join(re.escape(token) for token in sorted(special, key=len, reverse=True)) or r"(?!)"
        )

    @functools.cached_property
    def digest(self) -> str:
        """Of everything that decides tokens, besides the records."""
        tokenizer = self.tokenizer
        parts = [
            tokenizer.backend_tokenizer.to_str(),
            self.template,
            self._arguments,
            self._stops,
            self._learn,
            self._turns,
        ]
        parts += [tokenizer.special_tokens_map, tokenizer.bos_token_id, tokenizer.eos_token_id]
        return hashlib.sha256(repr(parts).encode()).hexdigest()

    def __call__(self, content: Content) -> list[Encoded]:
        """The samples of a record: one, or one for each reply.

        Raises:
            ValueError: the tokenizer lacks a template or an end of sequence; the template refuses, drops or changes a message.
        """
        self.asked_otherwise = False
        return [self._text(content)] if isinstance(content, Text) else self._conversation(content)

    def prompt(self, content: Content) -> tuple[str, list[int]]:
        """The text of a prompt up to where the reply begins, and its tokens. Raises ``ValueError`` as for a record.

        In training they stand before the reply, unless its first character shares a token with the prompt's last.

        Args:
            content: without the reply.
        """
        if isinstance(content, Text):
            text = "".join(piece for piece, _ in content.pieces)
            return text, self._begun(content, self._encode(text, []))[0]
        self._check_template(content)
        replies.check_prompt(content.messages, lambda turns, open_reply: self._render(content, turns, open_reply)[0])
        text = self._render(content, content.messages, True)[0]
        return text, self._encode(text, [])[0]

    # -----------------------------------------------------------------------------------------------------------------

    def _text(self, content: Text) -> Encoded:
        if self.tokenizer.eos_token_id is None:
            raise ValueError("the tokenizer has no end-of-sequence token; set eos_token in its tokenizer_config.json")
        text, spans = "", []
        for piece, is_learned in content.pieces:
            if is_learned:
                spans.append((len(text), len(text) + len(piece)))
            text += piece
        begin = len(text) - len(content.pieces[-1][0])
        encoded = self._encode(text, spans, (begin, len(text)), weights.moved(content.weights, begin))
        ids, learned = self._begun(content, encoded)
        eos = self.tokenizer.eos_token_id
        if ids[-1:] != [eos]:  # once, whatever the text brings
            ids, learned = [*ids, eos], [*learned, 1.0]
        learned[-1] = float(content.pieces[-1][1])
        return ids, learned

    def _begun(self, content: Text, encoded: Encoded) -> Encoded:
        """With the beginning of sequence before it, where the tokenizer puts it there."""
        ids, learned = encoded
        if self._bos is not None and (content.second_bos or ids[:1] != [self._bos]):
            return [self._bos, *ids], [0.0, *learned]
        return encoded

    @functools.cached_property
    def _bos(self) -> int | None:
        """The token that the tokenizer puts before every text."""
        bos = self.tokenizer.bos_token_id
        return bos if bos is not None and self.tokenizer("x")["input_ids"][:1] == [bos] else None

    def _encode(
        self,
        text: str,
        spans: Sequence[tuple[int, int]],
        response: tuple[int, int] = (0, 0),
        weighted: Sequence[Span] = (),
    ) -> Encoded:
        """Tokens of ``text``, learned where they hold a character of a span, blanks at its end aside.

        Args:
            response: begin and end of what ``weighted`` is of.
            weighted: weights of its characters, 1 where there are none.
        """
        try:
            encoded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        except TypeError:  # records hold none
            raise ValueError(
                "the chat template writes half of a surrogate pair, which is no text; correct it"
            ) from None
        ends = [(begin, end, begin + len(text[begin:end].rstrip())) for begin, end in spans]

        def is_learned(a: int, b: int) -> bool:
            return a < b and any(begin < b and (a < visible or b <= end) and a < end for begin, end, visible in ends)

        learned = [float(is_learned(a, b)) for a, b in encoded["offset_mapping"]]
        if weighted:
            offsets = zip(learned, encoded["offset_mapping"], strict=True)
            learned = [known and weights.of_token(text, a, b, response, weighted) for known, (a, b) in offsets]
        return encoded["input_ids"], learned

    # -----------------------------------------------------------------------------------------------------------------

    def _check_template(self, content: Conversation) -> None:
        if not self.template:
            raise ValueError(
                "the tokenizer has no chat template; give data.chat_template, or prompt/completion records"
            )
        if content.tools and not templates.mentions(self.template, "tools"):
            raise ValueError(
                "the chat template does not write the record's tools; leave them out, or use another data.chat_template"
            )

    def _conversation(self, content: Conversation) -> list[Encoded]:
        self._check_template(content)
        roles = [message["role"] for message in content.messages]
        first = next(
            (n for n, role in enumerate(roles) if role not in ("system", "developer", "assistant")), len(roles)
        )
        wanted = [n for n, role in enumerate(roles) if role == "assistant" and n > first]  # an opening answers nothing
        wanted = [n for n in wanted[-1 if self._learn == LAST else 0 :] if n not in content.masked]
        if self._turns != SPLIT:
            try:
                return [self._sample(content, content.messages, wanted)]
            except replies.Changed as error:
                if self._turns == WHOLE:
                    split = (
                        "data.turns=split makes a sample of each reply, or "
                        if self._is_whole_alone(content, wanted)
                        else ""
                    )
                    raise ValueError(f"{error}; {split}use another data.chat_template, which keeps it") from None
            except ValueError:
                if self._turns == WHOLE or not wanted:
                    raise  # else it may be an earlier turn that is without its end
        return self._split(content, wanted)

    def _split(self, content: Conversation, wanted: Sequence[int]) -> list[Encoded]:
        """A sample of each reply."""
        try:
            return [self._sample(content, content.messages[: number + 1], [number]) for number in wanted]
        except replies.Changed as error:  # also in the newest turn
            raise ValueError(f"{error}; use another data.chat_template, which keeps it") from None

    def _is_whole_alone(self, content: Conversation, wanted: Sequence[int]) -> bool:
        """Whether ``SPLIT`` would show all of each reply."""
        with contextlib.suppress(ValueError):
            return bool(self._split(content, wanted))
        return False

    def _sample(self, content: Conversation, messages: Sequence[Message], wanted: Sequence[int]) -> Encoded:
        def render(turns: Sequence[Message], open_reply: bool) -> str:
            return self._render(content, turns, open_reply)[0]

        found = replies.find(messages, render, self._special, self._stops, wanted)
        self.asked_otherwise |= any(reply.is_asked_otherwise for reply in found)
        text = render(messages, False)
        if _GENERATION.search(self.template or ""):
            spans = self._marked_by_template(content, messages, found)
        else:
            spans = [(reply.begin, reply.end) for reply in found]
        stop = found[-1].stop if found else ""
        if stop:
            spans.append((len(text), len(text) + len(stop)))
        last = found[-1] if found else None
        if not content.weights or last is None or last.message != len(content.messages) - 1:
            return self._encode(text + stop, spans)
        reply = content.messages[-1]["content"]
        begin = weights.place(text, last.begin, last.end, reply)
        return self._encode(text + stop, spans, (begin, begin + len(reply)), weights.moved(content.weights, begin))

    def _marked_by_template(
        self, content: Conversation, messages: Sequence[Message], found: Sequence[replies.Reply]
    ) -> list[tuple[int, int]]:
        """The ``{% generation %}`` blocks that belong to the replies in ``found``."""
        _, blocks = self._render(content, messages, False)
        return [block for block in blocks if any(block[0] < reply.end and reply.begin < block[1] for reply in found)]

    @functools.cached_property
    def _takes_parts(self) -> bool:
        """Whether the template reads a message's content as a list of parts only, as those of vision models may."""
        probe = Conversation([{"role": "user", "content": "qX7zZq"}])
        for takes_parts in (False, True):
            with contextlib.suppress(ValueError):
                if "qX7zZq" in self._render(probe, probe.messages, False, takes_parts)[0]:
                    return takes_parts
        return False

    def _render(
        self, content: Conversation, messages: Sequence[Message], open_reply: bool, as_parts: bool | None = None
    ) -> tuple[str, list[tuple[int, int]]]:
        """The text of a conversation, and begin and end of its ``{% generation %}`` blocks."""
        from jinja2 import TemplateError, TemplateSyntaxError
        from transformers.utils.chat_template_utils import render_jinja_template

        if self._takes_parts if as_parts is None else as_parts:
            messages = [{**message, "content": [{"type": "text", "text": message["content"]}]} for message in messages]
        try:
            texts, blocks = render_jinja_template(
                [list(messages)],
                tools=content.tools,
                chat_template=self.template,
                return_assistant_tokens_mask=_GENERATION.search(self.template or "") is not None,
                add_generation_prompt=open_reply,
                **{**self.tokenizer.special_tokens_map, **self._arguments, **content.arguments},
            )
        except TemplateSyntaxError as error:
            raise ValueError(f"the chat template is malformed: line {error.lineno}: {error.message}") from None
        except TemplateError as error:  # templates reject unknown roles and orders
            raise ValueError(
                f"the chat template refuses this conversation: {_one_line(error)}; change the record, or use another "
                "data.chat_template"
            ) from None
        except Exception as error:  # and run into errors of any kind
            raise ValueError(
                f"the chat template fails on this conversation: {type(error).__name__}: {_one_line(error)}; change the record, "
                "or use another data.chat_template"
            ) from None
        return str(texts[0]), [tuple(block) for block in blocks[0]] if blocks else []


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
