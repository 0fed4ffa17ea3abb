"""Connection of a worker's thread for claims and reports: HTTP/1.1 with a fifth of the processor time of `Transport`.

Every task needs two requests, so their cost bounds the tasks per second of a worker.
"""

from __future__ import annotations

import select
from http.client import (
    HTTP_PORT,
    HTTPS_PORT,
    HTTPConnection,
    HTTPException,
    HTTPResponse,
    HTTPSConnection,
)
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit
from urllib.request import getproxies

import httpx2

from pilotflame_sdk import request_coding
from pilotflame_sdk.retries import RetryPolicy
from pilotflame_sdk.transport import Transport

if TYPE_CHECKING:
    from typing_extensions import Self

    from pilotflame_sdk.request_coding import ApiRequest


def connect(url: str, api_key: str, retry_seconds: float) -> Transport | WorkerConnection:
    """Return a connection whose requests are repeated for a time; 0 sends each once.

    Requests through a proxy, and to URLs with a user or other characters than ASCII, are left to `Transport`.
    """
    is_plain = url.isascii() and " " not in url and "@" not in url
    if retry_seconds or not is_plain or _may_use_proxy(url):
        return Transport(url, api_key, retry=RetryPolicy(seconds=retry_seconds))
    return WorkerConnection(url, api_key)


def _may_use_proxy(url: str) -> bool:
    """Return whether the environment has a proxy for this URL, exceptions of hosts aside."""
    if not request_coding.uses_proxies(url):
        return False
    proxies = getproxies()
    return bool(proxies.get(urlsplit(url).scheme) or proxies.get("all"))


class WorkerConnection:
    """One kept connection to a server, for the requests of one thread; each is sent once."""

    def __init__(self, url: str, api_key: str) -> None:
        """Connect at the first request. `url` and `api_key` are those that `find_server` returns."""
        parts = urlsplit(url)
        self._url = url
        self._prefix = parts.path
        headers = {"Host": parts.netloc, **request_coding.default_headers(api_key)}
        self._headers = _encode_headers(headers)
        self._is_encrypted = parts.scheme == "https"
        self._host = parts.hostname or ""
        # Without a port, `http.client` would take the end of an IPv6 address for one.
        self._port = parts.port or (HTTPS_PORT if self._is_encrypted else HTTP_PORT)
        self._http: HTTPConnection | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection; the next request opens a new one."""
        if self._http is not None:
            self._http.close()
            self._http = None

    def request(self, method: str, path: str, **parts: Any) -> Any:  # noqa: ANN401 - as `build_request`
        """Send a request and return the JSON of the answer, None for an empty one; takes the arguments of
        `request_coding.build_request` except `query`.

        Raises `APIError` and `TransportError`.
        """
        request = request_coding.build_request(method, path, **parts)
        try:
            response, body = self._send(request)
        except (OSError, HTTPException, UnicodeError) as error:  # `UnicodeError` is that of a host's name
            self.close()
            raise request_coding.unreachable(self._url, error) from error
        except BaseException:
            self.close()
            raise
        return request_coding.decode_body(response.status, response.reason, body, self._url)

    def _send(self, request: ApiRequest) -> tuple[HTTPResponse, bytes]:
        """Send a request in one packet, and return the answer with its body.

        Raises `OSError`, `HTTPException`, and `UnicodeError` for a name of a host that can't be looked up.
        """
        socket = self._open(request.timeout)
        body = request.body or b""
        own = {**request.headers, "Content-Length": str(len(body))}
        head = f"{request.method} {self._prefix}{request.path} HTTP/1.1\r\n".encode("ascii")
        is_refused_early = False
        try:
            socket.sendall(b"%b%b%b\r\n%b" % (head, self._headers, _encode_headers(own), body))
        except ConnectionError:
            # A server or proxy may answer a large body with a refusal before it has read all of it.
            is_refused_early = True
        response = HTTPResponse(socket, method=request.method)
        try:
            response.begin()
            answer = response.read()
        finally:
            response.close()
        if response.will_close or is_refused_early:
            self.close()
        return response, answer

    def _open(self, timeout: float) -> Any:  # noqa: ANN401 - a socket, also an encrypted one
        """Return the socket of the kept connection, or of a new one if the server has closed it."""
        if self._http is not None and _is_readable(self._http.sock):
            self.close()
        if self._http is None:
            self._http = self._build(timeout)
            self._http.connect()
        self._http.sock.settimeout(timeout)
        return self._http.sock

    def _build(self, timeout: float) -> HTTPConnection:
        if self._is_encrypted:
            context = httpx2.create_ssl_context()
            return HTTPSConnection(self._host, self._port, timeout=timeout, context=context)
        return HTTPConnection(self._host, self._port, timeout=timeout)


def _encode_headers(headers: dict[str, str]) -> bytes:
    return "".join(f"{name}: {value}\r\n" for name, value in headers.items()).encode("ascii")


def _is_readable(socket: Any) -> bool:  # noqa: ANN401 - a socket, also an encrypted one
    """Return whether an idle connection has something to read: its end, since no answer is due."""
    if hasattr(select, "poll"):  # `select` takes no descriptors from 1,024 on
        poll = select.poll()
        poll.register(socket, select.POLLIN)
        return bool(poll.poll(0))
    return bool(select.select([socket], [], [], 0)[0])
