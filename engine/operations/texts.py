"""Operations on texts. Positions count characters from 0, or from the end if negative."""

from __future__ import annotations

from typing import cast

from engine.operations.containers import concat_lists
from engine.operations.operation import (
    MAX_TEXT_LENGTH,
    OperationError,
    check_list_length,
    check_text_length,
    define_operation,
)
from engine.values import Json, type_name, value_as_text


@define_operation("concat")
def concat(first: Json, *more: Json) -> Json:
    """Join values into one text, or lists into one list.

    Values become text as by `to_text`, null the empty one. Raises `OperationError` for objects, for lists among other
    values, and for a result that is too long.
    """
    values = [first, *more]
    if all(type(value) is list for value in values):
        return concat_lists(cast("list[list[Json]]", values))
    if any(type(value) in (list, dict) for value in values):
        raise OperationError(f"joins texts or lists, not {' and '.join(map(type_name, values))}")
    return _join_texts("", values)


@define_operation("lower")
def lowercase(value: str) -> str:
    """Convert a text to lower case."""
    return value.lower()


@define_operation("upper")
def uppercase(value: str) -> str:
    """Convert a text to upper case."""
    return value.upper()


@define_operation("trim")
def trim(value: str) -> str:
    """Remove white space from both ends of a text."""
    return value.strip()


@define_operation("replace")
def replace(value: str, old: str, new: str) -> str:
    """Replace every occurrence of a text with another.

    Raises `OperationError` for an empty text to replace and a result that is too long.
    """
    _check_not_empty(old)
    check_text_length(len(value) + value.count(old) * (len(new) - len(old)))
    return value.replace(old, new)


@define_operation("split")
def split(value: str, separator: str) -> Json:
    """Split a text at each separator into a list.

    Raises `OperationError` for an empty separator and too many parts.
    """
    _check_not_empty(separator)
    check_list_length(value.count(separator) + 1)
    return cast("Json", value.split(separator))


@define_operation("join")
def join(values: list[Json], separator: str = "") -> str:
    """Join the values of a list into one text, with an optional separator between them.

    Values become text as by `to_text`: null the empty one, lists and objects JSON. Raises `OperationError` for a result
    that is too long, and `InvalidJson` as `to_text` does.
    """
    return _join_texts(separator, values)


@define_operation("substring")
def substring(value: str, start: int, end: int | None = None) -> str:
    """Return the part of a text between two positions, the second excluded; negative ones count from the end."""
    return value[start:end]


@define_operation("pad")
def pad(value: str, length: int, fill: str = " ", side: str = "start") -> str:
    """Pad a text to a length, at its `start` or `end`, with a character.

    A longer text stays unchanged. Raises `OperationError` for a `fill` of no or several characters, another side or a
    great length.
    """
    check_text_length(length)
    if len(fill) != 1 or side not in ("start", "end"):
        raise OperationError('pads with one character, at the "start" or the "end"')
    return value.rjust(length, fill) if side == "start" else value.ljust(length, fill)


def _join_texts(separator: str, values: list[Json]) -> str:
    texts = []
    length = 0
    for value in values:
        texts.append(value_as_text(value, max_bytes=MAX_TEXT_LENGTH))
        length += len(texts[-1]) + len(separator)
        check_text_length(length - len(separator))
    return separator.join(texts)


def _check_not_empty(searched: str) -> None:
    if not searched:
        raise OperationError("can't search for an empty text")
