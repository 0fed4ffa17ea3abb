"""Moments that tests wait for, and those that no condition tells."""

from __future__ import annotations

import asyncio
import inspect
import time
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar, overload

T = TypeVar("T")

PATIENCE_SECONDS = 60.0
POLL_SECONDS = 0.02


@overload
async def wait_until(
    condition: Callable[[], Coroutine[Any, Any, T | None]], within: float = ..., *, what: str = ...
) -> T: ...


@overload
async def wait_until(condition: Callable[[], T | None], within: float = ..., *, what: str = ...) -> T: ...


async def wait_until(
    condition: Callable[[], object], within: float = PATIENCE_SECONDS, *, what: str = ""
) -> object:
    """Return what `condition` gives as soon as that is true; raises TimeoutError with what was waited for."""
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
    """Do something at a moment that no condition tells: the random point of a fault."""
    await asyncio.sleep(seconds)
    action()
