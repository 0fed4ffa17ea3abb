"""Render a text from the data, with one part for each item of a list."""

from __future__ import annotations

from typing import TYPE_CHECKING

from concurrency.loop_share import LoopShare
from engine.run_errors import NodeError
from engine.values import value_as_text
from nodes import config_fields, item_lists

if TYPE_CHECKING:
    from engine.node_api import NodeCall
    from engine.values import Json

MAXIMUM_CHARACTERS = 10_000_000


class TextParts:
    """Parts of a text, up to the size limit of outputs."""

    def __init__(self, separator: str) -> None:
        self._separator = separator
        self._texts: list[str] = []
        self._characters = 0

    def add(self, value: Json) -> None:
        """Append a rendered value as text; raises `NodeError` if all parts together exceed ten million characters."""
        text = value_as_text(value)
        self._texts.append(text)
        self._characters += len(text) + len(self._separator)
        if self._characters > MAXIMUM_CHARACTERS:
            count = len(self._texts)
            message = f"The text has more than {MAXIMUM_CHARACTERS:,} characters after {count:,} parts"
            raise NodeError(message, code="output-too-large")

    def joined(self) -> str:
        return self._separator.join(self._texts)


async def run(call: NodeCall) -> Json:
    parts = TextParts(config_fields.read_text(call.config, "separator"))
    parts.add(call.config["text"])
    if "items" in call.config:
        await _add_items(parts, call)
    if "footer" in call.config:
        parts.add(call.config["footer"])
    return {"text": parts.joined()}


async def _add_items(parts: TextParts, call: NodeCall) -> None:
    each = call.values["each"]
    turn = LoopShare()
    for index, item in enumerate(item_lists.read_items(call.config)):
        await turn.yield_if_due()
        parts.add(each.render(call.scope_of(item, index), call.unresolved))
