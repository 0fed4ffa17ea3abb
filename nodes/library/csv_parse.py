"""Parse a CSV text into rows."""

from __future__ import annotations

from nodes.formats.csv_reader import parse_csv as run

__all__ = ["run"]
