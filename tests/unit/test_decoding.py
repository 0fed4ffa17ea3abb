"""JSON decoding: its cost is linear in the length, and all decoders come from one module."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from json_text import decoding
from models.column_types import JsonTextColumn
from nodes.sandbox import frames

SLOW_FOR_MSGSPEC = ("1e300", "-1.7976931348623157e308", "2.2250738585072011e-308", "5e-324")
COUNT = 20_000
MOST_MICROSECONDS = 3.0
"""Of processor time for each number, and for the list around it: a tenth of that is usual, and 8 were needed before."""


class WrappedValue(msgspec.Struct):
    items: Any
    raw: msgspec.Raw = msgspec.Raw(b"null")


class TimedValue(msgspec.Struct):
    seconds: float


DECODERS: dict[str, Callable[[bytes], Any]] = {
    "any": decoding.decode,
    "built": decoding.build_decoder().decode,
    "typed": lambda text: decoding.decode(b'{"items":' + text + b"}", WrappedValue).items,
    "list": lambda text: decoding.decode(text, list[Any]),
    "frame": frames.decode_value,
    "column": lambda text: JsonTextColumn().process_result_value(text.decode(), None),  # type: ignore[arg-type]  # unused
}


@pytest.mark.parametrize("name", DECODERS)
@pytest.mark.parametrize("number", SLOW_FOR_MSGSPEC)
def test_a_number_takes_no_longer_than_its_digits_deserve(name: str, number: str) -> None:
    text = b"[" + b",".join([number.encode()] * COUNT) + b"]"
    began_at = time.thread_time()
    value = DECODERS[name](text)
    assert (time.thread_time() - began_at) / COUNT * 1_000_000 < MOST_MICROSECONDS
    assert value == [float(number)] * COUNT


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_numbers_keep_every_bit(number: float) -> None:
    assert decoding.decode(json.dumps([number])) == [number]
    assert repr(decoding.decode(repr(number))) == repr(number)


@pytest.mark.parametrize("text", ["1e999", "-1e400", "[1.8e308]", '{"items": 1e309}'])
def test_a_number_that_would_be_infinite_is_refused(text: str) -> None:
    for kind in (Any, WrappedValue, list[Any]):
        with pytest.raises(ValueError, match=r"Number out of range|Expected"):
            decoding.decode(text, kind)


def test_no_decoder_is_made_that_would_decode_floats_by_itself() -> None:
    for kind in (list[float], dict[str, int | float], list[TimedValue], tuple[TimedValue, ...]):
        with pytest.raises(TypeError, match="collection of floats"):
            decoding.build_decoder(kind)


def test_a_single_float_is_a_float() -> None:
    assert decoding.decode(b'{"seconds":1e300}', TimedValue) == TimedValue(1e300)
