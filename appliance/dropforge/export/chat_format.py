"""What the runtime must know about a chat template: how a conversation is written, and where a turn ends."""

from __future__ import annotations

import re
from typing import Any

from dropforge.export.request import Message

# llama-server hands these to every template; the same must be given here or thinking templates differ.
RUNTIME_VARIABLES = {"enable_thinking": True}
_MARK = "\ue000answer\ue001"


def render(tokenizer: Any, messages: tuple[Message, ...], *, generation: bool = True) -> str | None:
    """The conversation as text, or None when the template refuses it (some know no system message) or fails in it."""
    from jinja2.exceptions import TemplateError

    try:
        text: str = tokenizer.apply_chat_template(
            list(messages), tokenize=False, add_generation_prompt=generation, **RUNTIME_VARIABLES
        )
    except (TemplateError, TypeError, ValueError, LookupError, AttributeError):
        return None  # a template is a small program, and fails in every way that one can
    return text


# Characters no chat template holds: 150 of them put the text more than 100 edits away from every template Ollama knows,
# so that it cannot choose a wrong one by likeness and runs the template in the file instead.
GUARD = "{#" + "\u203b" * 150 + "#}"
_DATE = re.compile(r"\bdate_string\b")


def file_template(template: str, *, beside: bool) -> str:
    """The chat template as a GGUF must hold it to write what the training wrote.

    `beside`: a Modelfile with a TEMPLATE goes with it; otherwise it is kept out of Ollama's guessing. llama.cpp hands
    today's date to every template as `date_string`, where transformers hands none: the variable gets another name, so
    that the template's own date stands.
    """
    return _DATE.sub("date_string_of_training", template) + ("" if beside else GUARD)


def token_ids(tokenizer: Any, text: str) -> list[int]:
    """Ids of a rendered conversation, as in training: the template writes every special token itself."""
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids


def turn_end(tokenizer: Any) -> str | None:
    """The special token the template writes right after an assistant's answer, or None when it writes none."""
    turns: tuple[Message, ...] = ({"role": "user", "content": "?"}, {"role": "assistant", "content": _MARK})
    text = render(tokenizer, turns, generation=False)
    if text is None or _MARK not in text:
        return None
    rest = text.split(_MARK, 1)[1].lstrip()
    special = [token for token in tokenizer.all_special_tokens if token and rest.startswith(token)]
    added = [token.content for token in tokenizer.added_tokens_decoder.values() if rest.startswith(token.content)]
    return max([*special, *added], key=len, default=None)


def stops(tokenizer: Any) -> list[str]:
    """Texts at which an answer ends: the turn's end token, and the vocabulary's end token if it is another."""
    found = [turn_end(tokenizer), tokenizer.eos_token]
    return list(dict.fromkeys(text for text in found if text))
