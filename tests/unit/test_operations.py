from __future__ import annotations

import math
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.operations import OPERATIONS, OperationError
from engine.values import MAX_NUMBER, Json, decode_json, encode_json, equal_json

json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text("ab1 .-T:%"),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text("ab", max_size=2), inner, max_size=4),
    max_leaves=6,
)


def compute(name: str, *arguments: Json) -> Json:
    assert OPERATIONS[name].takes(len(arguments))
    return OPERATIONS[name].apply(arguments)


BIG = 10**308

CASES: list[tuple[str, list[Json], Json]] = [
    ("add", [1, 2, 3.5], 6.5),
    ("add", [10**30, 1], 10**30 + 1),
    ("subtract", [1, 3], -2),
    ("multiply", [2, 3, 4], 24),
    ("divide", [6, 3], 2),
    ("divide", [7, 2], 3.5),
    ("divide", [10**40, 10], 10**39),
    ("modulo", [-7, 3], 2),
    ("round", [2.5], 3),
    ("round", [-2.5], -3),
    ("round", [2.675, 2], 2.68),
    ("round", [1.5e308, 2], 1.5e308),
    ("round", [1_250, -2], 1_300),
    ("round", [7, 2], 7),
    ("floor", [-1.5], -2),
    ("ceil", [1.2], 2),
    ("abs", [-3], 3),
    ("min", [3, 1.5, 2], 1.5),
    ("max", [[3, 5]], 5),
    ("sum", [[]], 0),
    ("sum", [[0.1] * 10], 1.0),
    ("sum", [10**30, 1], 10**30 + 1),
    ("format-number", [1234567.891, 2], "1,234,567.89"),
    ("format-number", [-1234567, 0, ".", ","], "-1.234.567"),
    ("format-number", [0.5, 3, "", ","], "0,500"),
    ("concat", ["a", 1, None, True, 1.5], "a1true1.5"),
    ("concat", [[1], [2, 3]], [1, 2, 3]),
    ("lower", ["ÄB"], "äb"),
    ("upper", ["äb"], "ÄB"),
    ("trim", ["  a b\n"], "a b"),
    ("replace", ["a.b.c", ".", "--"], "a--b--c"),
    ("split", ["a, b", ", "], ["a", "b"]),
    ("join", [["a", 1, None], "-"], "a-1-"),
    ("join", [[]], ""),
    ("substring", ["workflow", 4], "flow"),
    ("substring", ["workflow", -4, -1.0], "flo"),
    ("substring", ["workflow", 2, 10**30], "rkflow"),
    ("pad", ["7", 3, "0"], "007"),
    ("pad", ["7", 3, ".", "end"], "7.."),
    ("length", ["äb"], 2),
    ("length", [[1, 2, 3]], 3),
    ("length", [{"a": 1}], 1),
    ("first", [[1, 2]], 1),
    ("last", [[1, 2]], 2),
    ("first", [[]], None),
    ("slice", [[1, 2, 3], 1], [2, 3]),
    ("slice", [[1, 2, 3], 0, -1], [1, 2]),
    ("get", [[1, 2], -1], 2),
    ("get", [[1, 2], 2, "none"], "none"),
    ("get", [{"a": 1}, "a"], 1),
    ("get", [{"a": 1}, "b"], None),
    ("flatten", [[1, [2, [3]], []]], [1, 2, [3]]),
    ("unique", [[2, 1, 2.0, True, {"a": 1}, {"a": 1.0}, "1"]], [2, 1, True, {"a": 1}, "1"]),
    ("reverse", [[1, 2]], [2, 1]),
    ("sort", [[3, 1.5, 2]], [1.5, 2, 3]),
    ("sort", [["b", "a"], None, "descending"], ["b", "a"]),
    ("sort", [[{"n": 2, "x": 1}, {"n": 1}], "n"], [{"n": 1}, {"n": 2, "x": 1}]),
    ("range", [3], [0, 1, 2]),
    ("range", [3, 0, -2], [3, 1]),
    ("merge", [{"a": 1, "b": 1}, {"b": 2}, {}], {"a": 1, "b": 2}),
    ("pick", [{"a": 1, "b": 2}, ["b", "c"]], {"b": 2}),
    ("omit", [{"a": 1, "b": 2}, ["b", "c"]], {"a": 1}),
    ("keys", [{"b": 1, "a": 2}], ["b", "a"]),
    ("values", [{"b": 1, "a": 2}], [1, 2]),
    ("parse-date", ["2026-01-02T03:04:05+02:00"], "2026-01-02T01:04:05Z"),
    ("parse-date", ["2026-07-01 12:00", "Europe/Berlin"], "2026-07-01T10:00:00Z"),
    ("parse-date", ["2026-01-02"], "2026-01-02T00:00:00Z"),
    ("parse-date", [1_700_000_000], "2023-11-14T22:13:20Z"),
    ("parse-date", [0.25], "1970-01-01T00:00:00.250000Z"),
    (
        "format-date",
        ["2026-01-02T23:30:00Z", "%d.%m.%Y %H:%M %z 100%%", "Europe/Berlin"],
        "03.01.2026 00:30 +0100 100%",
    ),
    ("add-time", ["2026-01-31T10:00:00Z", 1, "months"], "2026-02-28T10:00:00Z"),
    ("add-time", ["2024-02-29T10:00:00Z", -1, "years"], "2023-02-28T10:00:00Z"),
    ("add-time", ["2026-01-01T00:00:00Z", -90, "minutes"], "2025-12-31T22:30:00Z"),
    ("add-time", ["2026-03-28T11:00:00Z", 1, "days", "Europe/Berlin"], "2026-03-29T10:00:00Z"),
    ("add-time", ["2026-03-28T11:00:00Z", 24, "hours", "Europe/Berlin"], "2026-03-29T11:00:00Z"),
    ("date-diff", ["2026-01-01T00:00:00Z", "2026-01-02T12:00:00Z", "days"], 1.5),
    ("date-diff", ["2026-01-02T00:00:00Z", "2026-01-01T00:00:00+01:00"], -90_000),
    ("default", [None, 1], 1),
    ("default", [False, 1], False),
    ("coalesce", [None, None], None),
    ("coalesce", [None, 0, 1], 0),
    ("to-number", [" 1.5e3 "], 1500.0),
    ("to-number", [7], 7),
    ("to-text", [None], ""),
    ("to-text", [[1, {"a": True}]], '[1,{"a":true}]'),
    ("to-boolean", ["TRUE"], True),
    ("to-boolean", [0], False),
    ("from-json", ['{"a": [1]}'], {"a": [1]}),
    ("to-json", ["a"], '"a"'),
    ("base64-encode", ["Grüße?>"], "R3LDvMOfZT8+"),
    ("base64-decode", ["R3LDvMOfZT8+"], "Grüße?>"),
    ("base64-decode", ["R3LDvMO_Pz4"], "Grüÿ?>"),
    ("base64-decode", ["aGk\n=\n"], "hi"),
    ("base64-decode", [""], ""),
]


@pytest.mark.parametrize(("name", "arguments", "result"), CASES)
def test_an_operation_computes(name: str, arguments: list[Json], result: Json) -> None:
    computed = compute(name, *arguments)
    assert equal_json(computed, result)
    assert type(computed) is type(result)


def test_every_operation_is_executed_and_documented() -> None:
    assert {name for name, _, _ in CASES} == set(OPERATIONS)
    for name, operation in OPERATIONS.items():
        assert operation.name == name
        assert operation.summary.endswith(".")
        assert "\n" not in operation.summary


@pytest.mark.parametrize(
    ("name", "arguments", "reason"),
    [
        ("add", ["a", "b"], "needs numbers, not text and text: concat joins texts"),
        ("add", ["1", 2], "not text and number"),
        ("add", [True, 2], "not boolean and number"),
        ("add", [None, 2], "not null and number"),
        ("multiply", ["2", 3], "to-number"),
        ("subtract", ["3", 1], "needs a number, not text"),
        ("divide", [1, 0], "divide by zero"),
        ("modulo", [1.5, 0.0], "divide by zero"),
        ("multiply", [BIG, 10], "too large"),
        ("multiply", [1e200, 1e200], "too large"),
        ("multiply", [BIG, 2.0], "too large"),
        ("add", [MAX_NUMBER, MAX_NUMBER], "too large"),
        ("sum", [[MAX_NUMBER, MAX_NUMBER]], "out of range"),
        ("sum", [["1"]], "needs a number, not text"),
        ("min", [[]], "at least one number"),
        ("round", [1.5, 16], "at most 15 decimals"),
        ("round", [1.5, 0.5], r"needs a whole number, not 0\.5"),
        ("format-number", [1, -1], "0 to 15 decimals"),
        ("format-number", [BIG, 0, "," * 11], "at most 10 characters"),
        ("concat", [[1], "a"], "not list and text"),
        ("upper", [1], "needs a text, not number"),
        ("replace", ["a", "", "b"], "empty text"),
        ("split", ["a", ""], "empty text"),
        ("pad", ["a", 5, "ab"], "one character"),
        ("pad", ["a", 5, "a", "left"], "one character"),
        ("length", [5], "not number"),
        ("first", ["abc"], "needs a list, not text"),
        ("get", [{"a": 1}, 0], "needs a text, not number"),
        ("get", ["abc", 0], "needs an object, not text"),
        ("sort", [[1, "a"]], "not number and text"),
        ("sort", [[True]], "not boolean"),
        ("sort", [[{"n": 1}, {}], "n"], "not null and number"),
        ("sort", [[1], None, "up"], "'up'"),
        ("range", [1, 2, 0], "step other than 0"),
        ("pick", [{"a": 1}, [1]], "needs a text, not number"),
        ("parse-date", ["yesterday"], "needs a date such as"),
        ("parse-date", ["2026-01-01", "../../etc/passwd"], "IANA time zone"),
        ("parse-date", ["2026-01-01", "Europe/Berlin\n"], "IANA time zone"),
        ("parse-date", [1e300], "out of range"),
        ("parse-date", ["9999-12-31T23:00:00-05:00"], "out of range"),
        ("format-date", ["2026-01-01", "%c"], "%Y"),
        ("format-date", ["2026-01-01", "50%"], "%Y"),
        ("add-time", ["2026-01-01", 1, "fortnights"], "seconds, minutes"),
        ("add-time", ["2026-01-01", BIG, "days"], "out of range"),
        ("add-time", ["2026-01-01", BIG, "years"], "out of range"),
        ("to-number", ["1,5"], "finds no number in the text '1,5'"),
        ("to-number", ["NaN"], "finds no number"),
        ("to-number", ["true"], "finds no number"),
        ("to-number", [True], "needs a number, not boolean"),
        ("to-boolean", ["yes"], "neither true nor false"),
        ("to-boolean", [2], "neither true nor false"),
        ("from-json", ['{"a": 1, "a": 2}'], "more than once"),
        ("from-json", ["[" * 100 + "]" * 100], "deep"),
        ("base64-encode", [5], "needs a text, not number"),
        ("base64-encode", ["ü" * 5_000_000], "more than 10,000,000 characters"),
        ("base64-decode", ["a"], "base64 of a text in UTF-8"),
        ("base64-decode", ["aGk!"], "base64 of a text in UTF-8"),
        ("base64-decode", ["/w=="], "base64 of a text in UTF-8"),
        ("base64-decode", ["AGE="], "without the character NUL"),
        ("join", [["x" * 600_000] * 20], "more than 10,000,000 characters"),
        ("to-json", [["x" * 600_000] * 20], "more than 10,000,000 bytes"),
        ("replace", ["aaaa" * 500_000, "a", "xxxxxxxxxx"], "more than 10,000,000 characters"),
        ("pad", ["a", 10**12], "more than 10,000,000 characters"),
        ("split", ["a," * 1_000_001, ","], "more than 1,000,000 elements"),
        ("range", [10**9], "more than 1,000,000 elements"),
        ("range", [BIG], "out of range"),
        ("flatten", [[[0] * 1_000] * 1_001], "more than 1,000,000 elements"),
        ("concat", [[0] * 600_000, [0] * 600_000], "more than 1,000,000 elements"),
    ],
)
def test_an_impossible_computation_is_an_error_with_a_reason(
    name: str, arguments: list[Json], reason: str
) -> None:
    with pytest.raises(OperationError, match=reason):
        compute(name, *arguments)


@given(st.sampled_from(sorted(OPERATIONS)), st.lists(json_values, min_size=1, max_size=4))
def test_any_arguments_give_json_or_an_operation_error(name: str, arguments: list[Json]) -> None:
    if not OPERATIONS[name].takes(len(arguments)):
        return
    before = encode_json(arguments)
    try:
        result = OPERATIONS[name].apply(arguments)
    except OperationError:
        return
    assert equal_json(decode_json(encode_json(result)), result)
    assert encode_json(arguments) == before


@given(st.floats(-1e15, 1e15), st.integers(0, 6))
def test_rounding_stays_within_half_a_step(value: float, decimals: int) -> None:
    result = compute("round", value, decimals)
    assert isinstance(result, int | float)
    # The result is itself the nearest float, so the precision of a float is added to the bound.
    assert abs(Fraction(result) - Fraction(value)) <= Fraction(1, 2 * 10**decimals) + Fraction(
        math.ulp(value)
    )


@given(st.datetimes(), st.sampled_from(["seconds", "hours", "days"]), st.integers(-1_000, 1_000))
def test_time_added_is_the_difference(moment: object, unit: str, amount: int) -> None:
    try:
        later = compute("add-time", str(moment), amount, unit)
    except OperationError:
        return
    assert compute("date-diff", str(moment), later, unit) == amount
