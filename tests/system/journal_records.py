"""Database triggers that record when an execution ends and when a node's result is committed.

Later changes can't remove the records: a second end adds a second record, and so does a change of a committed
result.
"""

from __future__ import annotations

import asyncio
import sqlite3
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Iterable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

import asyncpg

from engine.run_records import SETTLED_STATUSES
from models.execution_status import TERMINAL_STATUSES

PATIENCE_SECONDS = 60.0
POLL_SECONDS = 0.02

_ENDS = f"NEW.status IN ({', '.join(repr(status.value) for status in sorted(TERMINAL_STATUSES))})"
_SETTLES = f"NEW.status IN ({', '.join(repr(status.value) for status in sorted(SETTLED_STATUSES))})"
_WAS_SETTLED = _SETTLES.replace("NEW.", "OLD.")
_TABLE = "CREATE TABLE witness (kind TEXT, execution_id TEXT, node_id TEXT, status TEXT, noted_at DOUBLE PRECISION)"


class NoteKind(StrEnum):
    """Kind of a recorded change."""

    ENDED = "ended"
    """An execution was written in a state that is an end."""
    SETTLED = "settled"
    """A node's result was written."""
    REWRITTEN = "rewritten"
    """A node's committed result was replaced by another."""


@dataclass(frozen=True, slots=True)
class WitnessNote:
    """Recorded change."""

    kind: NoteKind
    execution_id: str
    node_id: str | None
    status: str
    noted_at: float
    """Unix time."""


@dataclass(frozen=True, slots=True)
class NodeRecord:
    """Node of an execution in the journal."""

    execution_id: str
    node_id: str
    status: str
    output: str | None
    """JSON text."""
    resolved_config: str | None
    """JSON text: the resolved input of a write node, stored before the node began."""


class JournalRecords(ABC):
    """Rows of the journal, read from the database itself, past every process under test."""

    @abstractmethod
    async def fetch(self, statement: str) -> list[tuple[Any, ...]]:
        """Return the rows of a query, once the database answers."""

    @abstractmethod
    async def install(self) -> None:
        """Create the triggers that record ends and results, in a database that has its tables."""

    @abstractmethod
    def close(self) -> None:
        """Close the connection to the database that is kept for later queries, if there is one."""

    async def notes(self, execution_ids: Iterable[str]) -> list[WitnessNote]:
        """Return the recorded changes of executions, in the order of their times."""
        rows = await self.fetch(
            "SELECT kind, execution_id, node_id, status, noted_at FROM witness"
            f" WHERE execution_id IN ({_quote_ids(execution_ids)}) ORDER BY noted_at"
        )
        return [WitnessNote(NoteKind(kind), *rest) for kind, *rest in rows]

    async def results(self, execution_ids: Iterable[str]) -> list[NodeRecord]:
        """Return the spans of executions."""
        rows = await self.fetch(
            "SELECT execution_id, node_id, status, output, resolved_config FROM span"
            f" WHERE execution_id IN ({_quote_ids(execution_ids)})"
        )
        return [NodeRecord(*row) for row in rows]

    async def status(self, execution_id: str) -> str | None:
        """Return the status of an execution; None if it doesn't exist."""
        rows = await self.fetch(f"SELECT status FROM execution WHERE id = '{execution_id}'")
        return rows[0][0] if rows else None


def _quote_ids(execution_ids: Iterable[str]) -> str:
    return ", ".join(f"'{execution_id}'" for execution_id in execution_ids) or "NULL"


class SqliteJournalRecords(JournalRecords):
    """Records of an SQLite file."""

    def __init__(self, path: Path) -> None:
        self._path = path

    async def fetch(self, statement: str) -> list[tuple[Any, ...]]:
        connection = sqlite3.connect(self._path, timeout=PATIENCE_SECONDS)
        try:
            return connection.execute(statement).fetchall()
        finally:
            connection.close()

    def close(self) -> None:
        """Do nothing: no connection is kept."""

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold SQLite's write lock during the block."""
        connection = sqlite3.connect(self._path, timeout=PATIENCE_SECONDS, isolation_level=None)
        try:
            connection.execute("BEGIN IMMEDIATE")
            yield
        finally:
            connection.close()

    async def install(self) -> None:
        now = "(julianday('now') - 2440587.5) * 86400.0"
        note_end = f"INSERT INTO witness VALUES ('ended', NEW.id, NULL, NEW.status, {now})"
        note_node = f"INSERT INTO witness VALUES ('{{}}', NEW.execution_id, NEW.node_id, NEW.status, {now})"
        has_changed = "(OLD.sequence <> NEW.sequence OR OLD.output IS NOT NEW.output)"
        # Completion actions write to the same row.
        is_new_end = "(OLD.status <> NEW.status OR OLD.ended_at IS NOT NEW.ended_at)"
        connection = sqlite3.connect(self._path)
        connection.executescript(
            f"""
            {_TABLE};
            CREATE TRIGGER end_is_noted AFTER UPDATE ON execution WHEN {_ENDS} AND {is_new_end}
                BEGIN {note_end}; END;
            CREATE TRIGGER new_result_is_noted AFTER INSERT ON span WHEN {_SETTLES}
                BEGIN {note_node.format("settled")}; END;
            CREATE TRIGGER result_is_noted AFTER UPDATE ON span WHEN {_SETTLES} AND NOT {_WAS_SETTLED}
                BEGIN {note_node.format("settled")}; END;
            CREATE TRIGGER change_is_noted AFTER UPDATE ON span WHEN {_WAS_SETTLED} AND {has_changed}
                BEGIN {note_node.format("rewritten")}; END;
            """
        )
        connection.close()


class PostgresJournalRecords(JournalRecords):
    """Records of a PostgreSQL server, which may be down for a while."""

    def __init__(self, url: str) -> None:
        self._url = url.replace("+asyncpg", "", 1)
        self._connection: asyncpg.Connection[asyncpg.Record] | None = None
        """Kept for later queries: tests repeat some until their result changes."""
        self._is_free = asyncio.Lock()

    async def fetch(self, statement: str) -> list[tuple[Any, ...]]:
        async with asyncio.timeout(PATIENCE_SECONDS), self._is_free:
            while True:
                try:
                    return await self._fetch(statement)
                except (OSError, asyncpg.PostgresConnectionError, asyncpg.OperatorInterventionError):
                    self.close()
                    await asyncio.sleep(POLL_SECONDS)

    async def _fetch(self, statement: str) -> list[tuple[Any, ...]]:
        if self._connection is None or self._connection.is_closed():
            self._connection = await asyncpg.connect(self._url)
        return [tuple(row) for row in await self._connection.fetch(statement)]

    def close(self) -> None:
        if self._connection is not None:
            self._connection.terminate()
            self._connection = None

    async def install(self) -> None:
        note = (
            "INSERT INTO witness VALUES (TG_ARGV[0], {}, NEW.status, extract(epoch FROM clock_timestamp()))"
        )
        has_changed = "(OLD.sequence <> NEW.sequence OR OLD.output IS DISTINCT FROM NEW.output)"
        is_new_end = "(OLD.status <> NEW.status OR OLD.ended_at IS DISTINCT FROM NEW.ended_at)"
        await self._execute(
            f"""
            {_TABLE};
            CREATE FUNCTION note_execution() RETURNS trigger LANGUAGE plpgsql AS
                $$ BEGIN {note.format("NEW.id, NULL")}; RETURN NULL; END $$;
            CREATE FUNCTION note_node() RETURNS trigger LANGUAGE plpgsql AS
                $$ BEGIN {note.format("NEW.execution_id, NEW.node_id")}; RETURN NULL; END $$;
            CREATE TRIGGER end_is_noted AFTER UPDATE ON execution FOR EACH ROW WHEN ({_ENDS} AND {is_new_end})
                EXECUTE FUNCTION note_execution('ended');
            CREATE TRIGGER new_result_is_noted AFTER INSERT ON span FOR EACH ROW WHEN ({_SETTLES})
                EXECUTE FUNCTION note_node('settled');
            CREATE TRIGGER result_is_noted AFTER UPDATE ON span FOR EACH ROW WHEN ({_SETTLES} AND NOT {_WAS_SETTLED})
                EXECUTE FUNCTION note_node('settled');
            CREATE TRIGGER change_is_noted AFTER UPDATE ON span FOR EACH ROW WHEN ({_WAS_SETTLED} AND {has_changed})
                EXECUTE FUNCTION note_node('rewritten');
            """
        )

    @asynccontextmanager
    async def row_locked(self, execution_id: str) -> AsyncIterator[int]:
        """Lock the row of an execution against writes; yield the process id of the lock's owner."""
        connection = await asyncpg.connect(self._url)
        try:
            async with connection.transaction():
                await connection.execute("SELECT FROM execution WHERE id = $1 FOR UPDATE", execution_id)
                yield connection.get_server_pid()
        finally:
            await connection.close()

    async def _execute(self, script: str) -> None:
        connection = await asyncpg.connect(self._url)
        try:
            await connection.execute(script)
        finally:
            await connection.close()
