"""Split one value into many: a text into parts, a list into batches, or a list in each item into items."""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from typing import TYPE_CHECKING

from concurrency.loop_share import LoopShare
from engine.run_errors import NodeError
from nodes import config_fields, item_keys, item_lists
from nodes.output_sizes import OutputSize

if TYPE_CHECKING:
    from engine.node_api import NodeCall
    from engine.values import Json


class SplitMode(StrEnum):
    TEXT = "text"
    BATCHES = "batches"
    FIELD = "field"


async def run(call: NodeCall) -> Json:
    match config_fields.read_choice(call.config, "mode", SplitMode):
        case SplitMode.TEXT:
            items = _split_text(call.config)
        case SplitMode.BATCHES:
            items = _split_batches(call.config)
        case SplitMode.FIELD:
            items = await _split_elements(call)
    return {"items": items, "count": len(items)}


def _split_text(config: Mapping[str, Json]) -> list[Json]:
    separator = config_fields.read_text(config, "separator")
    if not separator:
        raise NodeError("`separator` must have at least one character", code="invalid-config")
    parts = config_fields.read_text(config, "value").split(separator, item_lists.MAXIMUM_ITEMS)
    if len(parts) > item_lists.MAXIMUM_ITEMS:
        message = f"The text has more than {item_lists.MAXIMUM_ITEMS:,} parts: is `separator` right?"
        raise NodeError(message, code="too-many-items")
    if config_fields.read_flag(config, "trim"):
        parts = [part.strip() for part in parts]
    drops_empty = config_fields.read_flag(config, "dropEmpty")
    return [part for part in parts if part or not drops_empty]


def _split_batches(config: Mapping[str, Json]) -> list[Json]:
    items = item_lists.read_items(config, "value")
    size = config_fields.read_number(config, "size", minimum=1, maximum=item_lists.MAXIMUM_ITEMS)
    if not isinstance(size, int):
        raise config_fields.invalid_field("size", "a whole number", size)
    return [items[start : start + size] for start in range(0, len(items), size)]


async def _split_elements(call: NodeCall) -> list[Json]:
    """Return an item for each element of the list in the field `field` of each item; with the item's other fields if
    `keepFields`.

    Raises `NodeError` for an item that is no object, a field that is no list, and too many or too large items.
    """
    name = config_fields.read_text(call.config, "field")
    keeps_fields = config_fields.read_flag(call.config, "keepFields")
    found: list[Json] = []
    size = OutputSize("The items")
    turn = LoopShare()
    for index, item in enumerate(item_lists.read_items(call.config, "value")):
        own = item_keys.require_item_fields(item, index, f"it has no field `{name}`")
        for element in _read_list(own, index, name, call.unresolved):
            await turn.yield_if_due()
            made: Json = {**own, name: element} if keeps_fields else element
            size.add(made)
            found.append(made)
            if len(found) > item_lists.MAXIMUM_ITEMS:
                message = (
                    f"The lists in `{name}` have more than {item_lists.MAXIMUM_ITEMS:,} elements together"
                )
                raise NodeError(message, code="too-many-items")
    return found


def _read_list(own: Mapping[str, Json], index: int, name: str, unresolved: list[str]) -> list[Json]:
    """Return the list in a field of an item; empty for null, and for a missing field, whose path is added to
    `unresolved`.

    Raises `NodeError` for other types.
    """
    if name not in own:
        unresolved.append(f"item.{name}")
    value = own.get(name)
    if value is None:
        return []
    if isinstance(value, list):
        return value
    message = f"Item {index} has {config_fields.describe_type(value)} in `{name}`, where a list is needed"
    raise NodeError(message, code="not-a-list")
