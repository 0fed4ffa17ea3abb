"""Sort items by one or more keys; the sort is stable."""

from __future__ import annotations

import heapq
import re
from collections.abc import Callable, Mapping
from enum import StrEnum
from typing import TYPE_CHECKING, Any, Self, TypeAlias

from msgspec import Struct

from concurrency.loop_share import LoopShare
from engine.expressions import compile_value
from engine.run_errors import NodeError
from engine.values import encode_canonical
from nodes import config_fields, item_keys, item_lists, missing_fields
from nodes.item_keys import ItemKey

if TYPE_CHECKING:
    from engine.node_api import NodeCall
    from engine.values import Json

SortRank: TypeAlias = tuple[int, Any]
"""Rank of a value's type, and its key among values of the type."""

MAXIMUM_NATURAL_CHARACTERS = 10_000
SORT_BATCH = 5_000
"""Items per step: some milliseconds' work."""
DIGITS = re.compile(r"0*([0-9]+)")


class SortOrder(StrEnum):
    ASCENDING = "ascending"
    DESCENDING = "descending"


class NullOrder(StrEnum):
    FIRST = "first"
    LAST = "last"


class TextOrder(StrEnum):
    EXACT = "exact"
    IGNORE_CASE = "ignore-case"
    NATURAL = "natural"


class SortCriterion(Struct, frozen=True):
    """Sort key with its direction."""

    key: ItemKey
    descends: bool
    nulls: NullOrder
    text: TextOrder

    @classmethod
    def from_config(cls, call: NodeCall, source: Json) -> Self:
        """Return the criterion of an entry of `by`: a key, or an object with key and settings.

        The key is compiled as written, settings are rendered. Raises `NodeError` for invalid keys or settings, and
        `ExpressionError`.
        """
        if not isinstance(source, dict):
            return cls._of({}, ItemKey.from_config("by", call, source))
        settings = {name: value for name, value in source.items() if name != "key"}
        rendered = compile_value(settings).render(call.scope, call.unresolved)
        return cls._of(
            config_fields.read_mapping({"by": rendered}, "by"),
            ItemKey.from_config("by", call, source.get("key")),
        )

    @classmethod
    def from_data(cls, call: NodeCall, value: Json) -> Self:
        """Return the criterion of an entry of `by` that an expression gave: a field name, or an object with
        key and settings.

        Nothing in it is an expression. Raises `NodeError` for an invalid one.
        """
        if isinstance(value, dict):
            return cls._of(value, ItemKey.from_name("by", call, value.get("key")))
        return cls._of({}, ItemKey.from_name("by", call, value))

    @classmethod
    def _of(cls, settings: Mapping[str, Json], key: ItemKey) -> Self:
        given = {**DEFAULT_CRITERION, **settings}
        return cls(
            key=key,
            descends=config_fields.read_choice(given, "order", SortOrder) is SortOrder.DESCENDING,
            nulls=config_fields.read_choice(given, "nulls", NullOrder),
            text=config_fields.read_choice(given, "text", TextOrder),
        )

    def rank(self, item: Json, index: int) -> SortRank:
        """Return the value by which an item is sorted, in the order false, true, numbers, texts, lists, objects.

        Nulls are placed at the configured end, whatever the direction. Raises the errors of the key.
        """
        value = self.key.value_of(item, index)
        match value:
            case None:
                # A descending sort is reversed, but nulls must stay at the configured end.
                is_lowest = (self.nulls is NullOrder.FIRST) != self.descends
                return (-1, 0) if is_lowest else (5, 0)
            case bool():
                return (0, value)
            case int() | float():
                return (1, value)
            case str():
                return (2, TEXT_KEYS[self.text](value))
            case list():
                return (3, encode_canonical(value))
            case dict():
                return (4, encode_canonical(value))


async def run(call: NodeCall) -> Json:
    items = item_lists.read_items(call.config)
    places = list(range(len(items)))
    turn = LoopShare()
    # The sort is stable: a later key decides between items with equal earlier keys.
    criteria = _read_criteria(call)
    for criterion in reversed(criteria):
        ranks: list[SortRank] = []
        for index, item in enumerate(items):
            await turn.yield_if_due()
            ranks.append(criterion.rank(item, index))
        places = await _sort_places(places, ranks, turn, descends=criterion.descends)
    absent = [path for criterion in criteria for path in criterion.key.missing_paths(len(items))]
    missing_fields.require_fields(call, absent, len(items))
    return {"items": [items[place] for place in places], "count": len(items)}


async def _sort_places(
    places: list[int], ranks: list[SortRank], turn: LoopShare, *, descends: bool
) -> list[int]:
    """Return `places`, indexes of `ranks`, sorted stably by the rank at each, the highest first if `descends`, in
    batches between which other tasks run.
    """
    parts: list[list[int]] = []
    for begin in range(0, len(places), SORT_BATCH):
        await turn.yield_if_due()
        part = places[begin : begin + SORT_BATCH]
        parts.append(sorted(part, key=ranks.__getitem__, reverse=descends))
    if len(parts) <= 1:
        return parts[0] if parts else []
    merged: list[int] = []
    for place in heapq.merge(*parts, key=ranks.__getitem__, reverse=descends):
        await turn.yield_if_due()
        merged.append(place)
    return merged


def _read_criteria(call: NodeCall) -> list[SortCriterion]:
    template = call.values["by"]
    if isinstance(template.source, list):
        criteria = [SortCriterion.from_config(call, entry) for entry in template.source]
    else:
        entries = config_fields.read_sequence({"by": template.render(call.scope, call.unresolved)}, "by")
        criteria = [SortCriterion.from_data(call, entry) for entry in entries]
    item_keys.require_key_count("by", len(criteria))
    return criteria


def natural_key(text: str) -> str:
    """Return a key for natural order, ignoring case: `file9` before `file10`.

    Each number becomes a 0, one character for the number of its digits, and the digits, so that the shorter
    of two numbers comes first. Raises `NodeError` for over 10,000 characters.
    """
    if len(text) > MAXIMUM_NATURAL_CHARACTERS:
        message = (
            f"A text of {len(text):,} characters is too long to sort: at most {MAXIMUM_NATURAL_CHARACTERS:,}"
        )
        raise NodeError(message, code="key-too-long")
    return DIGITS.sub(_pad_number, text.casefold())


def _pad_number(match: re.Match[str]) -> str:
    return f"0{chr(len(match[1]))}{match[1]}"


DEFAULT_CRITERION: Mapping[str, Json] = {
    "order": SortOrder.ASCENDING,
    "nulls": NullOrder.LAST,
    "text": TextOrder.EXACT,
}
TEXT_KEYS: Mapping[TextOrder, Callable[[str], str]] = {
    TextOrder.EXACT: lambda text: text,
    TextOrder.IGNORE_CASE: str.casefold,
    TextOrder.NATURAL: natural_key,
}
