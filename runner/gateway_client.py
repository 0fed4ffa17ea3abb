"""Client of the gateway's internal API, with persistent connections and translated errors."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from time import monotonic
from typing import TYPE_CHECKING, Final, TypeVar

import msgspec

from engine.run_errors import NodeError
from execution.pod_api import NODE_ERROR_HEADER, PREFIX, RETRYABLE, RUNNER_HEADER
from json_text import decoding
from models.errors import DatabaseUnavailable
from models.pod_identity import PodProcess
from models.timestamps import DatabaseClock
from runner.gateway_connections import CONNECT_SECONDS, GatewayConnections

if TYPE_CHECKING:
    import aiohttp

    from runner.settings import RunnerSettings

Answer = TypeVar("Answer")

CALL_SECONDS: Final = 30.0
FIRST_PAUSE_SECONDS: Final = 0.05
MAX_PAUSE_SECONDS: Final = 2.0
MAX_DOUBLINGS: Final = 10
MAX_ERROR_BYTES: Final = 100_000
UNKNOWN_POD_STATUSES: Final = frozenset({401, 403, 404})
"""Answers of a gateway that doesn't know the pod, or of a foreign server."""


class CallRefused(Exception):
    """Permanent refusal of a call by the gateway."""

    def __init__(self, status: int, code: str, message: str) -> None:
        super().__init__(f"{message} ({status} {code})")
        self.status = status
        self.code = code


class _ErrorBody(msgspec.Struct):
    code: str = ""
    message: str = ""


class _RefusalBody(msgspec.Struct):
    error: _ErrorBody = msgspec.field(default_factory=_ErrorBody)


class GatewayClient:
    """Connections of one event loop to the gateway; the more calls in a row fail,
    the longer each pauses before it raises.
    """

    def __init__(
        self,
        settings: RunnerSettings,
        process: PodProcess | None = None,
        clock: DatabaseClock | None = None,
    ) -> None:
        """Without `process` and `clock`, create those of a new process."""
        self.clock = clock or DatabaseClock()
        self._settings = settings
        self._process = process or PodProcess.new(settings.runner_pod)
        self._url = settings.runner_gateway_url.rstrip("/") + PREFIX
        self._failures = 0
        self._failing_since: float | None = None
        self._headers = {"Authorization": f"Bearer {settings.token}", RUNNER_HEADER: self._process.name}
        self._connections = GatewayConnections(self._url, self._headers)
        self._streams: aiohttp.ClientSession | None = None

    def for_loop(self) -> GatewayClient:
        """Return a client with connections of its own for the running event loop of another thread."""
        return GatewayClient(self._settings, self._process, self.clock)

    @property
    def failing_seconds(self) -> float:
        """Seconds for which every call on this loop has failed: no gateway answered, or it doesn't know this
        pod; 0.0 after a success or any other refusal.
        """
        return 0.0 if self._failing_since is None else monotonic() - self._failing_since

    async def call(
        self, path: str, call: msgspec.Struct | None, answer: type[Answer], *, seconds: float = CALL_SECONDS
    ) -> Answer:
        """Post a call to the gateway and return its answer, decoded to the type `answer`.

        `call` None sends an empty object. Raises `DatabaseUnavailable`, after a pause that grows to two seconds, if the
        gateway does not answer within `seconds`, fails, asks for a retry or refuses the token of the pod; `NodeError`
        for errors of node services, and `CallRefused` for other refusals.
        """
        body = b"{}" if call is None else msgspec.json.encode(call)
        async with self._translated_errors(seconds):
            response = await self._connections.post(path, body)
            if response.status >= 300:  # noqa: PLR2004 - any status except success
                self._raise_refusal(response.status, response.headers, response.body[:MAX_ERROR_BYTES])
            self._failing_since = None
        return decoding.decode(response.body, answer)

    @asynccontextmanager
    async def stream(
        self,
        method: str,
        path: str,
        body: bytes | None = None,
        *,
        headers: Mapping[str, str] | None = None,
        seconds: float = CALL_SECONDS,
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        """Open a successful response of the gateway, to be read within the block and within `seconds`. Raises
        the errors of `call`.
        """
        import aiohttp  # noqa: PLC0415 - only pods with blobs need it: a seventh of a start, and 10 MB

        async with self._translated_errors(seconds):
            try:
                async with self._open_streams().request(
                    method, self._url + path, data=body, headers=headers, allow_redirects=False
                ) as response:
                    if response.status >= 300:  # noqa: PLR2004 - any status except success
                        text = await response.content.read(MAX_ERROR_BYTES)
                        self._raise_refusal(response.status, response.headers, text)
                    self._failing_since = None
                    yield response
            except aiohttp.ClientError as error:
                raise ConnectionError(str(error) or type(error).__name__) from error

    def _open_streams(self) -> aiohttp.ClientSession:
        """Return the HTTP session for streamed responses, created at its first use."""
        import aiohttp  # noqa: PLC0415 - as above

        if self._streams is None:
            self._streams = aiohttp.ClientSession(
                headers=self._headers,
                timeout=aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_SECONDS),
                connector=aiohttp.TCPConnector(limit=0),
                auto_decompress=False,
                trust_env=False,
            )
        return self._streams

    @asynccontextmanager
    async def _translated_errors(self, seconds: float) -> AsyncIterator[None]:
        """Limit the time of a block; a network error or timeout in it becomes `DatabaseUnavailable`,
        after a pause that grows.
        """
        try:
            async with asyncio.timeout(seconds):
                yield
        except OSError as error:
            self._count_failure()
            await self._pause()
            raise DatabaseUnavailable(
                f"The gateway did not answer: {error or type(error).__name__}"
            ) from error
        except DatabaseUnavailable:
            await self._pause()
            raise
        self._failures = 0

    def _raise_refusal(self, status: int, headers: Mapping[str, str], text: bytes) -> None:
        """Raise the error for an answer without success: `NodeError`, `DatabaseUnavailable` or `CallRefused`."""
        try:
            error = decoding.decode(text, _RefusalBody).error
        except msgspec.DecodeError:
            error = _ErrorBody("", "The answer is not from a gateway")
        if error.code and status not in UNKNOWN_POD_STATUSES:
            self._failing_since = None
        else:
            self._count_failure()
        # Headers of `call` have names in lower case; those of `stream` match any case.
        kind = headers.get(NODE_ERROR_HEADER.lower())
        if kind is not None:
            after = headers.get("retry-after")
            raise NodeError(
                error.message,
                code=error.code,
                retryable=kind == RETRYABLE,
                retry_after_seconds=None if after is None else float(after),
            )
        # An unknown token may be a new one that the gateway will know soon. If not, the leases expire, and
        # the runs continue elsewhere.
        if status in {401, 403, 408, 429} or status >= 500:  # noqa: PLR2004 - RFC 9110
            raise DatabaseUnavailable(f"The gateway refused: {status} {error.code}")
        raise CallRefused(status, error.code, error.message)

    def _count_failure(self) -> None:
        if self._failing_since is None:
            self._failing_since = monotonic()

    async def _pause(self) -> None:
        """Sleep before the next call: 50 ms, doubled by each consecutive failure up to two seconds."""
        pause = FIRST_PAUSE_SECONDS * 2 ** min(self._failures, MAX_DOUBLINGS)
        self._failures += 1
        await asyncio.sleep(min(pause, MAX_PAUSE_SECONDS))

    async def close(self) -> None:
        """Close the connections of the pod to the gateway."""
        self._connections.close()
        if self._streams is not None:
            await self._streams.close()
