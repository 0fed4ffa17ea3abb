"""SQL that differs between the databases, in statements about tasks: the present time, and lists of values."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final

import msgspec
from msgspec import Struct

from json_text import decoding
from models.timestamps import HOST_TIME

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncConnection

POSTGRESQL: Final = "postgresql"
DIALECTS: Final = (POSTGRESQL, "sqlite")
NOW: Final = {POSTGRESQL: "CAST(extract(epoch FROM now()) * 1000000 AS bigint)", "sqlite": ":now"}
"""SQL of the present time in microseconds since 1970, by dialect; SQLite takes that of `host_time`."""


_decode_texts: Final = decoding.build_decoder(list[str]).decode


def host_time(connection: AsyncConnection) -> dict[str, int]:
    """Return the parameter `now` (microseconds) that statements for SQLite need for `NOW`; empty for PostgreSQL."""
    return {} if connection.dialect.name == POSTGRESQL else {"now": HOST_TIME.microseconds()}


def is_in(dialect: str, column: str, parameter: str) -> str:
    """Return the SQL condition that a text column is one of the texts in a parameter, which `texts` makes.

    The SQL is the same for any number of texts, so that it is planned once.
    """
    if dialect == POSTGRESQL:
        return f"{column} = ANY(CAST(:{parameter} AS text[]))"
    return f"{column} IN (SELECT value FROM json_each(:{parameter}))"


def is_in_query(dialect: str, column: str, query: str) -> str:
    """Return a condition on a column: its value is among those of a query, which is executed first."""
    return f"{column} = ANY(ARRAY({query}))" if dialect == POSTGRESQL else f"{column} IN ({query})"


def texts(connection: AsyncConnection, values: Sequence[str]) -> object:
    """Return texts as the parameter that the SQL of `is_in` expects: a list for PostgreSQL, JSON for SQLite."""
    return list(values) if connection.dialect.name == POSTGRESQL else msgspec.json.encode(values).decode()


def list_sql(dialect: str, query: str) -> str:
    """Return the SQL of one value with all texts of a query, whose one column is `value`; `read_list` reads it."""
    if dialect == POSTGRESQL:
        return f"ARRAY({query})"
    return f"(SELECT json_group_array(value) FROM ({query}))"


def read_list(value: Any) -> list[str]:  # noqa: ANN401 - a column of a row
    """Return the texts in the value of a `list_sql` expression: a list of PostgreSQL or JSON of SQLite."""
    return _decode_texts(value) if isinstance(value, str) else value


class RowsParameter(Struct, frozen=True):
    """Rows of values for a FROM clause: an array for each column, or one JSON text."""

    name: str
    columns: Sequence[tuple[str, str]]
    """Names, unique in a statement, with types of PostgreSQL."""

    def sql(self, dialect: str) -> str:
        """Return the SQL of a table expression with the rows of this parameter, for use behind FROM."""
        names = ", ".join(column for column, _ in self.columns)
        if dialect == POSTGRESQL:
            return f"unnest({self.arrays_sql}) AS {self.name} ({names})"
        fields = ", ".join(
            f"json_extract(value, '$[{number}]') AS {column}"
            for number, (column, _) in enumerate(self.columns)
        )
        return f"(SELECT {fields} FROM json_each(:{self.name}_rows)) AS {self.name}"

    @property
    def arrays_sql(self) -> str:
        """SQL of the columns as arrays, for `unnest` of PostgreSQL."""
        return ", ".join(f"CAST(:{column} AS {kind}[])" for column, kind in self.columns)

    def values(self, connection: AsyncConnection, rows: Sequence[Sequence[object]]) -> dict[str, object]:
        """Return the statement's parameters that carry these rows, one sequence per row."""
        if connection.dialect.name == POSTGRESQL:
            return {column: [row[number] for row in rows] for number, (column, _) in enumerate(self.columns)}
        return {f"{self.name}_rows": msgspec.json.encode(rows).decode()}
