"""Retries with backoff until a service is available or the process stops."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import suppress
from random import uniform
from typing import Final, TypeVar

import structlog

from bridge.bridge_errors import BridgeStopped, BridgeUnavailable

T = TypeVar("T")

FIRST_PAUSE_SECONDS: Final = 0.1
MAX_PAUSE_SECONDS: Final = 30.0
MAX_DOUBLINGS: Final = 10
MAX_RETRY_AFTER_SECONDS: Final = 600.0
"""Maximum `Retry-After` that is respected."""

log = structlog.get_logger()


async def until_available(work: Callable[[], Awaitable[T]], stop: asyncio.Event) -> T:
    """Return the result of `work`, called again after each `BridgeUnavailable`, with a growing pause (0.1 to
    30 seconds).

    A requested `Retry-After` of up to 10 minutes is added. Raises `BridgeStopped` if the stop event is set
    during a pause, and other errors of `work` at once.
    """
    failures = 0
    while True:
        try:
            result = await work()
        except BridgeUnavailable as error:
            failures += 1
            seconds = pause_seconds(failures, error.retry_after_seconds)
            note = log.warning if failures == 1 else log.debug
            note("bridge waits", reason=str(error), seconds=round(seconds, 1))
        else:
            if failures:
                log.info("bridge continues", failures=failures)
            return result
        with suppress(TimeoutError):
            await asyncio.wait_for(stop.wait(), seconds)
        if stop.is_set():
            raise BridgeStopped("The process stopped while it waited")


def pause_seconds(failures: int, retry_after_seconds: float) -> float:
    """Return the seconds to wait after this many consecutive failures (1 or more).

    Doubles from 0.1 up to 30 seconds, of which a random 50 to 100 % count, plus the requested seconds, at
    most 600.
    """
    own = min(MAX_PAUSE_SECONDS, FIRST_PAUSE_SECONDS * 2.0 ** min(failures - 1, MAX_DOUBLINGS))
    spread = own * uniform(0.5, 1.0)  # noqa: S311 - spreads load only
    return min(retry_after_seconds, MAX_RETRY_AFTER_SECONDS) + spread
