"""Items that meet a condition stay, in their order."""

from __future__ import annotations

from typing import TYPE_CHECKING

from concurrency.loop_share import Turn
from nodes import lists

if TYPE_CHECKING:
    from engine.node_api import NodeCall
    from engine.values import Json


async def run(call: NodeCall) -> Json:
    condition = call.conditions["condition"]
    items = lists.items(call.config)
    kept: list[Json] = []
    turn = Turn()
    for index, item in enumerate(items):
        await turn.share()
        if condition.test(call.scope_of(item, index), call.unresolved):
            kept.append(item)
    return {"items": kept, "count": len(kept), "removed": len(items) - len(kept)}
