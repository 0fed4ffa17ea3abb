"""Keep the first or last item of each key, in the original order."""

from __future__ import annotations

from collections.abc import Hashable
from enum import StrEnum
from typing import TYPE_CHECKING

from concurrency.loop_share import LoopShare
from engine.values import identity_key
from nodes import config_fields, item_lists
from nodes.item_keys import ItemKeys

if TYPE_CHECKING:
    from engine.node_api import NodeCall
    from engine.values import Json


class DuplicateToKeep(StrEnum):
    FIRST = "first"
    LAST = "last"


async def run(call: NodeCall) -> Json:
    items = item_lists.read_items(call.config)
    keys = ItemKeys.from_config(call, "by")
    keeps_last = config_fields.read_choice(call.config, "keep", DuplicateToKeep) is DuplicateToKeep.LAST
    kept: dict[Hashable, int] = {}
    turn = LoopShare()
    for index, item in enumerate(items):
        await turn.yield_if_due()
        key = identity_key(keys.values_of(item, index))
        if keeps_last or key not in kept:
            kept[key] = index
    places = sorted(kept.values())
    return {
        "items": [items[place] for place in places],
        "count": len(places),
        "removed": len(items) - len(places),
    }
