"""Render conversations with the tokenizer's chat template and say which characters are the assistant's.

Method: once per sequence of roles the template is rendered with placeholders instead of contents; what stands
between the placeholders is the template's own text. Each row is then rendered once for real and must consist of
exactly these pieces and its own contents. A learnt span begins where the prompt with the generation marker ends
(what the model will be given when it is used) and ends with the end-of-turn token. The labels are therefore right by
construction, for any template.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dropforge.data.convert import Turn
from dropforge.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True, kw_only=True)
class Rendered:
    """A conversation as text; `spans` are [start, end) character positions of what is learnt, in order."""

    text: str
    spans: tuple[tuple[int, int], ...]
    rewritten: bool
    """The template changed a content by more than trimming it, for example by splitting off reasoning."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Shape:
    """The template's text around the contents of one sequence of roles.

    `pieces[i]` stands before content i, the last piece after the last content. For an assistant turn, the last
    `leads[i]` characters of `pieces[i]` come after the generation prompt; the first `ends[i]` of `pieces[i + 1]` end
    the turn.
    """

    pieces: tuple[str, ...]
    leads: tuple[int, ...]
    ends: tuple[int, ...]


class Renderer:
    """Renders with one tokenizer; remembers the shape of every sequence of roles it has seen."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._shapes: dict[tuple[str, ...], _Shape] = {}
        special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
        special |= set(tokenizer.all_special_tokens)
        self._special = re.compile(
            "|".join(re.escape(text) for text in sorted(special, key=len, reverse=True)) or r"(?!)"
        )
        self.end_of_turn = self._end_of_turn()

    def render(self, turns: Sequence[Turn], *, where: str) -> Rendered:
        """Raises DataError data-template-refused (the template raised) or data-template-unstable, with `where`."""
        roles = tuple(turn["role"] for turn in turns)
        if roles not in self._shapes:
            self._shapes[roles] = self._shape(roles, where)
        shape = self._shapes[roles]
        text = self._template(turns, where=where)
        leads = shape.leads
        contents = _match(text, shape.pieces, [turn["content"] for turn in turns])
        if contents is None:
            contents, leads = self._search(text, shape), (0,) * len(turns)
        if contents is None:
            raise _unstable(where, "the template rewrites the contents of this row in a way that cannot be followed")
        spans = tuple(
            (start - leads[i], end + shape.ends[i])
            for i, (start, end) in enumerate(contents)
            if roles[i] == "assistant"
        )
        rewritten = any(
            text[start:end].strip() != turn["content"].strip()
            for (start, end), turn in zip(contents, turns, strict=True)
        )
        return Rendered(text=text, spans=spans, rewritten=rewritten)

    def _template(self, turns: Sequence[Turn], *, where: str, generation: bool = False) -> str:
        import jinja2

        try:
            rendered: Any = self._tokenizer.apply_chat_template(
                list(turns), tokenize=False, add_generation_prompt=generation
            )
        except (jinja2.TemplateError, TypeError, KeyError, ValueError) as error:
            raise DataError(
                "the chat template refuses a conversation",
                code="data-template-refused",
                where=where,
                why=f"{error}; the roles are {', '.join(turn['role'] for turn in turns)}",
                fix="bring the turns into the order this model expects, or set data.template: chatml",
            ) from error
        return str(rendered)

    def _shape(self, roles: tuple[str, ...], where: str) -> _Shape:
        marks = [f"@{index}-content-of-turn@" for index in range(len(roles))]
        turns = [{"role": role, "content": mark} for role, mark in zip(roles, marks, strict=True)]
        text = self._template(turns, where=where)
        pieces = []
        for mark in marks:
            before, found, text = text.partition(mark)
            if not found:
                raise _unstable(where, f"the template leaves out or moves a turn of {', '.join(roles)}")
            pieces.append(before)
        pieces.append(text)
        leads, ends = [], []
        so_far = ""
        for index, role in enumerate(roles):
            so_far += pieces[index]
            leads.append(self._lead(turns[:index], so_far, pieces[index], where) if role == "assistant" else 0)
            ends.append(self._end(pieces[index + 1]) if role == "assistant" else 0)
            so_far += marks[index]
        return _Shape(pieces=tuple(pieces), leads=tuple(leads), ends=tuple(ends))

    def _lead(self, turns: Sequence[Turn], so_far: str, piece: str, where: str) -> int:
        """How much of the text before an answer the model has to produce itself (a space, an empty reasoning block)."""
        if not turns:
            return 0
        prompt = self._template(turns, where=where, generation=True)
        extra = len(so_far) - len(prompt)
        return extra if so_far.startswith(prompt) and 0 <= extra <= len(piece) else 0

    def _end(self, piece: str) -> int:
        return len(self.end_of_turn) if piece.startswith(self.end_of_turn) else 0

    def _end_of_turn(self) -> str:
        """The text from the end of an answer up to and including the first special token; empty if there is none."""
        mark = "@content-of-turn@"
        turns = [{"role": "user", "content": "@question@"}, {"role": "assistant", "content": mark}]
        tail = self._template(turns, where="chat template").partition(mark)[2]
        found = self._special.search(tail)
        return tail[: found.end()] if found else ""

    def _search(self, text: str, shape: _Shape) -> list[tuple[int, int]] | None:
        """Contents as what stands between the pieces, if each piece holds a special token and so is unmistakable.

        What the model has to produce before an answer counts as part of it here, since the template may have filled it
        (reasoning that was split off the answer).
        """
        kept = [piece[: len(piece) - lead] for piece, lead in zip(shape.pieces, (*shape.leads, 0), strict=True)]
        if not text.startswith(kept[0]) or not text.endswith(kept[-1]):
            return None
        spans = []
        position = len(kept[0])
        for index, piece in enumerate(kept[1:], start=1):
            last = index == len(kept) - 1
            end = len(text) - len(piece) if last else text.find(piece, position)
            if end < position or not self._special.search(piece) or self._special.search(text[position:end]):
                return None
            spans.append((position, end))
            position = end + len(piece)
        return spans


def _match(text: str, pieces: Sequence[str], contents: Sequence[str]) -> list[tuple[int, int]] | None:
    """Where the contents stand if `text` is pieces and contents in turn, each content whole or trimmed; else None."""
    position = len(pieces[0])
    if not text.startswith(pieces[0]):
        return None
    spans = []
    for content, piece in zip(contents, pieces[1:], strict=True):
        for form in dict.fromkeys((content, content.strip(), content.lstrip(), content.rstrip())):
            if text.startswith(form, position) and text.startswith(piece, position + len(form)):
                break
        else:
            return None
        spans.append((position, position + len(form)))
        position += len(form) + len(piece)
    return spans if position == len(text) else None


def _unstable(where: str, why: str) -> DataError:
    return DataError(
        "the mask of a conversation cannot be made",
        code="data-template-unstable",
        where=where,
        why=why,
        fix="set data.template: chatml, or data.train_on: everything",
    )
