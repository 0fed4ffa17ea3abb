"""Pacing of calls of models: rates, calls at the same time, and the times that runs wait for."""

from __future__ import annotations

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.model_calls import ModelCallFailed, ModelProvider
from engine.model_limits import ModelLimits, ModelLimitShare, share_limits
from nodes.ai.model_connection import ModelConnection
from nodes.ai.model_pacing import ModelPacer, RateWindow

pytestmark = pytest.mark.anyio


class ManualClock:
    """Clock that a test moves."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def limited_model(
    requests: float | None = None, tokens: float | None = None, concurrency: int | None = None
) -> ModelConnection:
    share = ModelLimitShare(requests, tokens, concurrency)
    return ModelConnection("model_1", ModelProvider.OPENAI_COMPATIBLE, limits=share)


async def find_wait_seconds(pacer: ModelPacer, model: ModelConnection, tokens: int = 1) -> float:
    """Return the wait of a call that is not admitted, and whose run comes back."""
    with pytest.raises(ModelCallFailed) as refused:
        async with pacer.admit(model, tokens):
            pass
    assert (refused.value.code, refused.value.retryable) == ("model-limit-reached", True)
    assert refused.value.retry_after_seconds is not None
    assert refused.value.book_return is not None
    return refused.value.book_return()


async def test_calls_over_the_rate_wait_and_come_back_one_after_another() -> None:
    clock, model = ManualClock(), limited_model(requests=2)
    pacer = ModelPacer(clock)
    for _ in range(2):
        async with pacer.admit(model, 1):
            pass
    clock.now = 10.0
    assert [await find_wait_seconds(pacer, model) for _ in range(3)] == [50.0, 80.0, 110.0]
    clock.now = 60.0
    async with pacer.admit(model, 1):
        pass


async def test_runs_that_ask_another_model_push_no_run_back() -> None:
    model, pacer = limited_model(requests=60), ModelPacer(ManualClock())
    for _ in range(60):
        async with pacer.admit(model, 1):
            pass
    for _ in range(10_000):
        with pytest.raises(ModelCallFailed) as refused:
            async with pacer.admit(model, 1):
                pass
        assert refused.value.retry_after_seconds == 60.0
    assert [await find_wait_seconds(pacer, model) for _ in range(2)] == [60.0, 61.0]


async def test_the_tokens_that_a_call_has_used_replace_the_estimate() -> None:
    model = limited_model(tokens=1_000)
    pacer = ModelPacer(ManualClock())
    async with pacer.admit(model, 900) as admitted:
        assert await find_wait_seconds(pacer, model, 200) == 60.0
        admitted.note_tokens(300)
    async with pacer.admit(model, 700):
        pass


async def test_a_call_over_the_whole_rate_is_admitted_alone_and_holds_it_for_longer() -> None:
    clock, model = ManualClock(), limited_model(tokens=100)
    pacer = ModelPacer(clock)
    async with pacer.admit(model, 250):
        pass
    assert await find_wait_seconds(pacer, model) == 150.0


async def test_a_call_waits_for_the_end_of_another_one() -> None:
    model, pacer, ended = limited_model(concurrency=1), ModelPacer(), list[str]()

    async def call(name: str, until: asyncio.Event) -> None:
        async with pacer.admit(model, 1):
            await until.wait()
            ended.append(name)

    first, second = asyncio.Event(), asyncio.Event()
    async with asyncio.TaskGroup() as group:
        group.create_task(call("first", first))
        await asyncio.sleep(0)
        group.create_task(call("second", second))
        second.set()
        await asyncio.sleep(0)
        assert not ended
        first.set()
    assert ended == ["first", "second"]


async def test_a_call_that_finds_no_place_in_time_waits_without_a_slot() -> None:
    model, pacer = limited_model(concurrency=1), ModelPacer(longest_wait_in_process=0.0)
    async with pacer.admit(model, 1):
        assert 5.0 <= await find_wait_seconds(pacer, model) <= 15.0
    async with pacer.admit(model, 1):
        pass


async def test_runs_behind_calls_at_the_same_time_come_back_at_the_rate_of_these_calls() -> None:
    clock, model = ManualClock(), limited_model(concurrency=2)
    pacer = ModelPacer(clock, longest_wait_in_process=0.0)
    async with pacer.admit(model, 1):
        clock.now += 30.0
    async with pacer.admit(model, 1), pacer.admit(model, 1):
        first, *others = [await find_wait_seconds(pacer, model) for _ in range(5)]
    assert others == pytest.approx([first + 15.0 * number for number in range(1, 5)])


def test_processes_share_limits_equally_with_at_least_one_call_each() -> None:
    limits = ModelLimits(requests_per_minute=10, tokens_per_minute=None, concurrency=3)
    assert share_limits(limits, 4) == ModelLimitShare(2.5, None, 1)


@given(st.lists(st.tuples(st.floats(0, 30), st.integers(1, 40)), max_size=40))
def test_no_minute_has_more_than_the_rate(calls: list[tuple[float, int]]) -> None:
    window, limit, now, made = RateWindow(), 50, 0.0, list[tuple[float, int]]()
    for pause, weight in calls:
        now += pause
        now += window.count_wait_seconds(now, weight, limit)
        assert window.count_wait_seconds(now, weight, limit) == 0
        window.add(now, weight, limit)
        made.append((now, weight))
    for start, _ in made:
        assert sum(weight for at, weight in made if start <= at < start + 59.999) <= limit
