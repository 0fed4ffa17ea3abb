"""Circuit breaker of database calls, with a server whose answers the test controls."""

from __future__ import annotations

import asyncio
import time

import pytest

from models import circuit_breaker
from models.circuit_breaker import CircuitBreaker
from models.errors import DatabaseUnavailable

TURNS = 30
"""Event loop turns until an answer is seen: more than the steps of a probe."""


@pytest.fixture(autouse=True)
def _hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("LATE_SECONDS", "CHECK_SECONDS", "PROBE_STEP_SECONDS", "PAUSE_SECONDS"):
        monkeypatch.setattr(circuit_breaker, name, 0.01)


async def test_calls_are_given_up_where_the_server_answers_no_probe_and_let_through_once_it_does() -> None:
    answers = asyncio.Event()
    broken: list[bool] = []
    breaker = CircuitBreaker(answers.wait, lambda: broken.append(True))

    async def call() -> None:
        with breaker.guard():
            await asyncio.Event().wait()

    outcomes = await asyncio.gather(call(), call(), return_exceptions=True)
    assert [type(one) for one in outcomes] == [DatabaseUnavailable] * 2
    assert broken == [True]
    with pytest.raises(DatabaseUnavailable), breaker.guard():
        pytest.fail("it is open")
    answers.set()
    for _ in range(1_000):
        try:
            with breaker.guard():
                return
        except DatabaseUnavailable:
            await asyncio.sleep(0.01)
    pytest.fail("it stays open")


async def test_a_cancelled_call_raises_no_outage() -> None:
    breaker = CircuitBreaker(asyncio.Event().wait, lambda: None)

    async def call() -> None:
        with breaker.guard():
            await asyncio.Event().wait()

    task = asyncio.create_task(call())
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_a_loop_that_is_busy_itself_proves_nothing_about_the_server() -> None:
    answered = asyncio.Event()

    async def probe() -> None:
        for _ in range(TURNS):
            await asyncio.sleep(0)
        answered.set()

    broken: list[bool] = []
    breaker = CircuitBreaker(probe, lambda: broken.append(True))
    with breaker.guard():
        while not answered.is_set():
            time.sleep(0.025)  # noqa: ASYNC251 - that is the point
            await asyncio.sleep(0)
    assert not broken
