"""What differs between two states of a workflow: nodes and edges by their ids, everything else by its keys."""

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
    """A value before and after; the side on which there was none is left out."""

    before: Any | UnsetType = UNSET
    after: Any | UnsetType = UNSET


class ChangedItem(WireStruct):
    """A node or an edge that is there before and after."""

    id: str
    changes: dict[str, ValueChange]
    """By the names of the fields; empty where a node was only moved."""
    position: ValueChange | UnsetType = UNSET
    """Where a node was moved from and to."""


class ItemsDifference(WireStruct):
    """Nodes or edges that came, went, or are no longer what they were; their order counts for nothing."""

    added: list[dict[str, Any]]
    removed: list[dict[str, Any]]
    changed: list[ChangedItem]


def compare_items(before: Sequence[dict[str, Json]], after: Sequence[dict[str, Json]]) -> ItemsDifference:
    """Return what differs between two lists of nodes or edges, each with an `id`."""
    old, new = _by_id(before), _by_id(after)
    pairs = ((old[key], item) for key, item in new.items() if key in old)
    changed = (_changed(left, right) for left, right in pairs)
    return ItemsDifference(
        added=[item for key, item in new.items() if key not in old],
        removed=[item for key, item in old.items() if key not in new],
        changed=[item for item in changed if item is not None],
    )


def compare_fields(before: Mapping[str, Json], after: Mapping[str, Json]) -> dict[str, ValueChange]:
    """Return the keys whose values differ, or that only one side has."""
    return {
        key: ValueChange(before=before.get(key, UNSET), after=after.get(key, UNSET))
        for key in {**before, **after}
        if not (key in before and key in after and equal_json(before[key], after[key]))
    }


def _by_id(items: Sequence[dict[str, Json]]) -> dict[tuple[str, int], dict[str, Json]]:
    """Return items by their ids, and by how many bearers an id had before: drafts may hold one more than once."""
    bearers: Counter[str] = Counter()
    found = {}
    for item in items:
        item_id = str(item["id"])
        found[item_id, bearers[item_id]] = item
        bearers[item_id] += 1
    return found


def _changed(before: dict[str, Json], after: dict[str, Json]) -> ChangedItem | None:
    changes = compare_fields(before, after)
    if not changes:
        return None
    position = changes.pop(POSITION, UNSET)
    return ChangedItem(id=str(after["id"]), changes=changes, position=position)
