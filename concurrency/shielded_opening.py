"""Opening of connections that a canceled caller leaves in no half-open state."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from functools import partial
from typing import TypeVar

T = TypeVar("T")


async def open_shielded(opening: Awaitable[T], close: Callable[[T], object]) -> T:
    """Await the opening of a connection, and return the connection or raise the error of `opening`.

    If the caller is canceled, `opening` continues in the background, and `close` is called with the connection once it
    is open: drivers that are canceled during a login leave open files or unhandled errors behind.
    """
    task = asyncio.ensure_future(opening)
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        task.add_done_callback(partial(_discard, close))
        raise


def _discard(close: Callable[[T], object], opening: asyncio.Future[T]) -> None:
    """Close the connection of an opening that nobody waits for any more."""
    if not opening.cancelled() and opening.exception() is None:
        close(opening.result())
