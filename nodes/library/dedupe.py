"""Of items with equal keys one stays, the first or the last, where it stood."""

from __future__ import annotations

from collections.abc import Hashable
from enum import StrEnum
from typing import TYPE_CHECKING

from concurrency.loop_share import Turn
from engine.values import identity_key
from nodes import fields, lists
from nodes.keys import Keys

if TYPE_CHECKING:
    from engine.node_api import NodeCall
    from engine.values import Json


class Keep(StrEnum):
    FIRST = "first"
    LAST = "last"


async def run(call: NodeCall) -> Json:
    items = lists.items(call.config)
    keys = Keys.of_config(call, "by")
    keeps_last = fields.choice(call.config, "keep", Keep) is Keep.LAST
    kept: dict[Hashable, int] = {}
    turn = Turn()
    for index, item in enumerate(items):
        await turn.share()
        key = identity_key(keys.of(item, index))
        if keeps_last or key not in kept:
            kept[key] = index
    places = sorted(kept.values())
    return {
        "items": [items[place] for place in places],
        "count": len(places),
        "removed": len(items) - len(places),
    }
