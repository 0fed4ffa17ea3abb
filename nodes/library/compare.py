"""Compare two lists by key: added, removed, changed and unchanged items."""

from __future__ import annotations

from collections.abc import Collection, Hashable, Mapping
from typing import TYPE_CHECKING

from concurrency.loop_share import LoopShare
from engine.run_errors import NodeError
from engine.values import equal_json, identity_key
from nodes import config_fields, item_lists
from nodes.item_keys import ItemKeys

if TYPE_CHECKING:
    from engine.node_api import NodeCall
    from engine.values import Json


async def run(call: NodeCall) -> Json:
    ignored = {
        config_fields.read_text({"ignore": name}, "ignore")
        for name in config_fields.read_sequence(call.config, "ignore")
    }
    keys = ItemKeys.from_config(call, "by")
    turn = LoopShare()
    before = await _index_by_key(call.config, "before", keys, turn)
    after = await _index_by_key(call.config, "after", keys, turn)
    added: list[Json] = []
    changed: list[Json] = []
    unchanged: list[Json] = []
    for key, item in after.items():
        await turn.yield_if_due()
        if key not in before:
            added.append(item)
        elif (names := _find_changed_fields(before[key], item, ignored)) is None:
            unchanged.append(item)
        else:
            changed.append({"before": before[key], "after": item, "fields": names})
    removed = [item for key, item in before.items() if key not in after]
    return {
        "added": added,
        "removed": removed,
        "changed": changed,
        "unchanged": unchanged,
        "counts": {
            "added": len(added),
            "removed": len(removed),
            "changed": len(changed),
            "unchanged": len(unchanged),
        },
        "hasChanges": bool(added or removed or changed),
    }


async def _index_by_key(
    config: Mapping[str, Json], name: str, keys: ItemKeys, turn: LoopShare
) -> dict[Hashable, Json]:
    """Return the items of the list in field `name` by their hashable keys, in order; null counts as an empty list.

    Raises `NodeError` for two items with the same key.
    """
    items = [] if config.get(name) is None else item_lists.read_items(config, name)
    found: dict[Hashable, Json] = {}
    places: dict[Hashable, int] = {}
    for index, item in enumerate(items):
        await turn.yield_if_due()
        key = identity_key(keys.values_of(item, index))
        if key in found:
            message = f"Items {places[key]} and {index} of `{name}` have the same key: a dedupe node keeps one of them"
            raise NodeError(message, code="duplicate-key")
        found[key], places[key] = item, index
    return found


def _find_changed_fields(before: Json, after: Json, ignored: Collection[str]) -> list[Json] | None:
    """Return the names of the fields that differ, without `ignored` ones; None for items that count as equal.

    An empty list for differing items of which one is no object.
    """
    if equal_json(before, after):
        return None
    if not isinstance(before, dict) or not isinstance(after, dict):
        return []
    names: list[Json] = [
        name for name in before | after if name not in ignored and not _is_same_field(before, after, name)
    ]
    return names or None


def _is_same_field(before: Mapping[str, Json], after: Mapping[str, Json], name: str) -> bool:
    return name in before and name in after and equal_json(before[name], after[name])
