"""What the three kinds of databases have in common: one connection to each, and what it may give at most."""

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
"""As JSON; the smallest packet that a MySQL server takes unless it is told otherwise holds this."""
MAX_MESSAGE_CHARACTERS = 500
QUOTES_AND_COLON = 4
ESCAPED_NUL = rb"\u0000"

_encode = msgspec.json.Encoder().encode


class DatabaseSession(Protocol):
    """One connection, used by one caller at a time; each method raises `NodeError`."""

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
        """Forget everything that was set in the session; False: it can't be used again."""

    async def is_alive(self) -> bool:
        """Tell whether the other side is still there after a while without use."""

    async def close(self) -> None: ...
    def abort(self) -> None:
        """Let go at once."""


FETCHED_ROWS = 500
FETCHED_VALUES = 20_000


def rows_per_fetch(columns: int) -> int:
    """Return how many rows of so many columns are fetched at once: their values are held before they are counted."""
    return min(FETCHED_ROWS, max(1, FETCHED_VALUES // max(1, columns)))


class RowCollector:
    """The rows of a query as they arrive, up to its limits."""

    def __init__(self, columns: Sequence[str], *, max_rows: int, max_bytes: int) -> None:
        self._columns = columns
        self._names_bytes = sum(len(name.encode()) + QUOTES_AND_COLON for name in columns)
        self._max_rows = max_rows
        self._max_bytes = max_bytes
        self._rows: list[list[Json]] = []
        self._bytes = 0

    def add(self, rows: list[list[Json]]) -> None:
        """Take the next rows; raises `NodeError` when they are too many or too large, each counted with its names."""
        if len(self._rows) + len(rows) > self._max_rows:
            message = f"The query gives more than {self._max_rows:,} rows, which is its limit (`maxRows`)"
            raise NodeError(message, code="too-many-rows")
        raw = _encode(rows)
        self._bytes += len(raw) + self._names_bytes * len(rows)
        if self._bytes > self._max_bytes:
            raise result_too_large(self._max_bytes)
        self._rows += [_replace_nul(row) for row in rows] if ESCAPED_NUL in raw else rows

    def rows(self) -> QueryRows:
        return QueryRows(self._columns, self._rows)


def result_too_large(max_bytes: int) -> NodeError:
    """Return the error for a result that no output can hold."""
    message = f"The result takes more than {max_bytes:,} bytes, which is the limit: select less"
    return NodeError(message, code="result-too-large")


def _replace_nul(row: list[Json]) -> list[Json]:
    """Return a row in whose texts U+FFFD stands for NUL, which some databases keep; values of JSON never hold one."""
    return [value.replace("\0", "\ufffd") if isinstance(value, str) else value for value in row]


def split_batches(rows: Sequence[Sequence[Json]], batch_rows: int) -> Iterator[Sequence[Sequence[Json]]]:
    """Divide rows so that each part has at most so many of them, and takes about a megabyte where one row doesn't."""
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
"""What drivers raise where a server doesn't keep to its protocol."""


def unreadable_server() -> NodeError:
    """Return the error for a server whose messages the driver can't read."""
    message = "What the server sent can't be read: it doesn't keep to the protocol of such databases"
    return NodeError(message, code="invalid-response")


def quote_server_message(message: object) -> str:
    """Return what a server says, as one line that an error can hold."""
    return " ".join(str(message).replace("\0", "").split())[:MAX_MESSAGE_CHARACTERS] or "no reason given"


def query_timed_out(timeout_seconds: float) -> NodeError:
    """Return the error for what took longer than it may."""
    message = (
        f"The database did not finish within {timeout_seconds:g} s, which is the limit (`timeoutSeconds`)"
    )
    return NodeError(message, code="timeout", retryable=True)
