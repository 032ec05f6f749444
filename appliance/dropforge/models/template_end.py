"""Whether a chat template ends an answer, and what to do when it does not: a model must learn to stop."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_ANSWER = "@answer@"
_END = (
    "{% if messages and messages[-1]['role'] == 'assistant' and not add_generation_prompt %}{{ eos_token }}{% endif %}"
)


def repair_end(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Make a template whose answers end with no special token write the end token last. Returns what was done."""
    template = tokenizer.chat_template
    tail = _tail(tokenizer)
    if not isinstance(template, str) or tail is None or _first_special(tokenizer, tail) is not None:
        return []
    if tokenizer.eos_token is None:
        return [
            "the chat template ends answers with no token, and the tokenizer has no end token: set tokenizer.eos_token"
        ]
    tokenizer.chat_template = template + _END
    return [f"the chat template ended answers with no token; now {tokenizer.eos_token!r} stands after the last one"]


def end_of_turn(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """The special token that ends an answer in the tokenizer's chat template; None without one."""
    tail = _tail(tokenizer)
    return None if tail is None else _first_special(tokenizer, tail)


def template_notes(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """What a user of this template has to know: a begin token written twice, a missing generation prompt."""
    text = _rendered(tokenizer)
    if text is None:
        return []
    notes = []
    bos = tokenizer.bos_token_id
    if bos is not None and tokenizer(text)["input_ids"][:2] == [bos, bos]:
        notes.append(
            f"double begin token: template and tokenizer both write {tokenizer.bos_token!r}; training rows get one, "
            "and elsewhere a rendered text is to be tokenised with add_special_tokens=False"
        )
    if _rendered(tokenizer, answered=False, generation=True) == _rendered(tokenizer, answered=False):
        notes.append(
            "the chat template has no generation prompt, so add_generation_prompt=True changes nothing: "
            "take another with dropforge.chat_templates.get_chat_template"
        )
    return notes


def _tail(tokenizer: PreTrainedTokenizerBase) -> str | None:
    text = _rendered(tokenizer)
    return None if text is None or _ANSWER not in text else text.partition(_ANSWER)[2]


def _rendered(tokenizer: PreTrainedTokenizerBase, *, answered: bool = True, generation: bool = False) -> str | None:
    """A question, and an answer to it; None when there is no template or it refuses the conversation."""
    import jinja2

    if not tokenizer.chat_template:
        return None
    turns = [{"role": "user", "content": "@question@"}, {"role": "assistant", "content": _ANSWER}]
    try:
        text: Any = tokenizer.apply_chat_template(
            turns if answered else turns[:1], tokenize=False, add_generation_prompt=generation
        )
    except (jinja2.TemplateError, TypeError, KeyError, ValueError):
        return None
    return str(text)


def _first_special(tokenizer: PreTrainedTokenizerBase, text: str) -> str | None:
    special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    found = [(text.find(token), token) for token in special | set(tokenizer.all_special_tokens) if token in text]
    return min(found)[1] if found else None
