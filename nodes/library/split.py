"""One value becomes many: a text its parts, a list its batches, a list in each item an item for each element."""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from typing import TYPE_CHECKING

from concurrency.loop_share import Turn
from engine.run_errors import NodeError
from nodes import fields, keys, lists
from nodes.sizes import Size

if TYPE_CHECKING:
    from engine.node_api import NodeCall
    from engine.values import Json


class Mode(StrEnum):
    TEXT = "text"
    BATCHES = "batches"
    FIELD = "field"


async def run(call: NodeCall) -> Json:
    match fields.choice(call.config, "mode", Mode):
        case Mode.TEXT:
            items = _parts(call.config)
        case Mode.BATCHES:
            items = _batches(call.config)
        case Mode.FIELD:
            items = await _elements(call)
    return {"items": items, "count": len(items)}


def _parts(config: Mapping[str, Json]) -> list[Json]:
    separator = fields.text(config, "separator")
    if not separator:
        raise NodeError("`separator` must have at least one character", code="invalid-config")
    parts = fields.text(config, "value").split(separator, lists.MAXIMUM_ITEMS)
    if len(parts) > lists.MAXIMUM_ITEMS:
        message = f"The text has more than {lists.MAXIMUM_ITEMS:,} parts: is `separator` right?"
        raise NodeError(message, code="too-many-items")
    if fields.flag(config, "trim"):
        parts = [part.strip() for part in parts]
    drops_empty = fields.flag(config, "dropEmpty")
    return [part for part in parts if part or not drops_empty]


def _batches(config: Mapping[str, Json]) -> list[Json]:
    items = lists.items(config, "value")
    size = fields.number(config, "size", minimum=1, maximum=lists.MAXIMUM_ITEMS)
    if not isinstance(size, int):
        raise fields.unfit("size", "a whole number", size)
    return [items[start : start + size] for start in range(0, len(items), size)]


async def _elements(call: NodeCall) -> list[Json]:
    """Return an item for each element of the list that each item has in the field."""
    name = fields.text(call.config, "field")
    keeps_fields = fields.flag(call.config, "keepFields")
    found: list[Json] = []
    size = Size("The items")
    turn = Turn()
    for index, item in enumerate(lists.items(call.config, "value")):
        own = keys.fields_of(item, index, f"it has no field `{name}`")
        for element in _list_in(own, index, name, call.unresolved):
            await turn.share()
            made: Json = {**own, name: element} if keeps_fields else element
            size.add(made)
            found.append(made)
            if len(found) > lists.MAXIMUM_ITEMS:
                message = f"The lists in `{name}` have more than {lists.MAXIMUM_ITEMS:,} elements together"
                raise NodeError(message, code="too-many-items")
    return found


def _list_in(own: Mapping[str, Json], index: int, name: str, unresolved: list[str]) -> list[Json]:
    """Return the list in an item's field; an empty one for null, and for a field that isn't there."""
    if name not in own:
        unresolved.append(f"item.{name}")
    value = own.get(name)
    if value is None:
        return []
    if isinstance(value, list):
        return value
    message = f"Item {index} has {fields.kind_of(value)} in `{name}`, where a list is needed"
    raise NodeError(message, code="not-a-list")
