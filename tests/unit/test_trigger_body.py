"""Webhook bodies stored apart from their rows: large ones, and those that look like a reference."""

from __future__ import annotations

import json
from typing import Any

import pytest

from concurrency import offload
from concurrency.offload import BudgetExceeded
from journal.blobs import large_values
from journal.blobs.blob_reference import BlobReference
from journal.blobs.large_values import MAX_ROW_BYTES, EncodedTrigger

REFERENCE = BlobReference("0" * 64, 1, "application/json")
REST: dict[str, Any] = {"headers": {"x": "1"}, "query": {}}


@pytest.mark.parametrize(("length", "is_large"), [(MAX_ROW_BYTES - 2, False), (MAX_ROW_BYTES - 1, True)])
def test_a_body_is_large_by_its_bytes_as_json(length: int, *, is_large: bool) -> None:
    encoded = EncodedTrigger.of({"body": "x" * length, **REST})
    assert encoded.is_large is is_large
    assert json.loads(encoded.body) == "x" * length


def test_a_row_names_the_body_and_holds_the_rest() -> None:
    row = EncodedTrigger.of({"body": [1], **REST}).as_row(REFERENCE)
    assert json.loads(row) == {"body": REFERENCE.as_json(), **REST}
    assert large_values.has_separate_body(row)
    assert large_values.find_reference(row) == REFERENCE


def test_no_body_of_a_sender_passes_for_a_reference() -> None:
    encoded = EncodedTrigger.of({"body": REFERENCE.as_json(), **REST})
    assert not large_values.has_separate_body(encoded.content.decode())


def test_a_long_body_is_not_written_while_others_wait() -> None:
    with pytest.raises(BudgetExceeded):
        offload.try_inline(EncodedTrigger.of, {"body": "x" * MAX_ROW_BYTES, **REST})
