"""Client of the gateway's internal API, with persistent connections and translated errors."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from time import monotonic
from typing import TYPE_CHECKING, Final, TypeVar

import aiohttp
import msgspec

from engine.run_errors import NodeError
from execution.pod_api import NODE_ERROR_HEADER, PREFIX, RETRYABLE, RUNNER_HEADER
from json_text import decoding
from models.errors import DatabaseUnavailable
from models.timestamps import DatabaseClock
from models.workflow_names import PodProcess

if TYPE_CHECKING:
    from runner.settings import RunnerSettings

Answer = TypeVar("Answer")

CALL_SECONDS: Final = 30.0
CONNECT_SECONDS: Final = 5.0
FIRST_PAUSE_SECONDS: Final = 0.05
MAX_PAUSE_SECONDS: Final = 2.0
MAX_DOUBLINGS: Final = 10
MAX_ERROR_BYTES: Final = 100_000
UNKNOWN_POD_STATUSES: Final = frozenset({401, 403, 404})
"""Answers of a gateway that doesn't know the pod, or of a foreign server."""
_JSON: Final = {"Content-Type": "application/json"}


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
    """Connections of one event loop to the gateway. Consecutive failures take longer and longer, as a back-off."""

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
        self._session = aiohttp.ClientSession(
            headers={"Authorization": f"Bearer {settings.token}", RUNNER_HEADER: self._process.name},
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_SECONDS),
            connector=aiohttp.TCPConnector(limit=0),
            auto_decompress=False,
            trust_env=False,
        )

    def for_loop(self) -> GatewayClient:
        """Return a client for the running event loop of another thread."""
        return GatewayClient(self._settings, self._process, self.clock)

    @property
    def failing_seconds(self) -> float:
        """Seconds for which every call on this loop found no gateway, or one that doesn't know this pod."""
        return 0.0 if self._failing_since is None else monotonic() - self._failing_since

    async def call(
        self, path: str, call: msgspec.Struct | None, answer: type[Answer], *, seconds: float = CALL_SECONDS
    ) -> Answer:
        """Return the answer to a call. Raises `DatabaseUnavailable`, `NodeError` and `CallRefused`."""
        body = b"{}" if call is None else msgspec.json.encode(call)
        async with self.exchange("POST", path, body, headers=_JSON, seconds=seconds) as response:
            text = await response.read()
        return decoding.decode(text, answer)

    @asynccontextmanager
    async def exchange(
        self,
        method: str,
        path: str,
        body: bytes | None = None,
        *,
        headers: Mapping[str, str] | None = None,
        seconds: float = CALL_SECONDS,
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        """Open a successful response, to be read within the block. Raises the errors of `call`."""
        try:
            async with (
                asyncio.timeout(seconds),
                self._session.request(
                    method, self._url + path, data=body, headers=headers, allow_redirects=False
                ) as response,
            ):
                if response.status >= 300:  # noqa: PLR2004 - any status except success
                    await self._raise_refusal(response)
                self._failing_since = None
                yield response
        except (aiohttp.ClientError, OSError, TimeoutError) as error:
            self._count_failure()
            await self._pause()
            raise DatabaseUnavailable(
                f"The gateway did not answer: {error or type(error).__name__}"
            ) from error
        except DatabaseUnavailable:
            await self._pause()
            raise
        self._failures = 0

    async def _raise_refusal(self, response: aiohttp.ClientResponse) -> None:
        text = await response.content.read(MAX_ERROR_BYTES)
        try:
            error = decoding.decode(text, _RefusalBody).error
        except msgspec.DecodeError:
            error = _ErrorBody("", "The answer is not from a gateway")
        if error.code and response.status not in UNKNOWN_POD_STATUSES:
            self._failing_since = None
        else:
            self._count_failure()
        kind = response.headers.get(NODE_ERROR_HEADER)
        if kind is not None:
            raise NodeError(error.message, code=error.code, retryable=kind == RETRYABLE)
        # An unknown token may be a new one that the gateway will know soon. If not, the leases expire, and
        # the runs continue elsewhere.
        if response.status in {401, 403, 408, 429} or response.status >= 500:  # noqa: PLR2004 - RFC 9110
            raise DatabaseUnavailable(f"The gateway refused: {response.status} {error.code}")
        raise CallRefused(response.status, error.code, error.message)

    def _count_failure(self) -> None:
        if self._failing_since is None:
            self._failing_since = monotonic()

    async def _pause(self) -> None:
        pause = FIRST_PAUSE_SECONDS * 2 ** min(self._failures, MAX_DOUBLINGS)
        self._failures += 1
        await asyncio.sleep(min(pause, MAX_PAUSE_SECONDS))

    async def close(self) -> None:
        """Close the connections of the pod to the gateway."""
        await self._session.close()
