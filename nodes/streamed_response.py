"""Response whose body is read while it arrives; the sender is slowed down by a slow reader."""

from __future__ import annotations

import asyncio
from collections import deque
from typing import TYPE_CHECKING, Final, Self

if TYPE_CHECKING:
    from collections.abc import Callable

MAX_UNREAD_BYTES: Final = 262_144
"""Unread bytes above which the connection stops reading."""


class StreamedResponse:
    """Response of one exchange: status and headers first, then the decompressed body in pieces, by iteration."""

    def __init__(self, transport: asyncio.Transport) -> None:
        self._transport = transport
        self._pieces: deque[bytes] = deque()
        self._unread = 0
        self._error: BaseException | None = None
        self._has_ended = False
        self._is_paused = False
        self._changed = asyncio.Event()
        self.status = 0
        """0 until the headers have arrived."""
        self.headers: dict[str, str] = {}

    async def wait_for_headers(self) -> None:
        """Wait until status and headers have arrived; raises the error of an exchange that has failed before."""
        await self._wait_until(lambda: self.status > 0)

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> bytes:
        """Wait for the next piece of the body and return it; after the last piece, the iteration ends, or the error of
        an exchange that has failed is raised.
        """
        await self._wait_until(lambda: bool(self._pieces))
        if not self._pieces:
            raise StopAsyncIteration
        piece = self._pieces.popleft()
        self._unread -= len(piece)
        if self._unread <= MAX_UNREAD_BYTES // 2:
            self.resume_reading()
        return piece

    # ── called by the connection ────────────────────────────────────────────────────────────────────────────────

    def begin(self, status: int, headers: dict[str, str]) -> None:
        """Set status and headers, for which readers may wait."""
        self.status, self.headers = status, headers
        self._changed.set()

    def add(self, piece: bytes) -> None:
        """Add a piece of the body; the connection stops reading while too many are unread."""
        self._pieces.append(piece)
        self._unread += len(piece)
        if self._unread > MAX_UNREAD_BYTES and not self._is_paused and not self._transport.is_closing():
            self._is_paused = True
            self._transport.pause_reading()
        self._changed.set()

    def end(self, error: BaseException | None) -> None:
        """End the response; readers get `error` after the pieces that have arrived."""
        self._error, self._has_ended = error, True
        self._changed.set()

    def resume_reading(self) -> None:
        """Make the connection read again if `add` has stopped it."""
        if self._is_paused:
            self._is_paused = False
            if not self._transport.is_closing():
                self._transport.resume_reading()

    async def _wait_until(self, is_reached: Callable[[], bool]) -> None:
        """Wait for a condition or the end of the exchange; raises its error if the condition is not met by then."""
        while not is_reached() and not self._has_ended:
            self._changed.clear()
            await self._changed.wait()
        if not is_reached() and self._error is not None:
            raise self._error
