import asyncio
import copy
import csv
import io
from collections.abc import AsyncIterator, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.node_api import NodeType, TimerWait
from engine.run_errors import NodeError
from engine.values import Json
from nodes import catalog
from nodes.library import ai_gateway
from tests.node_calls import NOW, call
from tests.sample_data import SampleDataSources

pytestmark = pytest.mark.anyio

FILE_NODES = {"s3-source", "s3-destination", "file-source", "file-destination", "file-parse"}
MAIL_NODES = {"email-parse", "attachment-read", "email-send"}
EXAMPLES = [
    pytest.param(node_type, example, id=f"{node_type.type}-{number}")
    for node_type in catalog.load_catalog().node_types.values()
    for number, example in enumerate(node_type.examples)
    # Those of http-request, of tool servers, of files and of mail are run against servers, and those of code by each
    # backend, in the integration tests.
    if node_type.runnable
    and node_type.type not in {"http-request", "mcp-tool", "code", *FILE_NODES, *MAIL_NODES}
    # Those of nodes that the engine completes are run by the engine.
    and node_type.type not in {"loop", "human-input", "sub-workflow", "wait-for-event", "wait-for-signal"}
]


@pytest.fixture
async def data_sources(tmp_path: Path) -> AsyncIterator[SampleDataSources]:
    sample = SampleDataSources(tmp_path)
    yield sample
    await sample.connections.close()


@pytest.mark.parametrize(("node_type", "example"), EXAMPLES)
async def test_every_example_of_the_catalogue_comes_true(
    node_type: NodeType,
    example: dict[str, Any],
    data_sources: SampleDataSources,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # The duration of an answer is part of the output of this node; its example says 0 ms.
    monkeypatch.setattr(ai_gateway, "monotonic", lambda: 0.0)
    data = example["input"]
    before = copy.deepcopy(data)
    if "error" in example:
        with pytest.raises(NodeError) as raised:
            await call(node_type.type, example["config"], data, data_sources=data_sources)
        assert raised.value.message == example["error"]
        return
    called = await call(node_type.type, example["config"], data, data_sources=data_sources)
    assert (called.output, called.port) == (example["output"], example["port"])
    assert data == before, "a node never changes what it was given"


ROWS: Json = [
    {"city": "Oslo", "t": 12, "place": {"zone": "N"}},
    {"city": "Rome", "t": 27.5, "place": {"zone": "S"}},
    {"city": "Oslo", "t": None, "place": {"zone": "N"}},
]


HOLDS: Json = {"left": 1, "operator": "equals", "right": 1}
ALWAYS: Json = {"condition": HOLDS}


def aggregation_config(function: str, field: str = "t") -> list[Json]:
    return [{"function": function, "field": field, "as": "x"}]


@pytest.mark.parametrize(
    ("node_type", "config", "data", "output"),
    [
        ("manual", {}, None, None),
        ("set", {"values": {"a": 2}}, {"a": 1, "b": 1}, {"a": 2, "b": 1}),
        ("set", {"values": {"a": 2}}, None, {"a": 2}),
        ("set", {"values": {"a.b": 1}}, {"a": {"b": 0}}, {"a": {"b": 0}, "a.b": 1}),
        ("set", {"values": {"a": 2}, "mode": "{{ data.mode }}"}, {"mode": "replace"}, {"a": 2}),
        (
            "filter",
            ALWAYS,
            [],
            {"items": [], "count": 0, "removed": 0},
        ),
        ("log", {"message": "hello"}, [1], [1]),
        ("template", {"text": "a {{ data.x }} b"}, {"x": 1}, {"text": "a 1 b"}),
        ("template", {"text": "{{ data }}"}, {"x": [1, None]}, {"text": '{"x":[1,null]}'}),
        (
            "template",
            {
                "text": "<",
                "items": "{{ data }}",
                "each": "{{ index }}={{ item }}",
                "separator": ",",
                "footer": ">",
            },
            ["a", "b"],
            {"text": "<,0=a,1=b,>"},
        ),
        ("template", {"text": "none", "items": [], "each": "{{ item }}"}, None, {"text": "none"}),
        (
            "template",
            {"text": "", "items": "{{ data }}", "each": {"$op": "round", "args": ["{{ item }}", 1]}},
            [1.25, 2],
            {"text": "\n1.3\n2"},
        ),
        (
            "aggregate",
            {"aggregations": aggregation_config("sum")},
            ROWS,
            {"groups": [{"x": 39.5}], "count": 1},
        ),
        (
            "aggregate",
            {"aggregations": aggregation_config("avg")},
            ROWS,
            {"groups": [{"x": 19.75}], "count": 1},
        ),
        ("aggregate", {"aggregations": aggregation_config("min")}, ROWS, {"groups": [{"x": 12}], "count": 1}),
        (
            "aggregate",
            {"aggregations": aggregation_config("max")},
            ROWS,
            {"groups": [{"x": 27.5}], "count": 1},
        ),
        (
            "aggregate",
            {"aggregations": aggregation_config("count")},
            ROWS,
            {"groups": [{"x": 2}], "count": 1},
        ),
        (
            "aggregate",
            {"aggregations": [{"function": "count", "as": "x"}]},
            ROWS,
            {"groups": [{"x": 3}], "count": 1},
        ),
        (
            "aggregate",
            {"groupBy": ["place.zone", "city"], "aggregations": aggregation_config("count", "city")},
            ROWS,
            {
                "groups": [
                    {"place.zone": "N", "city": "Oslo", "x": 2},
                    {"place.zone": "S", "city": "Rome", "x": 1},
                ],
                "count": 2,
            },
        ),
        ("aggregate", {"aggregations": aggregation_config("sum")}, [], {"groups": [{"x": 0}], "count": 1}),
        ("aggregate", {"aggregations": aggregation_config("avg")}, [], {"groups": [{"x": None}], "count": 1}),
        ("aggregate", {"aggregations": aggregation_config("max")}, [], {"groups": [{"x": None}], "count": 1}),
        (
            "aggregate",
            {"groupBy": ["city"], "aggregations": aggregation_config("max")},
            [],
            {"groups": [], "count": 0},
        ),
        (
            "aggregate",
            {"aggregations": aggregation_config("sum", "PM2.5")},
            [{"PM2.5": 3}],
            {"groups": [{"x": 3}], "count": 1},
        ),
        (
            "aggregate",
            {"aggregations": aggregation_config("sum")},
            [{"t": 0.1}] * 10,
            {"groups": [{"x": 1.0}], "count": 1},
        ),
        (
            "aggregate",
            {"groupBy": ["k"], "aggregations": [{"function": "count", "as": "n"}]},
            [{"k": True}, {"k": 1}, {"k": 1.0}, {"k": None}, {"k": [1]}, {"k": [1]}],
            {
                "groups": [{"k": True, "n": 1}, {"k": 1, "n": 2}, {"k": None, "n": 1}, {"k": [1], "n": 2}],
                "count": 4,
            },
        ),
    ],
)
async def test_a_node_gives(node_type: str, config: dict[str, Json], data: Json, output: Json) -> None:
    assert (await call(node_type, config, data)).output == output


@pytest.mark.parametrize(
    ("cases", "port"),
    [
        ([{"port": "a", "equals": "1"}, {"port": "b", "equals": 1.0}], "b"),
        ([{"port": "a", "equals": True}, {"port": "b", "equals": "{{ data }}"}], "b"),
        ([{"port": "a", "equals": 2}, {"port": "b", "condition": HOLDS}, {"port": "c", "equals": 1}], "b"),
        ([{"port": "a", "equals": 1}, {"port": "b", "equals": 1}], "a"),
        ([{"port": "a", "equals": None}], "default"),
    ],
)
async def test_the_first_case_of_a_switch_that_fits_counts(cases: Json, port: str) -> None:
    for value in ({}, {"value": "{{ data }}"}):
        called = await call("switch", {"cases": cases, **value}, 1)
        assert (called.output, called.port) == (1, port)


async def test_whole_numbers_stay_whole_when_they_are_added() -> None:
    called = await call("aggregate", {"aggregations": aggregation_config("sum")}, [{"t": 2**53}, {"t": 1}])
    assert repr(called.output) == repr({"groups": [{"x": 2**53 + 1}], "count": 1})


async def test_a_field_that_items_lack_is_reported_once() -> None:
    called = await call("aggregate", {"groupBy": ["cty"], "aggregations": aggregation_config("sum")}, ROWS)
    assert called.unresolved == ["item.cty"]


@pytest.mark.parametrize(
    ("written", "value"),
    [
        ("12", 12),
        ("-3", -3),
        ("0.5", 0.5),
        ("1.5e-3", 0.0015),
        (" 12 ", 12),
        ("", None),
        ("  ", None),
        ("007", "007"),
        ("+49", "+49"),
        ("1,5", "1,5"),
        ("nan", "nan"),
        ("inf", "inf"),
        ("1e999", "1e999"),
        ("0x10", "0x10"),
        ("1_000", "1_000"),
        ("٣", "٣"),
        ("true", "true"),
        ("999999999999999", 999999999999999),
        ("1234567890123456", "1234567890123456"),
        (" padded", " padded"),
    ],
)
async def test_a_field_of_a_csv_becomes_a_number_only_where_nothing_is_lost(
    written: str, value: Json
) -> None:
    called = await call("csv-parse", {"text": "{{ data }}"}, f'a,b\n"{written}",x\n')
    assert repr(called.output) == repr({"rows": [{"a": value, "b": "x"}], "columns": ["a", "b"], "count": 1})


def rows_output(columns: Sequence[str], *rows: Sequence[Json]) -> Json:
    objects: list[Json] = [dict(zip(columns, row, strict=True)) for row in rows]
    return {"rows": objects, "columns": list(columns), "count": len(rows)}


@pytest.mark.parametrize(
    ("config", "text", "output"),
    [
        ({}, "", rows_output([])),
        ({}, "a,b\n", rows_output(["a", "b"])),
        ({}, "\ufeffa,b\r\n1,2\r\n\r\n3,4", rows_output(["a", "b"], [1, 2], [3, 4])),
        ({}, "a,b\r1,2\r", rows_output(["a", "b"], [1, 2])),
        ({}, '"a,1","b ""x"""\n"two\nlines",2\n', rows_output(["a,1", 'b "x"'], ["two\nlines", 2])),
        ({}, " a , ,b\n1,2,3\n", rows_output(["a", "column2", "b"], [1, 2, 3])),
        ({"types": "text"}, "a,b\n1,\n", rows_output(["a", "b"], ["1", ""])),
        ({"hasHeader": False}, "1,2\n", rows_output(["column1", "column2"], [1, 2])),
        ({"hasHeader": False, "columns": ["x", "y"]}, "1,2\n", rows_output(["x", "y"], [1, 2])),
        ({"columns": ["x", "y"]}, "a,b\n1,2\n", rows_output(["x", "y"], [1, 2])),
        ({"delimiter": "\t"}, "a\tb\n1\t2\n", rows_output(["a", "b"], [1, 2])),
        ({"delimiter": "auto"}, '"a,b";c\n1;2\n', rows_output(["a,b", "c"], [1, 2])),
        ({"delimiter": "auto"}, "\na|b\n1|2\n", rows_output(["a", "b"], [1, 2])),
        ({"delimiter": "auto"}, "a\n1\n", rows_output(["a"], [1])),
        ({"onRaggedRow": "pad"}, "a,b\n1\n", rows_output(["a", "b"], [1, None])),
    ],
)
async def test_a_csv_is_read(config: dict[str, Json], text: str, output: Json) -> None:
    assert (await call("csv-parse", {"text": "{{ data }}", **config}, text)).output == output


TEXTS = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), min_size=1)
TABLES = st.integers(1, 5).flatmap(lambda width: st.lists(st.lists(TEXTS, min_size=width, max_size=width)))


@given(rows=TABLES, delimiter=st.sampled_from([",", ";", "\t", "|", " "]))
def test_every_table_of_texts_survives_being_written_as_csv(rows: list[list[str]], delimiter: str) -> None:
    columns = [f"c{number}" for number in range(len(rows[0]) if rows else 1)]
    written = io.StringIO(newline="")
    csv.writer(written, delimiter=delimiter).writerows([columns, *rows])
    config: dict[str, Json] = {"text": "{{ data }}", "types": "text", "delimiter": delimiter}
    assert asyncio.run(call("csv-parse", config, written.getvalue())).output == rows_output(columns, *rows)


@pytest.mark.parametrize(
    ("node_type", "config", "data", "code", "said"),
    [
        ("set", {"values": {"a": 1}}, [1], "not-an-object", "a list of 1 arrived"),
        (
            "set",
            {"values": {"a": 1}, "mode": "{{ data.mode }}"},
            {"mode": "add"},
            "invalid-config",
            "one of merge, replace",
        ),
        (
            "filter",
            ALWAYS,
            "x",
            "invalid-config",
            "a text arrived",
        ),
        (
            "filter",
            ALWAYS,
            {"rows": [1], "count": 1},
            "invalid-config",
            "its 'rows' would be one",
        ),
        (
            "filter",
            ALWAYS,
            [0] * 100_001,
            "too-many-items",
            "100,001 items; at most 100,000",
        ),
        (
            "aggregate",
            {"aggregations": aggregation_config("sum")},
            [{"t": "12"}],
            "not-a-number",
            "csv-parse",
        ),
        (
            "aggregate",
            {"aggregations": aggregation_config("avg")},
            [{"t": True}],
            "not-a-number",
            "Item 0 has true in `t`",
        ),
        (
            "aggregate",
            {"aggregations": aggregation_config("sum")},
            [3],
            "not-an-object",
            "Item 0 is a number",
        ),
        (
            "aggregate",
            {"aggregations": aggregation_config("sum")},
            [{"t": 1.7e308}] * 2,
            "number-too-large",
            "The sum of `t`",
        ),
        (
            "aggregate",
            {"groupBy": ["x"], "aggregations": aggregation_config("sum")},
            [],
            "duplicate-name",
            "`x`",
        ),
        ("aggregate", {"aggregations": aggregation_config("sum") * 2}, [], "duplicate-name", "another `as`"),
        (
            "aggregate",
            {"groupBy": "{{ data.by }}", "items": [], "aggregations": aggregation_config("sum")},
            {"by": [""] * 21},
            "invalid-config",
            "at most 20",
        ),
        (
            "aggregate",
            {"groupBy": ["n"], "aggregations": [{"function": "count", "as": f"x{i}"} for i in range(50)]},
            [{"n": n} for n in range(10_001)],
            "too-many-groups",
            "500,000",
        ),
        ("csv-parse", {"text": "{{ data.csv }}"}, {}, "invalid-config", "nothing (null) arrived"),
        (
            "csv-parse",
            {"text": "a,b\n1\n"},
            None,
            "ragged-row",
            "Line 2 has 1 fields where there are 2 columns; `onRaggedRow: pad`",
        ),
        ("csv-parse", {"text": "a\n1,2\n", "onRaggedRow": "pad"}, None, "ragged-row", "Line 2 has 2 fields"),
        ("csv-parse", {"text": "a,b\n", "columns": ["x"]}, None, "ragged-row", "the header has 2"),
        ("csv-parse", {"text": "a,a\n"}, None, "duplicate-column", "'a'"),
        ("csv-parse", {"text": "a," * 10_000}, None, "too-many-columns", "10,001 columns"),
        ("csv-parse", {"text": 'a\n"b\n'}, None, "invalid-csv", "unexpected end of data"),
        ("csv-parse", {"text": "a\n" + "x" * 140_000}, None, "invalid-csv", "field limit"),
        ("csv-parse", {"text": "a\n1\n2\n3\n", "maxRows": 2}, None, "too-many-rows", "more than 2 rows"),
        ("csv-parse", {"text": "a\n" + "1\n" * 100_001}, None, "too-many-rows", "more than 100,000 rows"),
        (
            "csv-parse",
            {"text": ",".join(map(str, range(1_000))) + "\n1" * 2_001, "onRaggedRow": "pad"},
            None,
            "too-many-rows",
            "2,000,000 values in its 1,000 columns",
        ),
        ("csv-parse", {"text": "a", "delimiter": "{{ data }}"}, '"', "invalid-config", "`delimiter`"),
        (
            "template",
            {"text": "x", "items": "{{ data }}", "each": "{{ item }}"},
            "abc",
            "invalid-config",
            "a list",
        ),
        (
            "template",
            {"text": "x", "items": [1, 2, 3, 4], "each": "{{ data }}"},
            "y" * 3_000_000,
            "output-too-large",
            "10,000,000 characters",
        ),
        (
            "template",
            {"text": "", "items": [0] * 1_000, "each": "", "separator": "-" * 10_001},
            None,
            "output-too-large",
            "parts",
        ),
        (
            "log",
            {"message": "m", "level": "{{ data }}"},
            "loud",
            "invalid-config",
            "one of debug, info, warning, error",
        ),
        ("stop-with-error", {"message": "{{ data }}"}, {"a": 1}, "node-error", '{"a":1}'),
        ("stop-with-error", {"message": "{{ data }}"}, None, "node-error", "its message is empty"),
        ("wait", {"seconds": "{{ data }}"}, "soon", "invalid-config", "`seconds` must be a number"),
        ("wait", {"seconds": "{{ data }}"}, -1, "invalid-config", "from 0 to 31,536,000"),
        ("wait", {"seconds": "{{ data }}"}, True, "invalid-config", "`seconds` must be a number"),
        ("wait", {"until": "tomorrow"}, None, "invalid-config", "ISO 8601"),
        ("wait", {"until": "2026-01-02T09:00:00"}, None, "invalid-config", "must have a time zone"),
        ("wait", {"until": "2027-01-02T09:00:00Z"}, None, "wait-too-long", "365 days at most"),
        ("wait", {"until": "9999-12-31T23:59:59-23:59"}, None, "wait-too-long", "365 days at most"),
    ],
)
async def test_a_node_fails_with_a_reason(
    node_type: str, config: dict[str, Json], data: Json, code: str, said: str
) -> None:
    with pytest.raises(NodeError) as raised:
        await call(node_type, config, data)
    assert (raised.value.code, raised.value.retryable) == (code, False)
    assert said in raised.value.message


@pytest.mark.parametrize(
    ("config", "until"),
    [
        ({"seconds": 1.5}, NOW + timedelta(seconds=1.5)),
        ({"until": "2026-01-01T09:00:00+01:00"}, datetime(2026, 1, 1, 8, tzinfo=UTC)),
        ({"until": "2026-01-01T09:00:00Z"}, datetime(2026, 1, 1, 9, tzinfo=UTC)),
    ],
)
async def test_a_wait_says_when_it_ends(config: dict[str, Json], until: datetime) -> None:
    assert (await call("wait", config, {"a": 1})).outcome == TimerWait(until, {"a": 1})


@pytest.mark.parametrize(
    "config", [{"seconds": 0}, {"until": "2025-12-31T23:59:59Z"}, {"until": "0001-01-01T00:00+23:59"}]
)
async def test_a_wait_until_a_past_time_ends_at_once(config: dict[str, Json]) -> None:
    assert (await call("wait", config, {"a": 1})).outcome == {"a": 1}


async def test_a_log_line_is_cut_off_where_it_becomes_too_long() -> None:
    called = await call("log", {"message": "{{ data }}", "level": "error"}, "ü" * 5_000)
    ((level, message),) = called.lines
    assert level == "error"
    assert message == "ü" * 4_094 + "…"
    assert len(message.encode()) <= 8_192


async def test_values_other_than_texts_are_logged_as_json() -> None:
    called = await call("log", {"message": "{{ data }}"}, {"a": [1, None]})
    assert called.lines == [("info", '{"a":[1,null]}')]


LONG_LOOPS = [
    (
        "filter",
        {"condition": {"left": "{{ item.t }}", "operator": "greater-than", "right": 1}},
        [{"t": 1}] * 100_000,
    ),
    ("aggregate", {"groupBy": ["t"], "aggregations": aggregation_config("sum")}, [{"t": 1}] * 100_000),
    (
        "template",
        {"text": "", "items": "{{ data }}", "each": "{{ item.t }} {{ index }}"},
        [{"t": 1}] * 100_000,
    ),
    ("csv-parse", {"text": "{{ data }}"}, "a,b,c\n" + "1,2.5,x\n" * 100_000),
]


@pytest.mark.parametrize(("node_type", "config", "data"), LONG_LOOPS, ids=[loop[0] for loop in LONG_LOOPS])
async def test_other_work_goes_on_while_a_node_loops(
    node_type: str, config: dict[str, Json], data: Json
) -> None:
    turns = 0

    async def other_work() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    other = asyncio.create_task(other_work())
    await call(node_type, config, data)
    other.cancel()
    assert turns > 3
