"""Long computations: started on the event loop, repeated in a thread, and scheduled fairly."""

from __future__ import annotations

import asyncio
import threading

import pytest

from concurrency import offload
from concurrency.offload import BudgetExceeded
from engine import values
from engine.expressions import ExpressionError, compile_value
from engine.values import InvalidJson
from tests.loop_heartbeat import measure_heartbeat

MANY = 3_000_000
LONGEST_DELAY_SECONDS = 0.15


def current_thread_name() -> str:
    offload.require_offloaded()
    return threading.current_thread().name


async def test_long_computations_are_repeated_in_a_thread() -> None:
    assert (await offload.run(current_thread_name)).startswith("long-work")
    assert await offload.run(len, "short") == 5


def test_only_inline_attempts_have_a_budget() -> None:
    assert values.encode_json([0] * MANY)
    with pytest.raises(BudgetExceeded):
        offload.try_inline(values.encode_json, [0] * MANY)
    with pytest.raises(BudgetExceeded):
        offload.try_inline(values.decode_json, b"[" + b"1," * MANY + b"1]")
    assert offload.try_inline(values.encode_json, [0] * 1_000)


def test_a_limit_is_the_same_however_the_work_is_begun() -> None:
    with pytest.raises(InvalidJson, match="more than 1,000,000 bytes"):
        values.encode_json([0] * MANY, max_bytes=1_000_000)
    bomb = compile_value([{"$op": "length", "args": [{"$op": "unique", "args": ["{{ data }}"]}]}] * 400)
    with pytest.raises(BudgetExceeded):
        offload.try_inline(bomb.render, {"data": [0] * MANY}, [])
    with pytest.raises(ExpressionError, match="more than 10,000,000"):
        bomb.render({"data": [0] * MANY}, [])


async def test_a_coroutine_that_takes_long_goes_on_in_the_thread_turn_by_turn() -> None:
    threads: list[str] = []

    async def work() -> int:
        for _ in range(3):
            await offload.yield_to_loop()
            threads.append(current_thread_name())
        return 7

    assert await offload.run_coroutine(work) == 7
    assert len(threads) == 3
    assert all(name.startswith("long-work") for name in threads)


async def test_a_coroutine_in_the_thread_is_cancelled_with_its_caller() -> None:
    begun, ended = threading.Event(), threading.Event()

    async def work() -> None:
        offload.require_offloaded()
        begun.set()
        try:
            while True:
                await offload.yield_to_loop()
        finally:
            ended.set()

    task = asyncio.create_task(offload.run_coroutine(work))
    assert await asyncio.to_thread(begun.wait, 5)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert await asyncio.to_thread(ended.wait, 5)


async def test_however_many_have_much_to_do_the_loop_waits_for_one_at_a_time() -> None:
    order: list[int] = []

    async def work(number: int) -> None:
        for _ in range(3):
            await offload.yield_to_loop()
            order.append(number)

    passes = 0

    async def count() -> None:
        nonlocal passes
        while len(order) < 30:
            passes += 1
            await asyncio.sleep(0)

    await asyncio.gather(count(), *(work(number) for number in range(10)))
    assert order == [*range(10)] * 3
    assert passes >= 30


async def test_an_abandoned_turn_blocks_no_other() -> None:
    tasks = [asyncio.create_task(offload.yield_to_loop()) for _ in range(3)]
    await asyncio.sleep(0)
    tasks[0].cancel()
    tasks[1].cancel()
    async with asyncio.timeout(60):
        await tasks[2]


async def test_the_loop_goes_on_while_a_large_value_is_written() -> None:
    async with measure_heartbeat() as heartbeat:
        await offload.run(values.encode_json, [0] * MANY)
    assert heartbeat.longest_delay_seconds < LONGEST_DELAY_SECONDS
