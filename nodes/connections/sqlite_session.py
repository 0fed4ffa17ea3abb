"""Session of SQLite: files of an organization, used by child processes; see `nodes.connections.sqlite_process`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import msgspec

from concurrency import offload
from engine.run_errors import NodeError
from engine.services import QueryRows, UpsertRule
from engine.values import encode_json
from models import durable_folders
from nodes import config_fields, sql_text
from nodes.connections import database_session, sqlite_process
from nodes.connections.sqlite_process import foreign_file_error
from nodes.sandbox.frames import SqliteJob, SqliteResult
from nodes.sandbox.processes import JobListener, ProcessKind, ProcessPool
from nodes.sql_text import SqlDialect

if TYPE_CHECKING:
    from engine.values import Json
    from nodes.connections.data_source import ConnectionSource
    from nodes.connections.data_source_policy import ConnectionPolicy
    from nodes.sql_text import SqlStatement

NAME_CHARACTERS = 100
COMPANION_SUFFIXES = ("-journal", "-wal", "-shm")


def find_file(source: ConnectionSource, policy: ConnectionPolicy) -> Path:
    """Return the path of a data source's SQLite file in the organization's folder; the file need not exist.

    Raises `NodeError` for a name that is no plain file name, a folder that is a link, and if this process has no folder
    of files.
    """
    if policy.files is None:
        raise NodeError("Files are not available in this process", code="not-available")
    name = config_fields.read_text(source.settings, "file")
    if not _is_file_name(name) or not _is_file_name(source.organization_id):
        message = "`file` must be a name of letters, digits, dots, hyphens and underscores, without a folder"
        raise NodeError(message, code="address-not-allowed")
    folder = policy.files / source.organization_id
    if folder.is_symlink():
        raise foreign_file_error()
    return folder / name


def _is_file_name(text: str) -> bool:
    return (
        0 < len(text) <= NAME_CHARACTERS
        and text.isascii()
        and not text.startswith((".", "-"))
        and not text.endswith(COMPANION_SUFFIXES)
        and all(character.isalnum() or character in "._-" for character in text)
    )


def open_processes(policy: ConnectionPolicy) -> ProcessPool:
    """Return a pool of child processes that run statements of SQLite, confined to the folder of files; they start on
    demand.
    """
    files = "" if policy.files is None else str(policy.files.absolute())
    return ProcessPool(
        ProcessKind.SQLITE,
        limit=policy.max_sqlite_processes,
        environment={sqlite_process.TEMPORARY_FOLDER_VARIABLE: files},
    )


async def open_session(
    source: ConnectionSource, policy: ConnectionPolicy, processes: ProcessPool
) -> SqliteSession:
    """Return a session for the SQLite file of a data source; it opens nothing before the first statement.

    Raises `NodeError` for an invalid file name.
    """
    return SqliteSession(source.organization_id, find_file(source, policy), policy, processes)


class SqliteSession:
    """Session that runs each statement in a child process, which is killed when its caller gives up."""

    def __init__(
        self, organization_id: str, file: Path, policy: ConnectionPolicy, processes: ProcessPool
    ) -> None:
        self._organization_id = organization_id
        self._file = file
        self._policy = policy
        self._processes = processes

    async def query(
        self,
        statement: SqlStatement,
        parameters: Sequence[Json],
        *,
        max_rows: int,
        max_bytes: int,
        timeout_seconds: float,
    ) -> QueryRows:
        found = await self._run(
            "query",
            _build_text(statement),
            parameters,
            max_rows=max_rows,
            max_bytes=max_bytes,
            timeout_seconds=timeout_seconds,
        )
        result = msgspec.convert(found, SqliteResult)
        return QueryRows(result.columns, result.rows)

    async def write(
        self,
        table: str,
        columns: Sequence[str],
        rows: Sequence[Sequence[Json]],
        *,
        upsert: UpsertRule,
        batch_rows: int,
        timeout_seconds: float,
    ) -> int:
        insertion = _insert_statement(table, columns, upsert)
        written = await self._run(
            "write", insertion, rows, batch_rows=batch_rows, timeout_seconds=timeout_seconds
        )
        return msgspec.convert(written, int)

    async def execute(
        self, statement: SqlStatement, parameters: Sequence[Json], *, timeout_seconds: float
    ) -> int:
        changed = await self._run(
            "execute", _build_text(statement), parameters, timeout_seconds=timeout_seconds
        )
        return msgspec.convert(changed, int)

    async def reset(self) -> bool:
        return True

    async def is_alive(self) -> bool:
        return True

    async def close(self) -> None:
        self.abort()

    def abort(self) -> None:
        """Do nothing: nothing is open between two statements."""

    async def _run(
        self,
        action: Literal["query", "write", "execute"],
        statement: str,
        values: Sequence[Json] | Sequence[Sequence[Json]],
        *,
        timeout_seconds: float,
        max_rows: int = 0,
        max_bytes: int = 0,
        batch_rows: int = 1,
    ) -> Json:
        """Run a statement on the file in a child process, which is killed at the time limit; return its result: for a
        query, a `SqliteResult` as JSON, else the number of rows.

        `values` are its parameters, for a write the rows. Raises `NodeError`, with the retryable code `timeout` at the
        time limit.
        """
        if self._policy.files is not None and not self._policy.files.is_dir():
            durable_folders.make_folder(
                self._policy.files
            )  # A child is confined to this folder, which must exist.
        job = SqliteJob(
            file=str(self._file.absolute()),
            own_files=list(self._own_files()),
            max_file_bytes=self._policy.max_file_bytes,
            statement=statement,
            values=msgspec.Raw(await offload.run(encode_json, [*values])),
            timeout_seconds=timeout_seconds,
            action=action,
            max_rows=max_rows,
            max_bytes=max_bytes,
            batch_rows=batch_rows,
        )
        try:
            done = await self._processes.run(
                msgspec.json.encode(job),
                JobListener(_ignore_line, []),
                organization_id=self._organization_id,
                seconds=timeout_seconds,
            )
        except NodeError as error:
            if error.code == "timeout":
                raise database_session.query_timed_out(timeout_seconds) from error
            raise
        return done.output

    def _own_files(self) -> Iterator[tuple[int, int]]:
        for own in self._policy.own_databases:
            if own.file is not None:
                with suppress(FileNotFoundError):
                    found = own.file.stat()
                    yield found.st_dev, found.st_ino


def _ignore_line(_level: str, _message: str) -> None:
    """Do nothing: statements print no lines."""


def _build_text(statement: SqlStatement) -> str:
    return statement.with_placeholders("?" * statement.placeholder_count)


def _insert_statement(table: str, columns: Sequence[str], upsert: UpsertRule) -> str:
    names = [sql_text.quote_name(column, SqlDialect.SQLITE) for column in columns]
    insertion = (
        f"INSERT INTO {sql_text.quote_table(table, SqlDialect.SQLITE)} "  # noqa: S608 - names are quoted, values are bound
        f"({', '.join(names)}) VALUES ({', '.join('?' * len(columns))})"
    )
    if not upsert.key:
        return insertion
    key = ", ".join(sql_text.quote_name(column, SqlDialect.SQLITE) for column in upsert.key)
    others = [
        sql_text.quote_name(column, SqlDialect.SQLITE) for column in columns if column not in upsert.key
    ]
    if not upsert.update or not others:
        return f"{insertion} ON CONFLICT ({key}) DO NOTHING"
    return f"{insertion} ON CONFLICT ({key}) DO UPDATE SET {', '.join(f'{name} = excluded.{name}' for name in others)}"
