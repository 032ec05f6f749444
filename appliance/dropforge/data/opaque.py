"""Does a chat template copy contents as they are? Proven by rendering with texts that notice being looked at.

Jinja can only depend on a content by calling one of its methods or comparing it. A `Watched` text overrides all of
those; when none is called, every other text of the same roles is rendered in the same way, and rendering is joining.
What reads a text behind its back (JSON encoding, formatting) shows in contents with quotes, breaks and every literal
that the template's source holds: they would come out changed.
"""

from __future__ import annotations

import re
from typing import Any

# Blanks at both ends, quotes, breaks and signs that encoders and escapers change.
AWKWARD = " \n\"'\\<&>{{}}{%%}\u00e9\u6c34\U0001f600\t</think> "


_LITERAL = re.compile(r"'([^'\\n]*)'|\"([^\"\\n]*)\"")


def probes(template: str) -> tuple[str, str]:
    """Two contents to render with: an awkward one, and one that holds every literal of the template too."""
    literals = sorted({one or other for one, other in _LITERAL.findall(template)})
    return AWKWARD, AWKWARD + " ".join(literals) + AWKWARD


class LookedAtError(Exception):
    """The template looked into a content."""


def _refuse(name: str) -> Any:
    def method(self: Any, *arguments: Any, **options: Any) -> Any:
        raise LookedAtError(name)

    return method


class Watched(str):
    """A text that may be written, joined to others and stripped, and nothing else."""

    __slots__ = ("stripped",)
    stripped: list[bool]

    @staticmethod
    def of(text: str, stripped: list[bool] | None = None) -> Watched:
        made = Watched(text)
        made.stripped = [] if stripped is None else stripped
        return made

    def strip(self, chars: str | None = None, /) -> Any:
        if chars is not None:
            raise LookedAtError("strip")
        self.stripped.append(True)
        return Watched.of(str.strip(self), self.stripped)

    def __add__(self, other: str, /) -> str:
        return Watched.of(str.__add__(self, other), self.stripped)

    def __radd__(self, other: str, /) -> str:
        return Watched.of(str.__add__(other, self), self.stripped)

    def __str__(self) -> str:
        return self


_ALLOWED = {
    "__add__", "__radd__", "__str__", "strip", "__new__", "__init__", "__class__", "__getattribute__", "__doc__",
    "__repr__", "__init_subclass__", "__subclasshook__", "__setattr__", "__delattr__", "__dir__", "__reduce__",
    "__reduce_ex__", "__getnewargs__", "__sizeof__", "__getstate__",
}  # fmt: skip
for _name in set(dir(str)) - _ALLOWED:
    setattr(Watched, _name, _refuse(_name))
