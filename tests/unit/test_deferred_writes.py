"""Writes that are stored together: in order, and again after a failure of the database."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest

from execution.deferred_writes import MAX_BATCH, DeferredWrites
from models.errors import DatabaseUnavailable

pytestmark = pytest.mark.anyio


async def test_writes_wait_for_an_unavailable_database_and_are_stored_in_order() -> None:
    failures, stored, is_stored = [True, True], list[int](), asyncio.Event()

    async def store(batch: Sequence[int]) -> None:
        if failures:
            failures.pop()
            raise DatabaseUnavailable("away")
        stored.extend(batch)
        is_stored.set()

    writes = DeferredWrites(store, delay_seconds=0.0)
    for number in range(3):
        writes.add(number)
    await is_stored.wait()
    assert stored == [0, 1, 2]
    await writes.close()


async def test_a_write_that_is_refused_holds_up_no_other() -> None:
    stored = list[int]()

    async def store(batch: Sequence[int]) -> None:
        if 1 in batch:
            raise OverflowError("too large")
        stored.extend(batch)

    writes = DeferredWrites(store, delay_seconds=3_600.0)
    for number in range(3):
        writes.add(number)
    await writes.close()
    assert stored == [0, 2]


async def test_the_end_of_a_process_stores_waiting_writes() -> None:
    batches = list[int]()

    async def store(batch: Sequence[int]) -> None:
        batches.append(len(batch))

    writes = DeferredWrites(store, delay_seconds=3_600.0)
    for number in range(MAX_BATCH + 1):
        writes.add(number)
    await writes.close()
    assert batches == [MAX_BATCH, 1]
