from __future__ import annotations

import json
import math
import time
from collections import defaultdict
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.values import (
    MAX_NUMBER,
    InvalidJson,
    Json,
    decode_json,
    encode_canonical,
    encode_json,
    equal_json,
    fingerprint,
    identity_key,
    type_name,
    value_as_text,
)

texts = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"))
numbers = st.integers(-int(MAX_NUMBER), int(MAX_NUMBER)) | st.floats(allow_nan=False, allow_infinity=False)
scalars = st.none() | st.booleans() | numbers | texts
json_values = st.recursive(
    scalars, lambda inner: st.lists(inner) | st.dictionaries(texts, inner), max_leaves=20
)


def refusal_code(raw: bytes) -> str:
    with pytest.raises(InvalidJson) as caught:
        decode_json(raw)
    return caught.value.code


# ── decoding ────────────────────────────────────────────────────────────────────────────────────────────────


@given(json_values)
def test_an_encoded_value_decodes_to_the_same_value(value: Json) -> None:
    assert is_identical(decode_json(encode_json(value)), value)


@given(json_values, st.booleans(), st.sampled_from([None, 2]))
def test_any_other_writer_of_json_is_understood(value: Json, ascii_only: bool, indent: int | None) -> None:  # noqa: FBT001 - drawn by hypothesis
    raw = json.dumps(value, ensure_ascii=ascii_only, indent=indent).encode()
    assert is_identical(decode_json(raw), value)


@given(json_values, texts, st.data())
def test_a_key_given_twice_is_refused_wherever_it_is(value: Json, key: str, data: st.DataObject) -> None:
    twin = f"{json.dumps(key)}: 1, {json.dumps(key, ensure_ascii=False)} : 2"
    raw = json.dumps({"around": [value, "a twin"], key + "'": value}).replace('"a twin"', f"{{{twin}}}")
    if data.draw(st.booleans()):
        raw = raw.replace(": ", ":")
    assert refusal_code(raw.encode()) == "duplicate-key"


def test_the_key_given_twice_is_named() -> None:
    with pytest.raises(InvalidJson, match="'user:id' occurs more than once"):
        decode_json(rb'{"a": "\\\":", "b": {"user:id": 1, "user\u003aid": 2}}')


@pytest.mark.parametrize(
    "raw",
    [
        rb'{"a": "\\", "b": ":"}',
        rb'{"a\\\"": "\\\\", "\"": "\":\""}',
        rb'{"": {"": {}}, ":": "a:b:c"}',
        b'{"at": "2026-01-02T03:04:05Z", "url": "https://example.com"}',
    ],
)
def test_colons_quotes_and_backslashes_in_texts_are_no_keys(raw: bytes) -> None:
    assert decode_json(raw) == json.loads(raw)


@pytest.mark.parametrize(
    ("raw", "code"),
    [
        (b"", "malformed-json"),
        (b" \n", "malformed-json"),
        (b"\xef\xbb\xbf{}", "malformed-json"),
        (b'"\xff"', "malformed-json"),
        (b'{"\xc0\x80": 1}', "malformed-json"),
        (b'"\x00"', "malformed-json"),
        (b"[1,]", "malformed-json"),
        (b"{'a': 1}", "malformed-json"),
        (b"{} {}", "malformed-json"),
        (b'{"a": 1', "malformed-json"),
        (b"01", "malformed-json"),
        (b"nul", "malformed-json"),
        (b"NaN", "not-finite"),
        (b"[1, NaN]", "not-finite"),
        (b'{"a": -Infinity}', "not-finite"),
        (b"1e999", "not-finite"),
        (b"[-1E400]", "not-finite"),
        (b"1" + b"0" * 309, "number-too-long"),
        (b"[-2" + b"0" * 308 + b"]", "number-too-long"),
        (b'{"a": ' + b"9" * 100_000 + b"}", "number-too-long"),
        (b"[" + b"1," * 2_500 + b"1" + b"0" * 309 + b"]", "number-too-long"),
        (rb'"\u0000"', "nul-character"),
        (rb'["\\\u0000"]', "nul-character"),
        (rb'{"\u0000": 1}', "nul-character"),
        (rb'"\ud800"', "lone-surrogate"),
        (rb'{"\udbff":1}', "lone-surrogate"),
        (rb'["\udc00 and more"]', "lone-surrogate"),
        (rb'["\ud800\u0041"]', "lone-surrogate"),
        (b'"\xed\xa0\x80"', "lone-surrogate"),
    ],
)
def test_a_value_that_cannot_be_stored_is_refused(raw: bytes, code: str) -> None:
    assert refusal_code(raw) == code


@pytest.mark.parametrize(
    "raw",
    [rb'"\\u0000"', rb'"\ud83d\ude00"', b'"\x7f"', b"18446744073709551616", b"1" + b"0" * 308, b"1e-999"],
)
def test_texts_that_only_resemble_secrets_are_kept(raw: bytes) -> None:
    assert decode_json(raw) == json.loads(raw)


def test_whole_numbers_stay_exact() -> None:
    assert (
        encode_json(decode_json(b"[123456789012345678901234567890]")) == b"[123456789012345678901234567890]"
    )


@pytest.mark.parametrize(("opening", "closing"), [("[", "]"), ('{"a":', "}")])
def test_depth_is_bounded_however_deep_the_text_is(opening: str, closing: str) -> None:
    assert decode_json((opening * 64 + "1" + closing * 64).encode())
    for depth in (65, 500, 1_500, 100_000):
        assert refusal_code((opening * depth + "1" + closing * depth).encode()) == "too-deep"
    with pytest.raises(InvalidJson, match="more than 2 deep"):
        decode_json(b"[[[]]]", max_depth=2)


def test_any_buffer_is_read() -> None:
    assert decode_json(bytearray(b'{"a": 1}')) == decode_json(memoryview(b'{"a": 1}')) == {"a": 1}


def test_a_hostile_text_takes_no_longer_than_its_length_deserves() -> None:
    hostile = [
        b'"' + rb"\\" * 1_000_000 + b'"',
        b'["' + b":" * 2_000_000 + b'"]',
        b'"\\"' + b"1" * 2_000_000 + b'"',
    ]
    started = time.process_time()
    for raw in hostile:
        decode_json(raw)
    assert time.process_time() - started < 8


# ── encoding ────────────────────────────────────────────────────────────────────────────────────────────────


def nested_list(depth: int) -> Json:
    value: Json = 1
    for _ in range(depth):
        value = [value]
    return value


@pytest.mark.parametrize(
    ("value", "code"),
    [
        (math.nan, "not-finite"),
        ({"a": [1, -math.inf]}, "not-finite"),
        (10**309, "number-too-long"),
        # Long lists of numbers are checked in batches.
        ([0] * 2_500 + [10**309], "number-too-long"),
        ([0] * 2_500 + [-(10**309)], "number-too-long"),
        ([0.5] * 2_500 + [math.nan], "not-finite"),
        ([0.5] * 2_500 + [-math.inf] + [0.5] * 2_500, "not-finite"),
        ({str(n): n for n in range(2_500)} | {"last": object()}, "not-json"),
        ([0] * 2_500 + [nested_list(64)], "too-deep"),
        ("\0", "nul-character"),
        ({"a\0": 1}, "nul-character"),
        (["\\\0"], "nul-character"),
        ("\ud800", "lone-surrogate"),
        ({"\udfff": 1}, "lone-surrogate"),
        ({1: 2}, "not-json"),
        ({None: 2}, "not-json"),
        ((1, 2), "not-json"),
        ({1, 2}, "not-json"),
        (b"bytes", "not-json"),
        ([defaultdict(list)], "not-json"),
        ([object()], "not-json"),
        (nested_list(65), "too-deep"),
    ],
)
def test_values_that_would_change_are_not_encoded(value: object, code: str) -> None:
    for write in (encode_json, encode_canonical, fingerprint):
        with pytest.raises(InvalidJson) as caught:
            write(value)
        assert caught.value.code == code


def test_a_value_that_contains_itself_is_too_deep() -> None:
    circle: list[Any] = []
    circle.append(circle)
    with pytest.raises(InvalidJson, match="deep"):
        encode_json(circle)


def test_a_backslash_before_u0000_is_no_nul() -> None:
    assert decode_json(encode_json(r"\u0000")) == r"\u0000"


def test_a_small_value_that_is_large_as_json_is_refused_before_it_is_written() -> None:
    value: Json = "x" * 1_000
    for _ in range(40):
        value = [value, value]
    with pytest.raises(InvalidJson) as caught:
        encode_json(value, max_bytes=1_000_000)
    assert caught.value.code == "too-large"


def test_the_limit_counts_bytes() -> None:
    assert encode_json("é" * 10, max_bytes=22)
    with pytest.raises(InvalidJson):
        encode_json("é" * 10, max_bytes=21)


def test_a_canonical_text_does_not_depend_on_the_order_of_keys() -> None:
    one, other = {"b": [1, {"d": 1, "c": 2}], "a": 1.5}, {"a": 1.5, "b": [1, {"c": 2, "d": 1}]}
    assert encode_canonical(one) == encode_canonical(other) == b'{"a":1.5,"b":[1,{"c":2,"d":1}]}'
    assert fingerprint(one) == fingerprint(other) != fingerprint({})


def test_a_fingerprint_never_changes() -> None:
    assert fingerprint({}) == "44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a"


# ── comparing and showing ───────────────────────────────────────────────────────────────────────────────────


def test_numbers_are_equal_by_value_and_never_to_booleans() -> None:
    assert equal_json(1, 1.0)
    assert equal_json({"a": [1, {"b": 2.0}]}, {"a": [1.0, {"b": 2}]})
    assert not equal_json(1, True)  # noqa: FBT003 - the value is the subject
    assert not equal_json([{"a": 0}], [{"a": False}])
    assert not equal_json({"a": 1}, [["a", 1]])


@given(json_values, json_values)
def test_values_share_an_identity_exactly_when_they_are_equal(left: Json, right: Json) -> None:
    assert (identity_key(left) == identity_key(right)) is equal_json(left, right)
    assert equal_json(left, decode_json(encode_json(left)))


@pytest.mark.parametrize(
    ("value", "text"),
    [("a", "a"), (None, ""), (True, "true"), (42, "42"), (1.5, "1.5"), ({"a": [1, None]}, '{"a":[1,null]}')],
)
def test_a_value_reads_in_a_text(value: Json, text: str) -> None:
    assert value_as_text(value) == text


def test_types_have_the_names_that_users_know() -> None:
    values: list[Json] = [None, True, 1, 1.5, "a", [], {}]
    assert [type_name(value) for value in values] == [
        "null",
        "boolean",
        "number",
        "number",
        "text",
        "list",
        "object",
    ]


def is_identical(left: Json, right: Json) -> bool:
    """Compare types too: 1.0 must not be returned as 1."""
    return repr(left) == repr(right)
