"""A text that is decoded in pieces has the value, or the fault, that it has as a whole."""

from __future__ import annotations

import json
from contextlib import suppress
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine import values
from engine.values import InvalidJson
from json_text import decoding, pieces
from json_text.pieces import DuplicateName

characters = st.sampled_from("ab\",:[]{}\\'\n é😀")
texts = st.text(characters, max_size=6)
scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | texts
json_values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(texts, inner, max_size=5),
    max_leaves=40,
)
sizes = st.integers(1, 40)


def decode_pieces(text: bytes, piece_bytes: int) -> Any:  # noqa: ANN401 - any JSON value
    return pieces.decode_in_pieces(text, decoding.decode, piece_bytes=piece_bytes)


@given(json_values, sizes, st.booleans(), st.sampled_from([None, 1]))
def test_the_value_is_the_same_in_pieces_of_any_size(
    value: Any,  # noqa: ANN401 - any JSON value
    piece_bytes: int,
    ascii_only: bool,  # noqa: FBT001 - drawn by hypothesis
    indent: int | None,
) -> None:
    text = json.dumps(value, ensure_ascii=ascii_only, indent=indent).encode()
    assert repr(decode_pieces(text, piece_bytes)) == repr(decoding.decode(text))


@given(json_values, sizes, st.data())
def test_json_malformed_as_a_whole_is_malformed_in_pieces(
    value: Any,  # noqa: ANN401 - any JSON value
    piece_bytes: int,
    data: st.DataObject,
) -> None:
    text = json.dumps(value, ensure_ascii=False)
    at = data.draw(st.integers(0, len(text)))
    wrong = (text[:at] + data.draw(characters) + text[at + data.draw(st.integers(0, 1)) :]).encode()
    try:
        whole = repr(json.loads(wrong, object_pairs_hook=_unique))
    except ValueError:
        with pytest.raises(ValueError, match=r".+"):
            pieces.decode_in_pieces(wrong, values.decode_json, piece_bytes=piece_bytes)
    else:
        assert repr(pieces.decode_in_pieces(wrong, values.decode_json, piece_bytes=piece_bytes)) == whole


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(pairs) != len(dict(pairs)):
        raise ValueError("a name is given twice")
    return dict(pairs)


@given(json_values, sizes)
def test_of_two_members_of_one_name_the_second_wins_or_both_are_refused(value: Any, piece_bytes: int) -> None:  # noqa: ANN401 - any JSON value
    inner = json.dumps(value)
    text = f'{{"b":{{"a":[{inner},1],"c":[2,{inner}],"a":[3,[{inner},4]]}},"d":{inner}}}'.encode()
    with suppress(DuplicateName):
        assert decode_pieces(text, piece_bytes) == json.loads(text)
    with pytest.raises(ValueError, match=r"name|more than once"):
        pieces.decode_in_pieces(text, values.decode_json, piece_bytes=piece_bytes)


def test_long_and_short_texts_are_refused_for_the_same_reasons() -> None:
    filler = b'"' + b"x" * values.INLINE_BYTES + b'",'
    faults = [
        (b'{"a":1,"b":%s"a":2}' % (b'2,"c":' + filler), "duplicate-key"),
        (b'[%s{"user:id":1,"user\\u003aid":2}]' % filler, "duplicate-key"),
        (b'[%s"\\u0000"]' % filler, "nul-character"),
        (b'[%s"\\ud800"]' % filler, "lone-surrogate"),
        (b'[%s"\xff"]' % filler, "malformed-json"),
        (b"[%s]" % filler, "malformed-json"),
        (b"[%s1" % filler, "malformed-json"),
        (b"[%s1}" % filler, "malformed-json"),
        (b"[%s1],2" % filler, "malformed-json"),
        (b"[%sNaN]" % filler, "not-finite"),
        (b"[%s1e999]" % filler, "not-finite"),
        (b"[%s1%s]" % (filler, b"0" * 309), "number-too-long"),
        (b"[%s%s1%s]" % (filler, b"[" * 64, b"]" * 64), "too-deep"),
        (b"[%s%s" % (filler, b"[" * 1_000_000), "too-deep"),
    ]
    for text, code in faults:
        with pytest.raises(InvalidJson) as caught:
            values.decode_json(text)
        assert caught.value.code == code, text[-50:]
    deep = b"[%s%s1,2%s]" % (filler, b"[" * 63, b"]" * 63)
    assert values.decode_json(deep) == decoding.decode(deep) == json.loads(deep)


def test_a_long_text_without_a_place_to_cut_is_decoded() -> None:
    for inner in ('"' * 300_000, "\\" * 300_001, ",:{[" * 100_000, "é😀" * 50_000):
        for value in (inner, [inner], {inner: {"a": [inner]}}, [[], inner, {}]):
            assert values.decode_json(msgspec.json.encode(value)) == value


def test_two_names_far_apart_are_told_by_name() -> None:
    text = b'{"first":1,%s"first":2}' % b"".join(b'"k%d":0,' % number for number in range(50_000))
    with pytest.raises(InvalidJson, match="'first' occurs more than once"):
        values.decode_json(text)
    assert decoding.decode(text)["first"] == 2
