"""Shared suite for the nodes of every SQL database, and tests of the features of one."""

import asyncio
import contextlib
import gc
import itertools
import os
import sqlite3
import ssl
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import closing
from dataclasses import dataclass, field, replace
from ipaddress import ip_network
from pathlib import Path
from typing import Any, cast

import psutil
import pytest
from sqlalchemy import URL, make_url

from engine.run_errors import NodeError
from engine.services import RunCaller
from engine.values import Json
from nodes.connections.data_source import ConnectionSource
from nodes.connections.data_source_connections import DataSourceConnections
from nodes.connections.data_source_policy import ConnectionPolicy, ServerDatabase
from tests import certificates, services
from tests.node_calls import CALLER, call

pytestmark = [pytest.mark.every_database, pytest.mark.anyio]

LOOPBACK = (ip_network("127.0.0.0/8"), ip_network("::1/128"))
TYPES = ["sqlite", "postgresql", "mysql"]
HOSTILE = [
    "'; DROP TABLE orders; --",
    '"; DROP TABLE orders; --',
    "`) --",
    "\\'; --",
    "?",
    "$1",
    "%s",
    "{{ data }}",
    "ø🔥",
]
SLOW = {
    "sqlite": "WITH RECURSIVE n(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM n) SELECT count(*) FROM n",
    "postgresql": "SELECT pg_sleep(60)",
    "mysql": "SELECT count(*) FROM seq_1_to_100000 AS a, seq_1_to_100000 AS b WHERE a.seq * b.seq % 7 = 8",
}
MANY = {
    "sqlite": "WITH RECURSIVE n(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM n LIMIT 200000) SELECT x FROM n",
    "postgresql": "SELECT generate_series(1, 100000000) AS x",
    "mysql": "SELECT seq FROM seq_1_to_100000000",
}
LARGE = {
    "sqlite": "SELECT hex(zeroblob(9000000))",
    "postgresql": "SELECT repeat('x', 70000000)",
    "mysql": "SELECT repeat('x', 900000) FROM seq_1_to_1000",
}


@dataclass
class FixedSources:
    """Data sources by id; every caller may use each."""

    found: dict[str, ConnectionSource] = field(default_factory=dict)

    async def find(self, caller: RunCaller, source_id: str) -> ConnectionSource:
        assert caller == CALLER
        if source_id not in self.found:
            raise NodeError("There is no such data source", code="data-source-not-found")
        return self.found[source_id]


@dataclass
class SqlTarget:
    """A database of some kind, with the table `orders`, empty; and the nodes that use it."""

    type: str
    sources: FixedSources
    connections: DataSourceConnections
    folder: Path

    async def read(self, query: str, *parameters: Json, data: Json = None, **config: Json) -> dict[str, Any]:
        given = {"dataSource": "ds", "query": query, "parameters": list(parameters), **config}
        called = await call(f"{self.type}-source", given, data, data_sources=self.connections)
        return cast("dict[str, Any]", called.output)

    async def write(self, data: Json = None, **config: Json) -> int:
        called = await call(
            f"{self.type}-destination", {"dataSource": "ds", **config}, data, data_sources=self.connections
        )
        return cast("dict[str, int]", called.output)["written"]

    async def run(self, statement: str, *parameters: Json) -> int:
        return await self.write(statement=statement, parameters=list(parameters))

    async def rows(self, table: str = "orders") -> list[dict[str, Json]]:
        return cast("list[dict[str, Json]]", (await self.read(f"SELECT * FROM {table} ORDER BY 1"))["rows"])


def make_source(kind: str, url: URL, **settings: Json) -> ConnectionSource:
    address: dict[str, Json] = {
        "host": url.host,
        "port": url.port,
        "database": url.database,
        "user": url.username,
    }
    return ConnectionSource(
        "ds", CALLER.organization_id, kind, 1, address | settings, {"password": str(url.password or "")}
    )


@pytest.fixture(scope="module", params=TYPES)
async def sql_target(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[SqlTarget]:
    folder = tmp_path_factory.mktemp("files")
    kind = request.param
    if kind == "sqlite":
        source = ConnectionSource("ds", CALLER.organization_id, kind, 1, {"file": "orders.db"}, {})
    elif kind == "postgresql":
        server = request.getfixturevalue("postgres")
        source = make_source(kind, make_url(await server.create_database("sql_nodes")))
    else:
        source = make_source(kind, make_url(request.getfixturevalue("mysql").url))
    sources = FixedSources({"ds": source})
    connections = DataSourceConnections(sources, ConnectionPolicy(allowed_networks=LOOPBACK, files=folder))
    yield SqlTarget(kind, sources, connections, folder)
    await connections.close()


@pytest.fixture
async def orders(sql_target: SqlTarget) -> SqlTarget:
    name = "text" if sql_target.type != "mysql" else "varchar(200)"
    await sql_target.run("DROP TABLE IF EXISTS orders")
    await sql_target.run(f"CREATE TABLE orders (id integer PRIMARY KEY, name {name}, total double precision)")
    return sql_target


async def assert_refused(code: str, work: Any) -> str:  # noqa: ANN401 - a coroutine
    with pytest.raises(NodeError) as raised:
        await work
    assert raised.value.code == code, raised.value.message
    return raised.value.message


async def wait_until(condition: Callable[[], Awaitable[bool]]) -> None:
    while not await condition():  # noqa: ASYNC110 - nothing signals the change
        await asyncio.sleep(0.02)


# ── reading and writing ─────────────────────────────────────────────────────────────────────────────────────


async def test_written_rows_are_read_back(orders: SqlTarget) -> None:
    rows: list[Json] = [{"id": 1, "name": "Ada", "total": 42.5}, {"id": 2, "name": None, "total": 7.0}]
    assert await orders.write([*rows, {"id": 3}], table="orders") == 3
    read = await orders.read("SELECT id, name, total FROM orders WHERE id <= ? ORDER BY id", 3)
    assert read["columns"] == ["id", "name", "total"]
    assert read["rows"] == [*rows, {"id": 3, "name": None, "total": None}]
    assert read["count"] == 3


async def test_columns_are_made_of_each_row(orders: SqlTarget) -> None:
    columns: Json = {"id": "{{ item.n }}", "name": "{{ data.who }}-{{ index }}"}
    data: Json = {"who": "x", "list": [{"n": 5}, {"n": 6.0}]}
    assert await orders.write(data, table="orders", rows="{{ data.list }}", columns=columns) == 2
    assert [row["name"] for row in await orders.rows()] == ["x-0", "x-1"]


async def test_a_key_that_is_there_is_updated_or_left_as_it_is(orders: SqlTarget) -> None:
    await orders.write(
        [{"id": 1, "name": "old", "total": 1}, {"id": 2, "name": "old", "total": 2}], table="orders"
    )
    fresh: Json = [{"id": 2, "name": "new"}, {"id": 3, "name": "new"}]
    assert await orders.write(fresh, table="orders", upsert={"key": ["id"], "update": False}) == 1
    assert [row["name"] for row in await orders.rows()] == ["old", "old", "new"]
    again: Json = [{"id": 2, "name": "first"}, {"id": 2, "name": "last"}, {"id": 4, "name": "last"}]
    await orders.write(again, table="orders", upsert={"key": ["id"]}, batchSize=2)
    assert [(row["name"], row["total"]) for row in await orders.rows()] == [
        ("old", 1), ("last", 2), ("new", None), ("last", None),
    ]  # fmt: skip
    assert await orders.write({"id": 1, "name": "only"}, table="orders", upsert={"key": ["id"]}) == 1


async def test_a_key_that_the_table_does_not_hold_unique_is_refused(orders: SqlTarget) -> None:
    await assert_refused(
        "sql-error", orders.write({"id": 1, "name": "a"}, table="orders", upsert={"key": ["name"]})
    )
    assert await orders.rows() == []


async def test_all_batches_are_written_or_none(orders: SqlTarget) -> None:
    rows: Json = [{"id": number % 7} for number in range(8)]
    message = await assert_refused("sql-error", orders.write(rows, table="orders", batchSize=3))
    assert "127.0.0.1" not in message
    assert await orders.rows() == []


async def test_many_rows_go_in_batches(orders: SqlTarget) -> None:
    rows: Json = [{"id": number, "name": "x" * 150, "total": number / 4} for number in range(12_000)]
    assert await orders.write(rows, table="orders", batchSize=5000) == 12_000
    read = await orders.read("SELECT id, total FROM orders", maxRows=12_000)
    assert sum(row["id"] for row in read["rows"]) == sum(range(12_000))


async def test_nothing_to_write_is_not_an_error(orders: SqlTarget) -> None:
    assert await orders.write([], table="orders") == 0


async def test_a_statement_returns_its_number_of_changed_rows(orders: SqlTarget) -> None:
    await orders.write([{"id": number} for number in range(5)], table="orders")
    assert await orders.run("UPDATE orders SET name = ? WHERE id >= ?", "late", 2) == 3
    assert await orders.run("DELETE FROM orders WHERE name = ?", "late") == 3


async def test_the_result_of_a_query_without_rows_has_its_columns(orders: SqlTarget) -> None:
    read = await orders.read("SELECT id, name FROM orders;  -- the end")
    assert read == {"rows": [], "columns": ["id", "name"], "count": 0}


async def test_two_columns_of_one_name_are_refused(orders: SqlTarget) -> None:
    await orders.write({"id": 1}, table="orders")
    await assert_refused("duplicate-column", orders.read("SELECT id, id FROM orders"))


# ── data versus SQL ─────────────────────────────────────────────────────────────────────────────────────────


async def test_values_are_never_read_as_sql(orders: SqlTarget) -> None:
    rows: Json = [{"id": number, "name": text} for number, text in enumerate(HOSTILE)]
    assert await orders.write(rows, table="orders") == len(HOSTILE)
    assert [row["name"] for row in await orders.rows()] == HOSTILE
    for number, text in enumerate(HOSTILE):
        read = await orders.read(
            "SELECT id FROM orders WHERE name = ?", "{{ data.name }}", data={"name": text}
        )
        assert read["rows"] == [{"id": number}]


@pytest.mark.parametrize(
    "name", ['x" integer); DROP TABLE orders; --', "x`); DROP TABLE orders; --", "id) --"]
)
async def test_names_are_never_read_as_sql(orders: SqlTarget, name: str) -> None:
    configs: list[dict[str, Json]] = [{"table": name}, {"table": "orders", "upsert": {"key": [name]}}]
    for config in configs:
        with pytest.raises(NodeError):
            await orders.write([{"id": 1, name: 2}], **config)
    assert await orders.rows() == []


async def test_an_expression_in_a_query_is_refused_and_not_run(orders: SqlTarget) -> None:
    query = "SELECT {{ data.what }} FROM orders"
    assert "parameters" in await assert_refused("statement-refused", orders.read(query, data={"what": "1"}))
    statement: Json = "DELETE FROM {{ data.what }}"
    await assert_refused("statement-refused", orders.write({"what": "orders"}, statement=statement))


@pytest.mark.parametrize(
    "query",
    [
        "SELECT 1; SELECT 2",
        "SELECT 1; DROP TABLE orders",
        "DROP TABLE orders",
        "INSERT INTO orders (id) VALUES (1)",
        "WITH x AS (SELECT 1) INSERT INTO orders (id) SELECT 1",
        "COPY orders TO PROGRAM 'id'",
        "LOAD DATA LOCAL INFILE '/etc/passwd' INTO TABLE orders",
        "SELECT 'x' INTO OUTFILE '/tmp/x'",
        "ATTACH DATABASE '/tmp/x' AS other",
        "PRAGMA journal_mode = WAL",
        "SET autocommit = 0",
        "BEGIN",
        "",
        "-- nothing",
        "SELECT 'open",
    ],
)
async def test_a_source_runs_one_statement_that_reads(orders: SqlTarget, query: str) -> None:
    with pytest.raises(NodeError) as raised:
        await orders.read(query or " ")
    assert raised.value.code in {"statement-refused", "sql-error"}
    assert not raised.value.retryable
    assert await orders.rows() == []


async def test_the_number_of_values_must_fit(orders: SqlTarget) -> None:
    await assert_refused("statement-refused", orders.read("SELECT id FROM orders WHERE id = ?"))
    await assert_refused("statement-refused", orders.read("SELECT '?' AS x", 1))


async def test_database_messages_are_passed_on_without_users_and_addresses(orders: SqlTarget) -> None:
    message = await assert_refused("sql-error", orders.read("SELECT nothing FROM orders"))
    assert "nothing" in message
    assert "127.0.0.1" not in message


# ── limits ──────────────────────────────────────────────────────────────────────────────────────────────────


async def test_more_rows_than_allowed_are_an_error_and_not_kept(sql_target: SqlTarget) -> None:
    message = await assert_refused("too-many-rows", sql_target.read(MANY[sql_target.type], maxRows=1000))
    assert "1,000" in message
    assert (await sql_target.read("SELECT 1 AS one"))["rows"] == [{"one": 1}]


async def test_a_result_too_large_for_an_output_is_an_error(sql_target: SqlTarget) -> None:
    assert "10,000,000" in await assert_refused("result-too-large", sql_target.read(LARGE[sql_target.type]))


async def test_a_slow_query_ends_at_its_timeout_without_delaying_others(sql_target: SqlTarget) -> None:
    turns = 0
    running = asyncio.create_task(sql_target.read(SLOW[sql_target.type], timeoutSeconds=0.4))
    while not running.done():
        await asyncio.sleep(0.005)
        turns += 1
    message = await assert_refused("timeout", running)
    assert "timeoutSeconds" in message
    assert turns > 10
    assert (await sql_target.read("SELECT 1 AS one"))["count"] == 1


async def test_a_cancelled_node_leaves_connections_that_work(orders: SqlTarget) -> None:
    # MySQL goes on for a node that has left, so it does something for which it needs no CPU.
    slow = "SELECT sleep(60)" if orders.type == "mysql" else SLOW[orders.type]
    for _ in range(2 * ConnectionPolicy().max_connections_per_source):
        running = asyncio.create_task(orders.read(slow))
        await asyncio.sleep(0.02)
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
    assert (await orders.read("SELECT 1 AS one", timeoutSeconds=10))["count"] == 1
    if orders.type == "mysql":
        await end_abandoned_queries(orders)


async def end_abandoned_queries(target: SqlTarget) -> None:
    """End the queries of closed connections: a server of MySQL computes on until their timeout of half a minute."""
    abandoned = (
        "SELECT id FROM information_schema.processlist "
        "WHERE command IN ('Query', 'Execute') AND id <> connection_id()"
    )
    for row in (await target.read(abandoned))["rows"]:
        with contextlib.suppress(NodeError):  # one that has ended in between
            await target.run(f"KILL {row['id']}")


async def test_a_node_that_is_cancelled_while_it_connects_leaves_nothing_behind(
    sql_target: SqlTarget, caplog: pytest.LogCaptureFixture
) -> None:
    policy = ConnectionPolicy(allowed_networks=LOOPBACK, files=sql_target.folder)
    for milliseconds in range(0, 24, 2):
        cold = replace(sql_target, connections=DataSourceConnections(sql_target.sources, policy))
        running = asyncio.create_task(cold.read("SELECT 1 AS one"))
        await asyncio.sleep(milliseconds / 1000)
        running.cancel()
        await asyncio.wait([running])
        await cold.connections.close()
        await asyncio.sleep(0)
    gc.collect()
    assert [record.message for record in caplog.records if record.name == "asyncio"] == []


async def test_few_connections_serve_many_calls(orders: SqlTarget) -> None:
    reads = [orders.read("SELECT count(*) AS n FROM orders") for _ in range(40)]
    assert all(read["rows"] == [{"n": 0}] for read in await asyncio.gather(*reads))


async def test_nothing_is_left_of_a_session(orders: SqlTarget) -> None:
    if orders.type == "sqlite":
        pytest.skip("a file is opened anew for each statement")
    marks = {
        "postgresql": (
            "SELECT set_config('my.mark', 'seen', false)",
            "SELECT current_setting('my.mark', true) AS m",
        ),
        "mysql": ("SELECT @mark := 'seen' AS m", "SELECT @mark AS m"),
    }
    mark, look = marks[orders.type]
    await orders.read(mark)
    for _ in range(3):
        assert (await orders.read(look))["rows"][0]["m"] in {None, ""}


# ── values of one kind of database ──────────────────────────────────────────────────────────────────────────


@pytest.fixture
async def postgresql(postgres: services.PostgresServer, tmp_path: Path) -> AsyncIterator[SqlTarget]:
    sources = FixedSources({"ds": make_source("postgresql", make_url(postgres.url))})
    connections = DataSourceConnections(sources, ConnectionPolicy(allowed_networks=LOOPBACK))
    yield SqlTarget("postgresql", sources, connections, tmp_path)
    await connections.close()


@pytest.fixture
async def mariadb(mysql: services.MysqlServer, tmp_path: Path) -> AsyncIterator[SqlTarget]:
    sources = FixedSources({"ds": make_source("mysql", make_url(mysql.url))})
    connections = DataSourceConnections(sources, ConnectionPolicy(allowed_networks=LOOPBACK))
    yield SqlTarget("mysql", sources, connections, tmp_path)
    await connections.close()


async def test_values_of_postgresql_are_json(postgresql: SqlTarget) -> None:
    values: Mapping[str, Json] = {
        "9007199254740993::bigint": 9007199254740993,
        "1.50::numeric": 1.5,
        "10.00::numeric": 10,
        "0.12345678901234567890::numeric": "0.12345678901234567890",
        "'NaN'::numeric": None,
        "'Infinity'::float8": None,
        "true": True,
        "date '2026-02-28'": "2026-02-28",
        "timestamptz '2026-02-28 12:00:00+02'": "2026-02-28T10:00:00+00:00",
        "timestamp '2026-02-28 12:00:00.5'": "2026-02-28T12:00:00.500000",
        "interval '1 month 2 days'": "P1M2D",
        "'\\x00ff'::bytea": "AP8=",
        "'4dd4e0f0-7f5e-4f0a-9a52-3b64dfe2f4ab'::uuid": "4dd4e0f0-7f5e-4f0a-9a52-3b64dfe2f4ab",
        """'{"a": [1, null]}'::jsonb""": {"a": [1, None]},
        r"""'"\u0000"'::json""": r'"\u0000"',
        "ARRAY[1.5, NULL]::numeric[]": [1.5, None],
        "int4range(1, 5)": "[1,5)",
        "ROW(1, 'a b')": '(1,"a b")',
        "ARRAY[ROW(1, NULL)]": ["(1,)"],
        "inet '10.0.0.1/8'": "10.0.0.1/8",
        "E'it\\'s ?'": "it's ?",
        """'{"a": 1}'::jsonb ?? 'a'""": True,
    }
    query = ", ".join(f"{value} AS c{number}" for number, value in enumerate(values))
    read = await postgresql.read(f"SELECT {query}")
    assert dict(zip(values, read["rows"][0].values(), strict=True)) == values


async def test_values_within_values_of_postgresql_are_json(postgresql: SqlTarget) -> None:
    await postgresql.run("CREATE TABLE pairs (n integer, tags text[], grid integer[], spans int4range[])")
    await postgresql.run(
        "INSERT INTO pairs VALUES (2147483647, ARRAY['a', NULL], ARRAY[ARRAY[1, 2], ARRAY[3, 4]],"
        " ARRAY[int4range(1, 5), 'empty']), (NULL, '{}', NULL, NULL)"
    )
    query = "SELECT (SELECT p FROM pairs p LIMIT 1) AS one, array_agg(p ORDER BY n) AS all, "
    multirange = "array_agg(int4multirange(int4range(1, 3), int4range(7, 9))) AS ranges FROM pairs p"
    one: Json = {"n": 2147483647, "tags": ["a", None], "grid": [[1, 2], [3, 4]], "spans": ["[1,5)", "empty"]}
    other: Json = {"n": None, "tags": [], "grid": None, "spans": None}
    (read,) = (await postgresql.read(query + multirange))["rows"]
    assert (read["one"], read["all"]) == (one, [one, other])
    assert read["ranges"] == [["[1,3)", "[7,9)"]] * 2


async def test_a_value_is_taken_as_the_type_that_stands_in_its_place(postgresql: SqlTarget) -> None:
    read = await postgresql.read(
        "SELECT ?::date + 1 AS a, ?::numeric * 2 AS b, ?::bool AS c, ?::jsonb AS d, ?::bytea AS e, ? || '!' AS f",
        *("2026-02-28", 1.25, False, "x", "AP8=", "hi"),
    )
    assert list(read["rows"][0].values()) == ["2026-03-01", 2.5, False, "x", "AP8=", "hi!"]
    await assert_refused("sql-error", postgresql.read("SELECT ?::int AS x", "1; DROP TABLE x"))


async def test_rows_of_every_type_are_written_to_postgresql(postgresql: SqlTarget) -> None:
    await postgresql.run("CREATE SCHEMA IF NOT EXISTS shop")
    await postgresql.run("DROP TABLE IF EXISTS shop.things")
    await postgresql.run(
        "CREATE TABLE shop.things (id int, day date, at timestamptz, exact numeric, raw bytea, doc jsonb,"
        ' tags text[], "order" uuid, note varchar(5))'
    )
    row: Json = {
        "id": 1.0, "day": "2026-02-28", "at": "2026-02-28T10:00:00+00:00", "exact": "0.12345678901234567890",
        "raw": "AP8=", "doc": {"a": [1]}, "tags": ["x", "'"], "order": "4dd4e0f0-7f5e-4f0a-9a52-3b64dfe2f4ab",
        "note": "short",
    }  # fmt: skip
    assert await postgresql.write(row, table="shop.things") == 1
    assert await postgresql.rows("shop.things") == [row]
    assert "too long" in await assert_refused(
        "sql-error", postgresql.write({"note": "longer"}, table="shop.things")
    )
    assert "no column 'nope'" in await assert_refused(
        "sql-error", postgresql.write({"nope": 1}, table="shop.things")
    )


async def test_values_of_mysql_are_json(mariadb: SqlTarget) -> None:
    values: Mapping[str, Json] = {
        "18446744073709551615": 18446744073709551615,
        "CAST(1.50 AS DECIMAL(9, 2))": 1.5,
        "CAST('0.12345678901234567890' AS DECIMAL(30, 20))": "0.12345678901234567890",
        "DATE '2026-02-28'": "2026-02-28",
        "TIMESTAMP '2026-02-28 12:00:00'": "2026-02-28T12:00:00",
        "TIME '25:30:00'": "25:30:00",
        "X'00FF'": "AP8=",
        "b'101'": 5,
        "'a\\'?'": "a'?",
        "'a\\0b'": "a\ufffdb",
        '"?"': "?",
        "NULL": None,
    }
    query = ", ".join(f"{value} AS c{number}" for number, value in enumerate(values))
    read = await mariadb.read(f"SELECT {query} # ?")
    assert dict(zip(values, read["rows"][0].values(), strict=True)) | {"b'101'": 5} == values


async def test_rows_of_every_type_are_written_to_mysql(mariadb: SqlTarget) -> None:
    await mariadb.run("DROP TABLE IF EXISTS things")
    await mariadb.run(
        "CREATE TABLE things (id int PRIMARY KEY, at datetime, stamp timestamp NULL, raw varbinary(9), doc json,"
        " `order` varchar(5) COLLATE latin1_swedish_ci, flag bool)"
    )
    row: Json = {
        "id": 1, "at": "2026-02-28T12:00:00+02:00", "stamp": "2026-02-28T10:00:00Z", "raw": "AP8=",
        "doc": {"a": [1]}, "order": "ü", "flag": True,
    }  # fmt: skip
    assert await mariadb.write(row, table="test.things") == 1
    kept: dict[str, Json] = {
        "at": "2026-02-28T10:00:00",
        "stamp": "2026-02-28T10:00:00+00:00",
        "doc": '{"a":[1]}',
        "flag": 1,
    }
    assert await mariadb.rows("things") == [cast("dict[str, Json]", row) | kept]
    assert (await mariadb.read("SELECT id FROM things WHERE `order` = ?", "ü"))["count"] == 1
    await assert_refused("sql-error", mariadb.write({"id": 2, "order": "longer"}, table="things"))
    await assert_refused("statement-refused", mariadb.read("SELECT /*! 1 */ AS x"))


async def test_a_file_gives_the_types_that_it_has(tmp_path: Path) -> None:
    sqlite = await sqlite_target(tmp_path)
    await sqlite.run("CREATE TABLE things (a, b, c, d, e)")
    await sqlite.write({"a": 2**62, "b": True, "c": {"x": [1]}, "d": None, "e": 1.5}, table="things")
    read = await sqlite.read("SELECT *, x'00ff' AS f, 9e999 AS g, CAST(x'6100ff' AS TEXT) AS h FROM things")
    assert list(read["rows"][0].values()) == [2**62, 1, '{"x":[1]}', None, 1.5, "AP8=", None, "a\ufffd\ufffd"]
    await sqlite.connections.close()


# ── connections ─────────────────────────────────────────────────────────────────────────────────────────────


async def test_a_connection_that_is_dropped_is_worth_another_attempt(postgresql: SqlTarget) -> None:
    running = asyncio.create_task(postgresql.read("SELECT pg_sleep(60), 'dropped'"))
    backends = "FROM pg_stat_activity WHERE query LIKE ? AND pid <> pg_backend_pid()"

    async def is_killed() -> bool:
        return bool(
            (await postgresql.read(f"SELECT pg_terminate_backend(pid) {backends}", "%dropped%"))["count"]
        )

    await wait_until(is_killed)
    with pytest.raises(NodeError) as raised:
        await running
    assert (raised.value.code, raised.value.retryable) == ("connection-failed", True)
    assert (await postgresql.read("SELECT 1 AS one"))["count"] == 1


async def test_a_deadlock_is_worth_another_attempt(postgresql: SqlTarget) -> None:
    await postgresql.run("DROP TABLE IF EXISTS pairs")
    await postgresql.run("CREATE TABLE pairs (id int PRIMARY KEY, n int)")
    await postgresql.write([{"id": 1, "n": 0}, {"id": 2, "n": 0}], table="pairs")
    both = [
        postgresql.run(f"WITH a AS (UPDATE pairs SET n = 1 WHERE id = {first} RETURNING pg_sleep(3)),"
                       f" b AS (SELECT count(*) AS n FROM a)"
                       f" UPDATE pairs SET n = b.n FROM b WHERE id = {second}")
        for first, second in ((1, 2), (2, 1))
    ]  # fmt: skip
    failures = [
        each for each in await asyncio.gather(*both, return_exceptions=True) if not isinstance(each, int)
    ]
    assert [(each.code, each.retryable) for each in failures if isinstance(each, NodeError)] == [
        ("sql-error", True)
    ]


async def test_a_new_revision_closes_the_connections_of_the_old_one(postgresql: SqlTarget) -> None:
    opened = "SELECT pid FROM pg_stat_activity WHERE application_name = 'pilotflame' AND datname = current_database()"
    (before,) = (await postgresql.read(opened))["rows"]
    assert before in (await postgresql.read(opened))["rows"]
    source = postgresql.sources.found["ds"]
    changed = ConnectionSource("ds", source.organization_id, source.type, 2, source.settings, source.secrets)
    postgresql.sources.found["ds"] = changed

    async def is_gone() -> bool:
        return before not in (await postgresql.read(opened))["rows"]

    await wait_until(is_gone)


async def test_a_connection_without_use_is_closed(postgres: services.PostgresServer, tmp_path: Path) -> None:
    sources = FixedSources({"ds": make_source("postgresql", make_url(postgres.url))})
    policy = ConnectionPolicy(allowed_networks=LOOPBACK, idle_seconds=0.01)
    hasty = SqlTarget("postgresql", sources, DataSourceConnections(sources, policy), tmp_path)
    backend = "SELECT pg_backend_pid() AS pid"
    first = await hasty.read(backend)

    async def is_another() -> bool:
        return await hasty.read(backend) != first

    await wait_until(is_another)
    await hasty.connections.close()


async def open_refused(
    source: ConnectionSource, policy: ConnectionPolicy, addresses: tuple[str, ...] = ()
) -> NodeError:
    async def resolve(_name: str) -> tuple[str, ...]:
        return addresses

    connections = DataSourceConnections(FixedSources({"ds": source}), policy, resolve)
    with pytest.raises(NodeError) as raised:
        await SqlTarget(source.type, FixedSources({"ds": source}), connections, Path()).read(
            "SELECT 1 AS one"
        )
    await connections.close()
    return raised.value


@pytest.mark.parametrize(
    "host", ["127.0.0.1", "::1", "10.0.0.1", "db.example", "169.254.169.254", "/tmp", "a b"]
)
@pytest.mark.parametrize("kind", ["postgresql", "mysql"])
async def test_private_hosts_are_refused(kind: str, host: str) -> None:
    source = make_source(kind, URL.create(kind, "u", None, host, 5432, "x"), host=host)
    refusal = await open_refused(source, ConnectionPolicy(), ("93.184.216.34", "192.168.0.1"))
    assert refusal.code == "address-not-allowed"
    assert "192.168" not in refusal.message


@pytest.mark.parametrize("own", ["127.0.0.1", "localhost", "", "/var/run/postgresql", "::1"])
@pytest.mark.parametrize("named", ["127.0.0.1", "127.0.0.2", "db.example", "::ffff:127.0.0.1"])
async def test_our_own_database_is_refused_under_every_name(own: str, named: str) -> None:
    policy = ConnectionPolicy(
        allowed_networks=LOOPBACK, own_databases=(ServerDatabase(own, 5432, "pilotflame"),)
    )
    url = URL.create("postgresql", "u", None, "x", 5432, "pilotflame")
    refusal = await open_refused(make_source("postgresql", url, host=named), policy, ("127.0.0.1",))
    assert (refusal.code, "own database" in refusal.message) == ("address-not-allowed", True)


async def test_nothing_is_connected_while_it_is_unknown_where_our_own_database_is() -> None:
    policy = ConnectionPolicy(
        allowed_networks=LOOPBACK, own_databases=(ServerDatabase("own.example", 5432, "pilotflame"),)
    )
    url = URL.create("postgresql", "u", None, "x", 5432, "pilotflame")
    refusal = await open_refused(make_source("postgresql", url, host="127.0.0.1"), policy, ())
    assert (refusal.code, refusal.retryable) == ("connection-failed", True)
    assert "own database" in refusal.message
    assert "own.example" not in refusal.message


def test_our_own_database_is_read_from_its_url() -> None:
    given = ServerDatabase.from_url("postgresql+asyncpg://u:p%40@db:6432/p%20f")
    assert given == ServerDatabase("db", 6432, "p f")
    assert ServerDatabase.from_url("postgresql://u@/pf?host=/run") == ServerDatabase("/run", 5432, "pf")
    assert ServerDatabase.from_url("sqlite+aiosqlite:////srv/pf.db") == ServerDatabase(
        file=Path("/srv/pf.db")
    )


async def test_errors_of_refused_logins_and_missing_servers_name_no_user(
    postgresql: SqlTarget, mariadb: SqlTarget
) -> None:
    for found in (postgresql, mariadb):
        source = found.sources.found["ds"]
        wrongs: list[dict[str, Json]] = [{"user": "nobody-here", "database": "gone"}, {"port": 1}]
        for settings in wrongs:
            wrong = ConnectionSource(
                "ds",
                source.organization_id,
                source.type,
                1,
                source.settings | settings,
                {"password": "s3cret"},
            )
            refusal = await open_refused(wrong, ConnectionPolicy(allowed_networks=LOOPBACK))
            assert refusal.code == "connection-failed"
            assert not any(word in refusal.message for word in ("nobody-here", "s3cret", "127.0.0.1"))


async def test_a_server_that_can_not_encrypt_is_refused_where_that_is_required(postgresql: SqlTarget) -> None:
    source = postgresql.sources.found["ds"]
    for tls in ("require", "verify-full"):
        strict = ConnectionSource(
            "ds", source.organization_id, source.type, 1, source.settings | {"tls": tls}, source.secrets
        )
        refusal = await open_refused(strict, ConnectionPolicy(allowed_networks=LOOPBACK))
        assert refusal.code == "connection-failed"


@pytest.mark.parametrize("kind", ["postgresql", "mysql"])
@pytest.mark.parametrize(
    "greeting",
    [
        bytes(200),  # messages that are shorter than their own length
        b"S" + bytes(50),
        b"R\x00\x00\x00\x08\x00\x00\x00\x05",  # half of a login
        b"\x05\x00\x00\x00\x0a8.0\x00",
        b"J\x00\x00\x00\x0a8.0.1\x00" + b"\x01" * 68,
        b"\xff" * 300,
        b"HTTP/1.1 400 Bad Request\r\n\r\n",
    ],
)
async def test_any_server_answer_only_refuses_the_connection(kind: str, greeting: bytes) -> None:
    async def greet(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(greeting)
        writer.close()

    async with await asyncio.start_server(greet, "127.0.0.1", 0) as server:
        url = URL.create(kind, "u", "p", "127.0.0.1", server.sockets[0].getsockname()[1], "x")
        refusal = await open_refused(make_source(kind, url), ConnectionPolicy(allowed_networks=LOOPBACK))
    assert refusal.code == "connection-failed"


async def test_encryption_is_used_where_the_server_can_and_the_certificate_is_looked_at(
    mariadb: SqlTarget,
) -> None:
    source = mariadb.sources.found["ds"]
    cipher = "SHOW STATUS LIKE 'Ssl_cipher'"
    if not (await mariadb.read(cipher))["rows"][0]["Value"]:
        pytest.skip("this server has no certificate")
    plain = ConnectionSource(
        "ds", source.organization_id, source.type, 2, source.settings | {"tls": "disable"}, source.secrets
    )
    mariadb.sources.found["ds"] = plain
    assert (await mariadb.read(cipher))["rows"][0]["Value"] == ""
    strict = ConnectionSource(
        "ds", source.organization_id, source.type, 3, source.settings | {"tls": "verify-full"}, {}
    )
    refusal = await open_refused(strict, ConnectionPolicy(allowed_networks=LOOPBACK))
    assert "certificate" in refusal.message


@pytest.mark.parametrize(("certified", "logins"), [("db.example", 1), ("other.example", 0)])
async def test_the_certificate_must_name_the_host_although_an_address_is_connected(
    certified: str, logins: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    certificate = certificates.create_certificate(certified, tmp_path)
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(certificate)
    names: list[str | None] = []
    context.sni_callback = lambda _object, name, _context: names.append(name)
    received: list[bytes] = []

    async def greet(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readexactly(8)
        writer.write(b"S")
        with contextlib.suppress(OSError, asyncio.IncompleteReadError):
            await writer.start_tls(context)
            received.append(await reader.readexactly(4))
        writer.close()

    async with await asyncio.start_server(greet, "127.0.0.1", 0) as server:
        url = URL.create("postgresql", "u", None, "db.example", server.sockets[0].getsockname()[1], "x")
        source = make_source("postgresql", url, tls="verify-full")
        refusal = await open_refused(source, ConnectionPolicy(allowed_networks=LOOPBACK), ("127.0.0.1",))
    assert refusal.code == "connection-failed"
    assert ("certificate" in refusal.message) != bool(logins)
    assert names == ["db.example"]
    assert len(received) == logins


async def test_a_data_source_of_another_kind_is_refused(postgresql: SqlTarget) -> None:
    other = SqlTarget("mysql", postgresql.sources, postgresql.connections, postgresql.folder)
    await assert_refused("wrong-data-source", other.read("SELECT 1"))
    await assert_refused("data-source-not-found", call_missing(postgresql))


async def call_missing(found: SqlTarget) -> None:
    config: dict[str, Json] = {"dataSource": "gone", "query": "SELECT 1"}
    await call("postgresql-source", config, data_sources=found.connections)


# ── files ───────────────────────────────────────────────────────────────────────────────────────────────────


def sqlite_source(file: str) -> ConnectionSource:
    return ConnectionSource("ds", CALLER.organization_id, "sqlite", 1, {"file": file}, {})


async def sqlite_target(folder: Path, file: str = "a.db", **policy: Any) -> SqlTarget:  # noqa: ANN401 - fields of the policy
    sources = FixedSources({"ds": sqlite_source(file)})
    return SqlTarget(
        "sqlite", sources, DataSourceConnections(sources, ConnectionPolicy(files=folder, **policy)), folder
    )


@pytest.mark.parametrize(
    "file",
    ["../b.db", "/etc/passwd", "a/b.db", "", ".hidden", "a.db-journal", "a\0b", "a.db?mode=rwc", "x" * 200],
)
async def test_a_file_has_a_plain_name(tmp_path: Path, file: str) -> None:
    found = await sqlite_target(tmp_path, file)
    await assert_refused("address-not-allowed", found.run("CREATE TABLE x (a)"))
    await found.connections.close()


async def test_a_file_is_made_for_us_alone_by_the_first_write(tmp_path: Path) -> None:
    found = await sqlite_target(tmp_path)
    await assert_refused("connection-failed", found.read("SELECT 1"))
    await found.run("CREATE TABLE x (a)")
    made = tmp_path / CALLER.organization_id / "a.db"
    assert made.stat().st_mode & 0o777 == 0o600
    await found.connections.close()


async def test_links_and_our_own_database_are_no_files_of_an_organisation(tmp_path: Path) -> None:
    folder = tmp_path / CALLER.organization_id
    folder.mkdir()
    elsewhere = tmp_path / "elsewhere.db"
    with closing(sqlite3.connect(elsewhere)) as connection:
        connection.execute("CREATE TABLE secret (a)")
    (folder / "soft.db").symlink_to(elsewhere)
    os.link(elsewhere, folder / "hard.db")
    os.mkfifo(folder / "pipe.db")
    (folder / "own.db").write_bytes(b"")
    found = await sqlite_target(tmp_path, own_databases=(ServerDatabase(file=folder / "own.db"),))
    for name in ("soft.db", "hard.db", "pipe.db", "own.db"):
        found.sources.found["ds"] = sqlite_source(name)
        await assert_refused("address-not-allowed", found.read("SELECT 1"))
        await assert_refused("address-not-allowed", found.run("CREATE TABLE x (a)"))
    await found.connections.close()


async def test_a_file_can_not_grow_past_its_limit(tmp_path: Path) -> None:
    found = await sqlite_target(tmp_path, max_file_bytes=100_000)
    await found.run("CREATE TABLE x (a)")
    rows: Json = [{"a": "x" * 1000}] * 200
    assert "full" in await assert_refused("sql-error", found.write(rows, table="x"))
    assert await found.rows("x") == []
    await found.connections.close()


@pytest.mark.parametrize(
    "statement",
    [
        "SELECT load_extension('x')",
        "SELECT * FROM pragma_database_list",
        "SELECT zeroblob(1000000000)",
        "WITH x AS (SELECT 1) DELETE FROM t",
    ],
)
async def test_a_file_is_all_that_a_query_can_touch(tmp_path: Path, statement: str) -> None:
    found = await sqlite_target(tmp_path)
    await found.run("CREATE TABLE t (a)")
    with pytest.raises(NodeError):
        await found.read(statement)
    await found.connections.close()


RECURSIVE = "WITH RECURSIVE c(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM c LIMIT 450)"
MAX_CHILD_BYTES = 600 << 20
"""The heap of SQLite, a row of it as Python's values, and Python itself."""


@pytest.mark.parametrize(
    ("statement", "code"),
    [
        (f"{RECURSIVE} SELECT zeroblob(19000000) FROM c", "result-too-large"),
        (f"SELECT {', '.join(['zeroblob(19000000)'] * 1000)}", "out-of-memory"),
        (f"{RECURSIVE} SELECT json_group_array(hex(zeroblob(9000000))) FROM c", "out-of-memory"),
        (f"{RECURSIVE} SELECT count(DISTINCT x || hex(zeroblob(500000))) FROM c", "sql-error"),
        (f"{RECURSIVE} SELECT c.x FROM c AS a, c AS b, c ORDER BY hex(randomblob(100))", "sql-error"),
        ("SELECT instr(hex(zeroblob(4000000)), hex(zeroblob(400000)) || '1')", "timeout"),
        (f"INSERT INTO t {RECURSIVE} SELECT zeroblob(19000000) FROM c RETURNING a", "sql-error"),
        (f"CREATE TABLE u AS {RECURSIVE} SELECT zeroblob(19000000) AS b FROM c", "sql-error"),
    ],
)
async def test_a_statement_ends_within_its_time_and_memory(tmp_path: Path, statement: str, code: str) -> None:
    found = await sqlite_target(tmp_path, max_file_bytes=40_000_000)
    await found.run("CREATE TABLE t (a)")
    writes = not statement.startswith(("SELECT", "WITH"))
    seconds = 0.4 if code == "timeout" else 60.0
    peak_bytes = 0
    work = asyncio.create_task(
        found.write(statement=statement, timeoutSeconds=seconds)
        if writes
        else found.read(statement, timeoutSeconds=seconds)
    )
    try:
        for turn in itertools.count():
            if turn % 10 == 0:  # it reads the files of all processes of the machine
                children = psutil.Process().children()
            peak_bytes = max([peak_bytes, *map(peak_resident_bytes, children)])
            await asyncio.wait([work], timeout=0.005)
            if work.done():
                break
        await assert_refused(code, work)
        assert peak_bytes < MAX_CHILD_BYTES
        assert await found.rows("t") == [], "whoever comes next is served"
    finally:
        await found.connections.close()
    assert list_files(tmp_path) == {"a.db", CALLER.organization_id}


def list_files(folder: Path) -> set[str]:
    return {each.name for each in folder.glob("**/*")}


def peak_resident_bytes(process: psutil.Process) -> int:
    try:
        status = Path(f"/proc/{process.pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return 1024 * int(status.partition("VmHWM:")[2].split()[0]) if "VmHWM:" in status else 0


async def test_where_a_writer_died_the_next_reader_mends_the_file(tmp_path: Path) -> None:
    found = await sqlite_target(tmp_path)
    await found.run("CREATE TABLE t (a)")
    file = tmp_path / CALLER.organization_id / "a.db"
    script = f"""
import os, sqlite3
connection = sqlite3.connect({str(file)!r}, isolation_level=None)
connection.execute("PRAGMA cache_size = 1")
connection.execute("BEGIN")
connection.executemany("INSERT INTO t VALUES (?)", [("x" * 1000,)] * 500)
os._exit(1)
"""
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", script)
    await process.wait()
    assert file.with_name("a.db-journal").exists()
    assert await found.rows("t") == []
    await found.connections.close()


# ── headers ─────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("kind", "settings", "secrets", "headers"),
    [
        ("http-bearer", {}, {"token": "t"}, {"Authorization": "Bearer t"}),
        ("http-basic", {"username": "ø"}, {"password": "p"}, {"Authorization": "Basic w7g6cA=="}),
        ("api-key", {}, {"key": "k"}, {"X-API-Key": "k"}),
        ("api-key", {"header": "Token", "hosts": ["api.example"]}, {"key": "k"}, {"Token": "k"}),
    ],
)
async def test_a_credential_becomes_a_header(
    kind: str, settings: dict[str, Json], secrets: dict[str, str], headers: dict[str, str]
) -> None:
    source = ConnectionSource("ds", CALLER.organization_id, kind, 1, settings, secrets)
    connections = DataSourceConnections(FixedSources({"ds": source}), ConnectionPolicy())
    assert await connections.headers(CALLER, "ds", "https://API.example/x") == headers
    if "hosts" in settings:
        await assert_refused(
            "host-not-allowed", connections.headers(CALLER, "ds", "https://api.example.evil/x")
        )
    await connections.close()
