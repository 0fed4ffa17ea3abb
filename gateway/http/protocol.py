"""Uvicorn's HTTP/1.1 with what it lacks: bounds on a request's head, answers in one packet, our shape for what isn't
HTTP at all.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Final, cast

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from gateway import errors
from models import ids

if TYPE_CHECKING:
    from collections.abc import Callable

MAX_HEAD_BYTES: Final = 64 * 1024
MAX_UNREAD_BYTES: Final = 32 * 1024 * 1024
"""How much of a body may come after the answer: a client whose connection is cut at once never sees why."""
REQUEST_SECONDS: Final = 60.0
"""How long a client may take to say what it wants: from connecting, or its first byte, to the end of the body."""


MAX_GATHERED_BYTES: Final = 64 * 1024


class Gathering:
    """A transport that sends together what is written in one turn of the loop: an answer's head with its body.

    Each packet costs both sides a system call, and those are most of what an answer costs.
    """

    def __init__(self, transport: asyncio.Transport, loop: asyncio.AbstractEventLoop) -> None:
        self._transport = transport
        self._loop = loop
        self._gathered: list[bytes] = []
        self.get_extra_info = transport.get_extra_info
        self.is_closing = transport.is_closing
        self.pause_reading = transport.pause_reading
        self.resume_reading = transport.resume_reading

    def write(self, data: bytes) -> None:
        if not self._gathered:
            self._loop.call_soon(self._send)
        self._gathered.append(data)
        if len(data) > MAX_GATHERED_BYTES:
            self._send()

    def close(self) -> None:
        self._send()
        self._transport.close()

    def _send(self) -> None:
        if self._gathered:
            self._transport.write(b"".join(self._gathered))
            self._gathered.clear()


class BoundedProtocol(HttpToolsProtocol):
    """One connection; it is closed when it takes too long, or too many words, to say what it wants."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as Uvicorn has it
        super().connection_made(cast("asyncio.Transport", Gathering(transport, self.loop)))
        self._is_head = False
        self._is_complete = False
        self._unread_bytes = 0
        """Of a head that goes on, or of a body that was answered before it was read."""
        self._timer: asyncio.TimerHandle | None = self._close_later()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        is_served = self.cycle is not None and not self.cycle.response_complete
        if is_served and self._is_complete:
            self._stop_timer()
            return
        if self._timer is None:
            self._timer = self._close_later()
        if self._is_head or not is_served:
            self._unread_bytes += len(data)
        if self._unread_bytes > (MAX_HEAD_BYTES if self._is_head else MAX_UNREAD_BYTES):
            self.transport.close()

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._is_head = True
        self._is_complete = False
        self._unread_bytes = 0

    def on_headers_complete(self) -> None:
        super().on_headers_complete()
        self._is_head = False
        self._unread_bytes = 0

    def on_message_complete(self) -> None:
        super().on_message_complete()
        self._is_complete = True

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timer()
        super().connection_lost(exc)

    def send_400_response(self, msg: str) -> None:
        request_id = ids.new("req")
        body = errors.ApiError(400, "malformed-request", msg).response(request_id).body
        head = (
            "HTTP/1.1 400 Bad Request\r\ncontent-type: application/json\r\n"
            f"x-request-id: {request_id}\r\ncontent-length: {len(body)}\r\nconnection: close\r\n\r\n"
        )
        self.transport.write(head.encode() + body)
        self.transport.close()

    def _close_later(self) -> asyncio.TimerHandle:
        close: Callable[[], None] = self.transport.close
        return self.loop.call_later(REQUEST_SECONDS, close)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
