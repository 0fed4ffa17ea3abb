"""Convert an XML text to JSON."""

from __future__ import annotations

from nodes.formats.xml_values import parse_xml as run

__all__ = ["run"]
