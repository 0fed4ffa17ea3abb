"""Join each item with the rows of a table that have the same key."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping
from enum import StrEnum
from typing import TYPE_CHECKING, Self, TypeAlias

from msgspec import Struct

from concurrency.loop_share import LoopShare
from engine.run_errors import NodeError
from engine.values import identity_key
from nodes import config_fields, item_keys, item_lists
from nodes.item_keys import ItemKeys
from nodes.output_sizes import OutputSize

if TYPE_CHECKING:
    from engine.node_api import NodeCall
    from engine.values import Json

LookupTable: TypeAlias = "Mapping[Hashable, list[Json]]"
"""Rows of each key, in order."""


class LookupMatches(StrEnum):
    FIRST = "first"
    EACH = "each"
    LIST = "list"


class LookupMissAction(StrEnum):
    KEEP = "keep"
    DROP = "drop"
    ERROR = "error"


class LookupJoin(Struct, frozen=True):
    """Rules for joining an item with its matching rows."""

    matches: LookupMatches
    on_missing: LookupMissAction
    name: str | None
    """Field for the matches; None merges the rows' fields into the item."""

    @classmethod
    def from_config(cls, config: Mapping[str, Json]) -> Self:
        matches = config_fields.read_choice(config, "matches", LookupMatches)
        needs_name = matches is LookupMatches.LIST or config.get("as") is not None
        return cls(
            matches,
            config_fields.read_choice(config, "onMissing", LookupMissAction),
            config_fields.read_text(config, "as") if needs_name else None,
        )

    def join_item(self, item: Json, index: int, rows: list[Json]) -> Iterator[Json]:
        """Yield an item joined with its matching `rows`: by `matches` once with the first row, once with each row, or
        once with the list of all. The item's own fields win over those of a row.

        Without rows, by `on_missing`, it yields nothing, raises `NodeError`, or yields the item, in which the field
        `name`, if set, is null or an empty list. Raises `NodeError` also for a joined item that is no object, and, if
        `name` is not set, for a row that is no object. It is lazy, since a single item can exceed the limit of the
        output.
        """
        if not rows:
            yield from self._handle_missing(item, index)
        elif self.matches is LookupMatches.LIST:
            yield self._add_matches(item, index, rows)
        else:
            found = rows if self.matches is LookupMatches.EACH else rows[:1]
            yield from (self._add_matches(item, index, row) for row in found)

    def _handle_missing(self, item: Json, index: int) -> list[Json]:
        if self.on_missing is LookupMissAction.ERROR:
            message = f"The table has no row for item {index}; `onMissing` can keep or drop such items"
            raise NodeError(message, code="no-match")
        if self.on_missing is LookupMissAction.DROP:
            return []
        nothing: Json = [] if self.matches is LookupMatches.LIST else None
        return [item if self.name is None else self._add_matches(item, index, nothing)]

    def _add_matches(self, item: Json, index: int, found: Json) -> Json:
        own = item_keys.require_item_fields(item, index, "no fields can be added to it")
        if self.name is not None:
            return {**own, self.name: found}
        if not isinstance(found, dict):
            kind = config_fields.describe_type(found)
            message = f"A row of the table is {kind}, which has no fields to merge into an item: set `as`"
            raise NodeError(message, code="not-an-object")
        return own | {name: value for name, value in found.items() if name not in own}


async def run(call: NodeCall) -> Json:
    items = item_lists.read_items(call.config)
    join = LookupJoin.from_config(call.config)
    turn = LoopShare()
    by = ItemKeys.from_config(call, "by")
    table = await _build_table(call, by, turn)
    joined: list[Json] = []
    unmatched = 0
    size = OutputSize("The joined items")
    for index, item in enumerate(items):
        await turn.yield_if_due()
        rows = table.get(_join_key(by.values_of(item, index)), [])
        unmatched += not rows
        for made in join.join_item(item, index, rows):
            await turn.yield_if_due()
            size.add(made)
            joined.append(made)
            if len(joined) > item_lists.MAXIMUM_ITEMS:
                message = (
                    f"More than {item_lists.MAXIMUM_ITEMS:,} items: `matches: list` returns one for each"
                )
                raise NodeError(message, code="too-many-items")
    return {"items": joined, "count": len(joined), "unmatched": unmatched}


async def _build_table(call: NodeCall, by: ItemKeys, turn: LoopShare) -> LookupTable:
    """Return the rows of the lookup table by their key `tableBy`, or else `by`; rows with a null in their key are left
    out.

    Raises `NodeError` if `tableBy` has another number of parts than `by`.
    """
    table_by = ItemKeys.from_config(call, "tableBy" if "tableBy" in call.values else "by")
    if len(table_by.parts) != len(by.parts):
        message = f"`tableBy` has {len(table_by.parts)} parts, but `by` has {len(by.parts)}"
        raise NodeError(message, code="invalid-config")
    table: dict[Hashable, list[Json]] = {}
    for index, row in enumerate(item_lists.read_items(call.config, "table")):
        await turn.yield_if_due()
        key = _join_key(table_by.values_of(row, index))
        if key is not None:
            table.setdefault(key, []).append(row)
    return table


def _join_key(key: list[Json]) -> Hashable:
    """Return a hashable key; None for a key with a null, which matches nothing, as in SQL."""
    return None if None in key else identity_key(key)
