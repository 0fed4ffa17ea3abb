"""Opening of connections that a canceled caller leaves in no half-open state."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from functools import partial
from typing import TypeVar

T = TypeVar("T")


async def open_shielded(opening: Awaitable[T], close: Callable[[T], object]) -> T:
    """Return the connection that `opening` gives, and propagate its exceptions.

    If the caller is canceled, the opening goes on by itself, and `close` gets the connection as soon as it is
    open: drivers that are canceled during a login leave open files or unhandled errors behind.
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
