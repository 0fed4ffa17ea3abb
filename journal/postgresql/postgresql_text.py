"""SQL fragments of the statements on PostgreSQL; batches are passed as one array per column."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Final, cast

SEPARATOR: Final = "\0"
QUOTED_COMMA: Final = '","'
NOW: Final = "(date_part('epoch', now()) * 1000000)::bigint"


def lock_wait_sql(milliseconds: int) -> str:
    """Return an always true SQL condition that limits lock waits from its statement to the end of the transaction; a
    longer wait fails.

    Unlike a setting of the session, it works behind a pooler too. As an uncorrelated subquery, it is evaluated once,
    before the rows that it filters.
    """
    return f"(SELECT set_config('lock_timeout', '{milliseconds}', true)) IS NOT NULL"


def transpose_rows(rows: Any, width: int) -> list[str]:  # noqa: ANN401 - rows of any kind of tuple
    """Turn rows of `width` values into columns, each as the text of a PostgreSQL array; empty arrays without rows.

    `unnest_sql` takes one text per column. `unnest` pads short arrays with NULL, so a column of NULLs is sent
    as an empty array.
    """
    return [array_literal(column) for column in zip(*rows, strict=True)] or ["{}"] * width


def array_literal(values: Sequence[object]) -> str:
    """Return texts, numbers, truth values or bytes as the text of a PostgreSQL array, with NULL for None; if all values
    are None, return `{}`.

    The driver takes a microsecond for each element of an array, and next to none for a text.
    """
    first = next((value for value in values if value is not None), None)
    if first is None:
        return "{}"
    if isinstance(first, str):
        return _text_array(cast("Sequence[str | None]", values))
    if isinstance(first, bytes):
        return _array(
            None if one is None else rf'"\\x{one.hex()}"' for one in cast("Sequence[bytes | None]", values)
        )
    return _array(None if value is None else str(value) for value in values)


def _text_array(values: Sequence[str | None]) -> str:
    if None not in values:
        # All at once: PostgreSQL stores no text with this separator.
        joined = SEPARATOR.join(cast("Sequence[str]", values))
        if joined.count(SEPARATOR) == len(values) - 1:
            return f'{{"{_escape(joined).replace(SEPARATOR, QUOTED_COMMA)}"}}'
    return _array(None if one is None else f'"{_escape(one)}"' for one in values)


def _array(elements: Iterable[str | None]) -> str:
    """Return the text of an array from its quoted elements; None is NULL."""
    return f"{{{','.join([element or 'NULL' for element in elements])}}}"


def _escape(text: str) -> str:
    """Escape backslashes and quotes for an element of an array."""
    if "\\" in text:
        text = text.replace("\\", "\\\\")
    return text.replace('"', '\\"')


def unnest_sql(first: int, types: Sequence[str]) -> str:
    """Return the arguments of `unnest` for array texts: a cast of each parameter from number `first` to an
    array of its type.
    """
    return ", ".join(f"${first + offset}::text::{kind}[]" for offset, kind in enumerate(types))


def lookup_sql(table: str, *columns: str) -> str:
    """Return SQL for the rows of a table whose `columns` equal those of a row of `asked`, to join with `asked`.

    OFFSET 0 fixes the order: the planner may neither begin with the table, which it would read from end to end, nor
    choose another index for the lack of rows or statistics.
    """
    matches = " AND ".join(f"{table}.{column} = asked.{column}" for column in columns)
    return f"LATERAL (SELECT * FROM {table} WHERE {matches} OFFSET 0)"
