"""Conversion of XML to JSON."""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from typing import TYPE_CHECKING

from msgspec import Struct, field

from concurrency.loop_share import LoopShare
from engine.run_errors import NodeError
from nodes import config_fields
from nodes.formats import xml_reader

if TYPE_CHECKING:
    from engine.node_api import NodeCall
    from engine.values import Json

MAXIMUM_BYTES = 5_000_000
MAXIMUM_DEPTH = 30
"""Each element may be an object in a list, and JSON is 64 deep at most."""
MAXIMUM_VALUES = 300_000
"""Maximum number of elements and attributes: each takes some 300 bytes."""
ATTRIBUTE_PREFIX = "@"
TEXT_KEY = "#text"


class PrefixMode(StrEnum):
    KEEP = "keep"
    DROP = "drop"


async def parse_xml(call: NodeCall) -> Json:
    """Return the XML text of the config as JSON: the name of its `root`, and the root's `value`.

    Raises `NodeError` for invalid XML, and over five million bytes, 300,000 elements and attributes, or 30 levels.
    """
    text = config_fields.read_text(call.config, "text").strip()
    _check_size(len(text))
    raw = text.encode()
    _check_size(len(raw))
    lists = frozenset(
        config_fields.read_text({"lists": name}, "lists")
        for name in config_fields.read_sequence(call.config, "lists")
    )
    drops_prefixes = config_fields.read_choice(call.config, "prefixes", PrefixMode) is PrefixMode.DROP
    tree = XmlTree(lists, drops_prefixes=drops_prefixes)
    await xml_reader.read_xml(raw, tree, LoopShare(), encoding="utf-8")
    return {"root": tree.root, "value": tree.value}


def _check_size(size: int) -> None:
    if size > MAXIMUM_BYTES:
        message = f"`text` has more than {MAXIMUM_BYTES:,} bytes: split the XML"
        raise NodeError(message, code="input-too-large")


class XmlElement(Struct):
    """Element that is still open."""

    name: str
    fields: dict[str, Json]
    texts: list[str] = field(default_factory=list)

    def value(self) -> Json:
        text = "".join(self.texts).strip()
        if not self.fields:
            return text or None
        return {**self.fields, TEXT_KEY: text} if text else self.fields


class XmlTree:
    """Handler that builds the JSON of a document."""

    root = ""
    value: Json = None

    def __init__(self, lists: frozenset[str], *, drops_prefixes: bool) -> None:
        self._lists = lists
        self._drops_prefixes = drops_prefixes
        self._open: list[XmlElement] = []
        self._count = 0

    def start(self, name: str, attributes: Mapping[str, str]) -> None:
        self._count += 1 + len(attributes)
        if self._count > MAXIMUM_VALUES:
            message = f"The XML has more than {MAXIMUM_VALUES:,} elements and attributes: split it"
            raise NodeError(message, code="too-many-elements")
        if len(self._open) == MAXIMUM_DEPTH:
            message = f"Elements are nested more than {MAXIMUM_DEPTH} deep at <{name[:40]}>"
            raise NodeError(message, code="too-deep")
        named = {
            ATTRIBUTE_PREFIX + self._named(key): value
            for key, value in attributes.items()
            if self._keeps(key)
        }
        self._open.append(XmlElement(self._named(name), dict(named)))

    def text(self, text: str) -> None:
        self._open[-1].texts.append(text)

    def end(self, name: str) -> None:  # noqa: ARG002 - the parser guarantees that it is the last open element
        element = self._open.pop()
        if self._open:
            self._put(element.name, element.value(), self._open[-1].fields)
        else:
            self.root, self.value = element.name, element.value()

    def _put(self, name: str, value: Json, into: dict[str, Json]) -> None:
        present = into.get(name)
        if isinstance(present, list):
            present.append(value)
        elif name in into:
            into[name] = [present, value]
        else:
            into[name] = [value] if name in self._lists else value

    def _named(self, name: str) -> str:
        return name.rpartition(":")[2] if self._drops_prefixes else name

    def _keeps(self, attribute: str) -> bool:
        return not (self._drops_prefixes and attribute.partition(":")[0] == "xmlns")
