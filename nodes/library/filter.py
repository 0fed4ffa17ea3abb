"""Keep the items that meet a condition, in their order."""

from __future__ import annotations

from typing import TYPE_CHECKING

from concurrency.loop_share import LoopShare
from nodes import item_lists

if TYPE_CHECKING:
    from engine.node_api import NodeCall
    from engine.values import Json


async def run(call: NodeCall) -> Json:
    condition = call.conditions["condition"]
    items = item_lists.read_items(call.config)
    kept: list[Json] = []
    turn = LoopShare()
    for index, item in enumerate(items):
        await turn.yield_if_due()
        if condition.test(call.scope_of(item, index), call.unresolved):
            kept.append(item)
    return {"items": kept, "count": len(kept), "removed": len(items) - len(kept)}
