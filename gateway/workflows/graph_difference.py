"""Differences between two states of a workflow: nodes and connections by id, other fields by key."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from msgspec import UNSET, UnsetType

from engine.values import equal_json
from gateway.http.wire import WireStruct

if TYPE_CHECKING:
    from engine.values import Json

POSITION = "position"


class ValueChange(WireStruct):
    """Value before and after; an absent side had none."""

    before: Any | UnsetType = UNSET
    after: Any | UnsetType = UNSET


class ChangedItem(WireStruct):
    """Node or connection that both states have."""

    id: str
    changes: dict[str, ValueChange]
    """Changes by field name; empty for a node that was only moved."""
    position: ValueChange | UnsetType = UNSET
    """Position of a moved node, before and after."""


class ItemsDifference(WireStruct):
    """Added, removed and changed nodes or connections; their order is ignored."""

    added: list[dict[str, Any]]
    removed: list[dict[str, Any]]
    changed: list[ChangedItem]


def compare_items(before: Sequence[dict[str, Json]], after: Sequence[dict[str, Json]]) -> ItemsDifference:
    """Return the added, removed and changed items between two lists of nodes or connections, each with an `id`.

    Their order is ignored.
    """
    old, new = _by_id(before), _by_id(after)
    pairs = ((old[key], item) for key, item in new.items() if key in old)
    changed = (_compare_item(left, right) for left, right in pairs)
    return ItemsDifference(
        added=[item for key, item in new.items() if key not in old],
        removed=[item for key, item in old.items() if key not in new],
        changed=[item for item in changed if item is not None],
    )


def compare_fields(before: Mapping[str, Json], after: Mapping[str, Json]) -> dict[str, ValueChange]:
    """Return the keys whose values differ as JSON (1 is not true), or that one side lacks, each with both values."""
    return {
        key: ValueChange(before=before.get(key, UNSET), after=after.get(key, UNSET))
        for key in {**before, **after}
        if not (key in before and key in after and equal_json(before[key], after[key]))
    }


def _by_id(items: Sequence[dict[str, Json]]) -> dict[tuple[str, int], dict[str, Json]]:
    """Return items by their id and the number of earlier items with that id, since drafts may have duplicate ids."""
    bearers: Counter[str] = Counter()
    found = {}
    for item in items:
        item_id = str(item["id"])
        found[item_id, bearers[item_id]] = item
        bearers[item_id] += 1
    return found


def _compare_item(before: dict[str, Json], after: dict[str, Json]) -> ChangedItem | None:
    changes = compare_fields(before, after)
    if not changes:
        return None
    position = changes.pop(POSITION, UNSET)
    return ChangedItem(id=str(after["id"]), changes=changes, position=position)
