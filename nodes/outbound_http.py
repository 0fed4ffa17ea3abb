"""HTTP client for URLs from users; it connects only to addresses that it has checked.

Addresses are checked when a connection is made: every address of a name is checked, and one of them is connected. The
name itself is used only in the Host header and in the TLS handshake. A kept connection serves further requests to the
same scheme, host and port, for a minute at most.
"""

from __future__ import annotations

import asyncio
import re
import socket
import ssl
from collections import OrderedDict
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager, nullcontext
from enum import StrEnum
from ipaddress import IPv4Network, IPv6Network
from math import inf
from typing import Any

from msgspec import Struct

from nodes import url_targets
from nodes.connection_phases import ConnectionPhase, is_recording, note_phase
from nodes.outbound_connection import (
    ConnectionBroken,
    OutboundConnection,
    ResponseInvalid,
    ResponseLimits,
    ResponseTooLarge,
)
from nodes.streamed_response import StreamedResponse
from nodes.url_targets import IpAddress, UrlTarget

Origin = tuple[str, str, int]
"""Scheme, host and port."""

IpNetwork = IPv4Network | IPv6Network
ResolveName = Callable[[str], Awaitable[Sequence[str]]]
"""Resolver of a host name to the texts of its addresses, the preferred one first; raises OSError."""

MAX_ADDRESSES = 16
RESOLVE_SECONDS = 5
CONNECT_SECONDS = 5
KEEP_ALIVE_SECONDS = (
    4  # Many servers close an idle connection after 5 s, and a request must not coincide with that.
)
MAX_CONNECTIONS = 256
MAX_AGE_SECONDS = 60.0
FIRST_UNPRIVILEGED_PORT = 1024

ALLOWED_METHODS = frozenset({"GET", "HEAD", "OPTIONS", "POST", "PUT", "PATCH", "DELETE"})
METHODS_WITHOUT_BODY = frozenset({"GET", "HEAD", "OPTIONS"})
REPEATED_METHODS = frozenset({"GET", "HEAD", "OPTIONS"})
"""Methods that are repeated on a new connection if a kept one breaks before it answers."""
DEFAULT_HEADERS = {"Accept": "*/*", "Accept-Encoding": "gzip, deflate", "User-Agent": "Pilotflame"}
FINAL_STATUSES = range(200, 600)
REDIRECTS = frozenset({301, 302, 303, 307, 308})

# They frame the message, name the peer or concern one connection only (RFC 9110, section 7.6.1).
MANAGED_HEADERS = frozenset({
    "accept-encoding", "connection", "content-length", "expect", "host", "http2-settings", "keep-alive",
    "proxy-authenticate", "proxy-authorization", "proxy-connection", "te", "trailer", "transfer-encoding",
    "upgrade",
})  # fmt: skip
# Keys travel in headers of any name, so other origins get only harmless headers.
HEADERS_FOR_ANY_ORIGIN = frozenset({"accept", "accept-language", "content-type", "user-agent"})

HEADER_NAME = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
HEADER_VALUE = re.compile(r"[^\x00-\x08\x0a-\x1f\x7f\ud800-\udfff]*")
CONNECTION_LOGIN = re.compile(r"\s*(?:ntlm|negotiate)\b", re.IGNORECASE)


class OutboundPolicy(Struct, frozen=True):
    allowed_networks: tuple[IpNetwork, ...] = ()
    """Networks that are allowed on any port, although they are not public."""
    allowed_hosts: frozenset[str] = frozenset()
    """Hosts, or hosts with ports as `host:port`, that are allowed whatever their addresses are."""
    hosts_setting: str = ""
    """Setting of `allowed_hosts`, such as `model_hosts`, which refusals name; empty for that of all networks."""
    privileged_ports: frozenset[int] = frozenset({80, 443})
    """Ports below 1024 that are allowed for public addresses."""
    max_redirects: int = 5
    max_header_bytes: int = 32_768
    max_response_bytes: int = 10_000_000
    """Maximum size after decompression."""
    max_pieces: int = 10_000
    """Maximum number of small pieces of a body: each costs more time than its bytes."""
    timeout_seconds: float = 30
    """Timeout of a request without its own."""


class OutboundRefusalCode(StrEnum):
    INVALID_URL = "invalid-url"
    INVALID_REQUEST = "invalid-request"
    ADDRESS_NOT_ALLOWED = "address-not-allowed"
    PORT_NOT_ALLOWED = "port-not-allowed"
    INSECURE_REDIRECT = "insecure-redirect"
    TOO_MANY_REDIRECTS = "too-many-redirects"
    RESPONSE_TOO_LARGE = "response-too-large"
    INVALID_RESPONSE = "invalid-response"


class OutboundOutageCode(StrEnum):
    """Reasons of an outage; only with the first two it is certain that nothing was sent."""

    NAME_NOT_RESOLVED = "name-not-resolved"
    NOT_CONNECTED = "not-connected"
    INTERRUPTED = "interrupted"
    TIMED_OUT = "timed-out"


class OutboundError(Exception):
    """Error of an outbound request; its message names at most the host, since paths, queries and headers contain
    secrets.
    """


class OutboundRefused(OutboundError):
    """Permanent refusal: the same request would be refused again."""

    def __init__(self, code: OutboundRefusalCode, message: str) -> None:
        super().__init__(message)
        self.code = code
        self.message = message


class OutboundUnavailable(OutboundError):
    """Missing or incomplete response; the same request may succeed later."""

    def __init__(self, code: OutboundOutageCode, message: str) -> None:
        super().__init__(message)
        self.code = code
        self.message = message


class OutboundResponse(Struct, frozen=True):
    status: int
    headers: dict[str, str]
    """Names in lower case; the values of one name are joined by a comma."""
    body: bytes
    """Decompressed content, even if `content-encoding` is set."""
    url: str
    """URL of the response, after redirects."""


class IdlePlace(Struct, frozen=True):
    """Place of an idle connection, and the timer that closes it."""

    origin: Origin
    ends: asyncio.TimerHandle


class OutboundCall(Struct, frozen=True):
    method: str
    target: UrlTarget
    headers: Mapping[str, str]
    body: bytes | None


def parse_target(url: str, base: str = "") -> UrlTarget:
    """Parse a URL as `url_targets.parse_target` does; raises `OutboundRefused` for an invalid URL."""
    try:
        return url_targets.parse_target(url, base)
    except ValueError as error:
        raise OutboundRefused(OutboundRefusalCode.INVALID_URL, str(error)) from error


def require_allowed_address(policy: OutboundPolicy, target: UrlTarget, address: IpAddress) -> None:
    """Raise `OutboundRefused` for an address that is not public, or a privileged port, unless the policy allows its
    network or host.

    The error doesn't contain the address: users must not be able to resolve names of the internal network.
    """
    if any(address in network for network in policy.allowed_networks):
        return
    if policy.allowed_hosts & {target.host, f"{target.host}:{target.port}"}:
        return
    if not url_targets.is_public(address):
        raise OutboundRefused(
            OutboundRefusalCode.ADDRESS_NOT_ALLOWED,
            url_targets.not_public_refusal(target.host, policy.hosts_setting),
        )
    if target.port < FIRST_UNPRIVILEGED_PORT and target.port not in policy.privileged_ports:
        raise OutboundRefused(
            OutboundRefusalCode.PORT_NOT_ALLOWED, url_targets.port_refusal(target.port, policy.hosts_setting)
        )


def require_valid_request(method: str, headers: Mapping[str, str]) -> None:
    """Raise `OutboundRefused` for an unknown method, a header that users can't set, such as `Host`, a control character
    in a header, and a login by NTLM or Negotiate.
    """
    if method not in ALLOWED_METHODS:
        raise OutboundRefused(OutboundRefusalCode.INVALID_REQUEST, f"the method {method!r} is not supported")
    for name, value in headers.items():
        if not HEADER_NAME.fullmatch(name) or name.lower() in MANAGED_HEADERS:
            raise OutboundRefused(OutboundRefusalCode.INVALID_REQUEST, f"the header {name!r} can't be set")
        if not HEADER_VALUE.fullmatch(value):
            raise OutboundRefused(
                OutboundRefusalCode.INVALID_REQUEST, f"the header {name!r} has a control character"
            )
        # Such a login authenticates the connection, which requests of other users share.
        if name.lower() == "authorization" and CONNECTION_LOGIN.match(value):
            raise OutboundRefused(OutboundRefusalCode.INVALID_REQUEST, "NTLM and Negotiate are not supported")


def build_redirected_call(call: OutboundCall, response: OutboundResponse) -> OutboundCall | None:
    """Return the next request if a response is a redirect, without sending it; None for other responses.

    Only harmless headers go to another origin. A POST becomes a GET by 301 and 302, any method but HEAD by 303. Raises
    `OutboundRefused` for an invalid URL, and from https to http.
    """
    location = response.headers.get("location")
    if response.status not in REDIRECTS or not location:
        return None
    target = parse_target(location, base=call.target.url)
    if (call.target.scheme, target.scheme) == ("https", "http"):
        raise OutboundRefused(
            OutboundRefusalCode.INSECURE_REDIRECT, f"{call.target.host} redirects from https to http"
        )
    headers = call.headers
    if target.origin != call.target.origin:
        headers = {name: value for name, value in headers.items() if name.lower() in HEADERS_FOR_ANY_ORIGIN}
    becomes_get = {301: call.method == "POST", 302: call.method == "POST", 303: call.method != "HEAD"}
    if not becomes_get.get(response.status):
        return OutboundCall(call.method, target, headers, call.body)
    headers = {name: value for name, value in headers.items() if not name.lower().startswith("content-")}
    return OutboundCall("GET", target, headers, body=None)


def _require_final_status(target: UrlTarget, status: int) -> None:
    """Raise `OutboundRefused` unless the status is from 200 to 599.

    An interim one such as 101 switches to a protocol that wasn't requested (RFC 9110, section 15).
    """
    if status not in FINAL_STATUSES:
        message = f"{target.host} answered {status}, which is not a final status"
        raise OutboundRefused(OutboundRefusalCode.INVALID_RESPONSE, message)


class StreamTimeLimits:
    """Time limits of one streamed exchange: for each pause, and for the whole."""

    def __init__(self, idle_seconds: float, total_seconds: float) -> None:
        self._idle_seconds = idle_seconds
        self._total_seconds = total_seconds
        self._ends_at = asyncio.get_running_loop().time() + total_seconds

    @contextmanager
    def enforce(self, target: UrlTarget) -> Iterator[float]:
        """Yield the deadline of one wait, in time of the event loop; failures in the block become `OutboundError`s.

        The block itself has to keep the deadline.
        """
        now = asyncio.get_running_loop().time()
        until = min(now + self._idle_seconds, self._ends_at)
        is_last = until == self._ends_at
        with _translate_failures(target, self._total_seconds if is_last else self._idle_seconds):
            yield until


class OutboundStream:
    """Response that is read while it arrives: status and headers, and the decompressed body by iteration."""

    def __init__(self, response: StreamedResponse, target: UrlTarget, limits: StreamTimeLimits) -> None:
        self.status = response.status
        self.headers: Mapping[str, str] = response.headers
        """Names in lower case; the values of one name are joined by a comma."""
        self._response = response
        self._target = target
        self._limits = limits

    async def __aiter__(self) -> AsyncIterator[bytes]:
        """Yield the pieces of the body; raises `OutboundError` at a failure, and after a pause that is too long."""
        while True:
            with self._limits.enforce(self._target) as until:
                async with asyncio.timeout_at(until):
                    piece = await anext(self._response, None)
            if piece is None:
                return
            yield piece


class OutboundClient:
    """HTTP client that keeps connections for four seconds, by scheme, host and port."""

    def __init__(self, policy: OutboundPolicy, resolve: ResolveName | None = None) -> None:
        self._policy = policy
        self._limits = ResponseLimits(policy.max_header_bytes, policy.max_response_bytes, policy.max_pieces)
        self._resolve = resolve or self._ask_system
        # A lookup blocks its thread for as long as the owner of the name likes, so it must not use the loop's own
        # threads.
        self._threads = ThreadPoolExecutor(max_workers=16, thread_name_prefix="outbound-names")
        self._tls: ssl.SSLContext | None = None
        self._places = asyncio.Semaphore(MAX_CONNECTIONS)
        """A place for each open connection."""
        self._waiting = 0
        self._open: set[OutboundConnection] = set()
        self._idle: OrderedDict[OutboundConnection, IdlePlace] = OrderedDict()
        """Idle connections, the longest idle first."""
        self._by_origin: dict[Origin, list[OutboundConnection]] = {}
        """The same connections, by origin."""

    async def request(
        self,
        method: str,
        url: str,
        *,
        headers: Mapping[str, str],
        body: bytes | None = None,
        timeout_seconds: float | None = None,
        follow_redirects: bool = True,
    ) -> OutboundResponse:
        """Send a request and return the response, of any final status; the timeout, by default the policy's, spans
        resolution, connections, redirects and body.

        Raises `OutboundRefused` if it is not permitted or invalid, also for an invalid URL and an invalid or too large
        response, and `OutboundUnavailable` if it may succeed later. Without `follow_redirects`, a redirect is returned
        as it is.
        """
        require_valid_request(method.upper(), headers)
        call = OutboundCall(method.upper(), parse_target(url), headers, body)
        seconds = self._policy.timeout_seconds if timeout_seconds is None else timeout_seconds
        try:
            async with asyncio.timeout(seconds):
                return await (self._send_following(call) if follow_redirects else self._send(call))
        except TimeoutError as error:
            raise _build_timeout(call.target, seconds) from error

    @asynccontextmanager
    async def stream(
        self,
        method: str,
        url: str,
        *,
        headers: Mapping[str, str],
        body: bytes,
        idle_seconds: float,
        total_seconds: float = inf,
        is_alone: bool = False,
    ) -> AsyncIterator[OutboundStream]:
        """Send a request over an idle connection or a new one, and yield its response while the body arrives.

        Redirects are not followed, and a request on an idle connection that breaks is not repeated. `idle_seconds`
        limits the time until the headers, and each pause in the body; `total_seconds` limits the whole response. At the
        end of the block the connection is closed unless the response is complete. With `is_alone`, the request has a
        connection of its own, which is closed in any case.

        Raises `OutboundRefused` if the request is not permitted or invalid, or for an invalid or too large response,
        and `OutboundUnavailable` if it may succeed later; so does the stream. Every final status is a response.
        """
        require_valid_request(method.upper(), headers)
        call = OutboundCall(method.upper(), parse_target(url), headers, body)
        connection: OutboundConnection | None = None
        time_limits = StreamTimeLimits(idle_seconds, total_seconds)
        try:
            with time_limits.enforce(call.target) as until:
                async with asyncio.timeout_at(until):
                    kept = None if is_alone else self._take_kept(call.target)
                    connection = kept or await self._connect(call.target)
                    response = await connection.open_stream(_request_head(call), body)
                _require_final_status(call.target, response.status)
            yield OutboundStream(response, call.target, time_limits)
        finally:
            if connection is not None:
                connection.end_stream()
                if is_alone:
                    self._discard(connection)
                else:
                    self._release(connection, call.target)

    async def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)
        for connection in tuple(self._open):
            self._discard(connection)

    async def _send_following(self, call: OutboundCall) -> OutboundResponse:
        """Send a call, and those to which it is redirected; return the last response.

        Raises `OutboundRefused` after the policy's maximum of redirects.
        """
        for _ in range(self._policy.max_redirects + 1):
            response = await self._send(call)
            following = build_redirected_call(call, response)
            if following is None:
                return response
            call = following
        raise OutboundRefused(
            OutboundRefusalCode.TOO_MANY_REDIRECTS, f"more than {self._policy.max_redirects} redirects"
        )

    async def _send(self, call: OutboundCall) -> OutboundResponse:
        """Send a call over an idle connection or a new one, and return the response.

        A read is repeated on a new connection if the server has closed the idle one; a write is not, since it
        may have been carried out.
        """
        kept = self._take_kept(call.target)
        if kept is not None:
            try:
                return await self._exchange(call, kept)
            except ConnectionBroken as error:
                # The server has closed it meanwhile. A write is not repeated: it may have been carried out.
                if call.method not in REPEATED_METHODS or error.has_answered:
                    raise _build_interruption(call.target) from error
        connection = await self._connect(call.target)
        try:
            return await self._exchange(call, connection)
        except ConnectionBroken as error:
            raise _build_interruption(call.target) from error

    async def _connect(self, target: UrlTarget) -> OutboundConnection:
        """Return a new connection to the first of the host's addresses that answers; wait while 256 connections are in
        use.

        Raises `OutboundError`, also before any attempt if one of the addresses is not permitted.
        """
        failure = OutboundUnavailable(OutboundOutageCode.NAME_NOT_RESOLVED, f"{target.host} has no address")
        addresses = await self._resolve_checked_addresses(target)
        await self._take_place()
        try:
            for address in addresses:
                try:
                    connection = await self._connect_to(target, address)
                except OutboundUnavailable as error:
                    failure = error
                else:
                    self._open.add(connection)
                    return connection
        except BaseException:
            self._places.release()
            raise
        self._places.release()
        raise failure

    async def _take_place(self) -> None:
        """Wait until a connection may be opened, and count it; if all 256 places are taken, close an idle
        connection.
        """
        if self._places.locked() and self._idle:
            self._discard(next(iter(self._idle)))
        self._waiting += 1
        try:
            await self._places.acquire()
        finally:
            self._waiting -= 1

    async def _connect_to(self, target: UrlTarget, address: IpAddress) -> OutboundConnection:
        """Return a new connection to an address within five seconds; raises `OutboundUnavailable`."""
        loop = asyncio.get_running_loop()
        kind = "connection"
        try:
            async with asyncio.timeout(CONNECT_SECONDS):
                if is_recording():
                    connection = await self._open_in_phases(target, address)
                else:
                    connection = await self._open_at(target, host=str(address), port=target.port)
        except OSError as error:
            if isinstance(error, ssl.SSLError):
                kind = "trusted connection"
            message = f"no {kind} to {target.host} on port {target.port}"
            raise OutboundUnavailable(OutboundOutageCode.NOT_CONNECTED, message) from error
        connection.made_at = loop.time()
        connection.on_lost = self._discard
        return connection

    async def _open_in_phases(self, target: UrlTarget, address: IpAddress) -> OutboundConnection:
        """Open a connection as `_open_at` does, in two steps, so that each can be recorded; raises `OSError`."""
        from nodes.tcp_sockets import connect_socket  # noqa: PLC0415 - only tests of data sources need it

        with note_phase(ConnectionPhase.TCP):
            opened = await connect_socket(address, target.port)
        with note_phase(ConnectionPhase.TLS) if target.scheme == "https" else nullcontext():
            return await self._open_at(target, sock=opened)

    async def _open_at(self, target: UrlTarget, **place: Any) -> OutboundConnection:  # noqa: ANN401 - passed on
        """Open a connection, with TLS for `https`, to a checked address or over a connected socket; raises `OSError`.

        `place` has `host` and `port`, or `sock`.
        """
        is_secure = target.scheme == "https"
        _, connection = await asyncio.get_running_loop().create_connection(
            lambda: OutboundConnection(self._limits),
            ssl=self._tls_context() if is_secure else None,
            server_hostname=target.host if is_secure else None,
            **place,
        )
        return connection

    def _tls_context(self) -> ssl.SSLContext:
        if self._tls is None:
            self._tls = ssl.create_default_context()
            self._tls.set_alpn_protocols(["http/1.1"])
        return self._tls

    # ── kept connections ────────────────────────────────────────────────────────────────────────────────────────

    def _take_kept(self, target: UrlTarget) -> OutboundConnection | None:
        """Take and return an open idle connection to the target's origin; None if there is none.

        Its address was checked when it was made.
        """
        kept = self._by_origin.get(_get_origin(target))
        while kept:
            connection = kept[-1]
            self._forget_idle(connection)
            if connection.is_open:
                return connection
            self._discard(connection)
        return None

    def _release(self, connection: OutboundConnection, target: UrlTarget) -> None:
        """Keep a connection as idle after an exchange if it can be used again, else close it."""
        if connection.is_reusable:
            self._keep(connection, target)
        else:
            self._discard(connection)

    def _keep(self, connection: OutboundConnection, target: UrlTarget) -> None:
        """Keep a connection as idle for four seconds; close it at once if others wait for a place, or if it is over a
        minute old.
        """
        loop = asyncio.get_running_loop()
        # A name whose address changes is resolved anew after a minute, however busy its connections are.
        if self._waiting or loop.time() - connection.made_at > MAX_AGE_SECONDS:
            self._discard(connection)
            return
        origin = _get_origin(target)
        ends = loop.call_later(KEEP_ALIVE_SECONDS, self._discard, connection)
        self._idle[connection] = IdlePlace(origin, ends)
        self._by_origin.setdefault(origin, []).append(connection)

    def _forget_idle(self, connection: OutboundConnection) -> None:
        place = self._idle.pop(connection, None)
        if place is None:
            return
        place.ends.cancel()
        of_origin = self._by_origin[place.origin]
        of_origin.remove(connection)
        if not of_origin:
            del self._by_origin[place.origin]

    def _discard(self, connection: OutboundConnection) -> None:
        """Close a connection and free its place."""
        self._forget_idle(connection)
        if connection in self._open:
            self._open.remove(connection)
            self._places.release()
        connection.abort()

    # ── names ───────────────────────────────────────────────────────────────────────────────────────────────────

    async def _resolve_checked_addresses(self, target: UrlTarget) -> list[IpAddress]:
        """Resolve the target's host and return up to 16 addresses; raises `OutboundRefused` if one of them is not
        permitted.
        """
        with note_phase(ConnectionPhase.DNS):
            if target.address is not None:
                found = [target.address]
            else:
                found = [
                    url_targets.unmap_ipv4(text)
                    for text in (await self._look_up(target.host))[:MAX_ADDRESSES]
                ]
            for address in found:
                require_allowed_address(self._policy, target, address)
        return found

    async def _look_up(self, name: str) -> Sequence[str]:
        try:
            async with asyncio.timeout(RESOLVE_SECONDS):
                return await self._resolve(name)
        except OSError as error:
            raise OutboundUnavailable(
                OutboundOutageCode.NAME_NOT_RESOLVED, f"{name} can't be resolved"
            ) from error

    async def _ask_system(self, name: str) -> Sequence[str]:
        def ask() -> list[str]:
            infos = socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)
            return [str(address[0]) for *_, address in infos]

        return await asyncio.get_running_loop().run_in_executor(self._threads, ask)

    async def _exchange(self, call: OutboundCall, connection: OutboundConnection) -> OutboundResponse:
        """Send a call over a connection and return the response; the connection is kept as idle if it can be used
        again.

        Raises `OutboundRefused` for an invalid or too large response, and `ConnectionBroken`.
        """
        target = call.target
        try:
            response = await connection.exchange(
                _request_head(call), call.body or b"", is_head=call.method == "HEAD"
            )
            _require_final_status(target, response.status)
        except (ResponseInvalid, ResponseTooLarge) as error:
            raise _build_refusal(target, error) from error
        finally:
            self._release(connection, target)
        return OutboundResponse(response.status, response.headers, response.body, target.url)


def _get_origin(target: UrlTarget) -> Origin:
    return target.scheme, target.host, target.port


def _build_timeout(target: UrlTarget, seconds: float) -> OutboundUnavailable:
    message = f"no complete response from {target.host} within {seconds:g} s"
    return OutboundUnavailable(OutboundOutageCode.TIMED_OUT, message)


def _build_refusal(target: UrlTarget, error: ResponseInvalid | ResponseTooLarge) -> OutboundRefused:
    if isinstance(error, ResponseTooLarge):
        return OutboundRefused(OutboundRefusalCode.RESPONSE_TOO_LARGE, str(error))
    return OutboundRefused(OutboundRefusalCode.INVALID_RESPONSE, f"{target.host} {error}")


@contextmanager
def _translate_failures(target: UrlTarget, limit_seconds: float) -> Iterator[None]:
    """Convert failures of a stream's connection in the block to `OutboundError`s; that of a timeout names
    `limit_seconds`.
    """
    try:
        yield
    except TimeoutError as error:
        raise _build_timeout(target, limit_seconds) from error
    except (ResponseInvalid, ResponseTooLarge) as error:
        raise _build_refusal(target, error) from error
    except ConnectionBroken as error:
        raise _build_interruption(target) from error


def _build_interruption(target: UrlTarget) -> OutboundUnavailable:
    message = f"the connection to {target.host} was lost before its response was complete"
    return OutboundUnavailable(OutboundOutageCode.INTERRUPTED, message)


def _request_head(call: OutboundCall) -> bytes:
    """Return request line and headers of a validated call as bytes, with default headers added."""
    target = call.target
    path = f"{target.path}?{target.query}" if target.query else target.path
    given = {name.lower() for name in call.headers}
    lines = [f"{call.method} {path} HTTP/1.1", f"Host: {target.authority}"]
    lines += [f"{name}: {value}" for name, value in call.headers.items()]
    lines += [f"{name}: {value}" for name, value in DEFAULT_HEADERS.items() if name.lower() not in given]
    if call.body is not None or call.method not in METHODS_WITHOUT_BODY:
        lines.append(f"Content-Length: {len(call.body or b'')}")
    return "\r\n".join([*lines, "", ""]).encode()
