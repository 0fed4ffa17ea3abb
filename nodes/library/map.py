"""Replace each item by a computed value, or merge new fields into it."""

from __future__ import annotations

from enum import StrEnum
from typing import TYPE_CHECKING

from concurrency.loop_share import LoopShare
from nodes import config_fields, item_keys, item_lists
from nodes.output_sizes import OutputSize

if TYPE_CHECKING:
    from engine.node_api import NodeCall
    from engine.values import Json


class MapMode(StrEnum):
    REPLACE = "replace"
    MERGE = "merge"


async def run(call: NodeCall) -> Json:
    value = call.values["value"]
    merges = config_fields.read_choice(call.config, "mode", MapMode) is MapMode.MERGE
    mapped: list[Json] = []
    size = OutputSize("The mapped items")
    turn = LoopShare()
    for index, item in enumerate(item_lists.read_items(call.config)):
        await turn.yield_if_due()
        made = value.render(call.scope_of(item, index), call.unresolved)
        if merges:
            made = _merge_item(item, index, made)
        size.add(made)
        mapped.append(made)
    return {"items": mapped, "count": len(mapped)}


def _merge_item(item: Json, index: int, made: Json) -> Json:
    own = item_keys.require_item_fields(
        item, index, "fields can only be merged into an object; `mode: replace` replaces it"
    )
    return {**own, **config_fields.read_mapping({"value": made}, "value")}
