"""What a node asks of our own database, asked again for as long as that doesn't answer."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Final, TypeVar

from models.errors import DatabaseUnavailable

T = TypeVar("T")

PAUSE_SECONDS: Final = 0.5


async def until_available(work: Callable[[], Awaitable[T]]) -> T:
    """Return what `work` returns once the database has answered; the end of the run's lease breaks that off.

    What failed may have been done all the same, so `work` is harmless twice.
    """
    while True:
        try:
            return await work()
        except DatabaseUnavailable:
            await asyncio.sleep(PAUSE_SECONDS)
