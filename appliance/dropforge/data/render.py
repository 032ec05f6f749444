"""Render conversations with the tokenizer's chat template and say which characters are the assistant's.

Method: once per sequence of roles the template is rendered with placeholders instead of contents; what stands
between the placeholders is the template's own text. A template that is proven to do nothing with contents but write
them (opaque.py) then writes each row by joining; of any other one, each row is rendered for real and must consist of
exactly these pieces and its own contents. A learnt span begins where the prompt with the generation marker ends
(what the model will be given when it is used) and ends with the end-of-turn token. The labels are therefore right by
construction, for any template.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from dropforge.data.convert import Turn
from dropforge.data.opaque import LookedAtError, Watched, probes
from dropforge.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


CALL_ENDS = ("<|eom_id|>", "<|call|>")
"""Markers that end a turn with a tool call where another one ends an answer (Llama 3.1's built-in tools, harmony)."""


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
    strips: tuple[bool, ...] | None = None
    """Per content whether the template strips it, if that is all it does with contents; None when it may do more."""


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

    def render(self, turns: Sequence[Turn], *, where: str, tools: Sequence[dict[str, Any]] | None = None) -> Rendered:
        """Raises DataError data-template-refused (the template raised) or data-template-unstable, with `where`."""
        if tools or any(len(turn) > 2 or turn["role"] == "tool" for turn in turns):
            return self._render_tools(turns, where=where, tools=tools)
        roles = tuple(turn["role"] for turn in turns)
        if roles not in self._shapes:
            self._shapes[roles] = self._shape(roles, where)
        shape = self._shapes[roles]
        if shape.strips is not None:
            return _joined(turns, shape, shape.strips)
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

    def before_answer(self, roles: tuple[str, ...]) -> tuple[str, str]:
        """The template's text before an answer, and what else the model may be given behind it (`<think>`).

        The generation prompt where there is one, else all that stands between the question and the answer.
        """
        shape = self._shape(roles, "chat template")
        first = roles.index("assistant")
        before = shape.pieces[first][: len(shape.pieces[first]) - shape.leads[first]]
        turns = [{"role": role, "content": f"@{index}@"} for index, role in enumerate(roles[:first])]
        prompt = self._template(turns, where="chat template", generation=True)
        plain = self._template(turns, where="chat template")
        marker = prompt.removeprefix(plain) if prompt.startswith(plain) else ""
        for length in range(len(marker), 0, -1):
            if before.endswith(marker[:length]):
                return marker[:length], marker[length:]
        return before, ""

    def after_answer(self, roles: tuple[str, ...]) -> str:
        """The template's text between the first answer of such a conversation and the next content."""
        return self._shape(roles, "chat template").pieces[roles.index("assistant") + 1]

    def _render_tools(self, turns: Sequence[Turn], *, where: str, tools: Sequence[dict[str, Any]] | None) -> Rendered:
        """Conversations with tools or reasoning, by prefix rendering.

        What the model writes in a turn begins where the prompt up to that turn ends. Templates that drop earlier
        reasoning later have another prompt then; there the generation marker is looked for behind the last span.
        """
        text = self._template(turns, where=where, tools=tools)
        spans: list[tuple[int, int]] = []
        rewritten = False
        for index, turn in enumerate(turns):
            if turn["role"] != "assistant":
                continue
            after = spans[-1][1] if spans else 0
            prompt = self._template(turns[:index], where=where, generation=True, tools=tools) if index else ""
            known = prompt and text.startswith(prompt) and len(prompt) >= after
            start = len(prompt) if known else self._marker(text, after)
            end = self._turn_end(text, start)
            if start < 0 or end < start:
                raise _unstable(where, f"turn {index + 1} cannot be found in what the template writes")
            span = text[start:end]
            self._check_turn(turn, span, where=where, number=index + 1)
            reasoning = turn.get("reasoning_content", "")
            rewritten |= bool(reasoning) and reasoning.strip() not in span
            spans.append((start, end))
        for tool in tools or ():
            if str(tool.get("function", tool).get("name", "")) not in text:
                raise _refused(where, "the template does not write the tools", turns)
        return Rendered(text=text, spans=tuple(spans), rewritten=rewritten)

    def _marker(self, text: str, after: int) -> int:
        """Where the next answer begins behind `after`, by the generation marker; -1 when there is none."""
        marker, more = self.before_answer(("user", "assistant"))
        found = text.find(marker, after)
        if found < 0:
            return -1
        start = found + len(marker)
        return start + len(more) if text.startswith(more, start) else start

    def _turn_end(self, text: str, start: int) -> int:
        """Behind the special token that ends the turn at `start`; the whole rest when the template has none."""
        ends = [end for end in (self.end_of_turn, *CALL_ENDS) if end]
        found = [(text.find(end, start), end) for end in ends]
        return min((at + len(end) for at, end in found if at >= 0), default=len(text))

    def _check_turn(self, turn: Turn, span: str, *, where: str, number: int) -> None:
        """Everything the turn says must stand in its span."""
        content = turn["content"].strip()
        if "</think>" in content:
            content = content.rpartition("</think>")[2].strip()
        if content and content not in span:
            raise _unstable(where, f"the text of turn {number} is not where the template should put it")
        for call in turn.get("tool_calls", ()):
            if call["function"]["name"] not in span:
                raise _refused(where, f"the template does not write the tool call of turn {number}", [turn])

    def _template(
        self,
        turns: Sequence[Turn],
        *,
        where: str,
        generation: bool = False,
        tools: Sequence[dict[str, Any]] | None = None,
    ) -> str:
        import jinja2

        try:
            rendered: Any = self._tokenizer.apply_chat_template(
                list(turns), tokenize=False, add_generation_prompt=generation, tools=list(tools) if tools else None
            )
        except (jinja2.TemplateError, TypeError, KeyError, ValueError) as error:
            raise _refused(where, str(error), turns) from error
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
        shape = _Shape(pieces=tuple(pieces), leads=tuple(leads), ends=tuple(ends))
        return replace(shape, strips=self._strips(roles, shape))

    def _strips(self, roles: tuple[str, ...], shape: _Shape) -> tuple[bool, ...] | None:
        """Whether each content is stripped; None when the template does more with contents than write them."""
        done: list[tuple[bool, ...]] = []
        for probe in probes(str(self._tokenizer.chat_template)):
            contents = [Watched.of(probe) for _ in roles]
            turns = [{"role": role, "content": content} for role, content in zip(roles, contents, strict=True)]
            try:
                text = self._template(turns, where="probe")
            except (LookedAtError, DataError):
                return None
            strips = tuple(bool(content.stripped) for content in contents)
            plain = [{"role": role, "content": probe} for role in roles]
            if text != _joined(plain, shape, strips).text:
                return None
            done.append(strips)
        return done[0] if done[0] == done[1] else None

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


def _joined(turns: Sequence[Turn], shape: _Shape, strips: Sequence[bool]) -> Rendered:
    """What a template writes that does nothing with contents but write (and strip) them."""
    parts = [shape.pieces[0]]
    spans = []
    position = len(shape.pieces[0])
    for index, turn in enumerate(turns):
        content = turn["content"].strip() if strips[index] else turn["content"]
        end = position + len(content)
        if turn["role"] == "assistant":
            spans.append((position - shape.leads[index], end + shape.ends[index]))
        piece = shape.pieces[index + 1]
        parts += (content, piece)
        position = end + len(piece)
    return Rendered(text="".join(parts), spans=tuple(spans), rewritten=False)


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


def _refused(where: str, why: str, turns: Sequence[Turn]) -> DataError:
    return DataError(
        "the chat template refuses a conversation",
        code="data-template-refused",
        where=where,
        why=f"{why}; the roles are {', '.join(turn['role'] for turn in turns)}",
        fix="bring the turns into the order this model expects, or set data.template: chatml",
    )


def _unstable(where: str, why: str) -> DataError:
    return DataError(
        "the mask of a conversation cannot be made",
        code="data-template-unstable",
        where=where,
        why=why,
        fix="set data.template: chatml, or data.train_on: everything",
    )
