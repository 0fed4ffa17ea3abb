"""Client of the gateway's queue trigger; errors are classified by their handling."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from io import BytesIO
from typing import TYPE_CHECKING, Final, Literal
from urllib.parse import quote

import aiohttp
import msgspec

from bridge.bridge_errors import BridgeRefused, BridgeUnavailable, ContentRefused
from bridge.http_bodies import read_body
from json_text import decoding

if TYPE_CHECKING:
    from collections.abc import Mapping

    from bridge.message_source import SourceMessage
    from bridge.settings import BridgeSettings

CALL_SECONDS: Final = 15.0
CONNECT_SECONDS: Final = 5.0
MAX_PART_BYTES: Final = 4_000_000
"""Maximum bytes of the messages of one request; a single message may be larger."""
MAX_ANSWER_BYTES: Final = 4_000_000
SUCCESS_STATUSES: Final = range(200, 300)
CONFLICT_STATUS: Final = 409
TOO_LARGE_STATUS: Final = 413
RETRYABLE_STATUSES: Final = frozenset({408, 425, 429})
FIRST_SERVER_ERROR: Final = 500
CONCURRENCY_LIMIT_CODE: Final = "concurrency-limit"
"""Refusal of one message that may be accepted later."""
VALIDATION_FAILED_CODE: Final = "validation-failed"
CONTENT_CODES: Final = frozenset(
    {
        "malformed-json",
        "duplicate-key",
        "not-finite",
        "number-too-long",
        "lone-surrogate",
        "nul-character",
        "too-deep",
        "payload-too-large",
    }
)
"""Refusals that are caused by a message; other refusals never justify dropping messages."""


class RefusalDetail(msgspec.Struct, frozen=True):
    """Code and message of a refusal."""

    code: str = ""
    message: str = ""


class MessageResult(msgspec.Struct, frozen=True, rename="camel"):
    """Result of one message."""

    status: Literal["accepted", "duplicate", "refused"]
    execution_id: str | None = None
    error: RefusalDetail | None = None


class _MessageResults(msgspec.Struct):
    results: list[MessageResult]


class _ErrorLocation(msgspec.Struct):
    path: str = ""


class _ValidationRefusal(RefusalDetail, frozen=True):
    details: list[_ErrorLocation] = []

    @property
    def blames_content(self) -> bool:
        """Whether the content of the posted messages caused the refusal.

        An invalid graph of the workflow is refused with the same code, but its problems are elsewhere.
        """
        if self.code == VALIDATION_FAILED_CODE:
            return all(detail.path.startswith("messages") for detail in self.details)
        return self.code in CONTENT_CODES


class _RefusalEnvelope(msgspec.Struct):
    error: _ValidationRefusal


class _MessageBody(msgspec.Struct, rename="camel", omit_defaults=True):
    message: msgspec.Raw
    deduplication_id: str
    source: str
    priority: int | None = None


class QueueGateway:
    """Client of a workflow's queue trigger."""

    def __init__(self, settings: BridgeSettings) -> None:
        workflow = quote(settings.bridge_workflow, safe="")
        self._url = f"{settings.url.rstrip('/')}/api/v1/workflows/{workflow}/enqueue-batch"
        self._session = aiohttp.ClientSession(
            headers={"X-API-Key": settings.api_key.get_secret_value(), "Content-Type": "application/json"},
            timeout=aiohttp.ClientTimeout(total=CALL_SECONDS, sock_connect=CONNECT_SECONDS),
            trust_env=False,
        )

    async def enqueue(self, messages: Sequence[SourceMessage], *, source: str) -> Sequence[MessageResult]:
        """Post messages to a workflow's queue trigger in one request; return one result for each, in order.

        `source` is the label of their queue, which runs get as their origin. Raises `BridgeUnavailable` if a retry may
        help (also at the concurrency limit of the workflow), `ContentRefused` if a message is to blame, and
        `BridgeRefused` for other refusals. After any error the outcome of all messages is unknown: post them again, the
        gateway deduplicates them.
        """
        sent = [
            _MessageBody(msgspec.Raw(one.body), one.deduplication_id, source, one.priority)
            for one in messages
        ]
        status, headers, text = await self._post(msgspec.json.encode({"messages": sent}))
        if status not in SUCCESS_STATUSES:
            raise _error_for_response(status, headers, text)
        try:
            answers = decoding.decode(text, _MessageResults).results
        except msgspec.DecodeError as error:
            raise BridgeRefused(f"The server at {self._url} is not Pilotflame") from error
        if len(answers) != len(messages):
            raise BridgeRefused(f"The gateway has answered {len(answers)} of {len(messages)} messages")
        if any(one.error is not None and one.error.code == CONCURRENCY_LIMIT_CODE for one in answers):
            # Messages that were accepted meanwhile are deduplicated on the next attempt.
            raise BridgeUnavailable("The concurrency limit of the workflow is reached")
        return answers

    async def close(self) -> None:
        """Close the connections to the gateway."""
        await self._session.close()

    async def _post(self, body: bytes) -> tuple[int, Mapping[str, str], bytes]:
        """Post a JSON body to the workflow's queue trigger; return status,
        headers and body of the answer, of any status.

        Raises `BridgeUnavailable` if the gateway does not answer within 15 seconds, and `BridgeRefused` for an answer
        of over 4,000,000 bytes.
        """
        try:
            async with self._session.post(
                self._url,
                data=BytesIO(body),
                allow_redirects=False,
                # A gateway that refuses bodies of this size says so before the body is sent.
                expect100=len(body) > MAX_PART_BYTES,
            ) as response:
                return response.status, response.headers, await read_body(response, MAX_ANSWER_BYTES)
        except (aiohttp.ClientError, OSError, TimeoutError) as error:
            raise BridgeUnavailable(f"The gateway did not answer: {error or type(error).__name__}") from error


def _error_for_response(status: int, headers: Mapping[str, str], text: bytes) -> Exception:
    """Return (not raise) the error for an answer of the gateway that is no success.

    `ContentRefused` for too large or invalid messages, `BridgeUnavailable` for 408, 409, 425, 429 and 5xx (an
    inactive workflow may become active again), else `BridgeRefused`.
    """
    try:
        reason = decoding.decode(text, _RefusalEnvelope).error
    except msgspec.DecodeError:
        reason = _ValidationRefusal("", "The response is not one of Pilotflame")
    said = f"{reason.message} ({status} {reason.code})".replace(" )", ")")
    if status == TOO_LARGE_STATUS or reason.blames_content:
        return ContentRefused(reason.code or "payload-too-large", said)
    # An inactive workflow may become active again: its messages are safest in their queue.
    if status in RETRYABLE_STATUSES or status == CONFLICT_STATUS or status >= FIRST_SERVER_ERROR:
        return BridgeUnavailable(
            f"The gateway is not available: {said}",
            retry_after_seconds=_parse_retry_after(headers.get("Retry-After")),
        )
    return BridgeRefused(f"The gateway refused the request: {said}")


def _parse_retry_after(retry_after: str | None) -> float:
    """Return the seconds that a `Retry-After` header asks for, in either of its forms (RFC 9110).

    0 without a valid one, and for a date in the past.
    """
    if retry_after is None:
        return 0.0
    if retry_after.isdecimal():
        return float(retry_after)
    with suppress(ValueError):
        return max(0.0, (parsedate_to_datetime(retry_after) - datetime.now(UTC)).total_seconds())  # noqa: TID251 - HTTP dates are compared with the clock of the client
    return 0.0
