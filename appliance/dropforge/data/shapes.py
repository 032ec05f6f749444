"""The text a chat template writes around the contents of one sequence of roles, and conversations made with it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dropforge.data.convert import Turn
from dropforge.data.opaque import Form, Question, written


@dataclass(frozen=True, slots=True, kw_only=True)
class Rendered:
    """A conversation as text; `spans` are [start, end) character positions of what is learnt, in order."""

    text: str
    spans: tuple[tuple[int, int], ...]
    rewritten: bool
    """The template changed a content by more than trimming it, for example by splitting off reasoning."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """The template's text around the contents of one sequence of roles.

    `pieces[i]` stands before content i, the last piece after the last content. For an assistant turn, the last
    `leads[i]` characters of `pieces[i]` come after the generation prompt; the first `ends[i]` of `pieces[i + 1]` end
    the turn.
    """

    pieces: tuple[str, ...]
    leads: tuple[int, ...]
    ends: tuple[int, ...]
    forms: tuple[Form, ...] | None = None
    """Per content how it is stripped, if that is all the template does with contents; None when it may do more."""
    asked: tuple[tuple[int, Question], ...] = ()
    """What the template asks about contents (by their number): `forms` hold for those that give the same answers."""


def answers_alike(turns: Sequence[Turn], shape: Shape) -> bool:
    """Whether `forms` hold for this conversation."""
    return not shape.asked or all(question.same(turns[index]["content"]) for index, question in shape.asked)


def joined(turns: Sequence[Turn], shape: Shape, forms: Sequence[Form]) -> Rendered:
    """What a template writes that does nothing with contents but write (and strip) them."""
    parts = [shape.pieces[0]]
    spans = []
    position = len(shape.pieces[0])
    for index, turn in enumerate(turns):
        content = written(turn["content"], forms[index])
        end = position + len(content)
        if turn["role"] == "assistant":
            spans.append((position - shape.leads[index], end + shape.ends[index]))
        piece = shape.pieces[index + 1]
        parts += (content, piece)
        position = end + len(piece)
    return Rendered(text="".join(parts), spans=tuple(spans), rewritten=False)


def match(text: str, pieces: Sequence[str], contents: Sequence[str]) -> list[tuple[int, int]] | None:
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
