"""Parse a sheet of an Excel workbook into rows."""

from __future__ import annotations

from nodes.formats.xlsx_rows import parse_xlsx as run

__all__ = ["run"]
