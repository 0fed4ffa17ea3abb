"""Differences between two JSON values by path, such as `rows[0].currency`."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Final

from engine.values import equal_json

if TYPE_CHECKING:
    from engine.values import Json

_PLAIN_KEY: Final = re.compile(r"[A-Za-z_][A-Za-z0-9_-]*\Z")


class Missing(Enum):
    """Marker of a side that has no value at a path."""

    MISSING = "missing"


MISSING: Final = Missing.MISSING


@dataclass(frozen=True, slots=True)
class PathChange:
    """Values at a path that differ; a side without a value has `MISSING`."""

    path: str
    """Empty for the whole value."""
    before: Json | Missing
    after: Json | Missing


@dataclass(frozen=True, slots=True)
class ValueDifference:
    """Differences between two values."""

    changes: Sequence[PathChange]
    equal_paths: int
    """Number of equal values that are neither objects nor lists."""
    is_cut: bool
    """Whether there are more changes."""


def compare_values(before: Json | Missing, after: Json | Missing, *, at_most: int) -> ValueDifference:
    """Return the first `at_most` differences of two values, with their paths, and the number of equal values seen.

    Lists are compared by position. The result says whether there are more differences.
    """
    changes: list[PathChange] = []
    equal = 0
    # A stack instead of recursion: values may be nested deeper than Python's calls.
    left: list[Iterator[tuple[str, Json | Missing, Json | Missing]]] = [iter([("", before, after)])]
    while left:
        pair = next(left[-1], None)
        if pair is None:
            left.pop()
            continue
        path, one, other = pair
        if isinstance(one, Mapping) and isinstance(other, Mapping):
            left.append(_pair_fields(path, one, other))
        elif isinstance(one, list) and isinstance(other, list):
            left.append(_pair_items(path, one, other))
        elif one is MISSING or other is MISSING or not equal_json(one, other):
            if one is not other:
                if len(changes) >= at_most:
                    return ValueDifference(changes, equal, is_cut=True)
                changes.append(PathChange(path, one, other))
        else:
            equal += 1
    return ValueDifference(changes, equal, is_cut=False)


def _pair_fields(
    path: str, before: Mapping[str, Json], after: Mapping[str, Json]
) -> Iterator[tuple[str, Json | Missing, Json | Missing]]:
    for key in {**before, **after}:
        yield _join(path, key), before.get(key, MISSING), after.get(key, MISSING)


def _pair_items(
    path: str, before: Sequence[Json], after: Sequence[Json]
) -> Iterator[tuple[str, Json | Missing, Json | Missing]]:
    for index in range(max(len(before), len(after))):
        yield (
            f"{path}[{index}]",
            before[index] if index < len(before) else MISSING,
            after[index] if index < len(after) else MISSING,
        )


def _join(path: str, key: str) -> str:
    if not _PLAIN_KEY.match(key):
        escaped = key.replace("\\", "\\\\").replace('"', '\\"')
        return f'{path}["{escaped}"]'
    return f"{path}.{key}" if path else key
