"""SQLite: files of an organisation, each used in threads of its own, where nothing but the file can be touched."""

from __future__ import annotations

import asyncio
import os
import sqlite3
import stat
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import quote

from engine.errors import NodeError
from engine.services import Rows, Upsert
from nodes import fields, sql_text
from nodes.connections import session, sql_values
from nodes.connections.session import Gathering
from nodes.sql_text import Dialect

if TYPE_CHECKING:
    from engine.values import Json
    from nodes.connections.policy import ConnectionPolicy
    from nodes.connections.source import Source
    from nodes.sql_text import Statement

Outcome = TypeVar("Outcome")

FETCHED_ROWS = 500
BUSY_SECONDS = 5
OPERATIONS_BETWEEN_LOOKS = 10_000
MAX_VALUE_BYTES = 20_000_000
NAME_CHARACTERS = 100
COMPANIONS = ("-journal", "-wal", "-shm")

READING = frozenset(
    {sqlite3.SQLITE_SELECT, sqlite3.SQLITE_READ, sqlite3.SQLITE_FUNCTION, sqlite3.SQLITE_RECURSIVE}
)
WRITING = READING | {sqlite3.SQLITE_INSERT, sqlite3.SQLITE_UPDATE, sqlite3.SQLITE_DELETE}
CHANGING = WRITING | {
    sqlite3.SQLITE_CREATE_TABLE, sqlite3.SQLITE_CREATE_INDEX, sqlite3.SQLITE_CREATE_VIEW,
    sqlite3.SQLITE_DROP_TABLE, sqlite3.SQLITE_DROP_INDEX, sqlite3.SQLITE_DROP_VIEW,
    sqlite3.SQLITE_ALTER_TABLE, sqlite3.SQLITE_REINDEX,
}  # fmt: skip
REFUSED_FUNCTIONS = frozenset({"load_extension", "fts3_tokenizer", "readfile", "writefile", "edit"})


def file_of(source: Source, policy: ConnectionPolicy) -> Path:
    """Return where a data source keeps its database; raises `NodeError` for one that leads out of its organisation."""
    if policy.files is None:
        raise NodeError("There are no files where this runs", code="not-available")
    name = fields.text(source.settings, "file")
    if not _is_name(name) or not _is_name(source.organization_id):
        message = "`file` must be a name of letters, digits, dots, hyphens and underscores, without a folder"
        raise NodeError(message, code="address-not-allowed")
    folder = policy.files / source.organization_id
    if folder.is_symlink():
        raise _no_file_of_its_own()
    return folder / name


def _is_name(text: str) -> bool:
    return (
        0 < len(text) <= NAME_CHARACTERS
        and text.isascii()
        and not text.startswith((".", "-"))
        and not text.endswith(COMPANIONS)
        and all(character.isalnum() or character in "._-" for character in text)
    )


def _no_file_of_its_own() -> NodeError:
    return NodeError("The data source leads to a file that is not its own", code="address-not-allowed")


async def open_session(source: Source, policy: ConnectionPolicy) -> SqliteSession:
    """Return a session; the file itself is opened, and made, by what first needs it."""
    return SqliteSession(file_of(source, policy), policy)


class SqliteSession:
    """Opens the file anew for each statement, which takes less time than a commit: there is no state to forget."""

    def __init__(self, file: Path, policy: ConnectionPolicy) -> None:
        self._file = file
        self._policy = policy
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="sqlite-source")
        self._ends_at = 0.0

    async def query(
        self,
        statement: Statement,
        parameters: Sequence[Json],
        *,
        max_rows: int,
        max_bytes: int,
        timeout_seconds: float,
    ) -> Rows:
        def read(connection: sqlite3.Connection) -> Rows:
            with _allowing(connection, READING):
                cursor = connection.execute(
                    _text(statement), [sql_values.to_plain(value) for value in parameters]
                )
                columns = [column[0] for column in cursor.description or ()]
                gathering = Gathering(columns, max_rows=max_rows, max_bytes=max_bytes)
                while fetched := cursor.fetchmany(FETCHED_ROWS):
                    gathering.add([[_as_json(value) for value in row] for row in fetched])
            return gathering.rows()

        return await self._run(read, mode="ro", timeout_seconds=timeout_seconds)

    async def write(
        self,
        table: str,
        columns: Sequence[str],
        rows: Sequence[Sequence[Json]],
        *,
        upsert: Upsert,
        batch_rows: int,
        timeout_seconds: float,
    ) -> int:
        insertion = _insertion(table, columns, upsert)

        def write(connection: sqlite3.Connection) -> int:
            written = 0
            with _transaction(connection, WRITING):
                for batch in session.batches(rows, batch_rows):
                    values = [[sql_values.to_plain(value) for value in row] for row in batch]
                    written += connection.executemany(insertion, values).rowcount
            return written

        return await self._run(write, mode="rw", timeout_seconds=timeout_seconds)

    async def execute(
        self, statement: Statement, parameters: Sequence[Json], *, timeout_seconds: float
    ) -> int:
        def change(connection: sqlite3.Connection) -> int:
            with _transaction(connection, CHANGING):
                cursor = connection.execute(
                    _text(statement), [sql_values.to_plain(value) for value in parameters]
                )
                while cursor.fetchmany(FETCHED_ROWS):
                    pass  # what it returns is nobody's, but it isn't done before that is read
                return max(cursor.rowcount, 0)

        return await self._run(change, mode="rw", timeout_seconds=timeout_seconds)

    async def reset(self) -> bool:
        return True

    async def is_alive(self) -> bool:
        return True

    async def close(self) -> None:
        self.abort()

    def abort(self) -> None:
        self._ends_at = 0
        self._thread.shutdown(wait=False)

    async def _run(
        self, work: Callable[[sqlite3.Connection], Outcome], *, mode: str, timeout_seconds: float
    ) -> Outcome:
        """Do the work in the thread, and have it end there when the caller no longer waits."""
        self._ends_at = time.monotonic() + timeout_seconds

        def run() -> Outcome:
            with _translated(self._is_over, timeout_seconds), closing(self._open(mode)) as connection:
                return work(connection)

        try:
            return await asyncio.get_running_loop().run_in_executor(self._thread, run)
        except asyncio.CancelledError:
            self._ends_at = 0
            raise

    def _is_over(self) -> bool:
        return time.monotonic() >= self._ends_at

    def _open(self, mode: str) -> sqlite3.Connection:
        if mode == "rw":
            self._file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._check_file(mode)
        if mode == "ro" and self._file.with_name(self._file.name + "-journal").exists():
            # A writer may have died: what it left half done is undone by whoever reads next and may write.
            with closing(self._connect("rw")) as connection:
                connection.execute("SELECT 1 FROM sqlite_schema").fetchone()
        connection = self._connect(mode)
        connection.set_progress_handler(self._is_over, OPERATIONS_BETWEEN_LOOKS)
        return connection

    def _connect(self, mode: str) -> sqlite3.Connection:
        connection = sqlite3.connect(
            f"file:{quote(str(self._file.absolute()))}?mode={mode}",
            uri=True,
            timeout=BUSY_SECONDS,
            isolation_level=None,
        )
        connection.text_factory = lambda raw: raw.decode(errors="replace")
        connection.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, MAX_VALUE_BYTES)
        connection.setlimit(sqlite3.SQLITE_LIMIT_ATTACHED, 0)
        connection.execute("PRAGMA trusted_schema = OFF")
        if mode == "rw":
            (page_bytes,) = connection.execute("PRAGMA page_size").fetchone()
            connection.execute(f"PRAGMA max_page_count = {self._policy.max_file_bytes // page_bytes}")
        else:
            connection.execute("PRAGMA query_only = ON")
        return connection

    def _check_file(self, mode: str) -> None:
        """Make the file if it may be made, and refuse what stands in its place but isn't the organisation's own."""
        flags = os.O_RDWR | os.O_CREAT if mode == "rw" else os.O_RDONLY
        try:
            descriptor = os.open(self._file, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o600)
        except FileNotFoundError as error:
            message = "The file of the data source doesn't exist yet: a sqlite-destination makes it"
            raise NodeError(message, code="connection-failed") from error
        except OSError as error:
            raise _no_file_of_its_own() from error
        try:
            found = os.fstat(descriptor)
        finally:
            os.close(descriptor)
        if not stat.S_ISREG(found.st_mode) or found.st_nlink != 1 or self._is_own_database(found):
            raise _no_file_of_its_own()

    def _is_own_database(self, found: os.stat_result) -> bool:
        for own in self._policy.own_databases:
            try:
                if own.file is not None and os.path.samestat(own.file.stat(), found):
                    return True
            except FileNotFoundError:
                continue
        return False


def _text(statement: Statement) -> str:
    return statement.with_places("?" * statement.values)


def _insertion(table: str, columns: Sequence[str], upsert: Upsert) -> str:
    names = [sql_text.quoted(column, Dialect.SQLITE) for column in columns]
    insertion = (
        f"INSERT INTO {sql_text.quoted_table(table, Dialect.SQLITE)} "  # noqa: S608 - names are quoted, values are bound
        f"({', '.join(names)}) VALUES ({', '.join('?' * len(columns))})"
    )
    if not upsert.key:
        return insertion
    key = ", ".join(sql_text.quoted(column, Dialect.SQLITE) for column in upsert.key)
    others = [sql_text.quoted(column, Dialect.SQLITE) for column in columns if column not in upsert.key]
    if not upsert.update or not others:
        return f"{insertion} ON CONFLICT ({key}) DO NOTHING"
    return f"{insertion} ON CONFLICT ({key}) DO UPDATE SET {', '.join(f'{name} = excluded.{name}' for name in others)}"


def _as_json(value: Any) -> Json:  # noqa: ANN401 - one of the five types of SQLite
    if isinstance(value, bytes):
        return sql_values.of_bytes(value)
    return sql_values.of_float(value) if isinstance(value, float) else value


# ── what a statement may do ─────────────────────────────────────────────────────────────────────────────────


@contextmanager
def _allowing(connection: sqlite3.Connection, actions: Collection[int]) -> Iterator[None]:
    """Let statements do these things and nothing else: no other file, no setting, no extension."""

    def authorize(action: int, first: str | None, second: str | None, *_: str | None) -> int:
        if action not in actions:
            return sqlite3.SQLITE_DENY
        if action == sqlite3.SQLITE_FUNCTION and (second or first or "").lower() in REFUSED_FUNCTIONS:
            return sqlite3.SQLITE_DENY
        return sqlite3.SQLITE_OK

    connection.set_authorizer(authorize)
    try:
        yield
    finally:
        connection.set_authorizer(None)


@contextmanager
def _transaction(connection: sqlite3.Connection, actions: Collection[int]) -> Iterator[None]:
    connection.execute("BEGIN IMMEDIATE")
    try:
        with _allowing(connection, actions):
            yield
    except BaseException:
        connection.set_progress_handler(None, 0)  # whose time is up still has to be undone
        if connection.in_transaction:
            connection.execute("ROLLBACK")
        raise
    connection.set_progress_handler(None, 0)  # a commit that has begun is not given up
    connection.execute("COMMIT")


# ── failures ────────────────────────────────────────────────────────────────────────────────────────────────


@contextmanager
def _translated(is_over: Callable[[], bool], timeout_seconds: float) -> Iterator[None]:
    try:
        yield
    except sqlite3.Error as error:
        raise _node_error(error, is_over=is_over(), timeout_seconds=timeout_seconds) from error
    except OverflowError as error:
        raise NodeError(
            "A whole number doesn't fit into 64 bits: write it as a text", code="sql-error"
        ) from error


def _node_error(error: sqlite3.Error, *, is_over: bool, timeout_seconds: float) -> NodeError:
    name = getattr(error, "sqlite_errorname", "") or ""
    if name == "SQLITE_INTERRUPT" and is_over:
        return session.timed_out(timeout_seconds)
    if name.startswith(("SQLITE_AUTH", "SQLITE_READONLY")):
        return NodeError(f"The statement may not do that: {session.said(error)}", code="statement-refused")
    is_busy = name.startswith(("SQLITE_BUSY", "SQLITE_LOCKED"))
    return NodeError(f"The database refused: {session.said(error)}", code="sql-error", retryable=is_busy)
