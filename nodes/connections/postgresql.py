"""PostgreSQL, through asyncpg."""

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
from nodes.connections import session, sql_values
from nodes.connections.binary_values import LearnedTypes
from nodes.connections.endpoint import no_connection
from nodes.connections.session import Gathering
from nodes.connections.wire import MessageWire, WiredLoop
from nodes.sizes import MAXIMUM_BYTES
from nodes.sql_text import Dialect

if TYPE_CHECKING:
    import ssl

    from asyncpg.prepared_stmt import PreparedStatement

    from engine.values import Json
    from nodes.connections.endpoint import Endpoint
    from nodes.sql_text import Statement

    Connection = asyncpg.Connection[asyncpg.Record]
    Prepared = PreparedStatement[asyncpg.Record]
    Convert = Callable[[Any], Json]

CLOSE_SECONDS = 2
MAX_RETURNED_ROWS = 1_000_000
"""Of a statement that writes: nobody gets them, but the driver holds them."""
WIRE_BYTES_PER_BYTE = 6
"""A small number in an array takes two bytes as JSON, with its comma, and twelve on the wire."""
TABLE_COLUMNS = "SELECT attname, format_type(atttypid, atttypmod) FROM pg_attribute WHERE attrelid = $1::text::regclass AND attnum > 0 AND NOT attisdropped"  # noqa: E501 - one statement

# Their own form in asyncpg is another than their text, and less of one: an interval of a month becomes one of 30 days.
# Of a record it would believe how many fields a server says that it has, and take 8 bytes for each.
AS_TEXT = (
    "record", "interval", "point", "line", "lseg", "box", "path", "polygon", "circle", "bit", "varbit", "tid", "inet",
    "cidr",
)  # fmt: skip
# What such columns give is JSON already.
PLAIN = frozenset(
    {"int2", "int4", "int8", "oid", "bool", "text", "varchar", "bpchar", "name", "char", *AS_TEXT}
)
WHOLE_NUMBERS = frozenset({"smallint", "integer", "bigint"})

RETRYABLE_STATES = frozenset({"40001", "40P01", "55P03"})
"""Serialization failure, deadlock, lock not available: everything was undone, and may succeed next time."""
CANCELLED_STATE = "57014"
UNAVAILABLE_STATES = ("08", "53", "57P")
"""Broken connections, a server without room, one that goes down or comes up: by how their states begin."""


class WatchedConnection(asyncpg.Connection):
    """Also keeps what the driver is told of types."""

    def __init__(self, *args: Any, **named: Any) -> None:  # noqa: ANN401 - passed on
        super().__init__(*args, **named)
        self.types = LearnedTypes()

    async def _introspect_types(self, *args: Any, **named: Any) -> Any:  # noqa: ANN401 - passed on
        types, statement = await super()._introspect_types(*args, **named)  # type: ignore[misc]  # it has no types
        self.types.learn(types)
        return types, statement


async def open_session(endpoint: Endpoint, address: str, context: ssl.SSLContext | None) -> PostgresqlSession:
    """Connect and log in; raises `OSError` when nobody takes the connection, else `NodeError`."""
    loop: Any = WiredLoop(MessageWire)
    try:
        connection = await asyncpg.connect(
            loop=loop,
            connection_class=WatchedConnection,
            host=address,
            port=endpoint.port,
            user=endpoint.user,
            password=endpoint.password,
            database=endpoint.database or endpoint.user,
            ssl=context or False,
            statement_cache_size=0,  # a pooler between may give each transaction another session
            server_settings={"application_name": "pilotflame"},
        )
    except asyncpg.PostgresConnectionError as error:
        raise OSError(str(error)) from error
    except asyncpg.PostgresError as error:
        raise _refused_login(error) from error
    except OSError:
        raise  # of which an untrusted certificate is one, besides being a ValueError
    except (asyncpg.InterfaceError, asyncpg.InternalClientError, *session.MISREAD) as error:
        raise no_connection("what answered there is no such database", retryable=False) from error
    opened = PostgresqlSession(connection, loop.wire)
    try:
        await opened.prepare()
    except BaseException:
        opened.abort()
        raise
    return opened


def _refused_login(error: asyncpg.PostgresError) -> NodeError:
    state = error.sqlstate or ""
    if state.startswith(UNAVAILABLE_STATES):
        return no_connection("it takes no more connections at the moment")
    if state == "3D000":
        return no_connection("there is no such database", retryable=False)
    return no_connection("it refused the login", retryable=False)


class PostgresqlSession:
    def __init__(self, connection: WatchedConnection, wire: MessageWire) -> None:
        self._connection = connection
        self._wire = wire

    async def prepare(self) -> None:
        """Say how values are written, once after connecting."""
        with _translated():
            for name in AS_TEXT:
                await self._connection.set_type_codec(
                    name, schema="pg_catalog", encoder=str, decoder=str, format="text"
                )
            await self._connection.execute(
                "SET standard_conforming_strings = on; SET intervalstyle = iso_8601; SET client_encoding = 'UTF8'"
            )

    async def query(
        self,
        statement: Statement,
        parameters: Sequence[Json],
        *,
        max_rows: int,
        max_bytes: int,
        timeout_seconds: float,
    ) -> QueryRows:
        with self._limited(max_bytes, timeout_seconds):
            return await self._read(statement, parameters, max_rows, max_bytes, timeout_seconds)

    async def _read(
        self,
        statement: Statement,
        parameters: Sequence[Json],
        max_rows: int,
        max_bytes: int,
        timeout_seconds: float,
    ) -> QueryRows:
        transaction = self._connection.transaction(readonly=True)
        await transaction.start()
        await self._limit_time(timeout_seconds)
        prepared, values = await self._prepared(statement, parameters)
        attributes = prepared.get_attributes()
        self._expect(max_bytes, max_rows, [each.type.oid for each in attributes])
        gathering = Gathering([each.name for each in attributes], max_rows=max_rows, max_bytes=max_bytes)
        converted = [
            (position, _converter(each.type.name))
            for position, each in enumerate(attributes)
            if each.type.kind != "scalar" or each.type.name not in PLAIN
        ]
        if not attributes:
            await prepared.fetch(*values)
        else:
            cursor = await prepared.cursor(*values)
            fetched_rows = session.fetched_rows(len(attributes))
            while records := await cursor.fetch(fetched_rows):
                gathering.add(_rows_of(records, converted))
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
        name = sql_text.quoted_table(table, Dialect.POSTGRESQL)
        with self._limited(MAXIMUM_BYTES, timeout_seconds):
            async with self._connection.transaction():
                await self._limit_time(timeout_seconds)
                types = {each[0]: str(each[1]) for each in await self._connection.fetch(TABLE_COLUMNS, name)}
                statement = _insertion(name, columns, types, upsert)
                numbers = [at for at, column in enumerate(columns) if types[column] in WHOLE_NUMBERS]
                prepared = await self._connection.prepare(statement)
                written = 0
                for batch in session.batches(_last_of_each_key(columns, rows, upsert), batch_rows):
                    await prepared.fetch(_recordset(columns, batch, numbers))
                    written += _count(prepared.get_statusmsg())
                return written

    async def execute(
        self, statement: Statement, parameters: Sequence[Json], *, timeout_seconds: float
    ) -> int:
        with self._limited(MAXIMUM_BYTES, timeout_seconds):
            async with self._connection.transaction():
                await self._limit_time(timeout_seconds)
                prepared, values = await self._prepared(statement, parameters)
                columns = [each.type.oid for each in prepared.get_attributes()]
                self._expect(MAXIMUM_BYTES, MAX_RETURNED_ROWS, columns)
                await prepared.fetch(*values)
                return _count(prepared.get_statusmsg())

    async def reset(self) -> bool:
        try:
            with _translated():
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

    def _expect(self, max_bytes: int, max_rows: int, columns: Sequence[int] | None = None) -> None:
        """Let the server send so much from now on, as JSON, and something besides; `columns`: the types of the rows."""
        self._wire.limit(WIRE_BYTES_PER_BYTE * max_bytes)
        self._wire.limit_rows(max_rows, self._connection.types, columns)

    @contextmanager
    def _limited(self, max_bytes: int, timeout_seconds: float) -> Iterator[None]:
        """Translate failures, of which being sent too much is one: until rows are due, little is expected."""
        self._expect(0, 0)
        try:
            with _translated(timeout_seconds):
                yield
        except NodeError:
            if self._wire.is_exceeded:
                raise session.too_large(max_bytes) from None
            if self._wire.is_garbled:
                raise session.not_understood() from None
            raise

    async def _limit_time(self, timeout_seconds: float) -> None:
        milliseconds = max(1, int(timeout_seconds * 1000))
        await self._connection.execute(f"SET LOCAL statement_timeout = {milliseconds}")

    async def _prepared(
        self, statement: Statement, parameters: Sequence[Json]
    ) -> tuple[Prepared, list[str | None]]:
        """Prepare a statement whose values are bound as texts, each read by the server as the type that it asks for."""
        places = [f"${number}" for number in range(1, statement.values + 1)]
        prepared = await self._connection.prepare(statement.with_places(places))
        if not places:
            return prepared, []
        types = prepared.get_parameters()
        read = [_read_as(place, type_) for place, type_ in zip(places, types, strict=True)]
        values = [_bound(value, type_.name) for value, type_ in zip(parameters, types, strict=True)]
        return await self._connection.prepare(statement.with_places(read)), values


# ── values ──────────────────────────────────────────────────────────────────────────────────────────────────


def _read_as(place: str, type_: asyncpg.Type) -> str:
    if type_.name == "bytea":
        return f"decode({place}::text, 'base64')"
    name, is_list = type_.name.removesuffix("[]"), type_.name.endswith("[]")
    schema = sql_text.quoted(type_.schema, Dialect.POSTGRESQL)
    return f"({place}::text)::{schema}.{sql_text.quoted(name, Dialect.POSTGRESQL)}{'[]' if is_list else ''}"


def _bound(value: Json, type_name: str) -> str | None:
    if value is None:
        return None
    if type_name in {"json", "jsonb"}:
        return sql_values.to_json_text(value)
    return value_as_text(int(value) if isinstance(value, float) and value.is_integer() else value)


def _rows_of(records: Sequence[asyncpg.Record], converted: Sequence[tuple[int, Convert]]) -> list[list[Json]]:
    rows = [list(record) for record in records]
    for position, convert in converted:
        for row in rows:
            value = row[position]
            if value is not None:
                row[position] = convert(value)
    return rows


def _converter(type_name: str) -> Convert:
    return CONVERTERS.get(type_name, _as_json)


def _as_json(value: Any) -> Json:  # noqa: ANN401 - whatever asyncpg makes of a type
    match value:
        case None | bool() | int() | str():
            return value
        case float():
            return sql_values.of_float(value)
        case bytes():
            return sql_values.of_bytes(value)
        case Decimal():
            return sql_values.of_decimal(value)
        case list():
            return [_as_json(item) for item in value]
        case asyncpg.Record():
            return {key: _as_json(item) for key, item in value.items()}
        case asyncpg.Range():
            return _range(value)
        case _:
            return value.isoformat() if hasattr(value, "isoformat") else str(value)


def _range(value: asyncpg.Range[Any]) -> str:
    if value.isempty:
        return "empty"
    lower, upper = (
        "" if bound is None else value_as_text(_as_json(bound)) for bound in (value.lower, value.upper)
    )
    return f"{'[' if value.lower_inc else '('}{lower},{upper}{']' if value.upper_inc else ')'}"


CONVERTERS: dict[str, Convert] = {
    "float4": sql_values.of_float,
    "float8": sql_values.of_float,
    "numeric": sql_values.of_decimal,
    "json": sql_values.of_json,
    "jsonb": sql_values.of_json,
    "bytea": sql_values.of_bytes,
    "uuid": str,
    **dict.fromkeys(("date", "time", "timetz", "timestamp", "timestamptz"), methodcaller("isoformat")),
}


# ── rows ────────────────────────────────────────────────────────────────────────────────────────────────────


def _insertion(table: str, columns: Sequence[str], types: dict[str, str], upsert: UpsertRule) -> str:
    """Return the statement for a batch: one value, JSON, whose parts the server reads as the types of the columns."""
    places, definitions = [], []
    for column in [*columns, *upsert.key]:
        if column not in types:
            raise NodeError(f"The table {table[:100]} has no column {column[:100]!r}", code="sql-error")
    for number, column in enumerate(columns):
        is_bytes = types[column] == "bytea"
        definitions.append(f"c{number} {'text' if is_bytes else types[column]}")
        places.append(f"decode(r.c{number}, 'base64')" if is_bytes else f"r.c{number}")
    names = ", ".join(_name(column) for column in columns)
    statement = (
        f"INSERT INTO {table} ({names}) "  # noqa: S608 - names are quoted, types are the server's, values are bound
        f"SELECT {', '.join(places)} FROM json_to_recordset($1::json) AS r({', '.join(definitions)})"
    )
    return statement + _on_conflict(columns, upsert)


def _on_conflict(columns: Sequence[str], upsert: UpsertRule) -> str:
    if not upsert.key:
        return ""
    key = ", ".join(_name(column) for column in upsert.key)
    others = [_name(column) for column in columns if column not in upsert.key]
    if not upsert.update or not others:
        return f" ON CONFLICT ({key}) DO NOTHING"
    return f" ON CONFLICT ({key}) DO UPDATE SET {', '.join(f'{name} = EXCLUDED.{name}' for name in others)}"


def _name(column: str) -> str:
    return sql_text.quoted(column, Dialect.POSTGRESQL)


def _recordset(columns: Sequence[str], rows: Sequence[Sequence[Json]], numbers: Sequence[int]) -> str:
    names = [f"c{number}" for number in range(len(columns))]
    records: list[dict[str, Json]] = [dict(zip(names, row, strict=True)) for row in rows]
    for name in [names[at] for at in numbers]:
        for record in records:
            value = record[name]
            if isinstance(value, float) and value.is_integer():
                record[name] = int(
                    value
                )  # JSON knows one kind of numbers, and the server would not take 1.0 for one
    return sql_values.to_json_text([*records])


def _last_of_each_key(
    columns: Sequence[str], rows: Sequence[Sequence[Json]], upsert: UpsertRule
) -> Sequence[Sequence[Json]]:
    """Return the rows that stay where several have one key: a single statement can't update a row twice."""
    if not upsert.key or not upsert.update:
        return rows
    places = [columns.index(name) for name in upsert.key]
    return list({tuple(identity_key(row[place]) for place in places): row for row in rows}.values())


def _count(status: str | None) -> int:
    """Return the number at the end of `INSERT 0 3`; of what changes no rows there is none."""
    last = (status or "").rpartition(" ")[2]
    return int(last) if last.isdigit() else 0


# ── failures ────────────────────────────────────────────────────────────────────────────────────────────────


@contextmanager
def _translated(timeout_seconds: float = 0) -> Iterator[None]:
    try:
        yield
    except asyncpg.PostgresError as error:
        raise _node_error(error, timeout_seconds) from error
    except (asyncpg.InterfaceError, asyncpg.InternalClientError) as error:
        if isinstance(error, asyncpg.ConnectionDoesNotExistError) or "connection is closed" in str(error):
            raise no_connection("it was lost") from error
        raise NodeError(f"The database driver: {session.said(error)}", code="sql-error") from error
    except (ValueError, OverflowError) as error:
        message = "A value of the result has no form here, as a date before the year 1: select it as a text"
        raise NodeError(message, code="sql-error") from error
    except session.MISREAD as error:
        raise session.not_understood() from error
    except OSError as error:
        if isinstance(error, TimeoutError):
            raise
        raise no_connection("it was lost") from error


def _node_error(error: asyncpg.PostgresError, timeout_seconds: float) -> NodeError:
    state = error.sqlstate or ""
    if state == CANCELLED_STATE:
        return session.timed_out(timeout_seconds)
    if state.startswith(UNAVAILABLE_STATES) or isinstance(error, asyncpg.PostgresConnectionError):
        return no_connection("it was lost")
    message = f"The database refused: {session.said(error.args[0] if error.args else error)}"
    return NodeError(message, code="sql-error", retryable=state in RETRYABLE_STATES)
