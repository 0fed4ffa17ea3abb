"""SQL fragments of the statements on PostgreSQL; batches are passed as one array per column."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

NOW: Final = "(date_part('epoch', now()) * 1000000)::bigint"


def lock_wait_sql(milliseconds: int) -> str:
    """Return an always true SQL condition that limits the lock waits of its statement, behind a pooler too.

    An uncorrelated subquery is evaluated once, before the rows that it filters.
    """
    return f"(SELECT set_config('lock_timeout', '{milliseconds}', true)) IS NOT NULL"


def transpose_rows(rows: Any, width: int) -> list[list[Any]]:  # noqa: ANN401 - rows of any kind of tuple
    """Turn rows into `width` columns, since `unnest` takes one array per column.

    `unnest` pads short arrays with NULL, so a column of NULLs is sent as an empty array: the driver looks at
    each element.
    """
    given = [list(column) for column in zip(*rows, strict=True)]
    return [[] if column.count(None) == len(column) else column for column in given] or [
        [] for _ in range(width)
    ]


def unnest_sql(first: int, types: Sequence[str]) -> str:
    return ", ".join(f"${first + offset}::{kind}[]" for offset, kind in enumerate(types))


def looked_up_sql(table: str, *columns: str) -> str:
    """Return SQL that looks up rows of a table by columns of each row of `asked`.

    OFFSET 0 fixes the order: the planner may neither begin with the table, which it would read from end to end, nor
    choose another index for the lack of rows or statistics.
    """
    matches = " AND ".join(f"{table}.{column} = asked.{column}" for column in columns)
    return f"LATERAL (SELECT * FROM {table} WHERE {matches} OFFSET 0)"
