"""SQS-compatible queue as a message source: calls in AWS's JSON protocol, signed here."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Final, TypeVar
from urllib.parse import urlsplit

import aiohttp
import msgspec
import structlog

from bridge.bridge_errors import BridgeRefused, BridgeUnavailable
from bridge.http_bodies import read_body
from bridge.message_source import (
    SourceMessage,
    UnreadableMessage,
    make_deduplication_id,
    parse_priority,
    to_json,
)
from bridge.settings import AwsCredentials
from json_text import decoding
from nodes.connections.aws_signature import AwsSigner

if TYPE_CHECKING:
    from bridge.settings import SqsBridgeSettings

T = TypeVar("T")

CALL_SECONDS: Final = 10.0
CONNECT_SECONDS: Final = 5.0
BATCH_MESSAGES: Final = 10
"""Maximum number of messages or entries in one call."""
MAX_TAKEN: Final = 100
"""More concurrent calls would mostly return nothing, and each is billed."""
MAX_ANSWER_BYTES: Final = 50_000_000
PRIORITY_ATTRIBUTE: Final = "priority"
OK_STATUS: Final = 200
TOO_MANY_REQUESTS: Final = 429
FIRST_SERVER_ERROR: Final = 500
RETRYABLE_CODES: Final = (
    "throttl",
    "slowdown",
    "toomanyrequests",
    "overlimit",
    "timeout",
    "unavailable",
    "internal",
)
"""Substrings of the codes of temporary errors, in lower case."""

log = structlog.get_logger()


class _MessageAttribute(msgspec.Struct, rename="pascal"):
    string_value: str | None = None


class _SqsMessage(msgspec.Struct, rename="pascal"):
    message_id: str
    receipt_handle: str
    body: str
    message_attributes: dict[str, _MessageAttribute] = msgspec.field(default_factory=dict)


class _SqsMessages(msgspec.Struct, rename="pascal"):
    messages: list[_SqsMessage] | None = None


class _SqsFailure(msgspec.Struct, rename="pascal"):
    id: str
    sender_fault: bool
    code: str = ""


class _SqsBatchResult(msgspec.Struct, rename="pascal"):
    failed: list[_SqsFailure] | None = None


class _QueueAttributes(msgspec.Struct, rename="pascal"):
    attributes: dict[str, str] | None = None


class _SqsError(msgspec.Struct):
    type: str = msgspec.field(default="", name="__type")
    message: str = ""


class SqsQueue:
    """Implements `bridge.message_source.MessageSource`. The id of a delivery is its receipt handle."""

    def __init__(
        self,
        settings: SqsBridgeSettings,
        credentials: AwsCredentials | None = None,
        now: Callable[[], datetime] = lambda: datetime.now(UTC),  # noqa: TID251 - a signature of this host
    ) -> None:
        credentials = credentials or AwsCredentials.from_environment(settings)
        self.label = settings.label("sqs", settings.queue_name)
        self._queue_url = settings.bridge_sqs_queue_url
        self._endpoint = settings.endpoint
        self._host = urlsplit(settings.endpoint).netloc
        self._hold_seconds = settings.bridge_hold_seconds
        self._signer = AwsSigner(
            credentials.access_key_id,
            credentials.secret_access_key,
            credentials.region,
            credentials.session_token,
            "sqs",
        )
        self._now = now
        self._session = aiohttp.ClientSession(
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_SECONDS), trust_env=False
        )

    async def take(self, limit: int, wait_seconds: float) -> Sequence[SourceMessage]:
        """Take up to `limit` messages, at most 100; an empty list after `wait_seconds` without one.

        Waits for a first page of up to 10 messages, and after a full one fetches more pages concurrently. Raises
        `BridgeUnavailable` and `BridgeRefused` for the first page; failures of later pages are ignored.
        """
        first = await self._receive(min(limit, BATCH_MESSAGES), wait_seconds)
        if len(first) < BATCH_MESSAGES:
            return first
        most = min(limit, MAX_TAKEN)
        sizes = [min(BATCH_MESSAGES, most - taken) for taken in range(BATCH_MESSAGES, most, BATCH_MESSAGES)]
        # A failed call doesn't affect the others: the next page returns its messages.
        rest = await asyncio.gather(*(self._receive(size, 0) for size in sizes), return_exceptions=True)
        return [*first, *(one for some in rest if not isinstance(some, BaseException) for one in some)]

    async def hold(self, ids: Sequence[str]) -> None:
        """Restart the visibility timeout of messages, so that no other consumer gets them for another hold period.

        Raises `BridgeUnavailable` and `BridgeRefused`; messages that this process no longer holds are only logged.
        """
        await self._change_visibility(ids, self._hold_seconds)

    async def acknowledge(self, ids: Sequence[str]) -> None:
        """Delete messages, so that they are never delivered again; messages that this process no longer holds are only
        logged.

        Raises `BridgeUnavailable` and `BridgeRefused`.
        """
        await self._in_batches("DeleteMessageBatch", ids, {})

    async def release(self, ids: Sequence[str]) -> None:
        """Make messages visible at once, so that other consumers get them; messages that this process no longer holds
        are only logged.

        Raises `BridgeUnavailable` and `BridgeRefused`.
        """
        await self._change_visibility(ids, 0)

    async def dead_letter(self, reasons: Mapping[str, str]) -> None:
        """Make messages visible at once; SQS itself moves them to its dead-letter
        queue after the configured number of receives.

        The reasons are not passed on. Raises `BridgeRefused`, also if the queue has no redrive policy, and so no
        dead-letter queue, and `BridgeUnavailable`.
        """
        found = await self._call(
            "GetQueueAttributes",
            {"AttributeNames": ["RedrivePolicy"]},
            _QueueAttributes,
            seconds=CALL_SECONDS,
        )
        if "RedrivePolicy" not in (found.attributes or {}):
            raise BridgeRefused(
                "The queue has no RedrivePolicy, and so no dead-letter queue: give it one, or use `drop`"
            )
        await self._change_visibility(list(reasons), 0)

    async def close(self) -> None:
        """Close the connections to SQS."""
        await self._session.close()

    async def _receive(self, limit: int, wait_seconds: float) -> Sequence[SourceMessage]:
        """Receive one page of up to `limit` messages (SQS allows 10), waiting whole seconds for the first.

        Raises `BridgeUnavailable` and `BridgeRefused`.
        """
        wait = math.ceil(wait_seconds)
        call = {
            "MaxNumberOfMessages": limit,
            "WaitTimeSeconds": wait,
            "VisibilityTimeout": self._hold_seconds,
            "MessageAttributeNames": [PRIORITY_ATTRIBUTE],
        }
        batch = await self._call("ReceiveMessage", call, _SqsMessages, seconds=wait + CALL_SECONDS)
        return [self._message(one) for one in batch.messages or ()]

    def _message(self, received: _SqsMessage) -> SourceMessage:
        """Convert a received message; one with an unreadable body or priority gets a `problem` instead of a body."""
        deduplication_id = make_deduplication_id(self.label, received.message_id)
        attribute = received.message_attributes.get(PRIORITY_ATTRIBUTE)
        try:
            priority = parse_priority(attribute.string_value if attribute else None)
            return SourceMessage(
                received.receipt_handle, deduplication_id, to_json(received.body.encode()), priority
            )
        except UnreadableMessage as error:
            return SourceMessage(received.receipt_handle, deduplication_id, problem=str(error))

    async def _change_visibility(self, ids: Sequence[str], seconds: int) -> None:
        """Set for how many seconds messages stay hidden from other consumers; 0 makes them visible at once.

        Raises `BridgeUnavailable` and `BridgeRefused`.
        """
        await self._in_batches("ChangeMessageVisibilityBatch", ids, {"VisibilityTimeout": seconds})

    async def _in_batches(self, action: str, ids: Sequence[str], about_each: Mapping[str, int]) -> None:
        """Call an action of SQS for messages in batches of 10, concurrently; `ids` are their receipt handles.

        `about_each` has further members of each entry. After all batches, raises the first error, `BridgeUnavailable`
        or `BridgeRefused`.
        """
        calls = [self._batch(action, some, about_each) for some in _split_pages(ids, BATCH_MESSAGES)]
        for outcome in await asyncio.gather(*calls, return_exceptions=True):
            if isinstance(outcome, BaseException):
                raise outcome

    async def _batch(self, action: str, ids: Sequence[str], about_each: Mapping[str, int]) -> None:
        """Call an action for one batch of at most 10 messages.

        Messages that this process no longer holds are logged. Raises `BridgeUnavailable` if SQS fails for a
        message.
        """
        entries = [{"Id": str(index), "ReceiptHandle": one, **about_each} for index, one in enumerate(ids)]
        done = await self._call(action, {"Entries": entries}, _SqsBatchResult, seconds=CALL_SECONDS)
        for failure in done.failed or ():
            if not failure.sender_fault:
                raise BridgeUnavailable(f"SQS has not completed {action}: {failure.code}")
            # The receipt handle has expired: another consumer has the message, or it is deleted.
            log.info("message no longer held", action=action, code=failure.code)

    async def _call(self, action: str, call: Mapping[str, Any], answer: type[T], *, seconds: float) -> T:
        """Call an action of SQS with signed JSON; return the decoded answer.

        Raises `BridgeUnavailable` without an answer within `seconds`, and for a refusal that a retry may change, and
        `BridgeRefused` for any other refusal and an answer that is not of SQS or too large.
        """
        body = msgspec.json.encode({"QueueUrl": self._queue_url, **call})
        given = {"content-type": "application/x-amz-json-1.0", "x-amz-target": f"AmazonSQS.{action}"}
        signed = self._signer.headers("POST", self._host, "/", {}, given, body, self._now())
        headers = {**signed, "host": self._host}
        try:
            async with (
                asyncio.timeout(seconds),
                self._session.post(
                    f"{self._endpoint}/", data=body, headers=headers, allow_redirects=False
                ) as response,
            ):
                status, text = response.status, await read_body(response, MAX_ANSWER_BYTES)
        except (aiohttp.ClientError, OSError, TimeoutError) as error:
            raise BridgeUnavailable(f"SQS did not answer: {error or type(error).__name__}") from error
        if status != OK_STATUS:
            raise _error_for_response(status, text)
        try:
            return decoding.decode(text, answer)
        except msgspec.DecodeError as error:
            raise BridgeRefused(
                f"The server at {self._endpoint} does not support the JSON protocol of SQS"
            ) from error


def _error_for_response(status: int, text: bytes) -> Exception:
    """Return (not raise) the error for an answer of SQS that is no success: `BridgeUnavailable` if a retry may help,
    else `BridgeRefused`.
    """
    try:
        error = decoding.decode(text, _SqsError)
    except msgspec.DecodeError:
        error = _SqsError()
    code = error.type.rpartition("#")[2]
    said = f"{error.message} ({status} {code})".strip().replace(" )", ")")
    passes = status >= FIRST_SERVER_ERROR or status == TOO_MANY_REQUESTS
    if passes or any(word in code.lower() for word in RETRYABLE_CODES):
        return BridgeUnavailable(f"SQS is not available: {said}")
    return BridgeRefused(f"SQS refused: {said}")


def _split_pages(ids: Sequence[str], size: int) -> Iterator[Sequence[str]]:
    """Yield ids, in order, in groups of at most `size`."""
    for start in range(0, len(ids), size):
        yield ids[start : start + size]
