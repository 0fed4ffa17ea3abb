"""Each item becomes what a value makes of it, or has new fields laid over it."""

from __future__ import annotations

from enum import StrEnum
from typing import TYPE_CHECKING

from concurrency.loop_share import Turn
from nodes import fields, keys, lists
from nodes.sizes import Size

if TYPE_CHECKING:
    from engine.node_api import NodeCall
    from engine.values import Json


class Mode(StrEnum):
    REPLACE = "replace"
    MERGE = "merge"


async def run(call: NodeCall) -> Json:
    value = call.values["value"]
    merges = fields.choice(call.config, "mode", Mode) is Mode.MERGE
    mapped: list[Json] = []
    size = Size("The mapped items")
    turn = Turn()
    for index, item in enumerate(lists.items(call.config)):
        await turn.share()
        made = value.render(call.scope_of(item, index), call.unresolved)
        if merges:
            made = _merged(item, index, made)
        size.add(made)
        mapped.append(made)
    return {"items": mapped, "count": len(mapped)}


def _merged(item: Json, index: int, made: Json) -> Json:
    own = keys.fields_of(item, index, "fields can be laid over an object; `mode: replace` drops it")
    return {**own, **fields.mapping({"value": made}, "value")}
