"""The pages of the Python API name every argument and function that a ported script can meet."""

from __future__ import annotations

from pathlib import Path

import dropforge
from dropforge.fast.extras import ADAPTER, LOADING
from dropforge.trainer_arguments import RENAMED, WITHOUT_EFFECT

DOCS = Path(__file__).resolve().parents[2] / "docs"
PAGES = ("guides/porting.md", "guides/python-api.md", "reference/python-api.md")


def test_every_name_is_on_a_page():
    text = "".join((DOCS / name).read_text(encoding="utf-8") for name in PAGES)
    names = [*LOADING, *ADAPTER, *RENAMED, *WITHOUT_EFFECT]
    names += [name for name in dropforge._LAZY if not name.startswith(("FastVision", "FastSentence"))]
    missing = [name for name in names if f"`{name}" not in text and name not in text]
    assert missing == []
