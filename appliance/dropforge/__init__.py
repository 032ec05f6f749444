"""Dropforge: drop a job in a folder, get a trained model out.

Importing this package has no side effects and imports nothing heavy; torch comes in with the first name that needs it.
"""

from __future__ import annotations

__version__ = "0.1.0"
