"""Tokens of one sample and its loss mask."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from jinja2 import TemplateError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def encode(content: Any, tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[bool]]:
    """Token ids of one sample and its loss mask: True for responses and the end of sequence, False for prompts.

    Args:
        content: ``(prompt, response)``, or chat messages.

    Raises:
        ValueError: the tokenizer has no chat template or end-of-sequence token, or the template rewrites earlier turns.
    """
    if isinstance(content, list):
        return _encode_chat(content, tokenizer)
    prompt, response = content
    if tokenizer.eos_token_id is None:
        raise ValueError("the tokenizer has no end-of-sequence token; set eos_token in its tokenizer_config.json")
    prompt_ids = tokenizer(prompt)["input_ids"]
    if prompt_ids and prompt_ids[-1] == tokenizer.eos_token_id and not prompt.endswith(str(tokenizer.eos_token)):
        prompt_ids = prompt_ids[:-1]  # some tokenizers end every text with it
    response_ids = [*tokenizer(response, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    return prompt_ids + response_ids, [False] * len(prompt_ids) + [True] * len(response_ids)


def _encode_chat(messages: list[dict[str, str]], tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[bool]]:
    if not tokenizer.chat_template:
        raise ValueError("the tokenizer has no chat template; use prompt/completion records with it")

    def render(turns: list[dict[str, str]], open_reply: bool = False) -> str:
        try:
            return str(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=open_reply))
        except TemplateError as error:  # templates reject unknown roles and orders
            raise ValueError(f"the chat template refuses this conversation: {error}") from None

    whole = render(messages)
    spans = []  # [begin, end) of every reply in the rendered text, with the token that ends the turn
    for turn, message in enumerate(messages):
        if message["role"] == "assistant" and turn > 0:  # a first turn of the assistant answers no prompt
            prefix, upto = render(messages[:turn], True), render(messages[: turn + 1])
            if whole.startswith(upto) and upto.startswith(prefix):
                spans.append((len(prefix), len(upto)))
            elif turn == len(messages) - 1:
                raise ValueError(
                    "the chat template does not render the reply after its own generation prompt; "
                    "use another template or prompt/completion records"
                )
    encoded = tokenizer(whole, add_special_tokens=False, return_offsets_mapping=True)
    learned = [any(begin <= a and b <= end and a < b for begin, end in spans) for a, b in encoded["offset_mapping"]]
    return encoded["input_ids"], learned
