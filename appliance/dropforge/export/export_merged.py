"""Export `merged`: the verified 16-bit folder for transformers, vLLM and every further conversion."""

from __future__ import annotations

import os
from pathlib import Path

from dropforge.export.request import Made
from dropforge.export.stage import Stage
from dropforge.files import regular_files


def export_merged(stage: Stage, folder: Path) -> Made:
    """Fill the empty `folder` with hard links to the staged files: no second copy while the job lives."""
    merged = stage.merged
    for path in regular_files(merged.folder):
        os.link(path, folder / path.name)
    return Made(path=folder, checks=merged.checks)
