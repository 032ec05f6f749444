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
from copy import copy
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from dropforge.data.convert import Turn
from dropforge.data.opaque import PLAIN, Form, LookedAtError, Question, Watched, forms_in, probes
from dropforge.data.shapes import Rendered, Shape, answers_alike, joined, match
from dropforge.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


CALL_ENDS = ("<|eom_id|>", "<|call|>", "<|tool_response>")
"""Markers that a model writes behind a tool call where another one ends an answer (Llama 3.1's built-in tools, harmony,
Gemma 4).
"""
EARLIER_ENDS = ("<|end|>",)
"""Markers in place of the end marker behind earlier answers (harmony); a model never writes them there."""


COMPARED_EVERY = 1000
"""Of so many rows that are joined one is also rendered."""


class Renderer:
    """Renders with one tokenizer; remembers the shape of every sequence of roles it has seen."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._shapes: dict[tuple[str, ...], Shape] = {}
        special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
        special |= set(tokenizer.all_special_tokens)
        self._special = re.compile(
            "|".join(re.escape(text) for text in sorted(special, key=len, reverse=True)) or r"(?!)"
        )
        self._joined: dict[tuple[str, ...], int] = {}
        self._compares = True
        self.end_of_turn = self._end_of_turn()

    def serving(self, tokenizer: PreTrainedTokenizerBase) -> Renderer:
        """The same renderer, with everything it knows, for another object of the same tokenizer."""
        other = copy(self)
        other._tokenizer, other._shapes = tokenizer, dict(self._shapes)
        other._compares = False  # a worker would have to import all of the tokenizer for it
        return other

    def render(self, turns: Sequence[Turn], *, where: str, tools: Sequence[dict[str, Any]] | None = None) -> Rendered:
        """Raises DataError data-template-refused (the template raised) or data-template-unstable, with `where`."""
        roles = tuple([turn["role"] for turn in turns])
        if tools or "tool" in roles or max(map(len, turns)) > 2:
            return self._render_tools(turns, where=where, tools=tools)
        if roles not in self._shapes:
            self._shapes[roles] = self._shape(roles, where)
        shape = self._shapes[roles]
        if shape.forms is not None and answers_alike(turns, shape):
            made = joined(turns, shape, shape.forms)
            self._compare(turns, made, roles, where)
            return made
        text = self._template(turns, where=where)
        leads = shape.leads
        contents = match(text, shape.pieces, [turn["content"] for turn in turns])
        if contents is None:
            contents, leads = self._search(text, shape), (0,) * len(turns)
        if contents is None:
            if _blank_system(turns) and self._template(turns[1:], where=where) == text:
                return self.render(turns[1:], where=where)  # a template may leave out a system turn that says nothing
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
            end = self._turn_end(text, turn, start) if start >= 0 else -1
            if end < start or start < 0:
                raise _unstable(where, f"turn {index + 1} cannot be found in what the template writes")
            span = text[start:end]
            self._check_turn(turn, span, where=where, number=index + 1)
            reasoning = turn.get("reasoning_content", "")
            rewritten |= bool(reasoning) and reasoning.strip() not in span
            spans.append((start, end))
        for tool in tools or ():
            if str(tool.get("function", tool).get("name", "")) not in text:
                raise _refused(where, "the template does not write the tools", turns, fix=TOOLS)
        return Rendered(text=text, spans=tuple(spans), rewritten=rewritten)

    def _marker(self, text: str, after: int) -> int:
        """Where the next answer begins behind `after`, by the generation marker; -1 when there is none."""
        marker, more = self.before_answer(("user", "assistant"))
        found = text.find(marker, after)
        if found < 0:
            return -1
        start = found + len(marker)
        return start + len(more) if text.startswith(more, start) else start

    def _turn_end(self, text: str, turn: Turn, start: int) -> int:
        """Behind the token that ends the turn at `start`, looked for behind all that the turn says; the whole rest when
        the template has none.
        """
        calls = [call["function"]["name"] for call in turn.get("tool_calls", ())]
        for said in (turn.get("reasoning_content", ""), _without_reasoning(turn["content"]), *calls):
            at = text.find(said.strip(), start)
            start = at + len(said.strip()) if at >= 0 else start
        ends = [(end, len(end)) for end in (self.end_of_turn, *CALL_ENDS) if end] + [(end, 0) for end in EARLIER_ENDS]
        found = [(at, -learnt) for at, learnt in ((text.find(end, start), learnt) for end, learnt in ends) if at >= 0]
        at, learnt = min(found, default=(len(text), 0))
        return at - learnt

    def _check_turn(self, turn: Turn, span: str, *, where: str, number: int) -> None:
        """Everything the turn says must stand in its span."""
        content = _without_reasoning(turn["content"]).strip()
        if content and content not in span:
            raise _unstable(where, f"the text of turn {number} is not where the template should put it")
        for call in turn.get("tool_calls", ()):
            if call["function"]["name"] not in span:
                why = f"the template does not write the tool call of turn {number}"
                raise _refused(where, why, [turn], fix=TOOLS)

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

    def _shape(self, roles: tuple[str, ...], where: str) -> Shape:
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
        shape = Shape(pieces=tuple(pieces), leads=tuple(leads), ends=tuple(ends))
        forms, asked = self._forms(roles, shape)
        return replace(shape, forms=forms, asked=asked)

    def _forms(
        self, roles: tuple[str, ...], shape: Shape
    ) -> tuple[tuple[Form, ...] | None, tuple[tuple[int, Question], ...]]:
        """How each content is written, and what was asked about it; None when the template does more than that."""
        for pair in (probes(str(self._tokenizer.chat_template)), PLAIN):
            one, two = (self._probed(roles, shape, probe) for probe in pair)
            if one is not None and one == two and (pair is PLAIN or not one[1]):
                return one
        return None, ()

    def _probed(
        self, roles: tuple[str, ...], shape: Shape, probe: str
    ) -> tuple[tuple[Form, ...], tuple[tuple[int, Question], ...]] | None:
        contents = [Watched.of(probe) for _ in roles]
        turns = [{"role": role, "content": content} for role, content in zip(roles, contents, strict=True)]
        try:
            text = self._template(turns, where="probe")
        except (LookedAtError, DataError):
            return None
        forms = forms_in(text, shape.pieces, contents)
        if forms is None:
            return None
        asked = dict.fromkeys((index, question) for index, content in enumerate(contents) for question in content.asked)
        return forms, tuple(asked)

    def _compare(self, turns: Sequence[Turn], made: Rendered, roles: tuple[str, ...], where: str) -> None:
        """One row in COMPARED_EVERY of a shape is rendered for real too: the proof is not trusted blindly."""
        if not self._compares:
            return
        number = self._joined[roles] = self._joined.get(roles, 0) + 1
        if number % COMPARED_EVERY == 1 and self._template(turns, where=where) != made.text:
            raise _unstable(where, "the template writes this row in another way than the rows before it")

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

    def _search(self, text: str, shape: Shape) -> list[tuple[int, int]] | None:
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


def _without_reasoning(content: str) -> str:
    return content.rpartition("</think>")[2]


def _blank_system(turns: Sequence[Turn]) -> bool:
    return turns[0]["role"] == "system" and not turns[0]["content"].strip()


ORDER = "bring the turns into the order this model expects, or set data.template: chatml"
TOOLS = "set data.template to one that writes tools (docs/guides/chat-templates.md), or take the tools out of the row"


def _refused(where: str, why: str, turns: Sequence[Turn], *, fix: str = ORDER) -> DataError:
    return DataError(
        "the chat template refuses a conversation",
        code="data-template-refused",
        where=where,
        why=f"{why}; the roles are {', '.join(turn['role'] for turn in turns)}",
        fix=fix,
    )


def _unstable(where: str, why: str) -> DataError:
    return DataError(
        "the mask of a conversation cannot be made",
        code="data-template-unstable",
        where=where,
        why=why,
        fix="set data.template: chatml, or data.train_on: everything",
    )
