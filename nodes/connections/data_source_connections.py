"""Service that opens users' data sources: pools of databases, buckets, mail servers, and credentials for requests."""

from __future__ import annotations

import asyncio
from base64 import b64encode
from collections.abc import Awaitable, Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, TypeVar

from engine.run_errors import NodeError
from engine.services import (
    ObjectBucket,
    QueryRows,
    RunCaller,
    SqlDatabase,
    UpsertRule,
    note_source_use,
)
from nodes import config_fields, redaction, sql_text, url_targets
from nodes.connections import database_session
from nodes.connections.data_source_policy import ConnectionPolicy, ResolveHost
from nodes.connections.database_endpoint import DatabaseEndpoint, NameResolver
from nodes.connections.session_pool import SessionPool
from nodes.sql_text import SqlDialect, StatementRefused

if TYPE_CHECKING:
    from engine.values import Json
    from nodes.connections.data_source import ConnectionSource, ConnectionSources
    from nodes.connections.database_session import DatabaseSession
    from nodes.connections.smtp_mail_server import SmtpMailServer
    from nodes.mcp.tool_servers import ToolServerConnection, ToolServers
    from nodes.sandbox.processes import ProcessPool

Outcome = TypeVar("Outcome")

BEARER, BASIC, API_KEY = "http-bearer", "http-basic", "api-key"


class DataSourceConnections:
    """Implements `engine.services.DataSourceService`; a driver is imported with the first data source that needs it."""

    def __init__(
        self, sources: ConnectionSources, policy: ConnectionPolicy, resolve: ResolveHost | None = None
    ) -> None:
        self._sources = sources
        self._policy = policy
        self._names = NameResolver()
        self._resolve = resolve or self._names.resolve
        self._pools: dict[tuple[str, str], tuple[int, SessionPool]] = {}
        self._closing: set[asyncio.Task[None]] = set()
        self._sqlite_processes: ProcessPool | None = None
        self._tool_servers: ToolServers | None = None

    async def database(self, caller: RunCaller, source_id: str, type: str) -> SqlDatabase:  # noqa: A002 - the field's own word
        """Return the SQL database of a data source of this type, over pooled connections; it connects at the first
        statement.

        Raises `NodeError` if the caller may not use it, its type is another one, or the settings of a server are
        unusable; an unusable file name of SQLite fails at the first statement.
        """
        source = await self._find(caller, source_id, type)
        return PooledSqlDatabase(self._pool_of(source), SqlDialect(type), tuple(source.secrets.values()))

    async def bucket(self, caller: RunCaller, source_id: str) -> ObjectBucket:
        """Return the bucket of an S3 data source, without connecting.

        Raises `NodeError` if the caller may not use it, or its settings are unusable.
        """
        from nodes.connections import s3_bucket  # noqa: PLC0415 - its library is optional

        return await s3_bucket.open_bucket(await self._find(caller, source_id, "s3"), self._policy)

    async def mail_server(self, caller: RunCaller, source_id: str) -> SmtpMailServer:
        """Return the mail server of an SMTP data source, without connecting.

        Raises `NodeError` if the caller may not use it, or its settings are unusable.
        """
        from nodes.connections import smtp_mail_server  # noqa: PLC0415 - see the class

        return smtp_mail_server.open_server(
            await self._find(caller, source_id, "smtp"), self._policy, self._resolve
        )

    async def tool_server(self, caller: RunCaller, source_id: str) -> ToolServerConnection:
        """Return the tool server of a data source, without connecting.

        Raises `NodeError` if the caller may not use it, or it is of another type.
        """
        from nodes.mcp import tool_servers  # noqa: PLC0415 - see the class

        source = await self._find(caller, source_id, "mcp-server")
        if self._tool_servers is None:
            self._tool_servers = tool_servers.ToolServers(
                self._policy.allowed_networks, self._policy.tool_server_hosts
            )
        return tool_servers.ToolServerConnection(self._tool_servers, source)

    async def headers(self, caller: RunCaller, source_id: str, url: str) -> Mapping[str, str]:
        """Return the secret headers of a data source for a request to `url`: a bearer token, a basic login or an API
        key.

        Raises `NodeError` if the caller may not use it, it is of another type, or it lists hosts and the URL's host is
        not among them.
        """
        source = await self._find(caller, source_id, BEARER, BASIC, API_KEY)
        _check_host(source, url)
        match source.type:
            case "http-bearer":
                return {"Authorization": f"Bearer {source.secrets['token']}"}
            case "http-basic":
                login = f"{config_fields.read_text(source.settings, 'username')}:{source.secrets['password']}"
                return {"Authorization": f"Basic {b64encode(login.encode()).decode()}"}
            case _:
                return {
                    config_fields.read_text(
                        {"header": "X-API-Key", **source.settings}, "header"
                    ): source.secrets["key"]
                }

    async def close(self) -> None:
        """Close idle connections, those to tool servers too, wait for those that are being reset or closed, and end the
        processes for SQLite.

        Connections in use are closed at their release.
        """
        for _, pool in self._pools.values():
            await pool.close()
        self._pools.clear()
        if self._closing:
            await asyncio.wait(self._closing)
        if self._sqlite_processes is not None:
            await self._sqlite_processes.close()
        if self._tool_servers is not None:
            await self._tool_servers.close()
        self._names.close()

    async def _find(self, caller: RunCaller, source_id: str, *types: str) -> ConnectionSource:
        """Return a data source of one of the types, and add it to the sources that the node uses by `note_source_use`;
        raises `NodeError` if the caller may not use it, and for another type.
        """
        source = await self._sources.find(caller, source_id)
        note_source_use(source.id, source.revision)
        if source.type not in types:
            wanted = " or ".join(types)
            raise NodeError(
                f"The data source is of the type {source.type}, not {wanted}", code="wrong-data-source"
            )
        return source

    def _pool_of(self, source: ConnectionSource) -> SessionPool:
        """Return the pool of connections of a data source, a new one at first use and for each new revision.

        A pool of an earlier revision is closed in the background. Each new pool also removes the unused pools of other
        data sources.
        """
        key = (source.organization_id, source.id)
        revision, pool = self._pools.get(key, (None, None))
        if pool is not None and revision == source.revision:
            return pool
        if pool is not None:
            self._close_in_background(pool)
        self._pools = {
            kept: each for kept, each in self._pools.items() if kept != key and not each[1].is_unused
        }
        made = SessionPool(
            self._choose_opener(source),
            max_connections=self._policy.max_connections_per_source,
            idle_seconds=self._policy.idle_seconds,
        )
        self._pools[key] = (source.revision, made)
        return made

    def _choose_opener(self, source: ConnectionSource) -> Callable[[], Awaitable[DatabaseSession]]:
        """Return the function that opens a connection to a data source, by its type: SQLite, MySQL, or else PostgreSQL.

        Raises `NodeError` for unusable settings of a server.
        """
        match source.type:
            case SqlDialect.SQLITE:
                from nodes.connections import sqlite_session  # noqa: PLC0415 - see the class

                if self._sqlite_processes is None:
                    self._sqlite_processes = sqlite_session.open_processes(self._policy)
                return partial(sqlite_session.open_session, source, self._policy, self._sqlite_processes)
            case SqlDialect.MYSQL:
                from nodes.connections import mysql_session  # noqa: PLC0415 - see the class

                endpoint = DatabaseEndpoint.from_source(source)
                return partial(
                    endpoint.connect,
                    self._policy,
                    self._resolve,
                    partial(mysql_session.open_session, endpoint),
                )
            case _:
                from nodes.connections import postgresql_session  # noqa: PLC0415 - see the class

                endpoint = DatabaseEndpoint.from_source(source)
                return partial(
                    endpoint.connect,
                    self._policy,
                    self._resolve,
                    partial(postgresql_session.open_session, endpoint),
                )

    def _close_in_background(self, pool: SessionPool) -> None:
        task = asyncio.get_running_loop().create_task(pool.close())
        self._closing.add(task)
        task.add_done_callback(self._closing.discard)


class PooledSqlDatabase:
    """Implements `engine.services.SqlDatabase` over a pool; its time limits span waiting, connecting and reading."""

    def __init__(self, pool: SessionPool, dialect: SqlDialect, secrets: Sequence[str]) -> None:
        self._pool = pool
        self._dialect = dialect
        self._secrets = secrets

    async def query(
        self,
        statement: str,
        parameters: Sequence[Json],
        *,
        max_rows: int,
        max_bytes: int,
        timeout_seconds: float,
    ) -> QueryRows:
        """Run a read-only statement with its parameters, and return its columns and rows.

        Raises `NodeError` for a statement that writes or has another number of placeholders, more rows, bytes or time
        than the limits, and failures of the server.
        """
        try:
            read = sql_text.parse_reading(statement, self._dialect, len(parameters))
        except StatementRefused as error:
            raise _build_refusal(error) from error
        return await self._run_in_time(
            timeout_seconds,
            lambda lent: lent.query(
                read, parameters, max_rows=max_rows, max_bytes=max_bytes, timeout_seconds=timeout_seconds
            ),
        )

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
        """Insert rows into a table in batches, all or none; `upsert` decides whether rows with an existing key are
        updated or left. Return the number of inserted or changed rows.

        Without rows or columns it does nothing. Raises `NodeError` for invalid names, a key that is no column, the time
        limit, and failures of the server, such as a row that exists already if `upsert` has no key.
        """
        missing = [name for name in upsert.key if name not in columns]
        if missing:
            raise NodeError(
                f"The rows have no column {missing[0][:100]!r}, which is in the key", code="invalid-rows"
            )
        if not rows or not columns:
            return 0
        try:
            sql_text.quote_table(table, self._dialect)
            for name in columns:
                sql_text.quote_name(name, self._dialect)
        except StatementRefused as error:
            raise _build_refusal(error) from error
        return await self._run_in_time(
            timeout_seconds,
            lambda lent: lent.write(
                table, columns, rows, upsert=upsert, batch_rows=batch_rows, timeout_seconds=timeout_seconds
            ),
        )

    async def execute(self, statement: str, parameters: Sequence[Json], *, timeout_seconds: float) -> int:
        """Run a writing statement with its parameters, and return the number of changed rows.

        Raises `NodeError` for a refused statement, the time limit, and failures of the server.
        """
        try:
            read = sql_text.parse_writing(statement, self._dialect, len(parameters))
        except StatementRefused as error:
            raise _build_refusal(error) from error
        return await self._run_in_time(
            timeout_seconds, lambda lent: lent.execute(read, parameters, timeout_seconds=timeout_seconds)
        )

    async def _run_in_time(
        self, timeout_seconds: float, work: Callable[[DatabaseSession], Awaitable[Outcome]]
    ) -> Outcome:
        """Run `work` with a connection of the pool, and return its result; the time limit includes the wait for a
        connection.

        Raises `NodeError` with the code `timeout` after it, else errors of `work` with the source's secrets redacted.
        After any failure the connection is closed, since its state is unknown.
        """
        try:
            async with asyncio.timeout(timeout_seconds):
                with redaction.redact_errors(self._secrets):
                    lent = await self._pool.acquire()
                    try:
                        done = await work(lent)
                    except BaseException:
                        self._pool.discard(lent)
                        raise
        except TimeoutError as error:
            raise database_session.query_timed_out(timeout_seconds) from error
        self._pool.release(lent)
        return done


def _build_refusal(error: StatementRefused) -> NodeError:
    return NodeError(str(error), code="statement-refused")


def _check_host(source: ConnectionSource, url: str) -> None:
    """Raise `NodeError` if the data source lists hosts and the URL's host is not among them.

    Its secret headers are sent to no other host. Without a list, every URL passes; with one, an invalid URL is refused
    too.
    """
    hosts = source.settings.get("hosts")
    if not hosts:
        return
    try:
        host = url_targets.parse_target(url).host
    except ValueError as error:
        raise NodeError(f"The URL can't be used: {error}", code="invalid-url") from error
    if not isinstance(hosts, list) or host not in {str(each).lower().rstrip(".") for each in hosts}:
        raise NodeError(f"The data source is not for the host {host}", code="host-not-allowed")
