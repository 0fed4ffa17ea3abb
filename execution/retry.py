"""Retries of database work on behalf of nodes."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Final, TypeVar

from models.errors import DatabaseUnavailable

T = TypeVar("T")

PAUSE_SECONDS: Final = 0.5


async def until_available(work: Callable[[], Awaitable[T]]) -> T:
    """Call `work` every half a second until the database is available; return its result.

    A failed call may have been committed, so `work` must be idempotent. Losing the lease of the run cancels
    it. Raises all errors of `work` but `DatabaseUnavailable`.
    """
    while True:
        try:
            return await work()
        except DatabaseUnavailable:
            await asyncio.sleep(PAUSE_SECONDS)
