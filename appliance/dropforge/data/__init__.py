"""Data: files of any usual kind in, token rows with labels out. Start reading in prepare.py."""

from dropforge.data.prepare import PreparedData, prepare_data
from dropforge.data.report import DataReport, FileReport

__all__ = ["DataReport", "FileReport", "PreparedData", "prepare_data"]
