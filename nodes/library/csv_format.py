"""Format rows as a CSV text, in the form that `csv-parse` reads."""

from __future__ import annotations

from nodes.formats.csv_writer import format_csv as run

__all__ = ["run"]
