"""Parse a file into values, by its type."""

from __future__ import annotations

from nodes.formats.file_reader import parse_file as run

__all__ = ["run"]
