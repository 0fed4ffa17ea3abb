"""Group items by fields, and aggregate numbers of each group."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from enum import StrEnum
from typing import TYPE_CHECKING, Self, TypeAlias

from msgspec import Struct, field

from concurrency.loop_share import LoopShare
from engine.run_errors import NodeError
from engine.values import identity_key
from nodes import config_fields, item_lists, missing_fields

if TYPE_CHECKING:
    from engine.node_api import NodeCall
    from engine.values import Json

Number: TypeAlias = int | float

MAXIMUM_AGGREGATIONS = 50
MAXIMUM_GROUP_FIELDS = 20
MAXIMUM_RESULTS = 500_000
"""Maximum number of results in all groups: each takes some 300 bytes during the computation."""


class AggregateFunction(StrEnum):
    SUM = "sum"
    AVG = "avg"
    MIN = "min"
    MAX = "max"
    COUNT = "count"


class AggregateField(Struct, frozen=True):
    """Aggregation of one field."""

    function: AggregateFunction
    field: str | None
    name: str

    @classmethod
    def from_config(cls, config: Json) -> Self:
        if not isinstance(config, dict):
            raise config_fields.invalid_field("aggregations", "a list of objects", config)
        function = config_fields.read_choice(config, "function", AggregateFunction)
        needs_field = function is not AggregateFunction.COUNT or config.get("field") is not None
        return cls(
            function,
            config_fields.read_text(config, "field") if needs_field else None,
            config_fields.read_text(config, "as"),
        )


class AggregateItem(Struct, frozen=True):
    """Item of the list with its index."""

    value: Json
    index: int
    missing: set[str]
    """Fields that some item lacks."""
    found: set[str]
    """Fields that some item has."""

    def read_field(self, name: str) -> Json:
        """Return the value of a field by its name or dotted path, null if it is missing, and record in `found` or
        `missing` which.

        Raises `NodeError` if the item is no object.
        """
        if not isinstance(self.value, dict):
            message = (
                f"Item {self.index} is {config_fields.describe_type(self.value)}: it has no field `{name}`"
            )
            raise NodeError(message, code="not-an-object")
        if name in self.value:
            self.found.add(name)
            return self.value[name]
        found: Json = self.value
        for step in name.split("."):
            if not isinstance(found, dict) or step not in found:
                self.missing.add(name)
                return None
            found = found[step]
        self.found.add(name)
        return found

    def read_number(self, name: str) -> Number | None:
        """Return the number in a field; None for null and a missing field.

        Raises `NodeError` for other types, also booleans, and if the item is no object.
        """
        value = self.read_field(name)
        if value is None or (isinstance(value, int | float) and not isinstance(value, bool)):
            return value
        hint = "; csv-parse converts texts to numbers with `types`" if isinstance(value, str) else ""
        found = config_fields.describe_type(value)
        message = f"Item {self.index} has {found} in `{name}`, where a number is needed{hint}"
        raise NodeError(message, code="not-a-number")


class AggregateTally(Struct):
    """Intermediate state of one aggregation of one group."""

    aggregation: AggregateField
    count: int = 0
    numbers: list[Number] = field(default_factory=list)

    def add(self, item: AggregateItem) -> None:
        name = self.aggregation.field
        if name is None:
            self.count += 1
        elif self.aggregation.function is AggregateFunction.COUNT:
            self.count += item.read_field(name) is not None
        elif (number := item.read_number(name)) is not None:
            self.numbers.append(number)

    def result(self) -> Number | None:
        function = self.aggregation.function
        if function is AggregateFunction.COUNT:
            return self.count
        try:
            return AGGREGATE_FUNCTIONS[function](self.numbers)
        except OverflowError:
            message = f"The {function} of `{self.aggregation.field}` is too large"
            raise NodeError(message, code="number-too-large") from None


class ItemGroup(Struct, frozen=True):
    """Group of items with the same values in the fields of `groupBy`."""

    keys: Sequence[Json]
    tallies: Sequence[AggregateTally]

    def row(self, group_by: Sequence[str]) -> dict[str, Json]:
        """Return the output of the group: the fields of `groupBy` with its values, and the results of its aggregations
        by name.
        """
        results = {tally.aggregation.name: tally.result() for tally in self.tallies}
        return {**dict(zip(group_by, self.keys, strict=True)), **results}


async def run(call: NodeCall) -> Json:
    group_by = _read_group_by(call.config)
    aggregations = _read_aggregations(call.config, group_by)
    groups: dict[Hashable, ItemGroup] = {}
    if not group_by:
        # All items are one group, which exists even without items.
        groups[identity_key([])] = ItemGroup([], [*map(AggregateTally, aggregations)])
    missing: set[str] = set()
    found: set[str] = set()
    turn = LoopShare()
    items = item_lists.read_items(call.config)
    for index, value in enumerate(items):
        await turn.yield_if_due()
        item = AggregateItem(value, index, missing, found)
        keys = [item.read_field(name) for name in group_by]
        group = groups.get(identity_key(keys))
        if group is None:
            _check_size((len(groups) + 1) * len(aggregations))
            group = groups[identity_key(keys)] = ItemGroup(keys, [*map(AggregateTally, aggregations)])
        for tally in group.tallies:
            tally.add(item)
    call.unresolved.extend(f"item.{name}" for name in sorted(missing))
    named = {*group_by, *(one.field for one in aggregations if one.field is not None)}
    missing_fields.require_fields(call, [f"item.{name}" for name in sorted(named - found)], len(items))
    return {"groups": [group.row(group_by) for group in groups.values()], "count": len(groups)}


def _read_group_by(config: Mapping[str, Json]) -> list[str]:
    names = config_fields.read_sequence(config, "groupBy")
    if len(names) > MAXIMUM_GROUP_FIELDS:
        raise config_fields.invalid_field("groupBy", f"a list of at most {MAXIMUM_GROUP_FIELDS}", names)
    return [config_fields.read_text({"groupBy": name}, "groupBy") for name in names]


def _read_aggregations(config: Mapping[str, Json], group_by: Sequence[str]) -> list[AggregateField]:
    entries = config_fields.read_sequence(config, "aggregations")
    if len(entries) > MAXIMUM_AGGREGATIONS:
        raise config_fields.invalid_field(
            "aggregations", f"a list of at most {MAXIMUM_AGGREGATIONS}", entries
        )
    aggregations = [AggregateField.from_config(entry) for entry in entries]
    names = [*group_by, *(aggregation.name for aggregation in aggregations)]
    for name in names:
        if names.count(name) > 1:
            message = f"Two fields of a group would be named `{name}`: give one of them another `as`"
            raise NodeError(message, code="duplicate-name")
    return aggregations


def _check_size(results: int) -> None:
    if results > MAXIMUM_RESULTS:
        message = (
            f"The groups have more than {MAXIMUM_RESULTS:,} results: compute fewer, or group by fewer fields"
        )
        raise NodeError(message, code="too-many-groups")


def _sum_exactly(numbers: Sequence[Number]) -> Number:
    """Return the exact sum of integers, or the correctly rounded sum if a float is among them."""
    return sum(numbers) if all(isinstance(number, int) for number in numbers) else math.fsum(numbers)


def _average_exactly(numbers: Sequence[Number]) -> Number | None:
    return _sum_exactly(numbers) / len(numbers) if numbers else None


AGGREGATE_FUNCTIONS: Mapping[AggregateFunction, Callable[[Sequence[Number]], Number | None]] = {
    AggregateFunction.SUM: _sum_exactly,
    AggregateFunction.AVG: _average_exactly,
    AggregateFunction.MIN: lambda numbers: min(numbers, default=None),
    AggregateFunction.MAX: lambda numbers: max(numbers, default=None),
}
