"""Execution of statements on SQLite files in a child process with limited memory, which is killed at its time limit.

A user's statement may take any time between two checks of the clock, and any memory within its values: a thread of the
worker can limit neither. Only the organizations' files are accessible.
"""

from __future__ import annotations

import os
import sqlite3
import stat
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import quote

from engine.run_errors import NodeError
from json_text.decoding import build_decoder, decode
from models import durable_folders
from nodes.connections import database_session, sql_values
from nodes.connections.database_session import RowCollector
from nodes.sandbox.children import confinement, landlock, system_calls
from nodes.sandbox.frames import SqliteJob

if TYPE_CHECKING:
    from engine.values import Json
    from nodes.sandbox.children.child import JobReporter, PerformJob

FETCHED_BYTES: Final = 1_000_000
BUSY_SECONDS: Final = 5
OPERATIONS_BETWEEN_CHECKS: Final = 10_000
MAX_VALUE_BYTES: Final = 20_000_000
HEAP_BYTES: Final = 128 << 20
"""Heap limit of SQLite itself. Sorts and rollback data beyond its cache go to files."""
MEMORY_BYTES: Final = 1 << 30
"""Memory limit of the process: rows to write and a row of the result are Python values too."""
OPEN_FILES: Final = 64
CPU_SECONDS: Final = 1_200
TEMPORARY_FOLDER_VARIABLE: Final = "SQLITE_TMPDIR"
"""Environment variable with the folder of all organizations' files, in which SQLite keeps temporary files too."""

READ_ACTIONS: Final = frozenset(
    {sqlite3.SQLITE_SELECT, sqlite3.SQLITE_READ, sqlite3.SQLITE_FUNCTION, sqlite3.SQLITE_RECURSIVE}
)
WRITE_ACTIONS: Final = READ_ACTIONS | {sqlite3.SQLITE_INSERT, sqlite3.SQLITE_UPDATE, sqlite3.SQLITE_DELETE}
CHANGE_ACTIONS: Final = WRITE_ACTIONS | {
    sqlite3.SQLITE_CREATE_TABLE, sqlite3.SQLITE_CREATE_INDEX, sqlite3.SQLITE_CREATE_VIEW,
    sqlite3.SQLITE_DROP_TABLE, sqlite3.SQLITE_DROP_INDEX, sqlite3.SQLITE_DROP_VIEW,
    sqlite3.SQLITE_ALTER_TABLE, sqlite3.SQLITE_REINDEX,
}  # fmt: skip
REFUSED_FUNCTIONS: Final = frozenset({"load_extension", "fts3_tokenizer", "readfile", "writefile", "edit"})

_decode = build_decoder(SqliteJob).decode


def load() -> PerformJob:
    with closing(sqlite3.connect(":memory:")) as connection:
        connection.execute("SELECT hex(zeroblob(1)), json_object('a', 1.5)").fetchall()
    return perform


def confine(parent: int) -> None:
    """Restrict this process to the files of organizations, without network and further processes; kill it when its
    parent, the process id `parent`, ends.

    Protections that the system lacks are skipped.
    """
    confinement.limit_process(
        memory_bytes=MEMORY_BYTES, open_files=OPEN_FILES, cpu_seconds=CPU_SECONDS, file_bytes=None
    )
    confinement.limit_processes(0)
    confinement.leave_network()
    confinement.give_up_rights()
    confinement.die_with_parent(parent)
    landlock.restrict_files(
        {os.environ[TEMPORARY_FOLDER_VARIABLE]: landlock.CHANGE_RIGHTS, "/dev/urandom": landlock.READ_FILE}
    )
    system_calls.refuse_calls(
        {
            **system_calls.REACHING_OUT_CALLS,
            **system_calls.STARTING_PROCESSES_CALLS,
            **system_calls.CHANGING_ACCESS_CALLS,
        }
    )


def perform(raw: bytes, _reporter: JobReporter) -> Json:
    """Perform one encoded job on an SQLite file in this child process, and return its result; raises `NodeError`."""
    job = _decode(raw)
    confinement.limit_file_size(
        2 * job.max_file_bytes
    )  # Temporary files of a large sort need more than the database.
    work = {"query": _run_query, "write": _run_write, "execute": _run_statement}[job.action]
    file = SqliteJobFile(job)
    try:
        with _translate_errors(job, file.is_over), closing(file.open()) as connection:
            return work(connection, job)
    except MemoryError:
        raise _out_of_memory_error() from None


# ── actions ─────────────────────────────────────────────────────────────────────────────────────────────────


def _run_query(connection: sqlite3.Connection, job: SqliteJob) -> Json:
    """Return `columns` and `rows` of a reading statement; raises `NodeError` beyond the limits of the job."""
    with _allow_actions(connection, READ_ACTIONS):
        cursor = connection.execute(job.statement, _decode_values(job))
        columns = [column[0] for column in cursor.description or ()]
        gathering = RowCollector(columns, max_rows=job.max_rows, max_bytes=job.max_bytes)
        for rows in _fetch_pieces(cursor, job.max_bytes):
            gathering.add(rows)
    found = gathering.rows()
    return {"columns": [*found.columns], "rows": [[*row] for row in found.rows]}


def _fetch_pieces(cursor: sqlite3.Cursor, max_bytes: int) -> Iterator[list[list[Json]]]:
    """Yield lists of rows, at most 500 or about a megabyte at once.

    Raises `NodeError` if the texts and blobs of one list exceed `max_bytes`. A single row may fill the heap of SQLite.
    """
    rows: list[list[Json]] = []
    size = 0
    for row in cursor:
        size += sum(len(value) for value in row if isinstance(value, str | bytes))
        if size > max_bytes:
            raise database_session.result_too_large(max_bytes)
        rows.append([_to_json(value) for value in row])
        if len(rows) == database_session.FETCHED_ROWS or size > FETCHED_BYTES:
            yield rows
            rows, size = [], 0
    yield rows


def _run_write(connection: sqlite3.Connection, job: SqliteJob) -> Json:
    written = 0
    rows: list[list[Json]] = decode(job.values)
    with _open_transaction(connection, WRITE_ACTIONS):
        for batch in database_session.split_batches(rows, job.batch_rows):
            values = [[sql_values.to_plain(value) for value in row] for row in batch]
            written += connection.executemany(job.statement, values).rowcount
    return written


def _run_statement(connection: sqlite3.Connection, job: SqliteJob) -> Json:
    with _open_transaction(connection, CHANGE_ACTIONS):
        cursor = connection.execute(job.statement, _decode_values(job))
        for _ in cursor:
            pass  # The rows are discarded, but the statement is complete only when they have been read.
        return max(cursor.rowcount, 0)


def _decode_values(job: SqliteJob) -> list[str | int | float | None]:
    values: list[Json] = decode(job.values)
    return [sql_values.to_plain(value) for value in values]


# ── file ────────────────────────────────────────────────────────────────────────────────────────────────────


class SqliteJobFile:
    """File of one job, opened anew for each, which takes less time than a commit: no state survives a job."""

    def __init__(self, job: SqliteJob) -> None:
        self._file = Path(job.file)
        self._mode = "ro" if job.action == "query" else "rw"
        self._own_files = job.own_files
        self._max_file_bytes = job.max_file_bytes
        self._ends_at = time.monotonic() + job.timeout_seconds

    def is_over(self) -> bool:
        return time.monotonic() >= self._ends_at

    def open(self) -> sqlite3.Connection:
        """Open the file, and return a connection whose statements are interrupted at the time limit of the job.

        If a writer has died, its transaction is rolled back first. Raises `NodeError` for an unusable file, and
        `sqlite3.Error`.
        """
        mode = self._mode
        if mode == "rw":
            durable_folders.make_folder(self._file.parent)
        self._check_file(mode)
        if mode == "ro" and self._file.with_name(self._file.name + "-journal").exists():
            # A writer may have died: the next connection that may write rolls its transaction back.
            with closing(self._connect("rw")) as connection:
                connection.execute("SELECT 1 FROM sqlite_schema").fetchone()
        connection = self._connect(mode)
        connection.set_progress_handler(self.is_over, OPERATIONS_BETWEEN_CHECKS)
        return connection

    def _connect(self, mode: str) -> sqlite3.Connection:
        """Return a connection with limits of memory, values and file size; `mode` is `ro` (only reads) or `rw`."""
        connection = sqlite3.connect(
            f"file:{quote(str(self._file.absolute()))}?mode={mode}",
            uri=True,
            timeout=BUSY_SECONDS,
            isolation_level=None,
        )
        connection.text_factory = lambda raw: raw.decode(errors="replace")
        connection.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, MAX_VALUE_BYTES)
        connection.setlimit(sqlite3.SQLITE_LIMIT_ATTACHED, 0)
        # More than the default: a journal whose removal is not synced would undo a commit after a power failure.
        connection.execute("PRAGMA synchronous = EXTRA")
        connection.execute("PRAGMA trusted_schema = OFF")
        connection.execute(f"PRAGMA hard_heap_limit = {HEAP_BYTES}")
        if mode == "rw":
            (page_bytes,) = connection.execute("PRAGMA page_size").fetchone()
            connection.execute(f"PRAGMA max_page_count = {self._max_file_bytes // page_bytes}")
        else:
            connection.execute("PRAGMA query_only = ON")
        return connection

    def _check_file(self, mode: str) -> None:
        """Create the file if `mode` is `rw` and it is missing.

        Raises `NodeError` for a file that is missing otherwise, and for a path that is no regular file of the
        organization alone: a link, or one of the server's own files.
        """
        flags = os.O_RDWR | os.O_CREAT if mode == "rw" else os.O_RDONLY
        try:
            descriptor = os.open(self._file, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o600)
        except FileNotFoundError as error:
            message = "The file of the data source doesn't exist yet: a sqlite-destination node creates it"
            raise NodeError(message, code="connection-failed") from error
        except OSError as error:
            raise foreign_file_error() from error
        try:
            found = os.fstat(descriptor)
        finally:
            os.close(descriptor)
        if not stat.S_ISREG(found.st_mode) or found.st_nlink != 1 or self._is_own(found):
            raise foreign_file_error()

    def _is_own(self, found: os.stat_result) -> bool:
        """Return whether a file is one of the server's own."""
        return (found.st_dev, found.st_ino) in self._own_files


def foreign_file_error() -> NodeError:
    return NodeError(
        "The file of the data source is not a regular file of the organization", code="address-not-allowed"
    )


def _to_json(value: Any) -> Json:  # noqa: ANN401 - one of the five types of SQLite
    if isinstance(value, bytes):
        return sql_values.bytes_to_json(value)
    return sql_values.float_to_json(value) if isinstance(value, float) else value


# ── permissions ─────────────────────────────────────────────────────────────────────────────────────────────


@contextmanager
def _allow_actions(connection: sqlite3.Connection, actions: Collection[int]) -> Iterator[None]:
    """Restrict the statements of the block to these SQLite actions; functions such as `load_extension` are
    denied, too.
    """

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
def _open_transaction(connection: sqlite3.Connection, actions: Collection[int]) -> Iterator[None]:
    """Run the block in a write transaction, restricted to `actions`, and commit it, or roll it back after an error."""
    connection.execute("BEGIN IMMEDIATE")
    try:
        with _allow_actions(connection, actions):
            yield
    except BaseException:
        connection.set_progress_handler(None, 0)  # A rollback must not be interrupted after the time limit.
        if connection.in_transaction:
            connection.execute("ROLLBACK")
        raise
    connection.set_progress_handler(None, 0)  # A commit that has begun is not interrupted.
    connection.execute("COMMIT")


# ── failures ────────────────────────────────────────────────────────────────────────────────────────────────


@contextmanager
def _translate_errors(job: SqliteJob, is_over: Callable[[], bool]) -> Iterator[None]:
    try:
        yield
    except sqlite3.Error as error:
        raise _to_node_error(error, is_over=is_over(), timeout_seconds=job.timeout_seconds) from error
    except OverflowError as error:
        raise NodeError(
            "A whole number doesn't fit into 64 bits: write it as a text", code="sql-error"
        ) from error


def _to_node_error(error: sqlite3.Error, *, is_over: bool, timeout_seconds: float) -> NodeError:
    name = getattr(error, "sqlite_errorname", "") or ""
    if name == "SQLITE_INTERRUPT" and is_over:
        return database_session.query_timed_out(timeout_seconds)
    if name.startswith(("SQLITE_AUTH", "SQLITE_READONLY")):
        return NodeError(
            f"The statement may not do that: {database_session.quote_server_message(error)}",
            code="statement-refused",
        )
    if name.startswith("SQLITE_NOMEM"):
        return _out_of_memory_error()
    if name == "SQLITE_IOERR_WRITE":
        message = (
            "A file can't be written: the disk is full, or a temporary file of the statement is too large"
        )
        return NodeError(message, code="sql-error")
    is_busy = name.startswith(("SQLITE_BUSY", "SQLITE_LOCKED"))
    return NodeError(
        f"The database refused: {database_session.quote_server_message(error)}",
        code="sql-error",
        retryable=is_busy,
    )


def _out_of_memory_error() -> NodeError:
    message = f"The statement exceeded its memory limit of {HEAP_BYTES >> 20:,} MB: select less"
    return NodeError(message, code="out-of-memory")
