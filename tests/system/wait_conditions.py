"""Waits of tests for conditions, and for times without a condition."""

from __future__ import annotations

import asyncio
import inspect
import time
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar, overload

T = TypeVar("T")

PATIENCE_SECONDS = 60.0
POLL_SECONDS = 0.05
"""Pause between two looks, most of which are requests: fifty a second would keep a server busy."""


@overload
async def wait_until(
    condition: Callable[[], Coroutine[Any, Any, T | None]], within: float = ..., *, what: str = ...
) -> T: ...


@overload
async def wait_until(condition: Callable[[], T | None], within: float = ..., *, what: str = ...) -> T: ...


async def wait_until(
    condition: Callable[[], object], within: float = PATIENCE_SECONDS, *, what: str = ""
) -> object:
    """Return the result of `condition` as soon as it is true. Raises TimeoutError that names the awaited
    condition.
    """
    deadline = time.monotonic() + within
    while True:
        outcome = condition()
        if inspect.isawaitable(outcome):
            outcome = await outcome
        if outcome:
            return outcome
        if time.monotonic() > deadline:
            raise TimeoutError(f"after {within:g} s: {what or inspect.getsource(condition).strip()}")
        await asyncio.sleep(POLL_SECONDS)


async def act_after(seconds: float, action: Callable[[], object]) -> None:
    """Call an action after so many seconds, a random time that no condition marks."""
    await asyncio.sleep(seconds)
    action()


async def stop_accepting(descriptor: int) -> None:
    """Accept no more connections of a server of asyncio, so that it can be closed.

    A connection that is being accepted while its server is closed is never closed: Python warns of it later, in
    another test.
    """
    asyncio.get_running_loop().remove_reader(descriptor)
    await asyncio.sleep(0)
