"""Items are put in order by one or more keys; those with equal keys stay in the order they came in."""

from __future__ import annotations

import heapq
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Any, Self, TypeAlias

from concurrency.loop_share import Turn
from engine.expressions import compile_value
from engine.run_errors import NodeError
from engine.values import encode_canonical
from nodes import absences, fields, keys, lists
from nodes.keys import Key

if TYPE_CHECKING:
    from engine.node_api import NodeCall
    from engine.values import Json

Rank: TypeAlias = tuple[int, Any]
"""Where values of a type stand among the others, and what compares them with one another."""

MAXIMUM_NATURAL_CHARACTERS = 10_000
SORTED_AT_ONCE = 5_000
"""Items: some milliseconds' work."""
DIGITS = re.compile(r"0*([0-9]+)")


class Order(StrEnum):
    ASCENDING = "ascending"
    DESCENDING = "descending"


class Nulls(StrEnum):
    FIRST = "first"
    LAST = "last"


class Text(StrEnum):
    EXACT = "exact"
    IGNORE_CASE = "ignore-case"
    NATURAL = "natural"


@dataclass(frozen=True, slots=True)
class Criterion:
    """One thing to sort by, and which way."""

    key: Key
    descends: bool
    nulls: Nulls
    text: Text

    @classmethod
    def written(cls, call: NodeCall, source: Json) -> Self:
        """Return what one entry of `by` says; its key is read as it is written, the rest as it is rendered."""
        if not isinstance(source, dict):
            return cls._of({}, Key.written("by", call, source))
        settings = {name: value for name, value in source.items() if name != "key"}
        rendered = compile_value(settings).render(call.scope, call.unresolved)
        return cls._of(fields.mapping({"by": rendered}, "by"), Key.written("by", call, source.get("key")))

    @classmethod
    def arrived(cls, call: NodeCall, value: Json) -> Self:
        """Return what an entry of data says, in which nothing is an expression."""
        if isinstance(value, dict):
            return cls._of(value, Key.named("by", call, value.get("key")))
        return cls._of({}, Key.named("by", call, value))

    @classmethod
    def _of(cls, settings: Mapping[str, Json], key: Key) -> Self:
        given = {**DEFAULTS, **settings}
        return cls(
            key=key,
            descends=fields.choice(given, "order", Order) is Order.DESCENDING,
            nulls=fields.choice(given, "nulls", Nulls),
            text=fields.choice(given, "text", Text),
        )

    def rank(self, item: Json, index: int) -> Rank:
        """Return what stands for an item in a comparison: null, false, true, numbers, texts, lists, objects."""
        value = self.key.of(item, index)
        match value:
            case None:
                # The order of all is turned round when it descends, but nulls stay where they are wanted.
                is_lowest = (self.nulls is Nulls.FIRST) != self.descends
                return (-1, 0) if is_lowest else (5, 0)
            case bool():
                return (0, value)
            case int() | float():
                return (1, value)
            case str():
                return (2, COMPARED[self.text](value))
            case list():
                return (3, encode_canonical(value))
            case dict():
                return (4, encode_canonical(value))


async def run(call: NodeCall) -> Json:
    items = lists.items(call.config)
    places = list(range(len(items)))
    turn = Turn()
    # Sorting is stable: what the last key decides stays decided wherever the keys before it are equal.
    criteria = _criteria(call)
    for criterion in reversed(criteria):
        ranks: list[Rank] = []
        for index, item in enumerate(items):
            await turn.share()
            ranks.append(criterion.rank(item, index))
        places = await _in_order(places, ranks, turn, descends=criterion.descends)
    absent = [path for criterion in criteria for path in criterion.key.absent(len(items))]
    absences.check(call, absent, len(items))
    return {"items": [items[place] for place in places], "count": len(items)}


async def _in_order(places: list[int], ranks: list[Rank], turn: Turn, *, descends: bool) -> list[int]:
    """Return places by their ranks, equal ones as they stood; no step of it keeps others waiting for long."""
    parts: list[list[int]] = []
    for begin in range(0, len(places), SORTED_AT_ONCE):
        await turn.share()
        part = places[begin : begin + SORTED_AT_ONCE]
        parts.append(sorted(part, key=ranks.__getitem__, reverse=descends))
    if len(parts) <= 1:
        return parts[0] if parts else []
    merged: list[int] = []
    for place in heapq.merge(*parts, key=ranks.__getitem__, reverse=descends):
        await turn.share()
        merged.append(place)
    return merged


def _criteria(call: NodeCall) -> list[Criterion]:
    template = call.values["by"]
    if isinstance(template.source, list):
        criteria = [Criterion.written(call, entry) for entry in template.source]
    else:
        entries = fields.sequence({"by": template.render(call.scope, call.unresolved)}, "by")
        criteria = [Criterion.arrived(call, entry) for entry in entries]
    keys.check_count("by", len(criteria))
    return criteria


def natural(text: str) -> str:
    """Return a text that sorts as people count: `file9` before `file10`, whatever the case.

    Each number becomes a 0, one character for how many digits it has, and the digits, so that of two numbers the
    shorter comes first.
    """
    if len(text) > MAXIMUM_NATURAL_CHARACTERS:
        message = (
            f"A text of {len(text):,} characters is no natural key: at most {MAXIMUM_NATURAL_CHARACTERS:,}"
        )
        raise NodeError(message, code="key-too-long")
    return DIGITS.sub(_counted, text.casefold())


def _counted(match: re.Match[str]) -> str:
    return f"0{chr(len(match[1]))}{match[1]}"


DEFAULTS: Mapping[str, Json] = {"order": Order.ASCENDING, "nulls": Nulls.LAST, "text": Text.EXACT}
COMPARED: Mapping[Text, Callable[[str], str]] = {
    Text.EXACT: lambda text: text,
    Text.IGNORE_CASE: str.casefold,
    Text.NATURAL: natural,
}
