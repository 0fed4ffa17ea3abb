"""Uvicorn's HTTP/1.1 protocol with limits on the time and memory that clients take.

Also sends the head and body of an answer in one packet, and answers malformed HTTP in the shape of the API's
errors.
"""

from __future__ import annotations

import asyncio
import socket
from collections import Counter
from contextlib import suppress
from time import monotonic
from typing import TYPE_CHECKING, Any, Final, cast

from msgspec import Struct, field
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from gateway.http import errors, metrics
from gateway.http.byte_budget import ByteBudget, ByteHolding
from gateway.http.connection_budget import ClientConnectionPhase, ConnectionBudget
from gateway.http.request_origin import client_of
from models import ids

if TYPE_CHECKING:
    from collections.abc import Callable

    from gateway.http.errors import ApiError
    from gateway.http.proxies import TrustedProxies

MAX_HEAD_BYTES: Final = 64 * 1024
MAX_UNREAD_BYTES: Final = 32 * 1024 * 1024
"""Bytes of a body accepted after its answer: a client whose connection is cut at once never reads the answer.
"""
MAX_GATHERED_BYTES: Final = 64 * 1024
TAKEN_BYTES: Final = 16 * 1024
"""Bytes that a client must receive of a pending answer within `stall_seconds`."""
POD_BODIES_BYTES: Final = 67_108_864
UNSENT_BYTES: Final = 134_217_728
"""Maximum bytes of unsent answers of all clients together."""
INTERNAL: Final = "/internal/"
ALWAYS_SERVED: Final = ("/healthz", "/readyz")
READS: Final = frozenset({"GET", "HEAD"})


class ConnectionBounds(Struct):
    """Limits of all connections of a server together, and time limits of each."""

    connections: ConnectionBudget
    max_requests_per_client: int
    """Maximum requests of one client in progress."""
    bodies: ByteBudget
    proxies: TrustedProxies
    head_seconds: float
    """Time for the head of a request, from the connection or the end of the previous request."""
    body_seconds: float
    stall_seconds: float
    """Time for which a client may receive nothing of a pending answer."""
    pod_bodies: ByteBudget = field(
        default_factory=lambda: ByteBudget(POD_BODIES_BYTES, share_bytes=POD_BODIES_BYTES)
    )
    """Separate budget, so that uploads never hold up the runs of pods."""
    unsent: ByteBudget = field(default_factory=lambda: ByteBudget(UNSENT_BYTES, share_bytes=UNSENT_BYTES))
    requests: Counter[str] = field(default_factory=Counter)
    """Requests in progress, by client."""


class RequestHolding:
    """Share of the limits that one request occupies until it is released."""

    __slots__ = (
        "_bounds",
        "_has_left",
        "_is_released",
        "_on_disconnect",
        "_transport",
        "body",
        "client",
        "refusal",
    )

    def __init__(
        self,
        bounds: ConnectionBounds,
        client: str,
        body: ByteHolding,
        transport: BufferedTransport | None = None,
    ) -> None:
        self._bounds = bounds
        self._transport = transport
        self._is_released = False
        self._has_left = False
        self._on_disconnect: Callable[[], None] | None = None
        self.client = client
        self.body = body
        self.refusal: ApiError | None = None
        """Answer to send without calling a handler."""
        if client:
            bounds.requests[client] += 1
            if bounds.requests[client] > bounds.max_requests_per_client:
                self.refusal = errors.busy("Too many concurrent requests of this address")

    def call_on_disconnect(self, callback: Callable[[], None]) -> None:
        """Call `callback` as soon as the client leaves before its answer; at once if it has left already.

        It replaces the callback of an earlier call.
        """
        if self._has_left:
            callback()
        else:
            self._on_disconnect = callback

    def bound_silence(self, seconds: float) -> None:
        """Let the system end the connection if the client does not acknowledge sent bytes for this many seconds.

        Without it, a client that is gone without a word, such as a host without power, is noticed after 15 minutes.
        Nothing happens where the system has no such limit, and for connections other than TCP.
        """
        found = None if self._transport is None else self._transport.get_extra_info("socket")
        option = getattr(socket, "TCP_USER_TIMEOUT", None)
        if found is not None and option is not None and found.family in {socket.AF_INET, socket.AF_INET6}:
            with suppress(OSError):  # the connection has ended meanwhile
                found.setsockopt(socket.IPPROTO_TCP, option, int(seconds * 1_000))

    def disconnect(self) -> None:
        """Note that the client has left before its answer, and call the callback for that."""
        self._has_left = True
        if self._on_disconnect is not None:
            self._on_disconnect()
            self._on_disconnect = None

    def release(self) -> None:
        """Free the request's slot of its client, and the bytes of its body in the budget; repeated calls
        change nothing.
        """
        self.body.release()
        if self.client and not self._is_released:
            self._bounds.requests[self.client] -= 1
            if not self._bounds.requests[self.client]:
                del self._bounds.requests[self.client]
        self._is_released = True


class BufferedTransport:
    """Transport that joins all writes of one event loop iteration, such as the head and body of an answer.

    Each packet costs both sides a system call, which is most of the cost of an answer.
    """

    def __init__(
        self, transport: asyncio.Transport, loop: asyncio.AbstractEventLoop, linger_seconds: float
    ) -> None:
        """Wrap a transport; after `close`, a client that doesn't read the rest within `linger_seconds` is cut off."""
        self._transport = transport
        self._loop = loop
        self._linger_seconds = linger_seconds
        self._lingering: asyncio.TimerHandle | None = None
        self._gathered: list[bytes] = []
        self.get_extra_info = transport.get_extra_info
        self.is_closing = transport.is_closing
        self.pause_reading = transport.pause_reading
        self.resume_reading = transport.resume_reading
        self.get_write_buffer_size = transport.get_write_buffer_size
        self.abort = transport.abort

    def write(self, data: bytes) -> None:
        """Gather data to send at the end of the event loop's iteration; a piece over 64 kB sends all of it at once."""
        if not self._gathered:
            self._loop.call_soon(self._send)
        self._gathered.append(data)
        if len(data) > MAX_GATHERED_BYTES:
            self._send()

    def close(self) -> None:
        """Send what is gathered and close the connection; a client that does not take it in time is cut off."""
        self._send()
        self._transport.close()
        if self._lingering is None:
            self._lingering = self._loop.call_later(self._linger_seconds, self.abort)

    def stop_lingering(self) -> None:
        """Cancel the timer that would cut off a slow client, because the connection is gone."""
        if self._lingering is not None:
            self._lingering.cancel()

    def _send(self) -> None:
        """Send what is gathered."""
        if self._gathered:
            self._transport.write(b"".join(self._gathered))
            self._gathered.clear()


class BoundedProtocol(HttpToolsProtocol):
    """One connection within the limits, closed when its client takes too long or sends too much."""

    def __init__(self, bounds: ConnectionBounds, *args: Any, **kwargs: Any) -> None:  # noqa: ANN401 - as Uvicorn has it
        super().__init__(*args, **kwargs)
        self._bounds = bounds

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as Uvicorn has it
        """Begin a connection with the time limit for its first request, or abort it at once if the budget has no place
        for it.
        """
        gathering = BufferedTransport(transport, self.loop, self._bounds.stall_seconds)
        super().connection_made(cast("asyncio.Transport", gathering))
        self.gathering = gathering
        self._is_head = False
        self._is_complete = True
        self._unread_bytes = 0
        """Bytes of an unfinished head, or of a body that was answered before it was read."""
        self._timer: asyncio.TimerHandle | None = None
        self._is_timed_for_head = True
        self._progress_timer: asyncio.TimerHandle | None = None
        """Timer that checks whether the client receives its answer."""
        self._unsent: ByteHolding | None = None
        self._holding: RequestHolding | None = None
        self._is_read = False
        self.since = monotonic()
        host = self.client[0] if self.client else ""
        self._peer = "" if self._bounds.proxies.is_trusted(host) else client_of(host)
        self._close_after(self._bounds.head_seconds)
        if not self._bounds.connections.admit(self):
            gathering.abort()

    # ── interface of the connection budget
    # ────────────────────────────────────────────────────────────────────

    @property
    def _is_served(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    @property
    def phase(self) -> ClientConnectionPhase:
        """Phase of the connection, by the event that it waits for; it decides how soon it is closed to make room."""
        if self.gathering.is_closing():
            return ClientConnectionPhase.CLOSING
        if not self._is_complete or self.flow.write_paused:
            return ClientConnectionPhase.WAITING_FOR_CLIENT
        if not self._is_served:
            return ClientConnectionPhase.IDLE
        return ClientConnectionPhase.READING if self._is_read else ClientConnectionPhase.SERVED

    @property
    def client_key(self) -> str:
        """Client of the request in progress, otherwise the peer of the connection."""
        return self._holding.client if self._holding is not None and self._is_served else self._peer

    def cut(self) -> None:
        """Close the connection at once, without sending what is buffered."""
        self.gathering.abort()

    # ── requests ──────────────────────────────────────────────────────────────────────────────────────────

    def data_received(self, data: bytes) -> None:
        """Receive bytes: set the time limit for head or body, and close the connection if too much arrives unread.

        Limits are 64 kB for the head, and 32 MB for the rest of a body that was answered before it was read.
        """
        super().data_received(data)
        is_served = self._is_served
        if is_served and self._is_complete:
            self._stop_timer()
            return
        is_for_head = self._is_head or self._is_complete
        if self._timer is None or self._is_timed_for_head is not is_for_head:
            self._is_timed_for_head = is_for_head
            self._close_after(self._bounds.head_seconds if is_for_head else self._bounds.body_seconds)
        if self._is_head or not is_served:
            self._unread_bytes += len(data)
        if self._unread_bytes > (MAX_HEAD_BYTES if self._is_head else MAX_UNREAD_BYTES):
            self.transport.close()

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self.since = monotonic()
        self._is_head = True
        self._is_complete = False
        self._unread_bytes = 0

    def on_headers_complete(self) -> None:
        """Count a request against the limits of its client before its task starts, and refuse it with 503 beyond these,
        or if there are too many connections.

        Requests of pods, probes and trusted proxies are not counted.
        """
        super().on_headers_complete()  # its task starts in the next event loop iteration at the earliest
        self._is_head = False
        self._unread_bytes = 0
        path = self.scope["path"]
        is_internal = path.startswith(INTERNAL)
        is_always_served = is_internal or path in ALWAYS_SERVED
        source = self._bounds.proxies.client(self.client, self.headers)
        host = source[0] if source else ""
        budget = self._bounds.pod_bodies if is_internal else self._bounds.bodies
        # Pods are few and authenticated: their runs continue under any load of others.
        is_bounded = not is_always_served and not self._bounds.proxies.is_trusted(host)
        self._holding = RequestHolding(
            self._bounds,
            client_of(host) if is_bounded else "",
            ByteHolding(budget, client_of(host), self._drop_body),
            self.gathering,
        )
        if self._bounds.connections.is_over and not is_always_served:
            self._holding.refusal = errors.busy("Too many open connections", closes=True)
        scope = cast("dict[str, Any]", self.scope)
        scope["client"], scope["holding"] = source, self._holding
        self._is_read = not is_internal and self.scope["method"] in READS

    def on_body(self, body: bytes) -> None:
        """Add bytes of a body to the request, unless the memory budget has dropped that body."""
        if self._holding is None or self.cycle.response_complete or self._holding.body.add(len(body)):
            super().on_body(body)

    def on_message_complete(self) -> None:
        super().on_message_complete()
        self.since = monotonic()
        self._is_complete = True
        if self._holding is not None:
            self._holding.body.is_moving = False

    def on_response_complete(self) -> None:
        self.since = monotonic()
        super().on_response_complete()

    def _drop_body(self) -> None:
        """Drop the body of the request in favor of others; the handler's next read raises a 503 error."""
        metrics.count_abandoned_body()
        self.cycle.body = bytearray()
        self.cycle.message_event.set()

    # ── answers ───────────────────────────────────────────────────────────────────────────────────────────

    def pause_writing(self) -> None:
        """Count the unsent bytes of an answer against their budget, which may cut off connections, and check later that
        the client takes them.
        """
        super().pause_writing()
        if self._unsent is None:
            client = self._holding.client if self._holding is not None else self._peer
            self._unsent = ByteHolding(self._bounds.unsent, client, self.gathering.abort)
            size = self.gathering.get_write_buffer_size()
            self._check_later(size)
            self._unsent.add(size)

    def resume_writing(self) -> None:
        self._stop_checking()
        super().resume_writing()

    def _check_later(self, size: int) -> None:
        self._progress_timer = self.loop.call_later(self._bounds.stall_seconds, self._check_progress, size)

    def _check_progress(self, before: int) -> None:
        """Cut off a client that took less than 16 kB of the answer since the last check, else check again later.

        `before` is the number of unsent bytes at that check.
        """
        size = self.gathering.get_write_buffer_size()
        if self._unsent is None or before - size < TAKEN_BYTES:
            metrics.count_closed_connection("answer-not-taken")
            self.gathering.abort()
            return
        self._unsent.lower(size)
        self._check_later(size)

    def _stop_checking(self) -> None:
        if self._progress_timer is not None:
            self._progress_timer.cancel()
            self._progress_timer = None
        if self._unsent is not None:
            self._unsent.release()
            self._unsent = None

    # ── ends ──────────────────────────────────────────────────────────────────────────────────────────────

    def connection_lost(self, exc: Exception | None) -> None:
        """Free all that the connection occupies; requests in its pipeline are never started."""
        self._bounds.connections.leave(self)
        self._stop_timer()
        self._stop_checking()
        self.gathering.stop_lingering()
        if self._is_served:
            cast("dict[str, Any]", self.cycle.scope)["holding"].disconnect()
        for cycle, _ in self.pipeline:  # these requests are never started
            cast("dict[str, Any]", cycle.scope)["holding"].release()
        self.pipeline.clear()
        super().connection_lost(exc)

    def send_400_response(self, msg: str) -> None:
        """Answer a malformed request with a JSON error 400, and close the connection."""
        request_id = ids.new_id("req")
        body = errors.ApiError(400, "malformed-request", msg).response(request_id).body
        head = (
            "HTTP/1.1 400 Bad Request\r\ncontent-type: application/json\r\n"
            f"x-request-id: {request_id}\r\ncontent-length: {len(body)}\r\nconnection: close\r\n\r\n"
        )
        self.transport.write(head.encode() + body)
        self.transport.close()

    def _close_after(self, seconds: float) -> None:
        self._stop_timer()
        self._timer = self.loop.call_later(seconds, self._close_late)

    def _close_late(self) -> None:
        self._timer = None
        metrics.count_closed_connection("late-request")
        self.transport.close()

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
