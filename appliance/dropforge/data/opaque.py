"""What does a chat template do with contents? Proven by rendering with texts that notice being looked at.

Jinja can only depend on a content by calling one of its methods or comparing it. A `Watched` text overrides all of
those: it may be written, joined to others and stripped; a question with a yes or no (`'</think>' in content`,
`content.startswith(...)`, `if content`) is answered and remembered; anything else refuses. Every other conversation of
the same roles whose contents give the same answers is then rendered in the same way, and rendering is joining.

What reads a text behind its back (JSON encoding, formatting) shows in contents with quotes, breaks and, where nothing
was asked, every literal that the template's source holds: they would come out changed.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

# Different blanks at both ends, quotes, breaks and signs that encoders and escapers change.
_SIGNS = "\n \n\"'\\<&>{{}}{%%}\u00e9\u6c34\U0001f600\t"
PLAIN = (_SIGNS + "abc. \n \n", _SIGNS + "1 2 3\n\n" + _SIGNS + " x\n \n")
_LITERAL = re.compile(r"'([^'\\n]*)'|\"([^\"\\n]*)\"")
_STRIPS = ("strip", "lstrip", "rstrip")
_QUESTIONS = ("__contains__", "startswith", "endswith", "__eq__", "__ne__")

Form = tuple[tuple[str, str | None], ...]
"""Strips in the order they are done, each with the characters it takes away (None: blanks)."""
_JOINED: Form = (("joined", None),)
"""Of a text that is more than a content."""


def probes(template: str) -> tuple[str, str]:
    """Two contents to render with: an awkward one, and one that holds every literal of the template too."""
    literals = sorted({one or other for one, other in _LITERAL.findall(template)})
    awkward = _SIGNS + "</think>\n \n"
    return awkward, awkward + " ".join(literals) + awkward


class LookedAtError(Exception):
    """The template looked into a content."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """What was asked about a content in some form, and the answer."""

    form: Form
    method: str
    argument: str
    answer: bool

    def same(self, content: str) -> bool:
        """Whether another content gives the same answer."""
        text = written(content, self.form)
        return (bool(text) if self.method == "__bool__" else getattr(text, self.method)(self.argument)) is self.answer


def written(content: str, form: Form) -> str:
    """A content as the template writes it."""
    for method, characters in form:
        content = getattr(content, method)(characters)
    return content


class Watched(str):
    """A text that may be written, joined to others, stripped and asked, and nothing else."""

    __slots__ = ("asked", "form", "forms")
    form: Form
    forms: list[Form]
    """All forms the template made of the content."""
    asked: list[Question]

    @staticmethod
    def of(text: str, *, form: Form = (), of: Watched | None = None) -> Watched:
        made = Watched(text)
        made.form = form
        made.forms = [()] if of is None else of.forms
        made.asked = [] if of is None else of.asked
        return made

    def __add__(self, other: str, /) -> str:
        return Watched.of(str.__add__(self, other), form=_JOINED, of=self)

    def __radd__(self, other: str, /) -> str:
        return Watched.of(str.__add__(other, self), form=_JOINED, of=self)

    def __str__(self) -> str:
        return self

    def __bool__(self) -> bool:
        return self.ask("__bool__", "", str.__len__(self) > 0)

    def ask(self, method: str, argument: Any, answer: bool) -> bool:
        """Remember the answer; only contents themselves can be asked, not what was joined from them."""
        if self.form == _JOINED or type(argument) is not str:
            raise LookedAtError(method)
        self.asked.append(Question(form=self.form, method=method, argument=argument, answer=answer))
        return answer


def _strip(name: str) -> Any:
    def method(self: Watched, chars: str | None = None, /) -> Watched:
        if self.form == _JOINED or isinstance(chars, Watched):
            raise LookedAtError(name)
        form = (*self.form, (name, chars))
        self.forms.append(form)
        return Watched.of(getattr(str, name)(self, chars), form=form, of=self)

    return method


def _question(name: str) -> Any:
    def method(self: Watched, argument: Any, /) -> bool:
        return self.ask(name, argument, type(argument) is str and getattr(str, name)(self, argument))

    return method


def _refuse(name: str) -> Any:
    def method(self: Any, *arguments: Any, **options: Any) -> Any:
        raise LookedAtError(name)

    return method


_ALLOWED = {
    "__add__", "__radd__", "__str__", "__new__", "__init__", "__class__", "__getattribute__", "__doc__",
    "__repr__", "__init_subclass__", "__subclasshook__", "__setattr__", "__delattr__", "__dir__", "__reduce__",
    "__reduce_ex__", "__getnewargs__", "__sizeof__", "__getstate__",
}  # fmt: skip
for _name in set(dir(str)) - _ALLOWED:
    _maker = _strip if _name in _STRIPS else _question if _name in _QUESTIONS else _refuse
    setattr(Watched, _name, _maker(_name))


def forms_in(text: str, pieces: Sequence[str], contents: Sequence[Watched]) -> tuple[Form, ...] | None:
    """Which form of each content stands between the pieces of `text`; None when it is not one of them."""
    if not text.startswith(pieces[0]):
        return None
    position = len(pieces[0])
    found = []
    for content, piece in zip(contents, pieces[1:], strict=True):
        plain = "".join(str.__iter__(content))  # read past its watch
        for form in dict.fromkeys(content.forms):
            here = written(plain, form)
            if text.startswith(here + piece, position):
                break
        else:
            return None
        found.append(form)
        position += len(here) + len(piece)
    return tuple(found) if position == len(text) else None
