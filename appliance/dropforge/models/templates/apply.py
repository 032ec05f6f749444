"""Put a chat template on a tokenizer: end marker, begin token and default texts fitted to its vocabulary."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING

from dropforge.models.templates import CustomTemplate, Template

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BOS = "{{ bos_token }}"


def apply_template(
    tokenizer: PreTrainedTokenizerBase,
    template: Template,
    *,
    map_eos_token: bool = True,
    system: str | None = None,
    mapping: Mapping[str, str] | None = None,
) -> list[str]:
    """Set `template` without making new tokens; returns what had to be repaired, one sentence each.

    A vocabulary without the template's end marker ends turns with its own end token instead (the ids are the same as
    if that token were renamed, and files exported later still agree with the model's). New tokens would need
    embeddings that LoRA does not train.

    Args:
        map_eos_token: make the template's end marker the tokenizer's end token, so that generation stops there.
            False leaves the end token alone and the template as it is published.
        system: text for conversations without a system turn, in place of the template's own.
        mapping: other key and role names to read, such as {"role": "from", "content": "value", "user": "human",
            "assistant": "gpt"}; the usual names keep working.
    """
    text, repairs = template.text, []
    vocabulary = tokenizer.get_vocab()
    for marker, stand_in in template.stands_in.items():
        if marker not in vocabulary and stand_in in vocabulary:
            text = text.replace(marker, stand_in)
            repairs.append(f"{marker!r} is written as {stand_in!r}, which the vocabulary has")
    end = template.end_of_turn
    if end is not None and end not in vocabulary:
        end = template.stands_in.get(end, end)
    if map_eos_token and end is not None:
        text, more = _map_end(tokenizer, text, end=end, vocabulary=vocabulary)
        repairs += more
    missing = [marker for marker in template.markers if marker not in vocabulary and marker in text]
    if missing:
        repairs.append(f"not single tokens of this vocabulary, so written as text: {', '.join(missing)}")
    text = _system_head(system) + _mapping_head(mapping) + text
    tokenizer.chat_template = _with_begin(tokenizer, text)
    return repairs


def apply_custom(
    tokenizer: PreTrainedTokenizerBase, template: CustomTemplate, *, system: str | None = None,
    extra_ends: Collection[str] = (),
) -> list[str]:  # fmt: skip
    """The same for an example with {INPUT} and {OUTPUT}. An answer without a special token behind it gets the end
    token; with one, that becomes the end token. `extra_ends` are tokens that end an answer though they are not special.
    Raises ValueError for one that is no token of the vocabulary.
    """
    unknown = sorted(set(extra_ends) - set(tokenizer.get_vocab()))
    if unknown:
        raise ValueError(f"no single tokens of this vocabulary: {', '.join(map(repr, unknown))}")
    special = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    special = sorted({*special, *tokenizer.all_special_tokens, *extra_ends}, key=len, reverse=True)
    after = template.after_output.strip()
    end = next((token for token in special if token and after.endswith(token)), None)
    repairs = []
    if end is not None and tokenizer.eos_token != end:
        repairs.append(f"end token {tokenizer.eos_token!r} -> {end!r}, which ends a turn")
        tokenizer.eos_token = end
    end_token = "" if end is not None else str(tokenizer.eos_token or "")
    if end_token:
        repairs.append(f"answers end with {end_token!r}, which the template did not write")
    text = template.jinja(end_token=end_token, default_system=system or "", begin=str(tokenizer.bos_token or ""))
    tokenizer.chat_template = _with_begin(tokenizer, text)
    return repairs


def adds_begin_token(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the model expects a begin token: then chat texts must start with it too."""
    return tokenizer.bos_token_id is not None and tokenizer("x")["input_ids"][:1] == [tokenizer.bos_token_id]


def _map_end(
    tokenizer: PreTrainedTokenizerBase, text: str, *, end: str, vocabulary: Mapping[str, int]
) -> tuple[str, list[str]]:
    if end in vocabulary:
        if tokenizer.eos_token == end:
            return text, []
        repair = f"end token {tokenizer.eos_token!r} -> {end!r}, which ends a turn"
        tokenizer.eos_token = end
        return text, [repair]
    if not tokenizer.eos_token:
        return text, []
    repair = f"turns end with {tokenizer.eos_token!r}, because {end!r} is not in the vocabulary"
    return text.replace(end, str(tokenizer.eos_token)), [repair]


def _with_begin(tokenizer: PreTrainedTokenizerBase, text: str) -> str:
    return BOS + text if adds_begin_token(tokenizer) and "bos_token" not in text else text


def _system_head(system: str | None) -> str:
    if system is None:
        return ""
    quoted = json.dumps(system, ensure_ascii=False)
    return (
        "{%- if not messages or messages[0]['role'] != 'system' %}\n"
        "{%- set messages = [{'role': 'system', 'content': " + quoted + "}] + messages %}\n{%- endif %}\n"
    )


def _mapping_head(mapping: Mapping[str, str] | None) -> str:
    """Jinja that rewrites messages with other key and role names to role/content with system, user, assistant."""
    names = {"role": "role", "content": "content", "user": "user", "assistant": "assistant"} | dict(mapping or {})
    if all(key == value for key, value in names.items()):
        return ""
    role, content = json.dumps(names["role"]), json.dumps(names["content"])
    user, assistant = json.dumps(names["user"]), json.dumps(names["assistant"])
    return (
        "{%- set renamed = namespace(messages=[]) %}\n{%- for message in messages %}\n"
        f"{{%- set role = message[{role}] if {role} in message else message['role'] %}}\n"
        f"{{%- set role = 'user' if role == {user} else 'assistant' if role == {assistant} else role %}}\n"
        f"{{%- set content = message[{content}] if {content} in message else message['content'] %}}\n"
        "{%- set renamed.messages = renamed.messages + [{'role': role, 'content': content}] %}\n"
        "{%- endfor %}\n{%- set messages = renamed.messages %}\n"
    )
