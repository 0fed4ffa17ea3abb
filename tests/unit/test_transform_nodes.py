import asyncio
from collections.abc import Mapping
from functools import cmp_to_key
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.graph import ParsedGraph
from engine.run_errors import NodeError
from engine.validation import validate_graph
from engine.values import Json, encode_json, equal_json, identity_key, value_as_text
from nodes import catalog
from tests.node_calls import call

pytestmark = pytest.mark.anyio

SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text("ab1")
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("ab"), inner, max_size=3),
    max_leaves=6,
)
MANY_VALUES = st.lists(VALUES, max_size=20)


def run_node(node_type: str, config: Mapping[str, Json], data: Json = None) -> Any:  # noqa: ANN401 - any JSON
    return asyncio.run(call(node_type, config, data)).output


async def run_items(node_type: str, config: Mapping[str, Json], data: Json) -> Json:
    output = (await call(node_type, config, data)).output
    assert isinstance(output, dict)
    assert isinstance(output["items"], list)
    assert output["count"] == len(output["items"])
    return output["items"]


ADA: Json = {"id": 1, "name": "Ada", "home": {"city": "Oslo"}, "tags": ["x", "y"]}
BOB: Json = {"id": 2, "name": "Bob", "home": {"city": "Rome"}, "tags": []}
ADA_AGAIN: Json = {"id": 1, "name": "ADA", "home": {"city": "Bern"}, "tags": None}
PEOPLE: Json = [ADA, BOB, ADA_AGAIN]


# ── rules ───────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("node_type", "config", "data", "expected"),
    [
        ("map", {"value": "{{ index }}: {{ item.name }}"}, PEOPLE, ["0: Ada", "1: Bob", "2: ADA"]),
        ("map", {"value": {"$op": "add", "args": ["{{ item }}", "{{ index }}"]}}, [5, 5], [5, 6]),
        (
            "map",
            {"value": {"of": "{{ trigger.x }}"}, "items": "{{ data.l }}"},
            {"x": 1, "l": [0]},
            [{"of": 1}],
        ),
        ("map", {"value": None}, [1], [None]),
        ("map", {"value": {"b": 2}, "mode": "merge"}, [{"a": 1, "b": 1}], [{"a": 1, "b": 2}]),
        ("map", {"value": 1}, [], []),
        ("sort", {"by": ["name"]}, PEOPLE, [ADA_AGAIN, ADA, BOB]),
        ("sort", {"by": ["home.city"]}, PEOPLE, [ADA_AGAIN, ADA, BOB]),
        ("sort", {"by": ["id", {"key": "name", "order": "descending"}]}, PEOPLE, [ADA, ADA_AGAIN, BOB]),
        ("sort", {"by": [{"key": "id", "order": "descending"}]}, PEOPLE, [BOB, ADA, ADA_AGAIN]),
        ("sort", {"by": [{"key": "name", "text": "ignore-case"}]}, PEOPLE, [ADA, ADA_AGAIN, BOB]),
        (
            "sort",
            {"by": [{"key": {"$op": "length", "args": ["{{ item }}"]}}]},
            ["ccc", "a", "bb"],
            ["a", "bb", "ccc"],
        ),
        ("sort", {"by": ["a.b"]}, [{"a.b": 2}, {"a": {"b": 1}}], [{"a": {"b": 1}}, {"a.b": 2}]),
        ("sort", {"by": [{"key": "{{ index }}", "order": "descending"}]}, ["a", "b"], ["b", "a"]),
        (
            "sort",
            {},
            [{}, [2], [], "b", "B", 2, 1.5, True, False, None],
            [False, True, 1.5, 2, "B", "b", [2], [], {}, None],
        ),
        ("sort", {"by": [{"key": "{{ item }}", "nulls": "first"}]}, [1, None, 0], [None, 0, 1]),
        (
            "sort",
            {"by": [{"key": "{{ item }}", "nulls": "first", "order": "descending"}]},
            [1, None, 2],
            [None, 2, 1],
        ),
        ("sort", {"by": [{"key": "{{ item }}", "order": "descending"}]}, [1, None, 2], [2, 1, None]),
        (
            "sort",
            {"by": [{"key": "{{ item }}", "text": "natural"}]},
            ["v1.10", "V1.9", "v1", "v01.9", "v", "v1a"],
            ["v", "v1", "V1.9", "v01.9", "v1.10", "v1a"],
        ),
        (
            "sort",
            {"items": "{{ data.l }}", "by": "{{ data.by }}"},
            {"by": ["a", {"key": "b", "order": "descending"}], "l": [{"a": 1, "b": 1}, {"a": 1, "b": 2}]},
            [{"a": 1, "b": 2}, {"a": 1, "b": 1}],
        ),
        (
            "sort",
            {"items": "{{ data.l }}", "by": [{"key": "{{ data.by }}", "order": "{{ data.order }}"}]},
            {"by": "a", "order": "descending", "l": [{"a": 1}, {"a": 2}]},
            [{"a": 2}, {"a": 1}],
        ),
        (
            "dedupe",
            {},
            [1, 1.0, True, "1", None, None, {"a": [1]}, {"a": [1.0]}],
            [1, True, "1", None, {"a": [1]}],
        ),
        ("dedupe", {"by": ["id"]}, PEOPLE, [ADA, BOB]),
        ("dedupe", {"by": ["id"], "keep": "last"}, PEOPLE, [BOB, ADA_AGAIN]),
        ("dedupe", {"by": ["id", "home.city"]}, PEOPLE, PEOPLE),
        ("dedupe", {"by": ["id", {"$op": "lower", "args": ["{{ item.name }}"]}]}, PEOPLE, [ADA, BOB]),
        (
            "dedupe",
            {"items": "{{ data.l }}", "by": "{{ data.by }}"},
            {"by": ["{{ item.a }}"], "l": [{"{{ item.a }}": 1, "a": 1}, {"{{ item.a }}": 1, "a": 2}]},
            [{"{{ item.a }}": 1, "a": 1}],
        ),
        ("split", {"mode": "text"}, "a\nb\n", ["a", "b", ""]),
        ("split", {"mode": "text", "trim": True, "dropEmpty": True}, "a\r\n \r\n b", ["a", "b"]),
        ("split", {"mode": "text", "separator": "::"}, "", [""]),
        ("split", {"mode": "batches", "size": 10}, [1, 2], [[1, 2]]),
        ("split", {"mode": "batches"}, [], []),
        (
            "split",
            {"mode": "field", "field": "tags"},
            PEOPLE,
            [{**cast("dict[str, Json]", ADA), "tags": "x"}, {**cast("dict[str, Json]", ADA), "tags": "y"}],
        ),
        ("split", {"mode": "field", "field": "tags", "keepFields": False}, PEOPLE, ["x", "y"]),
    ],
)
async def test_a_list_becomes(node_type: str, config: dict[str, Json], data: Json, expected: Json) -> None:
    assert encode_json(await run_items(node_type, config, data)) == encode_json(expected)


ROWS: Json = [{"key": 1, "x": "a"}, {"key": 1, "x": "b"}, {"key": None, "x": "c"}]
ONE: dict[str, Json] = {"key": 1, "own": True, "x": "own"}
TWO: dict[str, Json] = {"key": 2}
NONE: dict[str, Json] = {"key": None}


@pytest.mark.parametrize(
    ("config", "expected", "unmatched"),
    [
        ({}, [ONE, TWO, NONE], 2),
        ({"as": "row"}, [ONE | {"row": {"key": 1, "x": "a"}}, TWO | {"row": None}, NONE | {"row": None}], 2),
        ({"onMissing": "drop"}, [ONE], 2),
        (
            {"onMissing": "drop", "matches": "each", "as": "x"},
            [ONE | {"x": {"key": 1, "x": x}} for x in "ab"],
            2,
        ),
        (
            {"matches": "list", "as": "rows", "onMissing": "keep"},
            [ONE | {"rows": cast("list[Json]", ROWS)[:2]}, TWO | {"rows": []}, NONE | {"rows": []}],
            2,
        ),
        ({"tableBy": ["x"], "by": ["x"], "onMissing": "drop"}, [], 3),
        (
            {
                "by": [{"$op": "subtract", "args": [{"$op": "default", "args": ["{{ item.key }}", 0]}, 1]}],
                "tableBy": ["key"],
            },
            [ONE, TWO | {"x": "a"}, NONE],
            2,
        ),
    ],
)
async def test_a_lookup_gives(config: dict[str, Json], expected: Json, unmatched: int) -> None:
    called = await call("lookup", {"by": ["key"], "table": ROWS, **config}, [ONE, TWO, NONE])
    assert called.output == {
        "items": expected,
        "count": len(cast("list[Json]", expected)),
        "unmatched": unmatched,
    }


@pytest.mark.parametrize(
    ("before", "after", "changed", "unchanged"),
    [
        ({"a": 1}, {"a": 1.0}, None, True),
        ({"a": 1}, {"a": True}, ["a"], False),
        ({"a": 1, "b": 1}, {"a": 1, "c": None}, ["b", "c"], False),
        ({"a": 1, "seen": 1}, {"a": 1}, None, True),
        ([1], {"a": 1}, [], False),
    ],
)
async def test_two_items_with_one_key_are_compared(
    before: Json,
    after: Json,
    changed: Json,
    unchanged: bool,  # noqa: FBT001 - one of the cases
) -> None:
    config: dict[str, Json] = {
        "before": [before],
        "after": [after],
        "by": [{"$op": "concat", "args": ["k", "{{ index }}"]}],
    }
    output = cast("dict[str, Any]", (await call("compare", {**config, "ignore": ["seen"]})).output)
    assert output["unchanged"] == ([after] if unchanged else [])
    assert output["changed"] == ([] if unchanged else [{"before": before, "after": after, "fields": changed}])
    assert output["hasChanges"] is not unchanged


async def test_everything_is_new_where_there_was_nothing_before() -> None:
    output = (
        await call(
            "compare",
            {"before": "{{ data.stored }}", "after": "{{ data.now }}", "by": ["id"]},
            {"stored": None, "now": [{"id": 1}]},
        )
    ).output
    assert cast("dict[str, Any]", output)["counts"] == {
        "added": 1,
        "removed": 0,
        "changed": 0,
        "unchanged": 0,
    }


@pytest.mark.parametrize(
    ("config", "text", "value"),
    [
        ({}, "\ufeff[1, 1.5, null]", [1, 1.5, None]),
        ({}, '"x"', "x"),
        ({"format": "lines"}, '1\r\n\r\n{"a": "\\n"}\n', [1, {"a": "\n"}]),
        ({"format": "lines"}, "", []),
    ],
)
async def test_a_json_text_is_read(config: dict[str, Json], text: str, value: Json) -> None:
    assert (await call("json-parse", {"text": "{{ data }}", **config}, text)).output == {"value": value}


@pytest.mark.parametrize(
    ("config", "data", "text"),
    [
        ({}, [], ""),
        ({}, [{}, {}], ""),
        ({"columns": ["a", "b"]}, [], "a,b\n"),
        (
            {},
            [{"a": 1.50, "b": True}, {"c": None, "a": [1, {"x": "y"}]}],
            'a,b,c\n1.5,true,\n"[1,{""x"":""y""}]",,\n',
        ),
        ({}, [{"a": None}, {"a": 'say "hi"'}, {"a": "two\nlines"}], 'a\n""\n"say ""hi"""\n"two\nlines"\n'),
        (
            {"hasHeader": False, "lineEnd": "crlf", "delimiter": ";"},
            [{"a": "x;y", "b": "x,y"}],
            '"x;y";x,y\r\n',
        ),
        ({"columns": ["b", "a.x"]}, [{"a": {"x": 1}, "b": 2, "c": 3}], "b,a.x\n2,1\n"),
        ({"formulas": "keep"}, [{"=a": "=1+1"}], "=a\n=1+1\n"),
    ],
)
async def test_a_csv_is_written(config: dict[str, Json], data: Json, text: str) -> None:
    output = (await call("csv-format", config, data)).output
    assert cast("dict[str, Any]", output)["text"] == text


@pytest.mark.parametrize(
    ("value", "field"),
    [
        ("=1+1", "'=1+1"),
        ("+SUM(A1)", "'+SUM(A1)"),
        ("-2+3", "'-2+3"),
        ("@cmd", "'@cmd"),
        ("\t=1", "'\t=1"),
        ("\uff1d1+1", "'\uff1d1+1"),
        ('=HYPERLINK("x","y")', '"\'=HYPERLINK(""x"",""y"")"'),
        ("-5", "-5"),
        ("+4.25", "+4.25"),
        ("-1,234.50", '"-1,234.50"'),
        ("+1.5e-7", "+1.5e-7"),
        ("-20%", "-20%"),
        ("+47 22 00", "'+47 22 00"),
        ("-1-2", "'-1-2"),
        ("-.", "'-."),
        (-7, "-7"),
        ("a=1", "a=1"),
    ],
)
async def test_no_spreadsheet_evaluates_a_guarded_field(value: Json, field: str) -> None:
    output = (await call("csv-format", {"hasHeader": False}, [{"a": value, "b": "x"}])).output
    assert cast("dict[str, Any]", output)["text"] == f"{field},x\n"
    named = (await call("csv-format", {}, [{"=a": 1}])).output
    assert cast("dict[str, Any]", named)["text"] == "'=a\n1\n"


async def test_a_node_pinned_to_an_earlier_version_goes_on_as_it_did() -> None:
    pinned = (await call("csv-format", {}, [{"a": "=1+1"}], version="1.0.0")).output
    assert cast("dict[str, Any]", pinned)["text"] == "a\n=1+1\n"


@pytest.mark.parametrize(
    ("node_type", "config"),
    [
        ("map", {"value": "{{ item.x }}"}),
        ("sort", {"by": ["x"]}),
        ("sort", {"by": [{"key": "{{ item.x }}"}]}),
        ("dedupe", {"by": ["x", "a"]}),
        ("lookup", {"by": ["x"], "table": [], "as": "t"}),
        (
            "compare",
            {
                "by": [{"$op": "concat", "args": ["{{ index }}", "{{ item.x }}"]}],
                "before": [],
                "after": "{{ data }}",
            },
        ),
        ("split", {"mode": "field", "field": "x"}),
        ("csv-format", {"columns": ["a", "x"]}),
    ],
)
async def test_a_field_that_items_lack_is_reported(node_type: str, config: dict[str, Json]) -> None:
    called = await call(node_type, config, [{"a": 1}])
    assert called.unresolved == ["item.x"]


# ── failures and limits ─────────────────────────────────────────────────────────────────────────────────────

LONG = "x" * 3_000_000
CONCAT: Json = {"$op": "concat", "args": ["{{ item }}", "{{ data.text }}"]}
BIG: dict[str, Json] = {"text": LONG, "items": [1, 2, 3, 4]}
MANY: Json = [0] * 100_001
WIDE: Json = {"k": 1, **{str(number): 0 for number in range(10_000)}}


@pytest.mark.parametrize(
    ("node_type", "config", "data", "code", "said"),
    [
        ("map", {"value": 1}, MANY, "too-many-items", "at most 100,000"),
        ("map", {"value": 1}, {"rows": [1]}, "invalid-config", "its 'rows' would be one"),
        ("map", {"value": CONCAT, "items": "{{ data.items }}"}, BIG, "output-too-large", "number 4"),
        ("map", {"value": ["{{ data }}"] * 4, "items": [1]}, LONG, "output-too-large", "10,000,000 bytes"),
        ("map", {"value": {"a": 1}, "mode": "merge"}, [{}, 1], "not-an-object", "Item 1 is a number"),
        ("map", {"value": 1, "mode": "merge"}, [{}], "invalid-config", "`value` must be an object"),
        ("map", {"value": 1, "mode": "{{ data }}", "items": []}, "add", "invalid-config", "replace, merge"),
        ("sort", {"by": ["a"]}, [{"a": 1}, "x"], "not-an-object", "Item 1 is a text: it has no field `a`"),
        ("sort", {"by": "{{ data.by }}", "items": []}, {"by": []}, "invalid-config", "1 to 20 keys, not 0"),
        ("sort", {"by": "{{ data }}", "items": []}, ["a"] * 21, "invalid-config", "not 21"),
        ("sort", {"by": ["{{ data.by }}"], "items": []}, {"by": 1}, "invalid-config", "names of fields"),
        (
            "sort",
            {"by": "{{ data }}", "items": []},
            [{"key": "a", "order": "up"}],
            "invalid-config",
            "`order`",
        ),
        (
            "sort",
            {"by": [{"key": "{{ item }}", "text": "natural"}]},
            ["a" * 10_001],
            "key-too-long",
            "at most 10,000",
        ),
        (
            "sort",
            {"by": [{"key": CONCAT}], "items": "{{ data.items }}"},
            BIG,
            "output-too-large",
            "The keys of the items",
        ),
        ("dedupe", {"by": [CONCAT], "items": "{{ data.items }}"}, BIG, "output-too-large", "The keys"),
        ("dedupe", {"by": "{{ data }}", "items": []}, [None], "invalid-config", "nothing (null) arrived"),
        ("dedupe", {"by": ["a"]}, [[]], "not-an-object", "Item 0 is a list of 0"),
        (
            "lookup",
            {"by": ["k"], "table": "{{ data }}", "items": []},
            MANY,
            "too-many-items",
            "`table` has 100,001",
        ),
        ("lookup", {"by": ["k"], "table": "x"}, [], "invalid-config", "`table` must be a list"),
        (
            "lookup",
            {"by": ["k"], "tableBy": ["a", "b"], "table": []},
            [],
            "invalid-config",
            "`tableBy` has 2",
        ),
        ("lookup", {"by": ["k"], "table": [], "onMissing": "error"}, [{"k": 1}], "no-match", "item 0"),
        ("lookup", {"by": ["{{ item }}"], "table": [1]}, [1], "not-an-object", "Item 0 is a number"),
        (
            "lookup",
            {"by": ["k"], "tableBy": ["{{ item }}"], "table": [1]},
            [{"k": 1}],
            "not-an-object",
            "set `as`",
        ),
        (
            "lookup",
            {"by": ["k"], "table": "{{ data }}", "matches": "each", "as": "r"},
            [{"k": 1}] * 320,
            "too-many-items",
            "More than 100,000 items",
        ),
        (
            "lookup",
            {"by": ["k"], "table": "{{ data.table }}", "items": "{{ data.items }}"},
            {"items": [{"k": 1}] * 1_000, "table": [WIDE]},
            "output-too-large",
            "The joined items",
        ),
        (
            "split",
            {"mode": "text", "separator": "{{ data }}", "value": "x"},
            "",
            "invalid-config",
            "`separator`",
        ),
        (
            "split",
            {"mode": "text", "separator": "x"},
            "x" * 100_000,
            "too-many-items",
            "more than 100,000 parts",
        ),
        ("split", {"mode": "text"}, [1], "invalid-config", "`value` must be a text"),
        ("split", {"mode": "batches"}, "x", "invalid-config", "`value` must be a list"),
        (
            "split",
            {"mode": "batches", "size": "{{ data }}", "value": []},
            0,
            "invalid-config",
            "from 1 to 100,000",
        ),
        (
            "split",
            {"mode": "batches", "size": "{{ data }}", "value": []},
            1.5,
            "invalid-config",
            "a whole number",
        ),
        ("split", {"mode": "field", "field": "a"}, [{"a": 1}], "not-a-list", "Item 0 has a number in `a`"),
        ("split", {"mode": "field", "field": "a"}, ["a"], "not-an-object", "Item 0 is a text"),
        ("split", {"mode": "{{ data }}", "value": []}, "field", "invalid-config", "`field` must be a text"),
        (
            "split",
            {"mode": "field", "field": "a", "keepFields": False},
            [{"a": [0] * 60_000}] * 2,
            "too-many-items",
            "more than 100,000 elements",
        ),
        (
            "split",
            {"mode": "field", "field": "a"},
            [{"a": [0] * 4, "b": LONG}],
            "output-too-large",
            "number 4",
        ),
        (
            "compare",
            {"by": ["a"], "before": 1, "after": []},
            None,
            "invalid-config",
            "`before` must be a list",
        ),
        (
            "compare",
            {"by": ["a"], "before": [], "after": [{"a": 1}, {"a": 2}, {"a": 1.0}]},
            None,
            "duplicate-key",
            "Items 0 and 2 of `after`",
        ),
        (
            "compare",
            {"by": ["a"], "before": None, "after": "{{ data }}"},
            MANY,
            "too-many-items",
            "`after` has",
        ),
        (
            "json-parse",
            {"text": "{{ data }}"},
            {"a": 1},
            "invalid-config",
            "an object with 1 fields: a arrived",
        ),
        ("json-parse", {"text": "{'a': 1}"}, None, "invalid-json", "`text` can't be read as JSON"),
        ("json-parse", {"text": ""}, None, "invalid-json", "JSON text is empty"),
        ("json-parse", {"text": '{"a": 1, "a": 2}'}, None, "invalid-json", "more than once"),
        ("json-parse", {"text": "[" * 65 + "]" * 65}, None, "invalid-json", "64 deep"),
        ("json-parse", {"text": "NaN"}, None, "invalid-json", "no NaN"),
        ("json-parse", {"text": "1\n\n2 3", "format": "lines"}, None, "invalid-json", "Line 3 can't be read"),
        ("json-parse", {"text": "{{ data }}"}, "ü" * 5_000_001, "text-too-long", "at most 10,000,000"),
        ("json-parse", {"text": "{{ data }}"}, "[" * 1_000_001, "too-many-values", "1,000,000 opening"),
        ("json-parse", {"text": "1\n" * 100_001, "format": "lines"}, None, "too-many-items", "100,000 lines"),
        (
            "csv-format",
            {},
            [{"a": 1}, 2],
            "not-an-object",
            "Item 1 is a number: it has no fields for columns",
        ),
        ("csv-format", {"columns": ["a", "b", "a"]}, [], "duplicate-column", "'a' 2 times"),
        ("csv-format", {"delimiter": "{{ data }}", "items": []}, ";;", "invalid-config", "`delimiter`"),
        ("csv-format", {}, [WIDE], "too-many-columns", "more than 10,000 fields"),
        (
            "csv-format",
            {},
            [{str(n): n for n in range(1_000)}] * 2_001,
            "too-many-values",
            "2,000,000 values",
        ),
        ("csv-format", {}, [{"a": LONG}] * 4, "output-too-large", "after 4 rows"),
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
    ("node_type", "config", "finding", "said"),
    [
        ("map", {}, "missing-config", "value is required"),
        ("map", {"value": 1, "mode": "append"}, "invalid-config", 'one of "replace", "merge"'),
        ("map", {"value": {"$op": "ad", "args": [1, 2]}}, "invalid-config", "no such operation"),
        ("map", {"value": "{{ itm.x }}"}, "invalid-config", "a path begins with"),
        ("sort", {"by": []}, "invalid-config", "1 or more items"),
        ("sort", {"by": [{"order": "ascending"}]}, "missing-config", "by.0.key is required"),
        ("sort", {"by": [{"key": "a", "order": "up"}]}, "invalid-config", '"descending"'),
        ("sort", {"by": [{"key": "a", "direction": "up"}]}, "invalid-config", "there is no such field"),
        ("sort", {"by": [{"key": "{{ item. }}"}]}, "invalid-config", "can't be parsed"),
        ("dedupe", {"by": ["a"], "keeps": "last"}, "invalid-config", "did you mean keep"),
        ("dedupe", {"by": [1]}, "invalid-config", "must be a text or an object"),
        ("lookup", {"by": ["a"]}, "missing-config", "table is required"),
        ("lookup", {"by": ["a"], "table": [], "matches": "list"}, "missing-config", "as is required"),
        ("split", {}, "missing-config", "mode is required"),
        ("split", {"mode": "field"}, "missing-config", "field is required"),
        ("split", {"mode": "batches", "size": 0}, "invalid-config", "at least 1"),
        ("split", {"mode": "text", "separator": ""}, "invalid-config", "1 or more characters"),
        ("compare", {"before": [], "after": []}, "missing-config", "by is required"),
        ("json-parse", {}, "missing-config", "text is required"),
        ("json-parse", {"text": 1}, "invalid-config", "must be a text"),
        ("csv-format", {"delimiter": ";;"}, "invalid-config", "must be one character"),
        ("csv-format", {"formula": "quote"}, "invalid-config", "did you mean formulas"),
    ],
)
def test_validation_reports_errors_of_a_config(
    node_type: str, config: dict[str, Json], finding: str, said: str
) -> None:
    nodes: list[Json] = [
        {"id": "start", "type": "manual"},
        {"id": "node", "type": node_type, "config": config},
    ]
    edges: list[Json] = [{"id": "edge", "source": "start", "target": "node"}]
    validation = validate_graph(
        ParsedGraph.from_stored({"nodes": nodes, "connections": edges}), catalog.load_catalog()
    )
    (found,) = [*validation.errors, *validation.warnings]
    assert found.type == finding
    assert said in found.message


LISTED: Json = [{"k": number, "t": str(number)} for number in range(20_000)]
LONG_LOOPS: dict[str, dict[str, Json]] = {
    "map": {"value": {"t": "{{ item.t }}"}},
    "sort": {"by": [{"key": "t", "text": "natural"}]},
    "dedupe": {},
    "lookup": {"by": ["k"], "table": "{{ data }}"},
    "compare": {"by": ["k"], "before": "{{ data }}", "after": "{{ data }}"},
    "csv-format": {},
}


@pytest.mark.parametrize("node_type", LONG_LOOPS)
async def test_other_work_goes_on_while_a_node_loops(node_type: str) -> None:
    turns = 0

    async def other_work() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    other = asyncio.create_task(other_work())
    await call(node_type, LONG_LOOPS[node_type], LISTED)
    other.cancel()
    assert turns > 2


# ── properties ──────────────────────────────────────────────────────────────────────────────────────────────

RECORDS = st.lists(
    st.fixed_dictionaries({"a": st.none() | st.integers(0, 2), "b": st.sampled_from(["x", "y", "z"])}),
    max_size=12,
)


@given(records=RECORDS)
def test_a_sort_by_several_keys_is_that_of_one_comparison_and_stable(records: list[dict[str, Any]]) -> None:
    marked: list[Any] = [{**record, "place": place} for place, record in enumerate(records)]

    def compared(left: dict[str, Any], right: dict[str, Any]) -> int:
        if left["b"] != right["b"]:
            return -1 if left["b"] > right["b"] else 1
        if left["a"] != right["a"]:
            if left["a"] is None or right["a"] is None:
                return 1 if left["a"] is None else -1
            return -1 if left["a"] < right["a"] else 1
        return 0

    config: dict[str, Json] = {"by": [{"key": "b", "order": "descending"}, "a"]}
    assert run_node("sort", config, marked)["items"] == sorted(marked, key=cmp_to_key(compared))


@given(values=MANY_VALUES)
def test_sorting_is_total_and_deterministic(values: list[Json]) -> None:
    once = run_node("sort", {}, values)["items"]
    assert sorted(map(encode_json, once)) == sorted(map(encode_json, values))
    assert run_node("sort", {}, once)["items"] == once
    downwards = run_node(
        "sort", {"by": [{"key": "{{ item }}", "order": "descending", "nulls": "first"}]}, values
    )
    keys = [*map(_sort_identity, downwards["items"])]
    assert keys == [*map(_sort_identity, reversed(once))]


def _sort_identity(value: Json) -> object:
    """Return a key that distinguishes two values like a sort: numbers by value, all else by its JSON text."""
    return identity_key(value) if not isinstance(value, list | dict) else encode_json(value)


@given(values=MANY_VALUES)
def test_of_equal_values_one_is_left_and_all_others_stay(values: list[Json]) -> None:
    output = run_node("dedupe", {}, values)
    left = output["items"]
    assert len(left) + output["removed"] == len(values)
    assert {*map(identity_key, left)} == {*map(identity_key, values)}
    assert len({*map(identity_key, left)}) == len(left)
    assert run_node("dedupe", {}, left)["removed"] == 0


@given(records=RECORDS, table=RECORDS)
def test_a_lookup_of_each_match_is_a_join(records: list[Any], table: list[Any]) -> None:
    config: dict[str, Json] = {
        "by": ["a", "b"],
        "table": table,
        "matches": "each",
        "as": "row",
        "onMissing": "drop",
    }
    joined = [
        {**record, "row": row}
        for record in records
        for row in table
        if record == row and record["a"] is not None
    ]
    assert run_node("lookup", config, records)["items"] == joined


KEYED = st.dictionaries(st.text("abc", max_size=2), st.integers(0, 2), max_size=6).map(
    lambda values: [{"key": key, "value": value} for key, value in values.items()]
)


@given(before=KEYED, after=KEYED)
def test_every_item_of_two_lists_is_told_once_and_the_way_back_mirrors_it(before: Any, after: Any) -> None:  # noqa: ANN401 - JSON
    there = run_node("compare", {"by": ["key"], "before": before, "after": after})
    back = run_node("compare", {"by": ["key"], "before": after, "after": before})
    changed = [change["after"] for change in there["changed"]]
    told = [*there["added"], *changed, *there["unchanged"]]
    assert sorted(item["key"] for item in told) == sorted(item["key"] for item in after)
    assert there["hasChanges"] == any(there["counts"][name] for name in ("added", "removed", "changed"))
    assert (there["added"], there["removed"]) == (back["removed"], back["added"])
    assert there["counts"]["changed"] == back["counts"]["changed"]


@given(values=MANY_VALUES, size=st.integers(1, 8), parts=st.lists(st.text("ab "), min_size=1))
def test_split_texts_can_be_joined_again(values: list[Json], size: int, parts: list[str]) -> None:
    batches = run_node("split", {"mode": "batches", "size": size}, values)["items"]
    assert [item for batch in batches for item in batch] == values
    assert {len(batch) for batch in batches[:-1]} <= {size}
    assert run_node("split", {"mode": "text", "separator": ", "}, ", ".join(parts))["items"] == parts


@given(values=MANY_VALUES)
def test_json_is_read_back_unchanged(values: list[Json]) -> None:
    read = run_node("json-parse", {"text": "{{ data }}"}, encode_json(values).decode())["value"]
    assert equal_json(read, values)
    lines = "\n".join(encode_json(value).decode() for value in values)
    assert equal_json(
        run_node("json-parse", {"text": "{{ data }}", "format": "lines"}, lines)["value"], values
    )


TEXTS = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]))


@given(
    rows=st.lists(st.fixed_dictionaries({"a": TEXTS, "b, c": SCALARS, "": TEXTS}), max_size=5),
    delimiter=st.sampled_from([",", ";", "\t", "|", " ", "="]),
    line_end=st.sampled_from(["lf", "crlf"]),
)
def test_every_csv_that_is_written_is_read_as_it_was(rows: list[Any], delimiter: str, line_end: str) -> None:
    written = run_node(
        "csv-format",
        {"delimiter": delimiter, "lineEnd": line_end, "columns": ["a", "b, c"], "formulas": "keep"},
        rows,
    )
    config: dict[str, Json] = {"text": "{{ data }}", "delimiter": delimiter, "types": "text"}
    expected = [{"a": row["a"], "b, c": value_as_text(row["b, c"])} for row in rows]
    assert run_node("csv-parse", config, written["text"])["rows"] == expected


# ── fields that no item has ─────────────────────────────────────────────────────────────────────────────────

MISSPELT: list[tuple[str, dict[str, Json]]] = [
    ("aggregate", {"aggregations": [{"function": "sum", "field": "totl", "as": "x"}]}),
    ("aggregate", {"groupBy": ["totl"], "aggregations": [{"function": "count", "as": "x"}]}),
    ("aggregate", {"aggregations": [{"function": "count", "field": "totl", "as": "x"}]}),
    ("sort", {"by": ["totl"]}),
    ("sort", {"by": ["total", {"key": "{{ item.totl }}"}]}),
    ("sort", {"by": ["{{ item.a ?? item.totl }}"]}),
]


@pytest.mark.parametrize(("node_type", "config"), MISSPELT)
async def test_a_field_that_none_of_several_items_has_fails_the_node_of_a_strict_workflow(
    node_type: str, config: dict[str, Json]
) -> None:
    rows: Json = [{"total": 1}, {"total": 2}]
    with pytest.raises(NodeError, match=r"item\.totl") as raised:
        await call(node_type, config, rows, is_strict=True)
    assert raised.value.code == "unresolved-mapping"
    for chosen, is_strict in ((config, False), ({**config, "missing": "null"}, True)):
        called = await call(node_type, chosen, rows, is_strict=is_strict)
        assert called.lines == []
        assert "item.totl" in called.unresolved
    assert (
        await call(node_type, config, [{"total": 1}, {"totl": None, "total": 2}], is_strict=True)
    ).lines == []


@pytest.mark.parametrize(("node_type", "config"), MISSPELT)
@pytest.mark.parametrize("rows", [[], [{"total": 1}]])
async def test_a_field_that_one_item_or_none_has_is_null_and_logged(
    node_type: str, config: dict[str, Json], rows: Json
) -> None:
    called = await call(node_type, config, rows, is_strict=True)
    assert called.unresolved in (["item.totl"], ["item.total", "item.totl"])
    ((level, message),) = called.lines
    assert (level, "item.totl" in message) == ("warning", True)


async def test_a_fallback_of_a_key_needs_no_field() -> None:
    called = await call(
        "sort", {"by": ["{{ item.totl ?? 0 }}"]}, [{"total": 1}, {"total": 2}], is_strict=True
    )
    assert (called.unresolved, called.lines) == ([], [])
