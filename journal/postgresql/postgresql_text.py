"""What the statements on PostgreSQL have in common: batches go as one array a column."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

NOW: Final = "(date_part('epoch', now()) * 1000000)::bigint"


def lock_wait_sql(milliseconds: int) -> str:
    """Return a condition, always true, that bounds the lock waits of its statement, behind a pooler too.

    An uncorrelated subquery is evaluated once, before the rows that it is a condition on.
    """
    return f"(SELECT set_config('lock_timeout', '{milliseconds}', true)) IS NOT NULL"


def transpose_rows(rows: Any, width: int) -> list[list[Any]]:  # noqa: ANN401 - rows of any kind of tuple
    """Turn rows into columns, since `unnest` takes one array a column.

    It fills short arrays up with NULL, so a column of nothing else is sent empty: the driver looks at each element.
    """
    given = [list(column) for column in zip(*rows, strict=True)]
    return [[] if column.count(None) == len(column) else column for column in given] or [
        [] for _ in range(width)
    ]


def unnest_sql(first: int, types: Sequence[str]) -> str:
    return ", ".join(f"${first + offset}::{kind}[]" for offset, kind in enumerate(types))
