"""No text within the limits keeps the rest of its process from computing for long, whatever it holds."""

from __future__ import annotations

import gc
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine import values
from engine.values import InvalidJson, Json
from tests import hostile_json, lock_holds
from tests.hostile_json import TEXTS

MEGABYTE = 1_000_000

scalars = (
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text()
)
items = st.recursive(
    scalars, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=10
)


def go_through(text: bytes) -> None:
    """Do with a text what is done with bodies, outputs and rows."""
    try:
        value: Json = values.decode(text)
    except InvalidJson:
        return
    raw = values.encode(value)
    values.fingerprint(value)
    del value
    values.restored(raw)


@pytest.mark.parametrize("name", TEXTS)
def test_a_body_of_a_megabyte_holds_nobody_up(name: str) -> None:
    text = TEXTS[name](MEGABYTE)
    with lock_holds.measuring() as holds:
        go_through(text)
    assert holds.longest_seconds < lock_holds.MEGABYTE_SECONDS * lock_holds.slowness()


@settings(max_examples=10)
@given(items)
def test_nor_does_any_other_body_of_that_size(item: Any) -> None:  # noqa: ANN401 - any JSON value
    text = hostile_json.repeated(json.dumps(item, ensure_ascii=False).encode(errors="replace"), MEGABYTE)
    with lock_holds.measuring() as holds:
        go_through(text)
    assert holds.longest_seconds < lock_holds.MEGABYTE_SECONDS * lock_holds.slowness()


def test_a_larger_text_is_decoded_in_pieces() -> None:
    """Apart from collections of garbage, the longest step doesn't depend on the length."""
    text = TEXTS["nested lists"](2 * MEGABYTE)
    gc.disable()
    try:
        with lock_holds.measuring() as holds:
            value = values.decode(text)
    finally:
        gc.enable()
    del value  # to let go of it isn't what is measured
    assert holds.longest_seconds < lock_holds.MEGABYTE_SECONDS * lock_holds.slowness()
