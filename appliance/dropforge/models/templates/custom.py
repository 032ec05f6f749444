"""A chat template of one's own, written as an example: text with {SYSTEM}, {INPUT} and {OUTPUT} in it.

    ### Instruction:
    {INPUT}

    ### Response:
    {OUTPUT}

With the pair {INPUT}, {OUTPUT} written twice, what stands between two turns is read off the repetition, and
conversations may have any number of turns. With one pair they have one question and one answer.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass

_SLOT = re.compile(r"\{(INPUT|OUTPUT)\}")
_SYSTEM = "{SYSTEM}"


@dataclass(frozen=True, kw_only=True)
class CustomTemplate:
    """The parts of the example: `prefix` (with or without {SYSTEM}), then per turn `before_input`, the question,
    `before_output`, the answer, `after_output`.
    """

    prefix: str
    before_input: str
    before_output: str
    after_output: str
    repeats: bool
    """Whether the example shows how a second turn follows."""

    @property
    def has_system(self) -> bool:
        return _SYSTEM in self.prefix

    def jinja(self, *, end_token: str, default_system: str = "", begin: str = "") -> str:
        """The Jinja text.

        Args:
            end_token: written behind `after_output`; empty when that already ends with a special token.
            default_system: for conversations without a system turn.
            begin: the begin token's text, if the example starts with it; it is then written as `bos_token`.
        """
        head, _, tail = self.prefix.partition(_SYSTEM)
        bos = ""
        if begin and head.startswith(begin):
            bos, head = "{{- bos_token }}\n", head[len(begin) :]
        # A blank before the answer is another token than the blank and the word together, which is what a model writes.
        lead = self.before_output[len(self.before_output.rstrip(" ")) :]
        before_output = self.before_output.removesuffix(lead)
        lines = [
            "{%- set system = " + _quoted(default_system) + " %}",
            "{%- if messages and messages[0]['role'] == 'system' %}",
            _SET_SYSTEM if self.has_system else _raise("this template has no place for a system text ({SYSTEM})"),
            "{%- endif %}",
            f"{bos}{{{{- {_quoted(head)} + system + {_quoted(tail)} }}}}"
            if self.has_system
            else f"{bos}{{{{- {_quoted(head)} }}}}",
            "{%- for message in messages %}",
            "{%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}",
            _raise("in this template user and assistant take turns, the user first"),
            "{%- endif %}",
            *([] if self.repeats else _ONE_TURN),
            "{%- if message['role'] == 'user' %}",
            f"{{{{- {_quoted(self.before_input)} + message['content'] + {_quoted(before_output)} }}}}",
            "{%- else %}",
            f"{{{{- {_quoted(lead)} + message['content'] + {_quoted(self.after_output + end_token)} }}}}",
            "{%- endif %}",
            "{%- endfor %}",
        ]
        return "\n".join(lines)


_SET_SYSTEM = "{%- set system = messages[0]['content'] %}\n{%- set messages = messages[1:] %}"


def _raise(text: str) -> str:
    return "{{- raise_exception('" + text + "') }}"


_ONE_TURN = [
    "{%- if loop.index0 > 1 %}",
    _raise("write {INPUT} and {OUTPUT} twice, so that a second turn can be read off"),
    "{%- endif %}",
]


def _quoted(text: str) -> str:
    """A Jinja string; only the escapes that Jinja and JSON share."""
    return json.dumps(text, ensure_ascii=False)


def is_custom(text: str) -> bool:
    """Whether `text` is such an example and not a name."""
    return "{INPUT}" in text or "{OUTPUT}" in text


def parse_custom(text: str) -> CustomTemplate:
    """Read the parts off an example. Raises ValueError that says what is missing."""
    slots = [match[1] for match in _SLOT.finditer(text)]
    parts = _SLOT.split(text)[0::2]
    if slots not in (["INPUT", "OUTPUT"], ["INPUT", "OUTPUT", "INPUT", "OUTPUT"]):
        found = ", ".join(f"{{{slot}}}" for slot in slots) or "none"
        raise ValueError(f"it must hold {{INPUT}}, {{OUTPUT}} in this order, once or twice; found {found}")
    if text.count(_SYSTEM) > 1 or any(_SYSTEM in part for part in parts[1:]):
        raise ValueError("{SYSTEM} may stand once, before the first {INPUT}")
    first = parts[0]
    if len(slots) == 2:
        return CustomTemplate(
            prefix=first, before_input="", before_output=parts[1], after_output=parts[2], repeats=False
        )
    _, between, middle, again, last = parts
    if between != again:
        raise ValueError(f"the text between {{INPUT}} and {{OUTPUT}} differs: {between!r} and {again!r}")
    after = last if middle.startswith(last) and first.endswith(middle[len(last) :]) else None
    if after is None:
        common = _common_suffix(first, middle)
        after = middle[: len(middle) - common]
        if last.rstrip() != after.rstrip():
            raise ValueError(f"the first {{OUTPUT}} is followed by {after!r}, the second by {last!r}")
    before = middle[len(after) :]
    return CustomTemplate(
        prefix=first[: len(first) - len(before)],
        before_input=before,
        before_output=between,
        after_output=after,
        repeats=True,
    )


def _common_suffix(one: str, other: str) -> int:
    length = 0
    while length < min(len(one), len(other)) and one[-1 - length] == other[-1 - length]:
        length += 1
    return length
