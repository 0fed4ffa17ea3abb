"""Common parts of the database drivers: the session protocol, and limits of results and batches."""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Protocol

import msgspec

from engine.run_errors import NodeError
from engine.services import QueryRows, UpsertRule

if TYPE_CHECKING:
    from engine.values import Json
    from nodes.sql_text import SqlStatement

MAX_BATCH_BYTES = 1_000_000
"""Maximum JSON size of a batch; the smallest default packet size of a MySQL server is larger."""
MAX_MESSAGE_CHARACTERS = 500
QUOTES_AND_COLON = 4
ESCAPED_NUL = rb"\u0000"

_encode = msgspec.json.Encoder().encode


class DatabaseSession(Protocol):
    """Database connection, used by one caller at a time; each method raises `NodeError`."""

    async def query(
        self,
        statement: SqlStatement,
        parameters: Sequence[Json],
        *,
        max_rows: int,
        max_bytes: int,
        timeout_seconds: float,
    ) -> QueryRows: ...

    async def write(
        self,
        table: str,
        columns: Sequence[str],
        rows: Sequence[Sequence[Json]],
        *,
        upsert: UpsertRule,
        batch_rows: int,
        timeout_seconds: float,
    ) -> int: ...

    async def execute(
        self, statement: SqlStatement, parameters: Sequence[Json], *, timeout_seconds: float
    ) -> int: ...

    async def reset(self) -> bool:
        """Discard the state of the session, such as settings and temporary tables; return False if it failed and the
        session can't be reused.
        """

    async def is_alive(self) -> bool:
        """Return whether an idle connection is still open."""

    async def close(self) -> None: ...
    def abort(self) -> None:
        """Close the connection at once, without waiting for the server or the statement in progress."""


FETCHED_ROWS = 500
FETCHED_VALUES = 20_000


def rows_per_fetch(columns: int) -> int:
    """Return the number of rows to fetch at once for so many columns: 500, fewer for more than 40 columns, at
    least 1.

    Fetched values are in memory before they are counted.
    """
    return min(FETCHED_ROWS, max(1, FETCHED_VALUES // max(1, columns)))


class RowCollector:
    """Collects the rows of a query up to its limits."""

    def __init__(self, columns: Sequence[str], *, max_rows: int, max_bytes: int) -> None:
        self._columns = columns
        self._names_bytes = sum(len(name.encode()) + QUOTES_AND_COLON for name in columns)
        self._max_rows = max_rows
        self._max_bytes = max_bytes
        self._rows: list[list[Json]] = []
        self._bytes = 0

    def add(self, rows: list[list[Json]]) -> None:
        """Add rows, with NUL in texts replaced by U+FFFD.

        Raises `NodeError` beyond the limit of rows, or of bytes as JSON, which include the column names of
        each row.
        """
        if len(self._rows) + len(rows) > self._max_rows:
            message = f"The query returns more than {self._max_rows:,} rows, which is its limit (`maxRows`)"
            raise NodeError(message, code="too-many-rows")
        raw = _encode(rows)
        self._bytes += len(raw) + self._names_bytes * len(rows)
        if self._bytes > self._max_bytes:
            raise result_too_large(self._max_bytes)
        self._rows += [_replace_nul(row) for row in rows] if ESCAPED_NUL in raw else rows

    def rows(self) -> QueryRows:
        return QueryRows(self._columns, self._rows)


def result_too_large(max_bytes: int) -> NodeError:
    """Return the error for a query result that exceeds the size limit of outputs, in bytes."""
    message = f"The result takes more than {max_bytes:,} bytes, which is the limit: select less"
    return NodeError(message, code="result-too-large")


def _replace_nul(row: list[Json]) -> list[Json]:
    """Replace NUL by U+FFFD in the texts of a row: some databases store NUL, but stored JSON can't contain it."""
    return [value.replace("\0", "\ufffd") if isinstance(value, str) else value for value in row]


def split_batches(rows: Sequence[Sequence[Json]], batch_rows: int) -> Iterator[Sequence[Sequence[Json]]]:
    """Yield batches of at most `batch_rows` rows and about a megabyte of JSON; a single larger row is a batch
    of its own.
    """
    for start in range(0, len(rows), batch_rows):
        yield from _split_evenly(rows[start : start + batch_rows])


def _split_evenly(rows: Sequence[Sequence[Json]]) -> Iterator[Sequence[Sequence[Json]]]:
    if len(rows) == 1 or len(_encode(rows)) <= MAX_BATCH_BYTES:
        yield rows
        return
    middle = len(rows) // 2
    yield from _split_evenly(rows[:middle])
    yield from _split_evenly(rows[middle:])


MISREAD_ERRORS = (
    ArithmeticError, AssertionError, AttributeError, BufferError, EOFError, LookupError, MemoryError, RecursionError,
    SystemError, TypeError, ValueError, struct.error,
)  # fmt: skip
"""Exceptions of drivers if a server violates its protocol."""


def unreadable_server() -> NodeError:
    """Return the error for a server whose messages violate the database protocol."""
    message = "The response of the server can't be read: it violates the database protocol"
    return NodeError(message, code="invalid-response")


def quote_server_message(message: object) -> str:
    """Return the message of a server as one line without NUL, of at most 500 characters; "no reason given" if
    it is empty.
    """
    return " ".join(str(message).replace("\0", "").split())[:MAX_MESSAGE_CHARACTERS] or "no reason given"


def query_timed_out(timeout_seconds: float) -> NodeError:
    """Return the retryable error `timeout` for a query that exceeded its time limit, in seconds."""
    message = (
        f"The database did not finish within {timeout_seconds:g} s, which is the limit (`timeoutSeconds`)"
    )
    return NodeError(message, code="timeout", retryable=True)
