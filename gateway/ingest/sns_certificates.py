"""HTTP requests to Amazon SNS: for its signing certificates, and to confirm subscriptions.

`senders.sns` builds and checks the addresses; this module requests them through the guarded client, without
redirects.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Mapping
from datetime import datetime
from typing import TYPE_CHECKING, Final, Protocol

import structlog

from gateway.http import errors
from gateway.http.errors import ApiError
from nodes.outbound_http import OutboundRefused, OutboundUnavailable
from senders.request_refusal import RequestRefused

if TYPE_CHECKING:
    from nodes.outbound_http import OutboundResponse

log = structlog.get_logger()

ANSWER_SECONDS: Final = 5.0
"""SNS itself waits for 15 seconds."""
MAX_ANSWER_BYTES: Final = 65_536
MAX_KEPT: Final = 100
AT_ONCE: Final = 4
OK: Final = 200
TOO_MANY: Final = 429
SERVER_ERROR: Final = 500


class GuardedHttpClient(Protocol):
    """HTTP client with the guards of outbound requests."""

    async def request(
        self,
        method: str,
        url: str,
        *,
        headers: Mapping[str, str],
        timeout_seconds: float,
        follow_redirects: bool,
    ) -> OutboundResponse: ...

    async def close(self) -> None: ...


class SnsCertificateCache:
    """Cache of signing certificates, each until it expires; concurrent callers share one request."""

    def __init__(self, client: GuardedHttpClient) -> None:
        self._client = client
        self._kept: OrderedDict[str, tuple[bytes, datetime]] = OrderedDict()
        self._fetches: dict[str, asyncio.Task[bytes]] = {}
        self._places = asyncio.Semaphore(AT_ONCE)

    async def get(self, url: str, now: datetime) -> bytes:
        """Return the certificate at a URL as PEM; it is fetched once, and kept until it expires, 100 of them at most.

        Raises a 503 error when it can't be fetched within five seconds: SNS treats a 4xx as final, and the fault may be
        temporary, such as a network that is not allowed, or a proxy that answers instead of SNS.
        """
        kept = self._kept.get(url)
        if kept is not None and now < kept[1]:
            return kept[0]
        fetch = self._fetches.get(url)
        if fetch is None:
            fetch = self._fetches[url] = asyncio.create_task(self._fetch(url))
            fetch.add_done_callback(lambda done: self._finish_fetch(url, done))
        return await asyncio.shield(fetch)

    async def confirm(self, url: str) -> None:
        """Request a URL that confirms a subscription of SNS.

        Raises `RequestRefused` when SNS refuses, a 503 error when it does not answer or asks to wait.
        """
        status, _ = await self._request(url)
        if status != OK:
            raise RequestRefused(
                "malformed-message", "SNS does not confirm the subscription: its token may be too old"
            )

    async def close(self) -> None:
        """Wait for downloads of certificates in progress, then close the HTTP client."""
        await asyncio.gather(*self._fetches.values(), return_exceptions=True)
        await self._client.close()

    async def _fetch(self, url: str) -> bytes:
        """Fetch a certificate, check that it is one, and cache it; raises a 503 error otherwise."""
        status, pem = await self._request(url)
        if status != OK:
            raise _retry_later(f"it answered {status} instead of its certificate")
        from senders import public_keys  # noqa: PLC0415 - loads cryptography

        try:
            ends = public_keys.read_certificate(pem).ends_at
        except ValueError as error:
            raise _retry_later("its answer is no certificate") from error
        self._kept[url] = (pem, ends)
        while len(self._kept) > MAX_KEPT:
            self._kept.popitem(last=False)
        return pem

    def _finish_fetch(self, url: str, fetch: asyncio.Task[bytes]) -> None:
        del self._fetches[url]
        if not fetch.cancelled():
            fetch.exception()  # marks the exception as retrieved: waiting callers have it, and nobody else needs it

    async def _request(self, url: str) -> tuple[int, bytes]:
        """Return status and body of a GET, at most four at a time; raises a 503 error without an answer, for
        429 and 5xx.
        """
        try:
            async with self._places:
                answer = await self._client.request(
                    "GET", url, headers={}, timeout_seconds=ANSWER_SECONDS, follow_redirects=False
                )
        except OutboundUnavailable as error:
            raise _retry_later(str(error)) from error
        except OutboundRefused as error:
            raise _retry_later(error.message) from error
        if answer.status == TOO_MANY or answer.status >= SERVER_ERROR:
            raise _retry_later(f"it answered {answer.status}")
        return answer.status, answer.body


def _retry_later(reason: str) -> ApiError:
    log.warning("SNS not reached", reason=reason)
    return errors.not_ready(f"Amazon SNS could not be reached: {reason}")
