"""Sentences made from columns: `Capital of {Country}?[[ On the {River}?]]`.

`{Name}` inserts a column. `[[...]]` is an optional part: it disappears when the first column in it is empty, with the
blanks that set it apart from the next one. `{{` and `}}` are literal braces. An empty value (none, NaN, blank) outside
an optional part inserts nothing.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dropforge.data.values import to_text

_BLOCK = re.compile(r"\[\[(.*?)\]\]", re.DOTALL)
_TOKEN = re.compile(r"\{\{|\}\}|\{([^{}]*)\}|[{}]")


@dataclass(frozen=True, kw_only=True)
class _Part:
    """A run of text and columns. `parts` alternates literal text and column names: text, name, text, ..., text."""

    parts: tuple[str, ...]
    optional: bool

    @property
    def columns(self) -> tuple[str, ...]:
        return self.parts[1::2]

    @property
    def blank(self) -> bool:
        """Only blanks and line breaks, outside of an optional part."""
        return not self.optional and len(self.parts) == 1 and not self.parts[0].strip()


@dataclass(frozen=True, kw_only=True)
class ColumnTemplate:
    """A parsed template."""

    parts: tuple[_Part, ...]

    @property
    def columns(self) -> tuple[str, ...]:
        """Every column it names, once, in order."""
        return tuple(dict.fromkeys(name for part in self.parts for name in part.columns))

    def fill(self, fields: Mapping[str, Any]) -> str:
        """The sentence for one row. Raises KeyError for a column that is not there."""
        kept = [not part.optional or bool(to_text(fields[part.columns[0]]).strip()) for part in self.parts]
        filled = [index for index, part in enumerate(self.parts) if kept[index] and not part.blank]
        first, last = (filled[0], filled[-1]) if filled else (0, -1)
        out: list[str] = []
        for index, part in enumerate(self.parts):
            # Blanks between two optional parts go with the one that disappears, so that no gap is left.
            gap = part.blank and ((index > 0 and not kept[index - 1]) or not first < index < last)
            if kept[index] and not (gap and not all(kept)):
                out += [text if i % 2 == 0 else to_text(fields[text]) for i, text in enumerate(part.parts)]
        text = "".join(out)
        text = text.lstrip() if first and not kept[0] else text
        return text.rstrip() if kept and not kept[-1] else text


def parse(text: str) -> ColumnTemplate:
    """Parse a template; raises ValueError that says what is wrong with it."""
    parts: list[_Part] = []
    end = 0
    for match in _BLOCK.finditer(text):
        parts += [_part(text[end : match.start()], optional=False), _part(match[1], optional=True)]
        end = match.end()
    parts.append(_part(text[end:], optional=False))
    for part in parts:
        if part.optional and not part.columns:
            raise ValueError(f"the optional part [[{part.parts[0]}]] must name a column in braces")
    kept = tuple(part for part in parts if part.parts != ("",))
    return ColumnTemplate(parts=kept)


def _part(text: str, *, optional: bool) -> _Part:
    parts = [""]
    end = 0
    for match in _TOKEN.finditer(text):
        parts[-1] += text[end : match.start()]
        end = match.end()
        if match[0] in ("{{", "}}"):
            parts[-1] += match[0][0]
        elif match[1] is None:
            raise ValueError(f"there is a single {match[0]!r}; write it twice if it is meant literally")
        elif not match[1].strip():
            raise ValueError("there are braces without a column name in them")
        else:
            parts += [match[1], ""]
    parts[-1] += text[end:]
    return _Part(parts=tuple(parts), optional=optional)
