"""Session of MySQL or MariaDB, through asyncmy."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, cast

from asyncmy import converters, errors
from asyncmy.connection import Connection
from asyncmy.constants import CR, ER, FIELD_TYPE
from asyncmy.cursors import SSCursor

from concurrency.loop_share import LoopShare
from engine.run_errors import NodeError
from engine.services import QueryRows, UpsertRule
from nodes import sql_text
from nodes.connection_phases import ConnectionPhase, note_phase
from nodes.connections import database_session, sql_values
from nodes.connections.database_endpoint import CONNECT_SECONDS, connection_error
from nodes.connections.database_session import RowCollector
from nodes.connections.metered_wire import BYTES_BESIDE, BufferedWire, MeteredLoop
from nodes.output_sizes import MAXIMUM_BYTES
from nodes.sql_text import SqlDialect

if TYPE_CHECKING:
    import ssl

    from engine.values import Json
    from nodes.connections.database_endpoint import DatabaseEndpoint
    from nodes.sql_text import SqlStatement

    Convert = Callable[[Any], Json]

MAX_PLACEHOLDERS = 65_535
WIRE_BYTES_PER_BYTE = 3
"""A small number takes two bytes as JSON, with its comma, and six on the wire, but there it has no name."""
PLACEHOLDER_BYTES = 100
"""Wire size of a server's description of a placeholder."""
RETURNED_BYTES = 4_000_000
"""Maximum wire size of the result of a writing statement: it is discarded, but the driver holds it."""
RESET_CONNECTION = 0x1F
BINARY = 63
"""Character set of columns with bytes."""

# Quotes mean the same on every server, values that don't fit are errors instead of being truncated, and times are UTC.
SESSION_STATEMENT = (
    "SET SESSION sql_mode = 'STRICT_ALL_TABLES,ERROR_FOR_DIVISION_BY_ZERO,NO_ENGINE_SUBSTITUTION', "
    "time_zone = '+00:00', autocommit = 1"
)
UNIQUE_KEYS_QUERY = (
    "SELECT index_name, column_name FROM information_schema.statistics "
    "WHERE non_unique = 0 AND table_schema = COALESCE(?, DATABASE()) AND table_name = ?"
)

DATE_TYPES = frozenset({FIELD_TYPE.DATETIME, FIELD_TYPE.TIMESTAMP})
TEXT_TYPES = frozenset({FIELD_TYPE.DATE, FIELD_TYPE.NEWDATE, FIELD_TYPE.TIME, *DATE_TYPES})
"""Types whose texts are nearly ISO 8601 already, and may exceed the range of `datetime`."""
CONVERSIONS = {key: value for key, value in converters.conversions.items() if key not in TEXT_TYPES}

RETRYABLE = frozenset({ER.LOCK_DEADLOCK, ER.LOCK_WAIT_TIMEOUT})
TIMED_OUT = frozenset({ER.QUERY_INTERRUPTED, 1969, 3024})
"""Interrupted queries: by MariaDB's `max_statement_time`, MySQL's `max_execution_time`, or KILL QUERY."""
UNAVAILABLE = frozenset(
    {
        ER.SERVER_SHUTDOWN, ER.CON_COUNT_ERROR, 1927, 4031,  # The connection was killed, or idle for too long.
        CR.CR_SERVER_GONE_ERROR, CR.CR_SERVER_LOST, CR.CR_CONN_HOST_ERROR, CR.CR_CONNECTION_ERROR,
    }
)  # fmt: skip
REFUSED_LOGIN = frozenset(
    {ER.ACCESS_DENIED_ERROR, ER.DBACCESS_DENIED_ERROR, ER.HOST_NOT_PRIVILEGED, 1698, 2059}
)
ACCOUNT = re.compile(r"'[^']*'@'[^']*'")
DUPLICATES = re.compile(rb"Duplicates: (\d+)")


async def open_session(
    endpoint: DatabaseEndpoint, address: str, context: ssl.SSLContext | None
) -> MysqlSession:
    """Connect to MySQL or MariaDB at a checked address and log in; without a TLS context, the connection is plain.

    Raises `OSError` if the connection is refused or breaks, and `NodeError` for a refused login, a missing database,
    and a server of another kind.
    """
    make: Any = Connection  # The class has no types.
    connection = make(
        host=address,
        port=endpoint.port,
        user=endpoint.user,
        password=endpoint.password,
        database=endpoint.database or None,
        ssl=context,
        charset="utf8mb4",
        conv=CONVERSIONS,
        connect_timeout=CONNECT_SECONDS,
        autocommit=None,
        local_infile=False,
        program_name="pilotflame",
    )
    # The driver looks up the running loop itself, and accepts no other.
    loop = connection._loop = MeteredLoop(BufferedWire)  # noqa: SLF001 - see above
    try:
        with note_phase(ConnectionPhase.AUTH):
            await connection.connect()
    except errors.MySQLError as error:
        number = _error_number(error)
        if number == ER.BAD_DB_ERROR:
            raise connection_error("there is no such database", retryable=False) from error
        if number in REFUSED_LOGIN:
            raise connection_error("it refused the login", retryable=False) from error
        raise (error.__cause__ if isinstance(error.__cause__, OSError) else OSError(str(error))) from error
    except OSError:
        raise  # Includes an untrusted certificate, which is a ValueError too.
    except (RuntimeError, *database_session.MISREAD_ERRORS) as error:
        raise connection_error("the server is not a database of this type", retryable=False) from error
    opened = MysqlSession(connection, cast("BufferedWire", loop.wire))
    try:
        await opened.prepare()
    except BaseException:
        opened.abort()
        raise
    return opened


class MysqlSession:
    def __init__(self, connection: Any, wire: BufferedWire) -> None:  # noqa: ANN401 - a `Connection`, whose methods have no types
        self._connection = connection
        self._transport = connection._transport  # noqa: SLF001 - the driver lets go of it before it is closed
        self._protocol = connection._proto  # noqa: SLF001 - as above
        self._wire = wire
        self._is_idle = True
        self._is_mariadb = "MariaDB" in connection.get_server_info()

    async def prepare(self) -> None:
        """Set the session's variables, such as the time zone; needed after connecting and after each reset.

        Raises `NodeError`.
        """
        with _translate_errors():
            await self._connection.query(SESSION_STATEMENT)

    async def query(
        self,
        statement: SqlStatement,
        parameters: Sequence[Json],
        *,
        max_rows: int,
        max_bytes: int,
        timeout_seconds: float,
    ) -> QueryRows:
        with self._mark_busy(timeout_seconds, max_bytes):
            await self._limit_time(timeout_seconds)
            await self._connection.query("START TRANSACTION READ ONLY")
            rows = await self._read_rows(statement, parameters, max_rows, max_bytes)
            await self._connection.rollback()
            return rows

    async def _read_rows(
        self, statement: SqlStatement, parameters: Sequence[Json], max_rows: int, max_bytes: int
    ) -> QueryRows:
        """Run a reading statement with its parameters, and return its columns and rows within the limits.

        Raises the errors of the driver, and `NodeError` beyond the limits.
        """
        # The driver binds values on the server or streams rows, never both. So the text and the values are bound to
        # variables, and the server prepares the statement from them; it accepts only one.
        names = ["@query", *(f"@value{number}" for number in range(len(parameters)))]
        await self._execute(
            f"SET {', '.join(f'{name} = ?' for name in names)}", [_build_text(statement), *parameters]
        )
        await self._connection.query("PREPARE pilotflame FROM @query")
        using = f" USING {', '.join(names[1:])}" if parameters else ""
        cursor: Any = self._connection.cursor(SSCursor)
        self._wire.limit(BYTES_BESIDE)
        await cursor.execute(f"EXECUTE pilotflame{using}")
        # The column descriptions have been read by now, so only rows may take more.
        self._wire.limit(WIRE_BYTES_PER_BYTE * max_bytes)
        description = cursor.description or ()
        gathering = RowCollector(
            [str(column[0]) for column in description], max_rows=max_rows, max_bytes=max_bytes
        )
        converted = [
            (position, convert)
            for position, column in enumerate(description)
            if (convert := CONVERTERS.get(column[1])) is not None
        ]
        fetched_rows, turn = database_session.rows_per_fetch(len(description)), LoopShare()
        while description and (fetched := await cursor.fetchmany(fetched_rows)):
            gathering.add(_convert_rows(fetched, converted))
            await turn.yield_if_due()
        return gathering.rows()

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
        name = sql_text.quote_table(table, SqlDialect.MYSQL)
        names = [sql_text.quote_name(column, SqlDialect.MYSQL) for column in columns]
        with self._mark_busy(timeout_seconds):
            await self._limit_time(timeout_seconds)
            await self._check_key(table, upsert)
            bind = await self._read_binders(name, names)
            written = 0
            await self._connection.query("START TRANSACTION")
            for batch in database_session.split_batches(
                rows, min(batch_rows, max(1, MAX_PLACEHOLDERS // len(columns)))
            ):
                places = ", ".join(f"({', '.join('?' * len(columns))})" for _ in batch)
                insertion = f"INSERT INTO {name} ({', '.join(names)}) VALUES {places}"  # noqa: S608 - names are quoted, values are bound
                values = [convert(value) for row in batch for convert, value in zip(bind, row, strict=True)]
                result = await self._execute(insertion + _on_duplicate_sql(columns, upsert), values)
                written += _count_written(result)
            await self._connection.commit()
            return written

    async def execute(
        self, statement: SqlStatement, parameters: Sequence[Json], *, timeout_seconds: float
    ) -> int:
        with self._mark_busy(timeout_seconds):
            await self._limit_time(timeout_seconds)
            result = await self._execute(_build_text(statement), parameters)
            return int(result.affected_rows)

    async def reset(self) -> bool:
        self._wire.limit(0)
        try:
            with _translate_errors():
                await self._connection._execute_command(RESET_CONNECTION, b"")  # noqa: SLF001 - the driver has no name for it
                await self._connection._read_ok_packet()  # noqa: SLF001 - nor for its answer
            await self.prepare()
        except NodeError:
            return False
        return True

    async def is_alive(self) -> bool:
        try:
            with _translate_errors():
                await self._connection.ping(reconnect=False)
        except NodeError:
            return False
        return True

    async def close(self) -> None:
        if self._is_idle and self._connection.connected:
            await self._connection.ensure_closed()
            return
        # A server that is still busy doesn't answer the end of TLS, and the driver would buffer all that it still
        # sends.
        self._transport.abort()
        await self._protocol.wait_closed()

    def abort(self) -> None:
        self._transport.abort()

    @contextmanager
    def _mark_busy(self, timeout_seconds: float, max_bytes: int = MAXIMUM_BYTES) -> Iterator[None]:
        """Mark the session as busy for the block, and translate its failures to `NodeError`, except for `TimeoutError`;
        after a failure it stays busy.

        `max_bytes` is the limit that an error about too many received bytes names.
        """
        self._is_idle = False
        self._wire.limit(0)
        try:
            with _translate_errors(timeout_seconds):
                yield
        except NodeError:
            if self._wire.is_exceeded:
                raise database_session.result_too_large(max_bytes) from None
            raise
        self._is_idle = True

    async def _limit_time(self, timeout_seconds: float) -> None:
        """Set the time limit, in seconds, of statements and of waits for locks at the server."""
        limit = (
            f"max_statement_time = {timeout_seconds:.3f}"
            if self._is_mariadb
            else f"max_execution_time = {max(1, int(timeout_seconds * 1000))}"
        )
        await self._connection.query(
            f"SET SESSION {limit}, innodb_lock_wait_timeout = {int(timeout_seconds) + 1}"
        )

    async def _execute(self, text: str, values: Sequence[Json]) -> Any:  # noqa: ANN401 - a result of the driver
        """Prepare a statement at the server, run it with these values, and return the driver's result; raises its
        errors.
        """
        self._wire.limit(RETURNED_BYTES + PLACEHOLDER_BYTES * len(values))
        prepared = await self._connection.prepare(text)
        result = await prepared.execute([_bind_value(value) for value in values])
        await prepared.close()
        return result

    async def _check_key(self, table: str, upsert: UpsertRule) -> None:
        """Raise `NodeError` unless the table has a unique index of exactly the columns of the upsert key, ignoring
        case.

        Without such an index the server would insert rows instead of updating them. Without a key nothing is checked.
        """
        if not upsert.key:
            return
        schema, _, name = table.rpartition(".")
        found = await self._execute(UNIQUE_KEYS_QUERY, [schema or None, name])
        columns_of: dict[str, set[str]] = {}
        for index, column in found.rows:
            columns_of.setdefault(str(index), set()).add(str(column).lower())
        if {column.lower() for column in upsert.key} not in columns_of.values():
            key = ", ".join(upsert.key)
            raise NodeError(
                f"The table {table[:100]} has no unique key of exactly {key[:200]}", code="sql-error"
            )

    async def _read_binders(self, table: str, names: Sequence[str]) -> Sequence[Convert]:
        """Ask the server for the types of columns, and return for each a function that converts a value for
        its type.
        """
        cursor: Any = self._connection.cursor()
        await cursor.execute(f"SELECT {', '.join(names)} FROM {table} LIMIT 0")  # noqa: S608 - names are quoted
        fields = cursor._result.fields  # noqa: SLF001 - where the driver says which columns hold bytes
        return [_column_binder(field.type_code, field.charsetnr) for field in fields]


# ── values ──────────────────────────────────────────────────────────────────────────────────────────────────


def _build_text(statement: SqlStatement) -> str:
    return statement.with_placeholders("?" * statement.placeholder_count)


def _bind_value(value: Json | bytes) -> str | int | float | bytes | None:
    if isinstance(value, bytes):
        return value
    plain = sql_values.to_plain(value)
    return str(plain) if isinstance(plain, int) and plain.bit_length() >= 64 else plain  # noqa: PLR2004 - bits


def _column_binder(type_code: int, charset: int) -> Convert:
    if type_code in DATE_TYPES:
        return _to_utc_text
    if type_code == FIELD_TYPE.JSON:
        return lambda value: None if value is None else sql_values.to_json_text(value)
    if charset == BINARY and type_code in {FIELD_TYPE.BLOB, FIELD_TYPE.STRING, FIELD_TYPE.VAR_STRING}:
        return sql_values.to_bytes  # type: ignore[return-value]  # bytes are bound, though no JSON
    return lambda value: value


def _to_utc_text(value: Json) -> Json:
    """Return an ISO time with an offset as UTC without an offset, which not every server understands; other values
    unchanged.
    """
    if not isinstance(value, str):
        return value
    try:
        parsed = datetime.fromisoformat(value)
    except ValueError:
        return value
    return value if parsed.tzinfo is None else parsed.astimezone(UTC).replace(tzinfo=None).isoformat(" ")


def _convert_rows(
    fetched: Sequence[Sequence[Any]], converted: Sequence[tuple[int, Convert]]
) -> list[list[Json]]:
    rows = [list(row) for row in fetched]
    for position, convert in converted:
        for row in rows:
            value = row[position]
            if value is not None:
                row[position] = convert(value)
    return rows


def _convert_bytes(value: str | bytes) -> Json:
    return sql_values.bytes_to_json(value) if isinstance(value, bytes) else value


CONVERTERS: dict[int, Convert] = {
    FIELD_TYPE.DECIMAL: sql_values.decimal_to_json,
    FIELD_TYPE.NEWDECIMAL: sql_values.decimal_to_json,
    FIELD_TYPE.FLOAT: sql_values.float_to_json,
    FIELD_TYPE.DOUBLE: sql_values.float_to_json,
    FIELD_TYPE.DATETIME: lambda value: value.replace(" ", "T"),
    FIELD_TYPE.TIMESTAMP: lambda value: value.replace(" ", "T") + "+00:00",
    FIELD_TYPE.JSON: sql_values.json_column_to_json,
    FIELD_TYPE.BIT: lambda value: int.from_bytes(value, "big"),
    **dict.fromkeys(
        (
            FIELD_TYPE.TINY_BLOB, FIELD_TYPE.MEDIUM_BLOB, FIELD_TYPE.LONG_BLOB, FIELD_TYPE.BLOB,
            FIELD_TYPE.VARCHAR, FIELD_TYPE.VAR_STRING, FIELD_TYPE.STRING, FIELD_TYPE.GEOMETRY,
        ),
        _convert_bytes,
    ),
}  # fmt: skip


def _on_duplicate_sql(columns: Sequence[str], upsert: UpsertRule) -> str:
    if not upsert.key:
        return ""
    others = [sql_text.quote_name(column, SqlDialect.MYSQL) for column in columns if column not in upsert.key]
    if not upsert.update or not others:
        key = sql_text.quote_name(upsert.key[0], SqlDialect.MYSQL)
        return f" ON DUPLICATE KEY UPDATE {key} = {key}"
    return f" ON DUPLICATE KEY UPDATE {', '.join(f'{name} = VALUES({name})' for name in others)}"


def _count_written(result: Any) -> int:  # noqa: ANN401 - a result of the driver
    """Return the number of inserted or changed rows of a batch, from the driver's result, which counts changed rows
    twice.
    """
    duplicates = DUPLICATES.search(result.message or b"")
    if duplicates is not None:
        return int(result.affected_rows) - int(duplicates[1])
    return min(int(result.affected_rows), 1)


# ── failures ────────────────────────────────────────────────────────────────────────────────────────────────


@contextmanager
def _translate_errors(timeout_seconds: float = 0) -> Iterator[None]:
    """Translate failures of the block, such as errors of the driver, to `NodeError`; `TimeoutError` passes."""
    try:
        yield
    except errors.MySQLError as error:
        raise _to_node_error(error, timeout_seconds) from error
    except UnicodeError as error:
        message = "A text of the result is not valid in the character set of its column"
        raise NodeError(message, code="sql-error") from error
    except database_session.MISREAD_ERRORS as error:
        raise database_session.unreadable_server() from error
    except RuntimeError as error:
        # The driver raises it if a server requests a file of this machine.
        raise NodeError(
            "The server requested a local file, which is refused", code="statement-refused"
        ) from error
    except OSError as error:
        if isinstance(error, TimeoutError):
            raise
        raise connection_error("it was lost") from error


def _to_node_error(error: errors.MySQLError, timeout_seconds: float) -> NodeError:
    number = _error_number(error)
    if number in TIMED_OUT:
        return database_session.query_timed_out(timeout_seconds)
    if number in UNAVAILABLE or isinstance(error, errors.InterfaceError):
        return connection_error("it was lost")
    text = ACCOUNT.sub(
        "the user", database_session.quote_server_message(error.args[-1] if error.args else error)
    )
    return NodeError(f"The database refused: {text}", code="sql-error", retryable=number in RETRYABLE)


def _error_number(error: errors.MySQLError) -> int:
    return error.args[0] if error.args and isinstance(error.args[0], int) else 0
