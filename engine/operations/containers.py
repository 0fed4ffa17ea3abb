"""Operations on lists and objects. Arguments are never changed; elements are shared, never copied."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any, cast

from engine.operations.operation import (
    OperationError,
    check_list_length,
    define_operation,
    require_object,
    require_text,
    require_whole_number,
)
from engine.values import Json, identity_key, type_name


@define_operation("length")
def count_elements(value: Json) -> int:
    """Count the characters of a text, the elements of a list or the keys of an object.

    Raises `OperationError` for other values.
    """
    if isinstance(value, str | list | dict):
        return len(value)
    raise OperationError(f"needs a text, a list or an object, not {type_name(value)}")


@define_operation("first")
def first_element(values: list[Json]) -> Json:
    """Return the first element of a list, or null for an empty list."""
    return values[0] if values else None


@define_operation("last")
def last_element(values: list[Json]) -> Json:
    """Return the last element of a list, or null for an empty list."""
    return values[-1] if values else None


@define_operation("slice")
def slice_list(values: list[Json], start: int, end: int | None = None) -> Json:
    """Return the elements of a list between two positions, the second excluded; negative ones count from the end."""
    return values[start:end]


@define_operation("get")
def get_element(value: Json, key: Json, fallback: Json = None) -> Json:
    """Return the value of an object's key or of a list's position, or a fallback where there is none.

    The fallback is null by default. Negative positions count from the end. Raises `OperationError` for a key of a wrong
    type, and for a value that is no object or list.
    """
    if type(value) is list:
        position = require_whole_number(key)
        return value[position] if -len(value) <= position < len(value) else fallback
    return require_object(value).get(require_text(key), fallback)


@define_operation("flatten")
def flatten(values: list[Json]) -> Json:
    """Replace the lists in a list with their elements, one level deep.

    Raises `OperationError` for a result that is too long.
    """
    return concat_lists([value if type(value) is list else [value] for value in values])


@define_operation("unique", reads_all=True)
def remove_duplicates(values: list[Json]) -> Json:
    """Remove duplicates from a list; the first of equal elements stays."""
    found: dict[Hashable, Json] = {}
    for value in values:
        found.setdefault(identity_key(value), value)
    return list(found.values())


@define_operation("reverse")
def reverse_list(values: list[Json]) -> Json:
    """Reverse the order of a list."""
    return values[::-1]


@define_operation("sort")
def sort_list(values: list[Json], by: str | None = None, order: str = "ascending") -> Json:
    """Sort numbers or texts, or objects by one of their keys, in ascending or descending order.

    `by` is that key, which no object may lack. Raises `OperationError` for mixed or other types, and for an unknown
    order.
    """
    if order not in ("ascending", "descending"):
        raise OperationError(f'sorts in "ascending" or "descending" order, not {order[:40]!r}')
    key = None if by is None else _field_getter(by)
    keys = values if key is None else [key(value) for value in values]
    # One example of each type: native code finds them in a fraction of the time of a loop.
    examples = dict(zip(map(type, keys), keys, strict=True))
    kinds = {type_name(example) for example in examples.values()}
    if kinds not in ({"number"}, {"text"}, set()):
        raise OperationError(f"sorts numbers or texts, not {' and '.join(sorted(kinds))}")
    return sorted(cast("list[Any]", values), key=key, reverse=order == "descending")


@define_operation("range")
def number_range(start: int, end: int | None = None, step: int = 1) -> Json:
    """Return the numbers from a start to an end, which is excluded, by a step; one argument is the end.

    Raises `OperationError` for a step of 0 or too many numbers.
    """
    if step == 0:
        raise OperationError("needs a step other than 0")
    numbers = range(start) if end is None else range(start, end, step)
    check_list_length(len(numbers))
    return list(numbers)


@define_operation("merge")
def merge(first: dict[str, Json], *more: dict[str, Json]) -> Json:
    """Merge objects into one; the last value of a repeated key counts.

    Raises `OperationError` for a result with too many keys.
    """
    merged = first.copy()
    for each in more:
        merged |= each
        check_list_length(len(merged))
    return merged


@define_operation("pick")
def pick(value: dict[str, Json], keys: list[Json]) -> Json:
    """Keep only the given keys of an object.

    Absent keys are ignored. Raises `OperationError` for keys that are not texts.
    """
    return {key: value[key] for key in map(require_text, keys) if key in value}


@define_operation("omit")
def omit(value: dict[str, Json], keys: list[Json]) -> Json:
    """Remove the given keys from an object.

    Absent keys are ignored. Raises `OperationError` for keys that are not texts.
    """
    omitted = set(map(require_text, keys))
    return {key: item for key, item in value.items() if key not in omitted}


@define_operation("keys")
def object_keys(value: dict[str, Json]) -> Json:
    """List the keys of an object."""
    return cast("Json", list(value))


@define_operation("values")
def object_values(value: dict[str, Json]) -> Json:
    """List the values of an object."""
    return list(value.values())


def concat_lists(lists: list[list[Json]]) -> list[Json]:
    check_list_length(sum(map(len, lists)))
    return [item for each in lists for item in each]


def _field_getter(name: str) -> Callable[[Json], Any]:
    """Return the function that gives a field of an object; it raises `OperationError` for other values."""
    return lambda value: require_object(value).get(name)
