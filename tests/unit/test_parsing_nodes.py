import asyncio
import base64
import io
import random
import subprocess
import sys
import time
import zipfile
from collections.abc import Mapping

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.run_errors import NodeError
from engine.values import Json, encode_json
from tests.node_calls import call

pytestmark = pytest.mark.anyio

LONGEST_PAUSE_SECONDS = 0.8
"""Longest pause of other tasks of the process while a node is busy; the documented limit is a second."""


async def run_node(node_type: str, config: Mapping[str, Json], data: Json = None) -> Json:
    """Run a node, which must return JSON and let other tasks run meanwhile."""
    longest = 0.0

    async def other_work() -> None:
        nonlocal longest
        while True:
            # Processor time: other processes of the machine must not count.
            before = time.process_time()
            await asyncio.sleep(0)
            longest = max(longest, time.process_time() - before)

    other = asyncio.create_task(other_work())
    try:
        found = (await call(node_type, config, data)).output
        encode_json(found)
        return found
    finally:
        other.cancel()
        assert longest < LONGEST_PAUSE_SECONDS


async def run_failing_node(node_type: str, config: Mapping[str, Json], data: Json = None) -> tuple[str, str]:
    with pytest.raises(NodeError) as raised:
        await run_node(node_type, config, data)
    assert not raised.value.retryable
    assert len(raised.value.message) < 500
    return raised.value.code, raised.value.message


# ── date-time ───────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("config", "date", "local"),
    [
        ({"date": "2026-07-01T10:00:00+02:00"}, "2026-07-01T08:00:00Z", "2026-07-01T08:00:00+00:00"),
        (
            {"date": "2026-07-01", "zone": "Europe/Berlin"},
            "2026-06-30T22:00:00Z",
            "2026-07-01T00:00:00+02:00",
        ),
        ({"date": 1.5}, "1970-01-01T00:00:01.500000Z", "1970-01-01T00:00:01.500000+00:00"),
        ({}, "2026-01-01T00:00:00Z", "2026-01-01T00:00:00+00:00"),
        (
            {"date": "1 Feb 26 7:05 PM +0100", "inputForm": "%d %b %y %I:%M %p %z"},
            "2026-02-01T18:05:00Z",
            "2026-02-01T18:05:00+00:00",
        ),
        # The clock is set forward on 29 March, and back on 25 October.
        (
            {"operation": "add", "date": "2026-03-28T02:30", "zone": "Europe/Berlin"},
            "2026-03-29T01:30:00Z",
            "2026-03-29T03:30:00+02:00",
        ),
        (
            {"operation": "add", "date": "2026-10-24T12:00", "zone": "Europe/Berlin"},
            "2026-10-25T11:00:00Z",
            "2026-10-25T12:00:00+01:00",
        ),
        (
            {
                "operation": "add",
                "date": "2026-10-24T12:00",
                "unit": "hours",
                "amount": 24,
                "zone": "Europe/Berlin",
            },
            "2026-10-25T10:00:00Z",
            "2026-10-25T11:00:00+01:00",
        ),
        (
            {"operation": "subtract", "date": "2024-03-31", "unit": "months"},
            "2024-02-29T00:00:00Z",
            "2024-02-29T00:00:00+00:00",
        ),
        (
            {"operation": "start-of", "date": "2026-03-29T10:00:00Z", "zone": "Europe/Berlin"},
            "2026-03-28T23:00:00Z",
            "2026-03-29T00:00:00+01:00",
        ),
        (
            {"operation": "end-of", "date": "2026-03-29T00:30:00Z", "zone": "Europe/Berlin"},
            "2026-03-29T21:59:59.999999Z",
            "2026-03-29T23:59:59.999999+02:00",
        ),
        (
            {"operation": "start-of", "unit": "weeks", "date": "2026-01-01"},
            "2025-12-29T00:00:00Z",
            "2025-12-29T00:00:00+00:00",
        ),
        (
            {"operation": "end-of", "unit": "months", "date": "2028-02-10"},
            "2028-02-29T23:59:59.999999Z",
            "2028-02-29T23:59:59.999999+00:00",
        ),
        # In Cairo, 28 April 2023 began at one o'clock.
        (
            {"operation": "start-of", "date": "2023-04-28T12:00:00Z", "zone": "Africa/Cairo"},
            "2023-04-27T22:00:00Z",
            "2023-04-28T01:00:00+03:00",
        ),
        (
            {
                "operation": "start-of",
                "unit": "hours",
                "date": "2026-10-25T01:45:00Z",
                "zone": "Europe/Berlin",
            },
            "2026-10-25T01:00:00Z",
            "2026-10-25T02:00:00+01:00",
        ),
        (
            {
                "operation": "convert",
                "date": "2026-07-01T09:00",
                "zone": "America/New_York",
                "toZone": "Asia/Kolkata",
            },
            "2026-07-01T13:00:00Z",
            "2026-07-01T18:30:00+05:30",
        ),
    ],
)
async def test_a_moment_is_told_in_utc_and_in_the_zone(
    config: dict[str, Json], date: str, local: str
) -> None:
    found = await run_node("date-time", config)
    assert isinstance(found, dict)
    assert (found["date"], found["local"]) == (date, local)


@pytest.mark.parametrize(
    ("start", "end", "unit", "difference"),
    [
        ("2026-03-28T12:00", "2026-03-29T12:00", "days", 1),
        ("2026-03-28T12:00", "2026-03-29T12:00", "hours", 23),
        ("2026-03-02", "2026-02-23", "weeks", -1),
        ("2026-01-01", "2026-01-02T12:00", "days", 1.5),
        ("2026-01-31", "2026-02-28", "months", 0),
        ("2026-01-31", "2026-03-31", "months", 2),
        ("2026-03-31", "2026-01-31", "months", -2),
        ("2024-02-29", "2026-02-28", "years", 1),
    ],
)
async def test_a_difference_follows_the_calendar_of_the_zone(
    start: str, end: str, unit: str, difference: float
) -> None:
    config: dict[str, Json] = {"operation": "difference", "date": start, "until": end, "unit": unit}
    found = await run_node("date-time", {**config, "zone": "Europe/Berlin"})
    assert found == {"difference": difference, "unit": unit}


@pytest.mark.parametrize(
    ("config", "code", "said"),
    [
        ({"date": "tomorrow"}, "invalid-date", "needs a date such as"),
        ({"date": "{{ data }}"}, "invalid-config", "nothing (null) arrived"),
        ({"date": "2026-13-01", "inputForm": "%Y-%m-%d"}, "invalid-date", "doesn't have the format %Y-%m-%d"),
        ({"date": "x", "inputForm": "%Y%Y"}, "invalid-date", "doesn't have the format"),
        ({"date": "02-29", "inputForm": "%m-%d"}, "invalid-config", "needs a year"),
        ({"date": "x", "inputForm": "%c"}, "invalid-config", "%Y"),
        ({"zone": "../../etc/passwd"}, "unknown-zone", "Europe/Berlin"),
        ({"operation": "format", "form": "%x"}, "invalid-date", "%Y"),
        ({"operation": "add", "amount": 10**9, "unit": "years"}, "invalid-date", "out of range"),
        ({"operation": "end-of", "date": "9999-12-31", "unit": "years"}, "invalid-date", "out of range"),
        ({"date": 1e300}, "invalid-date", "out of range"),
        (
            {"date": "0001-01-01 00:00 +2300", "inputForm": "%Y-%m-%d %H:%M %z"},
            "invalid-date",
            "doesn't have the format",
        ),
        (
            {"operation": "convert", "date": "9999-12-31T23:00:00Z", "toZone": "Asia/Tokyo"},
            "out-of-range",
            "9999",
        ),
    ],
)
async def test_a_malformed_date_is_refused(config: dict[str, Json], code: str, said: str) -> None:
    found, message = await run_failing_node("date-time", config)
    assert found == code
    assert said in message


# ── hash ────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("config", "hashed"),
    [
        ({"algorithm": "sha256"}, "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"),
        ({"algorithm": "sha1"}, "a9993e364706816aba3e25717850c26c9cd0d89d"),
        ({"algorithm": "md5", "encoding": "base64"}, "kAFQmDzST7DWlj99KOF/cg=="),
        ({"valueEncoding": "hex", "value": "616263", "algorithm": "md5"}, "900150983cd24fb0d6963f7d28e17f72"),
        (
            {"valueEncoding": "base64", "value": "YWJj", "algorithm": "md5"},
            "900150983cd24fb0d6963f7d28e17f72",
        ),
        (
            # RFC 2202, the third case.
            {
                "algorithm": "hmac-md5",
                "valueEncoding": "hex",
                "value": "dd" * 50,
                "key": "aa" * 16,
                "keyEncoding": "hex",
            },
            "56be34521d144c88dbb8c733f0e8b3f6",
        ),
    ],
)
async def test_a_hash_is_that_of_the_standard(config: dict[str, Json], hashed: str) -> None:
    found = await run_node("hash", config, "abc")
    assert isinstance(found, dict)
    assert found["hash"] == hashed


async def test_equal_objects_have_the_same_hash() -> None:
    assert await run_node("hash", {}, {"a": 1, "b": 2}) == await run_node("hash", {}, {"b": 2, "a": 1})


@pytest.mark.parametrize(
    ("config", "data", "code"),
    [
        ({}, "é" * 5_000_001, "input-too-large"),
        ({}, [{"text": "x" * 1_000_000}] * 11, "input-too-large"),
        ({"valueEncoding": "hex"}, "xyz", "invalid-encoding"),
        ({"valueEncoding": "base64"}, "YW", "invalid-encoding"),
        ({"valueEncoding": "hex"}, [1], "invalid-config"),
        ({"algorithm": "hmac-sha1", "key": "{{ data }}"}, "", "invalid-config"),
        ({"algorithm": "{{ data }}"}, "hmac-sha1", "invalid-config"),
        ({"algorithm": "{{ data }}"}, "crc32", "invalid-config"),
    ],
)
async def test_an_unhashable_value_is_refused(config: dict[str, Json], data: Json, code: str) -> None:
    assert (await run_failing_node("hash", config, data))[0] == code


async def test_a_key_that_is_wrong_is_not_shown() -> None:
    config: dict[str, Json] = {"algorithm": "hmac-sha256", "key": "s3cret!", "keyEncoding": "base64"}
    code, message = await run_failing_node("hash", config, "x")
    assert code == "invalid-encoding"
    assert "s3cret" not in message


# ── regex ───────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("config", "text", "expected"),
    [
        ({"pattern": "x"}, "abc", {"found": False, "count": 0, "matches": []}),
        (
            {"pattern": "(é)|(𝄞)", "operation": "find-all"},
            "a𝄞é",
            {
                "found": True,
                "count": 2,
                "matches": [
                    {"text": "𝄞", "start": 1, "end": 2, "groups": [None, "𝄞"], "named": {}},
                    {"text": "é", "start": 2, "end": 3, "groups": ["é", None], "named": {}},
                ],
            },
        ),
        (
            {
                "pattern": "^b.?",
                "operation": "replace",
                "replacement": "<$0>",
                "multiline": True,
                "ignoreCase": True,
            },
            "a\nBc\nb\n",
            {"found": True, "count": 2, "text": "a\n<Bc>\n<b>\n"},
        ),
        (
            {"pattern": "(?P<d>\\d)(x)?", "operation": "replace", "replacement": "$$${d}${2}$1"},
            "1 2x",
            {"found": True, "count": 2, "text": "$11 $2x2"},
        ),
        (
            {"pattern": "a.c", "dotAll": True, "operation": "split"},
            "1a\nc2",
            {"found": True, "count": 1, "parts": ["1", "2"]},
        ),
        ({"pattern": ",", "operation": "split"}, "", {"found": False, "count": 0, "parts": [""]}),
    ],
)
async def test_an_expression_finds_replaces_and_splits(
    config: dict[str, Json], text: str, expected: Json
) -> None:
    assert await run_node("regex", {"text": "{{ data }}", **config}, text) == expected


NOISE = f"{random.Random(1).getrandbits(1_000_000):01000000b}".translate({ord("0"): "a", ord("1"): "b"})


@pytest.mark.parametrize(
    ("config", "text", "code", "said"),
    [
        ({"pattern": "(a"}, "", "invalid-pattern", "missing )"),
        ({"pattern": "a)(b", "ignoreCase": True}, "", "invalid-pattern", "unexpected )"),
        ({"pattern": "(a)\\1"}, "", "invalid-pattern", "invalid escape"),
        ({"pattern": "\\pL{1000}"}, "", "invalid-pattern", "too large"),
        ({"pattern": "()" * 101}, "", "invalid-pattern", "101 groups"),
        ({"pattern": "{{ data }}"}, "a" * 2_001, "invalid-config", "2,001"),
        ({"pattern": "a"}, "a" * 1_000_001, "input-too-large", "1,000,000"),
        ({"pattern": "(([ab]{0,30}){0,30})x"}, NOISE, "input-too-large", "repeats so much"),
        (
            {"pattern": "a", "operation": "find-all", "maxMatches": 2},
            "aaa",
            "too-many-matches",
            "more than 2",
        ),
        ({"pattern": "", "operation": "find-all"}, "a", "invalid-config", "1 to 2,000"),
        ({"pattern": "a", "operation": "replace", "replacement": "$2"}, "a", "unknown-group", "has 0"),
        (
            {"pattern": "a", "operation": "replace", "replacement": "x" * 100_000},
            "a" * 101,
            "output-too-large",
            "10,000,000",
        ),
        ({"pattern": "(" * 99 + ".*" + ")" * 99}, "a" * 102_000, "output-too-large", "groups of one match"),
    ],
)
async def test_an_expression_that_is_wrong_or_too_costly_is_refused(
    config: dict[str, Json], text: str, code: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A busy machine takes longer than an expression may, before the size of its output is known.
    monkeypatch.setattr("nodes.library.regex.MAXIMUM_SECONDS", 60)
    config = {"text": "{{ data }}", **config}
    found, message = await run_failing_node("regex", config, text)
    assert found == code
    assert said in message


@pytest.mark.parametrize("pattern", ["(a+)+$", "(a|a)*b", "(a*)*(a*)*(a*)*b", "(?:a?){30}a{30}b"])
async def test_an_expression_that_would_explode_elsewhere_ends_at_once(pattern: str) -> None:
    began = time.process_time()
    await run_node("regex", {"text": "{{ data }}", "pattern": pattern}, "a" * 100_000 + "!")
    assert time.process_time() - began < 5


async def test_many_searches_of_one_text_have_a_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nodes.library.regex.MAXIMUM_SECONDS", 0.05)
    config: dict[str, Json] = {"text": "{{ data }}", "pattern": "a*b|a", "operation": "split"}
    code, message = await run_failing_node("regex", config, "a" * 100_000)
    assert code == "took-too-long"
    assert "search less text" in message


# ── xml-parse ───────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("config", "text", "root", "value"),
    [
        ({}, "<a/>", "a", None),
        ({}, "\ufeff <a> x &lt;&#233; </a>", "a", "x <é"),
        ({}, "<a x='1'>t<b/>u</a>", "a", {"@x": "1", "b": None, "#text": "tu"}),
        ({}, "<a><b>1</b><c/><b>2</b><b/></a>", "a", {"b": ["1", "2", None], "c": None}),
        ({"lists": ["b"]}, "<a><b>1</b></a>", "a", {"b": ["1"]}),
        ({}, "<a><![CDATA[<b>]]><!-- no --><?no no?></a>", "a", "<b>"),
        ({}, "<?xml version='1.0' encoding='utf-16'?><a>é</a>", "a", "é"),
        ({}, "<s:a xmlns:s='u'/>", "s:a", {"@xmlns:s": "u"}),
        (
            {"prefixes": "drop"},
            "<s:a xmlns:s='u' xmlns='v' s:x='1'><s:b>t</s:b></s:a>",
            "a",
            {"@x": "1", "b": "t"},
        ),
    ],
)
async def test_xml_becomes_json(config: dict[str, Json], text: str, root: str, value: Json) -> None:
    expected = {"root": root, "value": value}
    assert (
        await run_node("xml-parse", {"text": "{{ data }}", **config}, text.removeprefix("\ufeff")) == expected
    )


LAUGHS = (
    "<!DOCTYPE l [<!ENTITY a 'ha'>"
    + "".join(f"<!ENTITY {b} '{f'&{a};' * 10}'>" for a, b in zip("abcdefgh", "bcdefghi", strict=True))
    + "]><l>&i;</l>"
)


@pytest.mark.parametrize(
    ("text", "code", "said"),
    [
        (LAUGHS, "document-type-refused", "send it without"),
        ("<!DOCTYPE a SYSTEM 'file:///etc/passwd'><a/>", "document-type-refused", "'a'"),
        ("<!DOCTYPE a [<!ENTITY x SYSTEM 'file:///etc/passwd'>]><a>&x;</a>", "document-type-refused", ""),
        ("<a>&x;</a>", "invalid-xml", "undefined entity"),
        ("<a><b></a>", "invalid-xml", "Line 1, column 9"),
        ("", "invalid-xml", "no element found"),
        ("<a>" * 31 + "</a>" * 31, "too-deep", "30 deep"),
        ("<a>" * 100_000, "too-deep", "30 deep"),
        ("<a>" + "<b/>" * 300_000 + "</a>", "too-many-elements", "300,000"),
        ("<a>" + "é" * 2_500_000 + "</a>", "input-too-large", "5,000,000 bytes"),
        ("<a>" + "x" * 10_000_000 + "</a>", "input-too-large", "5,000,000 bytes"),
        ("<a " + " ".join(f"a{n}='{n}'" for n in range(120_000)) + "/>", "input-too-large", "One tag"),
    ],
)
async def test_xml_that_is_hostile_or_broken_is_refused(text: str, code: str, said: str) -> None:
    found, message = await run_failing_node("xml-parse", {"text": "{{ data }}"}, text)
    assert found == code
    assert said in message


async def test_the_deepest_xml_that_is_taken_is_json_in_lists_all_the_way() -> None:
    text = "<a>" * 30 + "</a>" * 30
    found = await run_node("xml-parse", {"text": "{{ data }}", "lists": ["a"]}, text)
    assert encode_json(found).count(b"[") == 29


@given(st.text(alphabet="<>/&;'\"=! ?-[]ab#x0é", max_size=60))
def test_nothing_that_pretends_to_be_markup_does_more_than_fail(text: str) -> None:
    for config in (
        {"text": "{{ data }}"},
        {"html": "{{ data }}", "fields": {"t": {"selector": "*", "all": True}}},
    ):
        node_type = "xml-parse" if "text" in config else "html-extract"
        try:
            encode_json(asyncio.run(call(node_type, config, text)).output)  # type: ignore[arg-type]  # both are configs
        except NodeError as error:
            assert error.code in {"invalid-xml", "document-type-refused"}  # noqa: PT017 - it may also succeed


# ── html-extract ────────────────────────────────────────────────────────────────────────────────────────────

PAGE = """<!DOCTYPE html><title>Shop &amp; more</title><style>p { }</style>
<ul id=menu class="top wide"><li><a href=/a>A</a><li class=on><a href=/b rel="next up">B</a><li><a>C</a></ul>
<p lang=en-GB>One<br>two <b>th</b>ree</p><script>var p = "<p>"</script><p>Four&nbsp;\n five
<div><p>Six</p></div>
"""


@pytest.mark.parametrize(
    ("selector", "texts"),
    [
        ("title", ["Shop & more"]),
        ("#menu.wide > li.on", ["B"]),
        ("li a[href]", ["A", "B"]),
        ("li:not(.on):not(:first-child)", ["C"]),
        ("li:last-child, title", ["Shop & more", "C"]),
        ("li:nth-child(odd)", ["A", "C"]),
        ("li:nth-child(-n+2)", ["A", "B"]),
        ("li:nth-last-child(1)", ["C"]),
        ("b:only-child", []),
        ("li.on + li", ["C"]),
        ("li:first-child ~ li", ["B", "C"]),
        ("ul ~ p", ["One two three", "Four five"]),
        ("div p", ["Six"]),
        ("body > p", ["One two three", "Four five"]),
        ("[rel~=up]", ["B"]),
        ("[lang|=en]", ["One two three"]),
        ("a[href^='/'][href$=a]", ["A"]),
        ("A[HREF*='b']", ["B"]),
        (":is(title, li.on) ", ["Shop & more", "B"]),
        ("style", [""]),
        ("ul p", []),
    ],
)
async def test_a_selector_matches_as_css_defines(selector: str, texts: list[Json]) -> None:
    config: dict[str, Json] = {"html": "{{ data }}", "fields": {"found": {"selector": selector, "all": True}}}
    assert await run_node("html-extract", config, PAGE) == {"items": [{"found": texts}], "count": 1}


async def test_a_missing_field_of_an_item_is_null_and_reported() -> None:
    fields: dict[str, Json] = {
        "to": {"selector": "a", "attribute": "href"},
        "text": {},
        "class": {"attribute": "class"},
    }
    called = await call("html-extract", {"html": "{{ data }}", "items": "li", "fields": fields}, PAGE)
    assert called.output == {
        "items": [
            {"to": "/a", "text": "A", "class": None},
            {"to": "/b", "text": "B", "class": "on"},
            {"to": None, "text": "C", "class": None},
        ],
        "count": 3,
    }
    assert called.unresolved == ["item.class", "item.to"]


async def test_of_no_page_nothing_is_taken() -> None:
    config: dict[str, Json] = {"html": "{{ data }}", "fields": {"a": {}, "b": {"selector": "b", "all": True}}}
    assert await run_node("html-extract", config, " \n") == {"items": [{"a": None, "b": []}], "count": 1}


ALL_DIVS: Json = {"found": {"selector": "div", "all": True}}


@pytest.mark.parametrize(
    ("config", "html", "code", "said"),
    [
        (
            {"fields": {"a": {"selector": "p:hover"}}},
            "",
            "invalid-selector",
            "`fields.a.selector`: :hover is not supported",
        ),
        ({"fields": {"a": {"selector": "p:has(a)"}}}, "", "invalid-selector", "has(a)"),
        ({"fields": {"a": {"selector": "p::before"}}}, "", "invalid-selector", "pseudo-element"),
        ({"fields": {"a": {"selector": "p >"}}}, "", "invalid-selector", "is not a valid selector"),
        ({"fields": {"a": {}}, "items": "{{ data }}"}, "a " * 300, "invalid-selector", "600 characters"),
        (
            {"fields": {f"f{n}": {} for n in range(51)}, "html": "{{ data }}"},
            "",
            "invalid-config",
            "51 fields",
        ),
        ({"fields": ALL_DIVS}, "x" * 10_000_000, "input-too-large", "3,000,000"),
        ({"fields": ALL_DIVS}, "<div>" * 100_000, "too-deep", "200 deep"),
        (
            {"fields": ALL_DIVS},
            ("<div>" * 150 + "x " * 7_000 + "</div>" * 150) * 6,
            "output-too-large",
            "select less",
        ),
    ],
)
async def test_a_page_or_a_selector_that_is_hostile_or_wrong_is_refused(
    config: dict[str, Json], html: str, code: str, said: str
) -> None:
    config = {"html": "{{ data }}", **config}
    found, message = await run_failing_node("html-extract", config, html)
    assert found == code
    assert said in message


async def test_selectors_test_only_so_many_elements(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nodes.formats.css_selectors.MAXIMUM_STEPS", 100_000)
    fields: dict[str, Json] = {f"f{number}": {"selector": "a.b c.d"} for number in range(10)}
    html = "<div>" * 150 + "</div>" * 150
    code, message = await run_failing_node("html-extract", {"html": html, "items": "div", "fields": fields})
    assert code == "took-too-long"
    assert "take fewer" in message


async def test_a_selector_inside_itself_many_times_is_no_danger() -> None:
    fields: dict[str, Json] = {"a": {"selector": ":is(" * 99 + "b" + ")" * 99}}
    found = await run_node("html-extract", {"html": "<b>1</b>", "fields": fields})
    assert found == {"items": [{"a": "1"}], "count": 1}


# ── excel-parse ─────────────────────────────────────────────────────────────────────────────────────────────

RELATIONSHIPS = "http://schemas.openxmlformats.org/officeDocument/2006/relationships"
PARTS = {
    "_rels/.rels": f'<Relationships><Relationship Id="r1" Type="{RELATIONSHIPS}/officeDocument" '
    'Target="xl/w.xml"/></Relationships>',
    "xl/w.xml": '<workbook><sheets><sheet name="One" r:id="r1"/><sheet name="Two" r:id="r2"/></sheets></workbook>',
    "xl/_rels/w.xml.rels": "<Relationships>"
    + "".join(
        f'<Relationship Id="{identifier}" Type="{RELATIONSHIPS}/{kind}" Target="{target}"/>'
        for identifier, kind, target in [
            ("r1", "worksheet", "one.xml"),
            ("r2", "worksheet", "/xl/two.xml"),
            ("r3", "sharedStrings", "strings.xml"),
            ("r4", "styles", "styles.xml"),
        ]
    )
    + "</Relationships>",
    "xl/strings.xml": "<sst><si><t>at</t></si>"
    "<si><r><t>a</t></r><rPh><t>no</t></rPh><r><t>b_x000A_c</t></r></si></sst>",
    "xl/styles.xml": '<styleSheet><numFmts><numFmt numFmtId="164" formatCode="[$-F800]dddd\\, mmmm dd"/>'
    '<numFmt numFmtId="165" formatCode="[h]:mm"/><numFmt numFmtId="166" formatCode="0&quot; days&quot;"/></numFmts>'
    '<cellStyleXfs><xf numFmtId="22"/></cellStyleXfs><cellXfs><xf numFmtId="0"/><xf numFmtId="14"/><xf numFmtId="22"/>'
    '<xf numFmtId="164"/><xf numFmtId="165"/><xf numFmtId="166"/><xf numFmtId="20"/></cellXfs></styleSheet>',
    "xl/two.xml": "<worksheet/>",
}


def encode_workbook(cells: str, **parts: str) -> str:
    """Return a workbook in base64, with `cells` in its first sheet."""
    sheet = f"<worksheet><sheetData>{cells}</sheetData></worksheet>"
    written = io.BytesIO()
    with zipfile.ZipFile(written, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, part in {**PARTS, "xl/one.xml": sheet, **parts}.items():
            archive.writestr(name, part)
    return base64.b64encode(written.getvalue()).decode()


@pytest.mark.parametrize(
    ("cell", "value"),
    [
        ("<c><v>12</v></c>", 12),
        ("<c><v>1.50</v></c>", 1.5),
        ("<c><v>1E+20</v></c>", 1e20),
        ('<c t="b"><v>1</v></c>', True),
        ('<c t="e"><v>#N/A</v></c>', "#N/A"),
        ('<c t="s"><v>1</v></c>', "ab\nc"),
        ('<c t="str"><f>A1</f><v>x</v></c>', "x"),
        ('<c t="inlineStr"><is><t> y </t></is></c>', " y "),
        ('<c s="1"><v>46110</v></c>', "2026-03-29"),
        ('<c s="1"><v>46110.25</v></c>', "2026-03-29T06:00:00"),
        ('<c s="2"><v>46110.52083333334</v></c>', "2026-03-29T12:30:00"),
        ('<c s="3"><v>59</v></c>', "1900-02-28"),
        ('<c s="3"><v>61</v></c>', "1900-03-01"),
        ('<c s="4"><v>1.5</v></c>', 1.5),
        ('<c s="5"><v>3</v></c>', 3),
        ('<c s="6"><v>0.75</v></c>', "18:00:00"),
        ('<c s="1"><v>-1</v></c>', -1),
        ('<c s="99"><v>7</v></c>', 7),
    ],
)
async def test_a_cell_has_its_type(cell: str, value: Json) -> None:
    file = encode_workbook(f'<row><c t="s"><v>0</v></c></row><row>{cell}</row>')
    found = await run_node("excel-parse", {"file": "{{ data }}"}, file)
    assert repr(found) == repr(
        {"rows": [{"at": value}], "columns": ["at"], "count": 1, "sheet": "One", "sheets": ["One", "Two"]}
    )


async def test_a_workbook_of_a_mac_counts_from_1904() -> None:
    contents = PARTS["xl/w.xml"].replace("<sheets>", '<workbookPr date1904="1"/><sheets>')
    file = encode_workbook('<row><c s="1"><v>1</v></c></row>', **{"xl/w.xml": contents})
    found = await run_node("excel-parse", {"file": file, "hasHeader": False})
    assert isinstance(found, dict)
    assert found["rows"] == [{"column1": "1904-01-02"}]


TABLE = (
    '<row r="1"><c r="A1" t="str"><v>A list</v></c></row><row r="2"/>'
    '<row r="3"><c r="B3" t="str"><v>n</v></c><c r="D3" t="str"><v>m</v></c></row>'
    '<row r="4"><c r="B4"><v>1</v></c></row><row r="9"><c r="D9"><v>2</v></c><c r="E9"><v>3</v></c></row>'
)


@pytest.mark.parametrize(
    ("config", "columns", "rows"),
    [
        ({"startRow": 2}, ["n", "m", "column5"], [[1, None, None], [None, 2, 3]]),
        (
            {"startRow": 4, "hasHeader": False},
            ["column2", "column4", "column5"],
            [[1, None, None], [None, 2, 3]],
        ),
        ({"startRow": 9}, ["2", "3"], []),
        ({"startRow": 10}, [], []),
        ({"sheet": 2}, [], []),
        ({"sheet": "{{ data }}"}, [], []),
    ],
)
async def test_blank_rows_and_columns_are_passed_over(
    config: dict[str, Json], columns: list[str], rows: list[list[Json]]
) -> None:
    found = await run_node("excel-parse", {"file": encode_workbook(TABLE), **config}, "Two")
    assert isinstance(found, dict)
    assert (found["columns"], found["count"]) == (columns, len(rows))
    assert found["rows"] == [dict(zip(columns, row, strict=True)) for row in rows]


async def test_two_cells_in_far_corners_take_no_room() -> None:
    cells = '<row r="1"><c r="A1"><v>1</v></c></row><row r="1048576"><c r="XFD1048576"><v>2</v></c></row>'
    found = await run_node("excel-parse", {"file": encode_workbook(cells), "hasHeader": False})
    assert isinstance(found, dict)
    assert found["columns"] == ["column1", "column16384"]


def falsify_size(file: str) -> str:
    """Return a workbook with a directory that claims a small first sheet."""
    raw = bytearray(base64.b64decode(file))
    at = raw.rindex(b"xl/one.xml") - 46
    raw[at + 24 : at + 28] = (100).to_bytes(4, "little")
    return base64.b64encode(raw).decode()


@pytest.mark.parametrize(
    ("config", "file", "code", "said"),
    [
        ({}, "%%%", "invalid-encoding", "not base64"),
        ({}, base64.b64encode(b"a,b\n1,2\n").decode(), "invalid-workbook", "not a zip archive"),
        ({}, base64.b64encode(b"\xd0\xcf\x11\xe0" + b"\0" * 600).decode(), "invalid-workbook", "old `.xls`"),
        ({}, "A" * 14_000_000, "input-too-large", "10,000,000 bytes"),
        ({}, base64.b64encode(b"PK\x01\x02" * 2_001).decode(), "too-many-entries", "2,000 files"),
        (
            {},
            encode_workbook("", **{"_rels/.rels": "<Relationships/>"}),
            "invalid-workbook",
            "officeDocument",
        ),
        ({}, encode_workbook("<row>"), "invalid-xml", "mismatched tag"),
        ({}, encode_workbook("", **{"xl/strings.xml": LAUGHS}), "document-type-refused", "DOCTYPE"),
        ({}, falsify_size(encode_workbook("x" * 1_000_000)), "invalid-workbook", "damaged"),
        (
            {},
            encode_workbook('<row><c t="s"><v>2</v></c></row>'),
            "invalid-workbook",
            "a missing text",
        ),
        ({}, encode_workbook("<row><c><v>nan</v></c></row>"), "invalid-workbook", "an invalid number"),
        ({}, encode_workbook('<row><c r="XFE1"><v>1</v></c></row>'), "invalid-workbook", "16,384"),
        (
            {},
            encode_workbook('<row><c t="str"><v>a</v></c><c t="str"><v>a</v></c></row>'),
            "duplicate-column",
            "'a'",
        ),
        (
            {"maxRows": 1, "hasHeader": False},
            encode_workbook("<row><c><v>1</v></c></row>" * 2),
            "too-many-rows",
            "more than 1",
        ),
        ({"sheet": "Three"}, encode_workbook(""), "unknown-sheet", "has One, Two"),
        ({"sheet": 3}, encode_workbook(""), "unknown-sheet", "number 3"),
        (
            {"hasHeader": False},
            encode_workbook(f"<row>{'<c><v>1</v></c>' * 1_000}</row>" + "<row><c><v>1</v></c></row>" * 1_000),
            "too-many-rows",
            "1,000,000 values",
        ),
    ],
)
async def test_a_workbook_that_is_hostile_or_broken_is_refused(
    config: dict[str, Json], file: str, code: str, said: str
) -> None:
    found, message = await run_failing_node("excel-parse", {"file": "{{ data }}", **config}, file)
    assert found == code
    assert said in message


async def test_a_workbook_is_refused_whose_sheet_is_too_large() -> None:
    file = encode_workbook("x" * 50_000_000)
    found, message = await run_failing_node("excel-parse", {"file": "{{ data }}"}, file)
    assert found == "input-too-large"
    assert "50,000,000 bytes" in message


# ── all ─────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("limit", "node_type", "config", "data", "code"),
    [
        (
            "nodes.formats.xlsx_workbook.MAXIMUM_CELLS",
            "excel-parse",
            {},
            encode_workbook("<row><c/></row>" * 1_001),
            "too-many-cells",
        ),
        (
            "nodes.formats.xlsx_workbook.MAXIMUM_ELEMENTS",
            "excel-parse",
            {},
            encode_workbook("<x/>" * 1_001),
            "too-many-elements",
        ),
        (
            "nodes.formats.xlsx_workbook.MAXIMUM_STRINGS",
            "excel-parse",
            {},
            encode_workbook("", **{"xl/strings.xml": f"<sst>{'<si/>' * 1_001}</sst>"}),
            "too-many-cells",
        ),
        (
            "nodes.output_sizes.MAXIMUM_BYTES",
            "excel-parse",
            {},
            encode_workbook('<row><c t="s"><v>0</v></c></row>' * 501),
            "output-too-large",
        ),
        (
            "nodes.formats.html_document.MAXIMUM_ELEMENTS",
            "html-extract",
            {"fields": ALL_DIVS},
            "<p><b id=1></p>" * 501,
            "too-many-elements",
        ),
        (
            "nodes.formats.html_document.MAXIMUM_ATTRIBUTES",
            "html-extract",
            {"fields": ALL_DIVS},
            f"<p {' '.join(f'a{n}' for n in range(1_001))}>",
            "too-many-elements",
        ),
        (
            "nodes.library.html_extract.MAXIMUM_VALUES",
            "html-extract",
            {"fields": ALL_DIVS},
            "<div></div>" * 1_001,
            "output-too-large",
        ),
    ],
)
async def test_parsed_and_extracted_content_is_limited(
    limit: str,
    node_type: str,
    config: dict[str, Json],
    data: str,
    code: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(limit, 1_000)
    field = "file" if node_type == "excel-parse" else "html"
    found, message = await run_failing_node(node_type, {field: "{{ data }}", **config}, data)
    assert found == code
    assert "1,000" in message


LOADS = """
import sys
from nodes import catalog

catalog.load_catalog().implementation("csv-parse")
print([name for name in ("re2", "lxml", "cssselect", "pyexpat", "zipfile") if name in sys.modules])
"""


def test_modules_of_one_node_are_loaded_with_that_node() -> None:
    ran = subprocess.run([sys.executable, "-c", LOADS], capture_output=True, text=True, check=True)
    assert ran.stdout == "[]\n"
