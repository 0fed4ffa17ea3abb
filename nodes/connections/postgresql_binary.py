"""Plausibility checks of PostgreSQL's binary values before asyncpg reads them: it trusts the counts of a server.

An array of two billion items that contains none would be a list of 16 GB, whose release blocks the interpreter for ten
seconds, and values nested a hundred thousand deep would overflow the stack of the process.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from struct import Struct
from typing import Any, Final

import msgspec

MAX_DEPTH: Final = 64
"""Maximum depth of values."""
MAX_VISITS: Final = 250_000
"""Maximum number of checked values within one: more would take too long."""
MAX_DIMENSIONS: Final = 6
SMALLEST_ITEM: Final = 4
"""Bytes of the length in front of every item."""
ARRAY_HEADER: Final = Struct(">iiI")
"""Number of dimensions, flags, type of the items."""
DIMENSION: Final = Struct(">ii")
COUNT: Final = Struct(">H")
NUMBER: Final = Struct(">i")
FIELD: Final = Struct(">Ii")
"""Type and length of a field of a composite."""


class ContainerType(msgspec.Struct, frozen=True):
    """Type whose values contain other values."""

    kind: str
    """`array`, `composite`, `range` or `multirange`."""
    parts: tuple[int, ...]
    """Types of the contained values: of a composite those of its fields, else one."""


KNOWN_CONTAINERS: Final[Mapping[int, ContainerType]] = {
    1009: ContainerType("array", (25,)),
    1028: ContainerType("array", (26,)),
}
"""Arrays of text and of oid, which asyncpg knows without a query."""


class LearnedTypes:
    """Container types that the server has described to asyncpg."""

    def __init__(self) -> None:
        self._containers: dict[int, ContainerType] = dict(KNOWN_CONTAINERS)
        self._bases: dict[int, int] = {}
        """Base types of domains."""

    def learn(self, types: Iterable[Mapping[str, Any]]) -> None:
        """Record container types and domains from rows of asyncpg's query for types.

        A type that is recorded already keeps its description, as in asyncpg.
        """
        for each in types:
            oid = int(each["oid"])
            if oid in self._containers or oid in self._bases:
                continue
            kind = each["kind"]
            if each["elemtype"]:
                self._containers[oid] = ContainerType("array", (int(each["elemtype"]),))
            elif kind == b"c":
                self._containers[oid] = ContainerType("composite", tuple(map(int, each["attrtypoids"] or ())))
            elif kind == b"d":
                self._bases[oid] = int(each["basetype"] or 0)
            elif kind in {b"r", b"m"}:
                name = "range" if kind == b"r" else "multirange"
                self._containers[oid] = ContainerType(name, (int(each["range_subtype"] or 0),))

    def container(self, oid: int) -> ContainerType | None:
        """Return the description of a container type (array, composite, range) by its id, also for a domain over one;
        None for other types.
        """
        for _ in range(MAX_DEPTH):
            if oid not in self._bases:
                return self._containers.get(oid)
            oid = self._bases[oid]
        return None


def iterate_fields(row: bytes) -> Iterator[bytes]:
    """Yield the bytes of each field in the body of PostgreSQL's message `DataRow`, empty ones for null.

    It ends before an incomplete field.
    """
    (count,) = COUNT.unpack_from(row)
    position = COUNT.size
    for _ in range(count):
        if position + NUMBER.size > len(row):
            return
        (length,) = NUMBER.unpack_from(row, position)
        position += NUMBER.size
        if length > len(row) - position:
            return
        yield row[position : position + max(0, length)]
        position += max(0, length)


def is_credible(types: LearnedTypes, oid: int, value: bytes) -> bool:
    """Return whether all counts within a value of the type `oid` are plausible, and its nesting is not too deep.

    The driver allocates memory by these counts. A value with wrong lengths counts as plausible: the driver detects them
    itself.
    """
    visits = 0
    levels: list[Iterator[tuple[int, bytes]]] = [iter([(oid, value)])]
    while levels:
        found = next(levels[-1], None)
        if found is None:
            levels.pop()
            continue
        visits += 1
        of_type, held = found
        container = types.container(of_type)
        if container is None:
            continue
        if visits > MAX_VISITS or len(levels) > MAX_DEPTH:
            return False
        if container.kind == "array" and not has_plausible_dimensions(held):
            return False
        if container.kind == "multirange" and not _has_plausible_ranges(held):
            return False
        levels.append(_iterate_contained_values(types, container, held))
    return True


def has_plausible_dimensions(value: bytes) -> bool:
    """Return whether `value`, the bytes of an array, has enough bytes for the stated length of each dimension.

    True also for any value that doesn't begin with a number of dimensions, such as a text.
    """
    if len(value) < ARRAY_HEADER.size:
        return True
    dimensions, _, _ = ARRAY_HEADER.unpack_from(value)
    if not 0 < dimensions <= MAX_DIMENSIONS:
        return True
    end = min(len(value), ARRAY_HEADER.size + dimensions * DIMENSION.size)
    lengths = [
        DIMENSION.unpack_from(value, at)[0]
        for at in range(ARRAY_HEADER.size, end - DIMENSION.size + 1, DIMENSION.size)
    ]
    return all(length <= len(value) // SMALLEST_ITEM for length in lengths)


def _has_plausible_ranges(value: bytes) -> bool:
    return len(value) < NUMBER.size or NUMBER.unpack_from(value)[0] <= len(value) // SMALLEST_ITEM


def _iterate_contained_values(
    types: LearnedTypes, container: ContainerType, value: bytes
) -> Iterator[tuple[int, bytes]]:
    """Yield type id and bytes of each value in a container; none for an array of values that are no containers."""
    match container.kind:
        case "array":
            if types.container(container.parts[0]) is not None and len(value) >= ARRAY_HEADER.size:
                dimensions, _, _ = ARRAY_HEADER.unpack_from(value)
                start = ARRAY_HEADER.size + max(0, min(dimensions, MAX_DIMENSIONS)) * DIMENSION.size
                yield from ((container.parts[0], item) for item in _iterate_items(value, start))
        case "multirange":
            for item in _iterate_items(value, NUMBER.size):
                yield from ((container.parts[0], bound) for bound in _iterate_items(item, 1))
        case "composite":
            yield from _composite_fields(container.parts, value)
        case _:
            yield from (
                (container.parts[0], bound) for bound in _iterate_items(value, 1)
            )  # The flags come first.


def _iterate_items(value: bytes, position: int) -> Iterator[bytes]:
    while position + NUMBER.size <= len(value):
        (length,) = NUMBER.unpack_from(value, position)
        position += NUMBER.size
        if length > len(value) - position:
            return
        yield value[position : position + max(0, length)]
        position += max(0, length)


def _composite_fields(parts: Sequence[int], value: bytes) -> Iterator[tuple[int, bytes]]:
    position = NUMBER.size
    for part in parts:
        if position + FIELD.size > len(value):
            return
        _, length = FIELD.unpack_from(value, position)
        position += FIELD.size
        if length > len(value) - position:
            return
        if length > 0:
            yield part, value[position : position + length]
            position += length
