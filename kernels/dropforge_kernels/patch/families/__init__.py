"""One file per model family, named like transformers' model type, with a tuple ``SPECS``."""

from __future__ import annotations
