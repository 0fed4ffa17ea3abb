"""One connection of the outbound HTTP client: HTTP/1.1 with limits that are checked for each piece that arrives."""

from __future__ import annotations

import asyncio
import zlib
from typing import TYPE_CHECKING, Final, cast

import httptools
from msgspec import Struct

from nodes.streamed_response import StreamedResponse

if TYPE_CHECKING:
    from collections.abc import Callable

MAX_HEADERS: Final = 128
SMALL_PIECE_BYTES: Final = 16
MAX_OVERHEAD: Final = 4
"""Bytes of a response per byte of its limits; extensions of chunks are not part of the body."""
DECODED_ENCODINGS: Final = frozenset({"", "identity", "gzip", "deflate"})
SWITCHING_PROTOCOLS: Final = 101
FIRST_FINAL_STATUS: Final = 200
STATUSES_WITHOUT_BODY: Final = frozenset({204, 304})
GZIP_WINDOW: Final = 31
"""`wbits` of zlib for gzip; that of its own format is 15, and negative without any header."""
ZLIB_METHOD: Final = 8
"""Low four bits of the first byte of zlib's format (RFC 1950)."""


class ResponseLimits(Struct, frozen=True):
    """Maximum sizes of a response."""

    header_bytes: int
    body_bytes: int
    """After decompression."""
    pieces: int
    """Small pieces of a body: each costs more time than its bytes."""


class ResponseInvalid(Exception):
    """The response is no valid HTTP; the text completes a sentence that begins with the host."""


class ResponseTooLarge(Exception):
    """The response exceeds a limit; the text says which."""


class ConnectionBroken(Exception):
    """The connection was lost before the response was complete."""

    def __init__(self, *, has_answered: bool) -> None:
        super().__init__()
        self.has_answered = has_answered
        """Whether any byte of the response has arrived."""


class RawResponse(Struct):
    """Response with its decompressed body; `headers` have names in lower case, and joined values."""

    status: int
    headers: dict[str, str]
    body: bytes


class OutboundConnection(asyncio.Protocol):
    """Connection to one checked address; it carries one exchange after another."""

    def __init__(self, limits: ResponseLimits) -> None:
        self._limits = limits
        self._transport: asyncio.Transport | None = None
        self._parser: httptools.HttpResponseParser | None = None
        self._response: asyncio.Future[RawResponse] | None = None
        self._stream: StreamedResponse | None = None
        """Response that is read while it arrives; None in an exchange that returns the whole response."""
        self._is_head = False
        self.made_at = 0.0
        """By the clock of the loop."""
        self.is_reusable = False
        """Whether the last exchange ended cleanly and the server keeps the connection."""
        self.on_lost: Callable[[OutboundConnection], None] | None = None
        """Called when an idle connection is lost."""

    async def exchange(self, head: bytes, body: bytes, *, is_head: bool) -> RawResponse:
        """Send a request, encoded as `head` and `body`, and return the final response, without a time limit; `is_head`
        is for HEAD, which has no body.

        Raises `ResponseInvalid`, `ResponseTooLarge` or `ConnectionBroken`; the connection is closed then, and when the
        caller is canceled.
        """
        transport, response = self._begin_exchange(is_head=is_head)
        transport.write(head + body)
        try:
            return await response
        finally:
            if not self.is_reusable:
                self.abort()
            self._response = self._parser = None

    async def open_stream(self, head: bytes, body: bytes) -> StreamedResponse:
        """Send a request and return the final response once its headers have arrived, without a time limit, with its
        body as a stream.

        It raises the same errors as `exchange`, and so does the stream. Call `end_stream` afterwards, also after a
        failure.
        """
        transport, response = self._begin_exchange(is_head=False)
        stream = self._stream = StreamedResponse(transport)
        response.add_done_callback(lambda done: stream.end(done.exception()))
        transport.write(head + body)
        await stream.wait_for_headers()
        return stream

    def end_stream(self) -> None:
        """End the exchange of `open_stream`: if the response has arrived whole, another exchange may begin on the
        connection; else close it.
        """
        if not self.is_reusable:
            self.abort()
        if self._stream is not None:
            # Unread pieces of a whole response would keep it from reading the next one.
            self._stream.resume_reading()
        self._response = self._parser = self._stream = None

    def _begin_exchange(self, *, is_head: bool) -> tuple[asyncio.Transport, asyncio.Future[RawResponse]]:
        """Prepare the parser for a response, and return the transport and a future with the whole response.

        Raises `ConnectionBroken` if the connection is closed.
        """
        if self._transport is None or self._transport.is_closing():
            raise ConnectionBroken(has_answered=False)
        self.is_reusable = False
        self._is_head = is_head
        self._parser = httptools.HttpResponseParser(self)
        self._arrived = 0
        self._header_bytes = 0
        self._begin_message()
        self._response = asyncio.get_running_loop().create_future()
        return self._transport, self._response

    @property
    def is_open(self) -> bool:
        return self._transport is not None and not self._transport.is_closing()

    def abort(self) -> None:
        """Close the connection at once, without sending what is still buffered."""
        if self._transport is not None:
            self._transport.abort()

    # ── asyncio ─────────────────────────────────────────────────────────────────────────────────────────────────

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # Those of uvloop have no base class in common with asyncio's.
        self._transport = cast("asyncio.Transport", transport)

    def data_received(self, data: bytes) -> None:
        if self._parser is None or self._response is None or self._response.done():
            # Nobody asked: the next exchange would take it for its response.
            self.is_reusable = False
            self.abort()
            return
        self._arrived += len(data)
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserUpgrade:
            self._fail(ResponseInvalid(f"answered {SWITCHING_PROTOCOLS}, which is not a final status"))
        except httptools.HttpParserError:
            self._fail(ResponseInvalid("sent invalid HTTP, or headers that are too large"))
        if self._arrived > MAX_OVERHEAD * (self._limits.body_bytes + self._limits.header_bytes):
            self._fail(ResponseTooLarge("the framing of the response is too large"))
        if not self._has_headers and self._arrived - self._header_bytes > 2 * self._limits.header_bytes:
            self._fail(ResponseInvalid("sent invalid HTTP, or headers that are too large"))

    def connection_lost(self, error: Exception | None) -> None:
        self.is_reusable = False
        if self._response is not None and not self._response.done():
            if error is None and self._has_headers and self._ends_with_connection:
                self._complete()
            else:
                self._response.set_exception(ConnectionBroken(has_answered=self._arrived > 0))
        elif self.on_lost is not None:
            self.on_lost(self)
        self._transport = None

    # ── httptools ───────────────────────────────────────────────────────────────────────────────────────────────

    def on_message_begin(self) -> None:
        if self._response is None or self._response.done():
            self.is_reusable = False  # A second response to one request.

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._is_over():
            return
        size = len(name) + len(value)
        self._header_bytes += size
        self._header_count += 1
        if size > self._limits.header_bytes or self._header_count > MAX_HEADERS:
            self._fail(ResponseInvalid("sent invalid HTTP, or headers that are too large"))
        elif self._header_bytes > self._limits.header_bytes:
            self._fail(ResponseTooLarge("the headers of the response are too large"))
        elif not self._has_headers:  # Those behind a body are limited, and ignored.
            text, key = value.decode(errors="replace"), name.decode("latin-1").lower()
            self._headers[key] = f"{self._headers[key]}, {text}" if key in self._headers else text

    def on_headers_complete(self) -> None:
        if self._is_over() or self._parser is None:
            return
        self._status = self._parser.get_status_code()
        if self._status < FIRST_FINAL_STATUS and self._status // 100 == 1:
            return
        self._has_headers = True
        self._keeps_alive = self._parser.should_keep_alive()
        encoding = self._headers.get("content-encoding", "").strip().lower()
        if encoding not in DECODED_ENCODINGS:
            self._fail(ResponseInvalid("sent a response with an unknown encoding"))
            return
        if encoding in {"gzip", "deflate"}:
            self._encoding = encoding
        transfer = self._headers.get("transfer-encoding", "").strip().lower()
        if transfer not in {"", "chunked"}:
            self._fail(ResponseInvalid("sent a response with an unknown transfer encoding"))
            return
        self._ends_with_connection = not (
            transfer or "content-length" in self._headers or self._status in STATUSES_WITHOUT_BODY
        )
        if self._stream is not None:
            self._stream.begin(self._status, self._headers)
        if self._is_head:
            # The parser would wait for the body that the headers describe.
            self._keeps_alive = False
            self._complete()

    def on_body(self, data: bytes) -> None:
        if self._is_over():
            return
        self._pieces += 1
        self._raw_bytes += len(data)
        if self._pieces > self._limits.pieces and self._raw_bytes < self._pieces * SMALL_PIECE_BYTES:
            self._fail(
                ResponseInvalid(f"sent a response in more than {self._limits.pieces} pieces of a few bytes")
            )
            return
        try:
            content = data if not self._encoding else self._decompress(data)
        except zlib.error:
            self._fail(ResponseInvalid("sent a body that can't be decompressed"))
            return
        self._content_bytes += len(content)
        if max(self._content_bytes, self._raw_bytes) > self._limits.body_bytes:
            self._fail(ResponseTooLarge(f"the response has more than {self._limits.body_bytes} bytes"))
        elif self._stream is None:
            self._body += content
        elif content:
            self._stream.add(content)

    def on_message_complete(self) -> None:
        if self._is_over():
            return
        if self._has_headers:
            self._complete()
        elif self._status != SWITCHING_PROTOCOLS:
            self._begin_message()

    # ── state ───────────────────────────────────────────────────────────────────────────────────────────────────

    def _begin_message(self) -> None:
        """Reset the state of the message that is parsed, for the first response of an exchange and after an interim
        response.
        """
        self._status = 0
        self._headers: dict[str, str] = {}
        self._header_count = 0
        self._has_headers = False
        self._keeps_alive = False
        self._ends_with_connection = False
        self._encoding = ""
        self._decompressor: zlib._Decompress | None = None
        self._body = bytearray()
        self._content_bytes = 0
        """Size of the body so far, after decompression."""
        self._raw_bytes = 0
        self._pieces = 0

    def _decompress(self, data: bytes) -> bytes:
        """Decompress the next piece of the body; return at most one byte more than the limit of the whole body allows.

        Raises `zlib.error` for invalid data.
        """
        found = bytearray()
        while data:
            if self._decompressor is None:
                # Some servers send `deflate` without the header of zlib.
                is_zlib = data[0] & 0xF == ZLIB_METHOD
                self._decompressor = zlib.decompressobj(
                    GZIP_WINDOW
                    if self._encoding == "gzip"
                    else zlib.MAX_WBITS
                    if is_zlib
                    else -zlib.MAX_WBITS
                )
            room = self._limits.body_bytes - self._content_bytes - len(found) + 1
            found += self._decompressor.decompress(data, room)
            if self._decompressor.unconsumed_tail or len(found) >= room:
                break  # Over the limit; the caller refuses it.
            if not self._decompressor.eof:
                break
            data = self._decompressor.unused_data
            if self._encoding == "gzip" and data:
                self._decompressor = None  # A file of gzip may have several members (RFC 1952).
            elif data:
                raise zlib.error("data behind the end of the stream")
        return bytes(found)

    def _is_over(self) -> bool:
        """Return whether no response is awaited any more, so that further data is ignored."""
        return self._response is None or self._response.done()

    def _complete(self) -> None:
        assert self._response is not None  # noqa: S101 - callers checked it
        if self._decompressor is not None and not self._decompressor.eof:
            self._fail(ResponseInvalid("sent a body that can't be decompressed"))
            return
        self.is_reusable = self._keeps_alive
        self._response.set_result(RawResponse(self._status, self._headers, bytes(self._body)))

    def _fail(self, error: Exception) -> None:
        """End the exchange with an error, unless it has ended; the connection can't be used again."""
        if self._response is not None and not self._response.done():
            self._response.set_exception(error)
        self.is_reusable = False
