"""Parse a JSON text."""

from __future__ import annotations

from nodes.formats.json_reader import parse_json as run

__all__ = ["run"]
