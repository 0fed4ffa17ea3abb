"""HTTP client for URLs from users; it connects only to addresses that it has checked.

A name is resolved once for each request and each redirect, every returned address is checked, and one of them is
connected. The name itself is used only in the Host header and in the TLS handshake.
"""

from __future__ import annotations

import asyncio
import re
import socket
from collections.abc import Awaitable, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from enum import StrEnum
from ipaddress import IPv4Network, IPv6Address, IPv6Network
from typing import TYPE_CHECKING

from nodes import url_targets
from nodes.url_targets import IpAddress, UrlTarget

if TYPE_CHECKING:
    from aiohttp import ClientHandlerType, ClientRequest, ClientResponse, ClientSession

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
FIRST_UNPRIVILEGED_PORT = 1024
SMALL_PIECE_BYTES = 16

ALLOWED_METHODS = frozenset({"GET", "HEAD", "OPTIONS", "POST", "PUT", "PATCH", "DELETE"})
REPEATED_WRITES = frozenset({"PUT", "DELETE"})
"""Methods that aiohttp repeats by itself if a reused connection breaks."""
FINAL_STATUSES = range(200, 600)
REDIRECTS = frozenset({301, 302, 303, 307, 308})
DECODED_ENCODINGS = frozenset({"", "identity", "gzip", "deflate"})

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


@dataclass(frozen=True)
class OutboundPolicy:
    allowed_networks: tuple[IpNetwork, ...] = ()
    """Networks that are allowed on any port, although they are not public."""
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


@dataclass(frozen=True)
class OutboundResponse:
    status: int
    headers: dict[str, str]
    """Names in lower case; the values of one name are joined by a comma."""
    body: bytes
    """Decompressed content, even if `content-encoding` is set."""
    url: str
    """URL of the response, after redirects."""


@dataclass(frozen=True)
class OutboundCall:
    method: str
    target: UrlTarget
    headers: Mapping[str, str]
    body: bytes | None


def parse_target(url: str, base: str = "") -> UrlTarget:
    try:
        return url_targets.parse_target(url, base)
    except ValueError as error:
        raise OutboundRefused(OutboundRefusalCode.INVALID_URL, str(error)) from error


def require_allowed_address(policy: OutboundPolicy, target: UrlTarget, address: IpAddress) -> None:
    """Raise `OutboundRefused` without the address: names of the internal network must not be resolvable by users."""
    if any(address in network for network in policy.allowed_networks):
        return
    if not url_targets.is_public(address):
        raise OutboundRefused(
            OutboundRefusalCode.ADDRESS_NOT_ALLOWED, url_targets.not_public_refusal(target.host)
        )
    if target.port < FIRST_UNPRIVILEGED_PORT and target.port not in policy.privileged_ports:
        raise OutboundRefused(OutboundRefusalCode.PORT_NOT_ALLOWED, url_targets.port_refusal(target.port))


def require_valid_request(method: str, headers: Mapping[str, str]) -> None:
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


def follow_redirect(call: OutboundCall, response: OutboundResponse) -> OutboundCall | None:
    """Return the next call of a redirect, or None."""
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
    """Refuse an interim status: 101 switches to a protocol that wasn't requested (RFC 9110, section 15)."""
    if status not in FINAL_STATUSES:
        message = f"{target.host} answered {status}, which is not a final status"
        raise OutboundRefused(OutboundRefusalCode.INVALID_RESPONSE, message)


async def send_once(request: ClientRequest, handler: ClientHandlerType) -> ClientResponse:
    """Raise a broken connection as a plain `ClientError`, for which aiohttp doesn't repeat the request.

    The caller decides whether to repeat it. A failure to connect is raised as it is.
    """
    import aiohttp  # noqa: PLC0415 - see `OutboundClient`

    try:
        return await handler(request)
    except aiohttp.ClientConnectorError:
        raise
    except (aiohttp.ClientOSError, aiohttp.ServerDisconnectedError) as error:
        raise aiohttp.ClientError(str(error)) from error


class OutboundClient:
    """HTTP client that imports aiohttp with its first request: it takes 31 MB of memory."""

    def __init__(self, policy: OutboundPolicy, resolve: ResolveName | None = None) -> None:
        self._policy = policy
        self._resolve = resolve or self._ask_system
        # A lookup blocks its thread for as long as the owner of the name likes, so it must not use the loop's own
        # threads.
        self._threads = ThreadPoolExecutor(max_workers=16, thread_name_prefix="outbound-names")
        self._session: ClientSession | None = None

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
        """Send a request; the timeout spans resolution, connections, redirects and the body. Raises `OutboundError`."""
        require_valid_request(method.upper(), headers)
        call = OutboundCall(method.upper(), parse_target(url), headers, body)
        seconds = self._policy.timeout_seconds if timeout_seconds is None else timeout_seconds
        try:
            async with asyncio.timeout(seconds):
                return await (self._send_following(call) if follow_redirects else self._send(call))
        except TimeoutError as error:
            message = f"no complete response from {call.target.host} within {seconds:g} s"
            raise OutboundUnavailable(OutboundOutageCode.TIMED_OUT, message) from error

    async def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)
        if self._session is not None:
            await self._session.close()

    async def _send_following(self, call: OutboundCall) -> OutboundResponse:
        for _ in range(self._policy.max_redirects + 1):
            response = await self._send(call)
            following = follow_redirect(call, response)
            if following is None:
                return response
            call = following
        raise OutboundRefused(
            OutboundRefusalCode.TOO_MANY_REDIRECTS, f"more than {self._policy.max_redirects} redirects"
        )

    async def _send(self, call: OutboundCall) -> OutboundResponse:
        failure = OutboundUnavailable(
            OutboundOutageCode.NAME_NOT_RESOLVED, f"{call.target.host} has no address"
        )
        for address in await self._checked_addresses(call.target):
            try:
                return await self._exchange(call, address)
            except OutboundUnavailable as error:
                if error.code is not OutboundOutageCode.NOT_CONNECTED:
                    raise
                failure = error
        raise failure

    async def _checked_addresses(self, target: UrlTarget) -> list[IpAddress]:
        if target.address is not None:
            found = [target.address]
        else:
            found = [
                url_targets.unmap_ipv4(text) for text in (await self._look_up(target.host))[:MAX_ADDRESSES]
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

    async def _exchange(self, call: OutboundCall, address: IpAddress) -> OutboundResponse:
        import aiohttp  # noqa: PLC0415 - see `OutboundClient`
        import yarl  # noqa: PLC0415 - a dependency of aiohttp

        target = call.target
        # With the address in place of the name, the pool keeps connections by checked address too.
        host = f"[{address}]" if isinstance(address, IPv6Address) else str(address)
        url = yarl.URL.build(
            scheme=target.scheme,
            authority=f"{host}:{target.port}",
            path=target.path,
            query_string=target.query,
            encoded=True,
        )
        headers = {**call.headers, "Host": target.authority, "Accept-Encoding": "gzip, deflate"}
        try:
            async with self._open_session().request(
                call.method,
                url,
                headers=headers,
                data=call.body,
                server_hostname=target.host,
                allow_redirects=False,
                middlewares=(send_once,) if call.method in REPEATED_WRITES else (),
            ) as response:
                _require_final_status(target, response.status)
                return OutboundResponse(
                    response.status, self._read_headers(response), await self._read_body(response), target.url
                )
        except (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError) as error:
            kind = "trusted connection" if isinstance(error, aiohttp.ClientSSLError) else "connection"
            message = f"no {kind} to {target.host} on port {target.port}"
            raise OutboundUnavailable(OutboundOutageCode.NOT_CONNECTED, message) from error
        except aiohttp.ClientResponseError as error:
            message = f"{target.host} sent invalid HTTP, or headers that are too large"
            raise OutboundRefused(OutboundRefusalCode.INVALID_RESPONSE, message) from error
        except aiohttp.ClientError as error:
            message = f"the connection to {target.host} was lost before its response was complete"
            raise OutboundUnavailable(OutboundOutageCode.INTERRUPTED, message) from error

    def _open_session(self) -> ClientSession:
        import aiohttp  # noqa: PLC0415 - see `OutboundClient`

        if self._session is None:
            self._session = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(limit=MAX_CONNECTIONS, keepalive_timeout=KEEP_ALIVE_SECONDS),
                cookie_jar=aiohttp.DummyCookieJar(),
                headers={"User-Agent": "Pilotflame"},
                skip_auto_headers=("Content-Type",),
                timeout=aiohttp.ClientTimeout(sock_connect=CONNECT_SECONDS),
                trust_env=False,
                max_line_size=self._policy.max_header_bytes,
                max_field_size=self._policy.max_header_bytes,
            )
        return self._session

    def _read_headers(self, response: ClientResponse) -> dict[str, str]:
        size_bytes = sum(len(name) + len(value) for name, value in response.raw_headers)
        if size_bytes > self._policy.max_header_bytes:
            raise OutboundRefused(
                OutboundRefusalCode.RESPONSE_TOO_LARGE, "the headers of the response are too large"
            )
        headers: dict[str, str] = {}
        for raw_name, raw_value in response.raw_headers:
            name, value = raw_name.decode("latin-1").lower(), raw_value.decode(errors="replace")
            headers[name] = f"{headers[name]}, {value}" if name in headers else value
        if headers.get("content-encoding", "").lower() not in DECODED_ENCODINGS:
            raise OutboundRefused(
                OutboundRefusalCode.INVALID_RESPONSE, "the response has an unknown encoding"
            )
        return headers

    async def _read_body(self, response: ClientResponse) -> bytes:
        body = bytearray()
        pieces = 0
        async for chunk, _ in response.content.iter_chunks():
            if not chunk and response.content.at_eof():
                break  # Responses without a body share one stream, which reports its end forever.
            body += chunk
            pieces += 1
            if pieces > self._policy.max_pieces and len(body) < pieces * SMALL_PIECE_BYTES:
                message = f"the response comes in more than {self._policy.max_pieces} pieces of a few bytes"
                raise OutboundRefused(OutboundRefusalCode.INVALID_RESPONSE, message)
            if len(body) > self._policy.max_response_bytes:
                message = f"the response has more than {self._policy.max_response_bytes} bytes"
                raise OutboundRefused(OutboundRefusalCode.RESPONSE_TOO_LARGE, message)
        return bytes(body)
