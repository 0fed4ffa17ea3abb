"""Session of PostgreSQL, through asyncpg."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from decimal import Decimal
from operator import methodcaller
from typing import TYPE_CHECKING, Any

import asyncpg

from engine.run_errors import NodeError
from engine.services import QueryRows, UpsertRule
from engine.values import identity_key, value_as_text
from nodes import sql_text
from nodes.connection_phases import ConnectionPhase, note_phase
from nodes.connections import database_session, sql_values
from nodes.connections.database_endpoint import connection_error
from nodes.connections.database_session import RowCollector
from nodes.connections.metered_wire import MessageWire, MeteredLoop
from nodes.connections.postgresql_binary import LearnedTypes
from nodes.output_sizes import MAXIMUM_BYTES
from nodes.sql_text import SqlDialect

if TYPE_CHECKING:
    import ssl

    from asyncpg.prepared_stmt import PreparedStatement

    from engine.values import Json
    from nodes.connections.database_endpoint import DatabaseEndpoint
    from nodes.sql_text import SqlStatement

    Connection = asyncpg.Connection[asyncpg.Record]
    Prepared = PreparedStatement[asyncpg.Record]
    Convert = Callable[[Any], Json]

CLOSE_SECONDS = 2
MAX_RETURNED_ROWS = 1_000_000
"""Maximum number of rows that a writing statement returns: they are discarded, but the driver holds them."""
WIRE_BYTES_PER_BYTE = 6
"""A small number in an array takes two bytes as JSON, with its comma, and twelve on the wire."""
TABLE_COLUMNS_QUERY = "SELECT attname, format_type(atttypid, atttypmod) FROM pg_attribute WHERE attrelid = $1::text::regclass AND attnum > 0 AND NOT attisdropped"  # noqa: E501 - one statement

# Types that asyncpg would decode with a loss: an interval of a month becomes one of 30 days. For a record it would
# trust the server's number of fields, and take 8 bytes for each.
TEXT_CODEC_TYPES = (
    "record", "interval", "point", "line", "lseg", "box", "path", "polygon", "circle", "bit", "varbit", "tid", "inet",
    "cidr",
)  # fmt: skip
# Types whose values are JSON already.
PLAIN_TYPES = frozenset(
    {"int2", "int4", "int8", "oid", "bool", "text", "varchar", "bpchar", "name", "char", *TEXT_CODEC_TYPES}
)
WHOLE_NUMBERS = frozenset({"smallint", "integer", "bigint"})

RETRYABLE_STATES = frozenset({"40001", "40P01", "55P03"})
"""Serialization failure, deadlock, lock not available: everything was rolled back, and a retry may succeed."""
CANCELLED_STATE = "57014"
UNAVAILABLE_STATES = ("08", "53", "57P")
"""Prefixes of states: broken connections, exhausted resources, shutdown or startup of the server."""

LOST_CONNECTION_SIGNS = ("connection is closed", "cannot switch to state")
"""Parts of the driver's messages for a lost connection. It can't switch its state if the server ended the session
between two messages, and the end of the connection has not been read yet."""


class TypeLearningConnection(asyncpg.Connection):
    """Connection that records the type descriptions of the server."""

    def __init__(self, *args: Any, **named: Any) -> None:  # noqa: ANN401 - passed on
        super().__init__(*args, **named)
        self.types = LearnedTypes()

    async def _introspect_types(self, *args: Any, **named: Any) -> Any:  # noqa: ANN401 - passed on
        types, statement = await super()._introspect_types(*args, **named)  # type: ignore[misc]  # it has no types
        self.types.learn(types)
        return types, statement


async def open_session(
    endpoint: DatabaseEndpoint, address: str, context: ssl.SSLContext | None
) -> PostgresqlSession:
    """Connect to PostgreSQL at a checked address and log in; without a TLS context, the connection is plain.

    Raises `OSError` if the connection is refused or breaks, and `NodeError` for a refused login, a missing database, a
    server of another kind, and (retryable) one that takes no more connections.
    """
    loop: Any = MeteredLoop(MessageWire)
    try:
        with note_phase(ConnectionPhase.AUTH):
            connection = await asyncpg.connect(
                loop=loop,
                connection_class=TypeLearningConnection,
                host=address,
                port=endpoint.port,
                user=endpoint.user,
                password=endpoint.password,
                database=endpoint.database or endpoint.user,
                ssl=context or False,
                statement_cache_size=0,  # A connection pooler may give each transaction another session.
                server_settings={"application_name": "pilotflame"},
            )
    except asyncpg.PostgresConnectionError as error:
        raise OSError(str(error)) from error
    except asyncpg.PostgresError as error:
        raise _login_error(error) from error
    except OSError:
        raise  # Includes an untrusted certificate, which is a ValueError too.
    except (asyncpg.InterfaceError, asyncpg.InternalClientError, *database_session.MISREAD_ERRORS) as error:
        raise connection_error("the server is not a database of this type", retryable=False) from error
    opened = PostgresqlSession(connection, loop.wire)
    try:
        await opened.prepare()
    except BaseException:
        opened.abort()
        raise
    return opened


def _login_error(error: asyncpg.PostgresError) -> NodeError:
    state = error.sqlstate or ""
    if state.startswith(UNAVAILABLE_STATES):
        return connection_error("it takes no more connections at the moment")
    if state == "3D000":
        return connection_error("there is no such database", retryable=False)
    return connection_error("it refused the login", retryable=False)


class PostgresqlSession:
    def __init__(self, connection: TypeLearningConnection, wire: MessageWire) -> None:
        self._connection = connection
        self._wire = wire

    async def prepare(self) -> None:
        """Set codecs, formats of values and the encoding; needed after connecting and after each reset. Raises
        `NodeError`.
        """
        with _translate_errors():
            for name in TEXT_CODEC_TYPES:
                await self._connection.set_type_codec(
                    name, schema="pg_catalog", encoder=str, decoder=str, format="text"
                )
            await self._connection.execute(
                "SET standard_conforming_strings = on; SET intervalstyle = iso_8601; SET client_encoding = 'UTF8'"
            )

    async def query(
        self,
        statement: SqlStatement,
        parameters: Sequence[Json],
        *,
        max_rows: int,
        max_bytes: int,
        timeout_seconds: float,
    ) -> QueryRows:
        with self._limited(max_bytes, timeout_seconds):
            return await self._read_rows(statement, parameters, max_rows, max_bytes, timeout_seconds)

    async def _read_rows(
        self,
        statement: SqlStatement,
        parameters: Sequence[Json],
        max_rows: int,
        max_bytes: int,
        timeout_seconds: float,
    ) -> QueryRows:
        """Run a reading statement in a read-only transaction, and return its columns and rows within the limits.

        Raises the errors of the driver, and `NodeError` beyond the limits.
        """
        transaction = self._connection.transaction(readonly=True)
        await transaction.start()
        await self._limit_time(timeout_seconds)
        prepared, values = await self._prepare_statement(statement, parameters)
        attributes = prepared.get_attributes()
        self._allow_data(max_bytes, max_rows, [each.type.oid for each in attributes])
        gathering = RowCollector([each.name for each in attributes], max_rows=max_rows, max_bytes=max_bytes)
        converted = [
            (position, _column_converter(each.type.name))
            for position, each in enumerate(attributes)
            if each.type.kind != "scalar" or each.type.name not in PLAIN_TYPES
        ]
        if not attributes:
            await prepared.fetch(*values)
        else:
            cursor = await prepared.cursor(*values)
            fetched_rows = database_session.rows_per_fetch(len(attributes))
            while records := await cursor.fetch(fetched_rows):
                gathering.add(_convert_rows(records, converted))
        await transaction.rollback()
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
        name = sql_text.quote_table(table, SqlDialect.POSTGRESQL)
        with self._limited(MAXIMUM_BYTES, timeout_seconds):
            async with self._connection.transaction():
                await self._limit_time(timeout_seconds)
                types = {
                    each[0]: str(each[1]) for each in await self._connection.fetch(TABLE_COLUMNS_QUERY, name)
                }
                statement = _insert_statement(name, columns, types, upsert)
                numbers = [at for at, column in enumerate(columns) if types[column] in WHOLE_NUMBERS]
                prepared = await self._connection.prepare(statement)
                written = 0
                for batch in database_session.split_batches(
                    _deduplicate_rows(columns, rows, upsert), batch_rows
                ):
                    await prepared.fetch(_encode_recordset(columns, batch, numbers))
                    written += _parse_count(prepared.get_statusmsg())
                return written

    async def execute(
        self, statement: SqlStatement, parameters: Sequence[Json], *, timeout_seconds: float
    ) -> int:
        with self._limited(MAXIMUM_BYTES, timeout_seconds):
            async with self._connection.transaction():
                await self._limit_time(timeout_seconds)
                prepared, values = await self._prepare_statement(statement, parameters)
                columns = [each.type.oid for each in prepared.get_attributes()]
                self._allow_data(MAXIMUM_BYTES, MAX_RETURNED_ROWS, columns)
                await prepared.fetch(*values)
                return _parse_count(prepared.get_statusmsg())

    async def reset(self) -> bool:
        try:
            with _translate_errors():
                await self._connection.execute("DISCARD ALL")
                await self.prepare()
        except NodeError:
            return False
        return True

    async def is_alive(self) -> bool:
        return not self._connection.is_closed()

    async def close(self) -> None:
        try:
            await self._connection.close(timeout=CLOSE_SECONDS)
        except (asyncpg.PostgresError, asyncpg.InterfaceError, OSError):
            self._connection.terminate()

    def abort(self) -> None:
        self._connection.terminate()

    def _allow_data(self, max_bytes: int, max_rows: int, columns: Sequence[int] | None = None) -> None:
        """Allow the server to send this much data from now on, in bytes of JSON and in rows, plus an allowance.

        `columns` are the type ids of the rows, if known.
        """
        self._wire.limit(WIRE_BYTES_PER_BYTE * max_bytes)
        self._wire.limit_rows(max_rows, self._connection.types, columns)

    @contextmanager
    def _limited(self, max_bytes: int, timeout_seconds: float) -> Iterator[None]:
        """Translate failures of the block to `NodeError`, such as a timeout at the server, or too much or unreadable
        data; `TimeoutError` passes.

        Until `_allow_data` allows rows, little data may be received.
        """
        self._allow_data(0, 0)
        try:
            with _translate_errors(timeout_seconds):
                yield
        except NodeError:
            if self._wire.is_exceeded:
                raise database_session.result_too_large(max_bytes) from None
            if self._wire.is_garbled:
                raise database_session.unreadable_server() from None
            raise

    async def _limit_time(self, timeout_seconds: float) -> None:
        milliseconds = max(1, int(timeout_seconds * 1000))
        await self._connection.execute(f"SET LOCAL statement_timeout = {milliseconds}")

    async def _prepare_statement(
        self, statement: SqlStatement, parameters: Sequence[Json]
    ) -> tuple[Prepared, list[str | None]]:
        """Prepare a statement with casts of its placeholders to their types; return it, and the parameters as texts,
        None for null.
        """
        places = [f"${number}" for number in range(1, statement.placeholder_count + 1)]
        prepared = await self._connection.prepare(statement.with_placeholders(places))
        if not places:
            return prepared, []
        types = prepared.get_parameters()
        read = [_cast_placeholder(place, type_) for place, type_ in zip(places, types, strict=True)]
        values = [_bind_value(value, type_.name) for value, type_ in zip(parameters, types, strict=True)]
        return await self._connection.prepare(statement.with_placeholders(read)), values


# ── values ──────────────────────────────────────────────────────────────────────────────────────────────────


def _cast_placeholder(place: str, type_: asyncpg.Type) -> str:
    if type_.name == "bytea":
        return f"decode({place}::text, 'base64')"
    name, is_list = type_.name.removesuffix("[]"), type_.name.endswith("[]")
    schema = sql_text.quote_name(type_.schema, SqlDialect.POSTGRESQL)
    return f"({place}::text)::{schema}.{sql_text.quote_name(name, SqlDialect.POSTGRESQL)}{'[]' if is_list else ''}"


def _bind_value(value: Json, type_name: str) -> str | None:
    if value is None:
        return None
    if type_name in {"json", "jsonb"}:
        return sql_values.to_json_text(value)
    return value_as_text(int(value) if isinstance(value, float) and value.is_integer() else value)


def _convert_rows(
    records: Sequence[asyncpg.Record], converted: Sequence[tuple[int, Convert]]
) -> list[list[Json]]:
    rows = [list(record) for record in records]
    for position, convert in converted:
        for row in rows:
            value = row[position]
            if value is not None:
                row[position] = convert(value)
    return rows


def _column_converter(type_name: str) -> Convert:
    return CONVERTERS.get(type_name, _to_json)


def _to_json(value: Any) -> Json:  # noqa: ANN401 - any type that asyncpg returns
    match value:
        case None | bool() | int() | str():
            return value
        case float():
            return sql_values.float_to_json(value)
        case bytes():
            return sql_values.bytes_to_json(value)
        case Decimal():
            return sql_values.decimal_to_json(value)
        case list():
            return [_to_json(item) for item in value]
        case asyncpg.Record():
            return {key: _to_json(item) for key, item in value.items()}
        case asyncpg.Range():
            return _range_to_json(value)
        case _:
            return value.isoformat() if hasattr(value, "isoformat") else str(value)


def _range_to_json(value: asyncpg.Range[Any]) -> str:
    if value.isempty:
        return "empty"
    lower, upper = (
        "" if bound is None else value_as_text(_to_json(bound)) for bound in (value.lower, value.upper)
    )
    return f"{'[' if value.lower_inc else '('}{lower},{upper}{']' if value.upper_inc else ')'}"


CONVERTERS: dict[str, Convert] = {
    "float4": sql_values.float_to_json,
    "float8": sql_values.float_to_json,
    "numeric": sql_values.decimal_to_json,
    "json": sql_values.json_column_to_json,
    "jsonb": sql_values.json_column_to_json,
    "bytea": sql_values.bytes_to_json,
    "uuid": str,
    **dict.fromkeys(("date", "time", "timetz", "timestamp", "timestamptz"), methodcaller("isoformat")),
}


# ── rows ────────────────────────────────────────────────────────────────────────────────────────────────────


def _insert_statement(table: str, columns: Sequence[str], types: dict[str, str], upsert: UpsertRule) -> str:
    """Return the INSERT statement for a batch: its single parameter is a JSON list of rows, cast to the column types.

    `types` are the column types by name. Raises `NodeError` for a column that the table doesn't have.
    """
    places, definitions = [], []
    for column in [*columns, *upsert.key]:
        if column not in types:
            raise NodeError(f"The table {table[:100]} has no column {column[:100]!r}", code="sql-error")
    for number, column in enumerate(columns):
        is_bytes = types[column] == "bytea"
        definitions.append(f"c{number} {'text' if is_bytes else types[column]}")
        places.append(f"decode(r.c{number}, 'base64')" if is_bytes else f"r.c{number}")
    names = ", ".join(_column_name(column) for column in columns)
    statement = (
        f"INSERT INTO {table} ({names}) "  # noqa: S608 - names are quoted, types are the server's, values are bound
        f"SELECT {', '.join(places)} FROM json_to_recordset($1::json) AS r({', '.join(definitions)})"
    )
    return statement + _on_conflict_sql(columns, upsert)


def _on_conflict_sql(columns: Sequence[str], upsert: UpsertRule) -> str:
    if not upsert.key:
        return ""
    key = ", ".join(_column_name(column) for column in upsert.key)
    others = [_column_name(column) for column in columns if column not in upsert.key]
    if not upsert.update or not others:
        return f" ON CONFLICT ({key}) DO NOTHING"
    return f" ON CONFLICT ({key}) DO UPDATE SET {', '.join(f'{name} = EXCLUDED.{name}' for name in others)}"


def _column_name(column: str) -> str:
    return sql_text.quote_name(column, SqlDialect.POSTGRESQL)


def _encode_recordset(columns: Sequence[str], rows: Sequence[Sequence[Json]], numbers: Sequence[int]) -> str:
    names = [f"c{number}" for number in range(len(columns))]
    records: list[dict[str, Json]] = [dict(zip(names, row, strict=True)) for row in rows]
    for name in [names[at] for at in numbers]:
        for record in records:
            value = record[name]
            if isinstance(value, float) and value.is_integer():
                record[name] = int(
                    value
                )  # JSON has one kind of numbers, and the server would not accept 1.0 as an integer.
    return sql_values.to_json_text([*records])


def _deduplicate_rows(
    columns: Sequence[str], rows: Sequence[Sequence[Json]], upsert: UpsertRule
) -> Sequence[Sequence[Json]]:
    """Return the rows with only the last one of each upsert key, since a single statement can't update a row twice.

    Unless `upsert` updates, all rows are returned.
    """
    if not upsert.key or not upsert.update:
        return rows
    places = [columns.index(name) for name in upsert.key]
    return list({tuple(identity_key(row[place]) for place in places): row for row in rows}.values())


def _parse_count(status: str | None) -> int:
    """Return the number of rows from a command status such as `INSERT 0 3`; 0 for statements that change no rows."""
    last = (status or "").rpartition(" ")[2]
    return int(last) if last.isdigit() else 0


# ── failures ────────────────────────────────────────────────────────────────────────────────────────────────


@contextmanager
def _translate_errors(timeout_seconds: float = 0) -> Iterator[None]:
    """Translate failures of the block, such as errors of the driver, to `NodeError`; `TimeoutError` passes."""
    try:
        yield
    except asyncpg.PostgresError as error:
        raise _to_node_error(error, timeout_seconds) from error
    except (asyncpg.InterfaceError, asyncpg.InternalClientError) as error:
        if isinstance(error, asyncpg.ConnectionDoesNotExistError) or any(
            sign in str(error) for sign in LOST_CONNECTION_SIGNS
        ):
            raise connection_error("it was lost") from error
        raise NodeError(
            f"The database driver: {database_session.quote_server_message(error)}", code="sql-error"
        ) from error
    except (ValueError, OverflowError) as error:
        message = (
            "A value of the result can't be represented, such as a date before the year 1: cast it to text"
        )
        raise NodeError(message, code="sql-error") from error
    except database_session.MISREAD_ERRORS as error:
        raise database_session.unreadable_server() from error
    except OSError as error:
        if isinstance(error, TimeoutError):
            raise
        raise connection_error("it was lost") from error


def _to_node_error(error: asyncpg.PostgresError, timeout_seconds: float) -> NodeError:
    state = error.sqlstate or ""
    if state == CANCELLED_STATE:
        return database_session.query_timed_out(timeout_seconds)
    if state.startswith(UNAVAILABLE_STATES) or isinstance(error, asyncpg.PostgresConnectionError):
        return connection_error("it was lost")
    message = f"The database refused: {database_session.quote_server_message(error.args[0] if error.args else error)}"
    return NodeError(message, code="sql-error", retryable=state in RETRYABLE_STATES)
