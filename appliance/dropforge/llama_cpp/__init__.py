"""llama.cpp beside us: where its tools are, how they are built, and one small wrapper per tool.

Nothing here is built, cloned or downloaded while a job runs: `make llama` (or the image) makes the tools beforehand.
"""

from __future__ import annotations
