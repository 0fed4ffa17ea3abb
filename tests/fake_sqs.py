"""A small SQS in memory, strict where a client may be wrong: signatures, handles, visibility, limits of batches."""

from __future__ import annotations

import asyncio
import hmac
import json
import re
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from hashlib import sha256
from typing import Any, Final
from uuid import uuid4

from aiohttp import web

AUTHORIZATION: Final = re.compile(
    r"AWS4-HMAC-SHA256 Credential=([^/]+)/(\d{8})/([^/]+)/sqs/aws4_request, SignedHeaders=([a-z0-9;-]+),"
    r" Signature=([0-9a-f]{64})"
)
TOLERANCE: Final = timedelta(minutes=15)
MAX_BATCH: Final = 10
MAX_WAIT_SECONDS: Final = 20
MAX_VISIBILITY_SECONDS: Final = 43_200
REAL_WAIT_SECONDS: Final = 0.05
"""Longest real duration of a long poll: the test controls the clock of the queue."""


@dataclass
class FakeSqsMessage:
    """A message in the queue."""

    body: str
    attributes: Mapping[str, Any]
    id: str = field(default_factory=lambda: str(uuid4()))
    visible_at: float = 0.0
    receives: int = 0
    handle: str | None = None
    """Of the newest delivery, the only one that is good."""


class SqsError(Exception):
    """Error in the form of SQS."""

    def __init__(self, status: int, code: str) -> None:
        super().__init__(code)
        self.status = status
        self.code = code


@dataclass
class FakeSqs:
    """One queue of one account; tests read and change its fields."""

    region: str = "eu-test-1"
    access_key_id: str = "AKIATEST"
    secret_access_key: str = "sqs-secret-canary"
    session_token: str | None = None
    port: int = 0
    now: float = 0.0
    """Seconds on the clock of visibility timeouts."""
    messages: list[FakeSqsMessage] = field(default_factory=list)
    dead: list[FakeSqsMessage] = field(default_factory=list)
    max_receives: int | None = None
    """Receives before a message becomes a dead letter; None if the queue has no redrive policy."""
    failures: list[SqsError] = field(default_factory=list)
    """Answers to the next calls."""
    half_failures: int = 0
    """Number of next batches in which every second entry fails by a fault of the service."""
    actions: list[str] = field(default_factory=list)
    message_sent: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def queue_url(self) -> str:
        return f"http://sqs.test/123456789012/{self.name}"

    @property
    def name(self) -> str:
        return "orders"

    def send(self, body: str, **attributes: Any) -> None:  # noqa: ANN401 - as SQS has them
        """Put a message into the queue, visible at once, which ends a long poll."""
        self.messages.append(FakeSqsMessage(body, attributes))
        self.message_sent.set()

    async def answer(self, request: web.Request) -> web.Response:
        """Answer one signed call as SQS would, or by the faults that the fields ask for."""
        text = await request.read()
        try:
            self._check_signature(request, text)
            return _json_response(await self._dispatch(request, json.loads(text)))
        except SqsError as refused:
            return _json_response(
                {"__type": refused.code, "message": "It was refused"}, status=refused.status
            )

    async def _dispatch(self, request: web.Request, call: dict[str, Any]) -> object:
        """Return the answer to a call; raises `SqsError` for a wrong media type or queue,
        and the next of `failures`.
        """
        if request.headers["Content-Type"] != "application/x-amz-json-1.0":
            raise SqsError(400, "com.amazon.coral.service#SerializationException")
        if call.pop("QueueUrl", None) != self.queue_url:
            raise SqsError(400, "com.amazonaws.sqs#QueueDoesNotExist")
        action = request.headers["X-Amz-Target"].removeprefix("AmazonSQS.")
        self.actions.append(action)
        if self.failures:
            raise self.failures.pop(0)
        return await self._perform(action, call)

    async def _perform(self, action: str, call: dict[str, Any]) -> object:
        """Carry out an action of SQS and return its answer; raises `SqsError` for an unknown action."""
        match action:
            case "ReceiveMessage":
                return await self._receive(**call)
            case "DeleteMessageBatch":
                return self._each(call, {"Id", "ReceiptHandle"}, self._delete)
            case "ChangeMessageVisibilityBatch":
                return self._each(call, {"Id", "ReceiptHandle", "VisibilityTimeout"}, self._change_visibility)
            case "GetQueueAttributes":
                policy = json.dumps({"deadLetterTargetArn": "arn:dead", "maxReceiveCount": self.max_receives})
                has_policy = "RedrivePolicy" in call["AttributeNames"] and self.max_receives is not None
                return {"Attributes": {"RedrivePolicy": policy}} if has_policy else {}
        raise SqsError(400, "com.amazon.coral.service#UnknownOperationException")

    # ── operations ──────────────────────────────────────────────────────────────────────────────────────────

    async def _receive(
        self,
        MaxNumberOfMessages: int,  # noqa: N803 - the names of the protocol
        WaitTimeSeconds: int,  # noqa: N803 - as above
        VisibilityTimeout: int,  # noqa: N803 - as above
        MessageAttributeNames: Sequence[str],  # noqa: N803 - as above
    ) -> object:
        """Return up to so many visible messages, which become hidden; wait only for a short time,
        not the requested one.
        """
        in_range = (
            type(WaitTimeSeconds) is int
            and 1 <= MaxNumberOfMessages <= MAX_BATCH
            and 0 <= WaitTimeSeconds <= MAX_WAIT_SECONDS
            and 0 <= VisibilityTimeout <= MAX_VISIBILITY_SECONDS
        )
        if not in_range:
            raise SqsError(400, "com.amazonaws.sqs#InvalidParameterValue")
        if WaitTimeSeconds and not self._visible():
            self.message_sent.clear()
            try:
                await asyncio.wait_for(self.message_sent.wait(), REAL_WAIT_SECONDS)
            except TimeoutError:
                return {}
        received = []
        for kept in self._visible()[:MaxNumberOfMessages]:
            kept.receives += 1
            kept.handle = str(uuid4())
            kept.visible_at = self.now + VisibilityTimeout
            shown = {name: value for name, value in kept.attributes.items() if name in MessageAttributeNames}
            about = {"MessageId": kept.id, "ReceiptHandle": kept.handle, "Body": kept.body}
            received.append({**about, **({"MessageAttributes": shown} if shown else {})})
        return {"Messages": received} if received else {}

    def _visible(self) -> list[FakeSqsMessage]:
        """Return the messages that a call could receive now; those with too many receives become dead letters."""
        self._bury()
        return [kept for kept in self.messages if kept.visible_at <= self.now]

    def _bury(self) -> None:
        """Move visible messages that were received too often to the dead letters."""
        for kept in [*self.messages]:
            spent = self.max_receives is not None and kept.receives >= self.max_receives
            if spent and kept.visible_at <= self.now:
                self.messages.remove(kept)
                self.dead.append(kept)

    def _each(self, call: Mapping[str, Any], fields: set[str], do: Any) -> object:  # noqa: ANN401 - one of two methods
        """Call `do` for each entry of a batch, and return the entries that succeeded and failed.

        `do` returns the code of an error, or None. With `half_failures`, every second entry fails instead.
        """
        entries: list[dict[str, Any]] = call["Entries"]
        ids = [entry["Id"] for entry in entries]
        if not 1 <= len(entries) <= MAX_BATCH or len(set(ids)) < len(ids):
            raise SqsError(400, "com.amazonaws.sqs#TooManyEntriesInBatchRequest")
        failing = set(ids[1::2]) if self.half_failures > 0 else set()
        self.half_failures -= 1
        successful, failed = [], []
        for entry in entries:
            assert entry.keys() == fields
            code = "InternalError" if entry["Id"] in failing else do(entry)
            if code is None:
                successful.append({"Id": entry["Id"]})
            else:
                failed.append({"Id": entry["Id"], "SenderFault": code != "InternalError", "Code": code})
        return {"Successful": successful, "Failed": failed} if failed else {"Successful": successful}

    def _delete(self, entry: Mapping[str, Any]) -> str | None:
        self.messages = [kept for kept in self.messages if kept.handle != entry["ReceiptHandle"]]
        return None

    def _change_visibility(self, entry: Mapping[str, Any]) -> str | None:
        """Hide a held message for a time from now; return the code of an error if its handle is not valid any more."""
        for kept in self.messages:
            if kept.handle == entry["ReceiptHandle"] and kept.visible_at > self.now:
                kept.visible_at = self.now + entry["VisibilityTimeout"]
                return None
        return "ReceiptHandleIsInvalid"

    # ── authentication ──────────────────────────────────────────────────────────────────────────────────────

    def _check_signature(self, request: web.Request, body: bytes) -> None:
        """Raise `SqsError` unless AWS Signature Version 4 signs the request with the credentials of this queue."""
        match = AUTHORIZATION.fullmatch(request.headers.get("Authorization", ""))
        if match is None:
            raise SqsError(403, "com.amazon.coral.service#MissingAuthenticationTokenException")
        access_key_id, day, region, names, signature = match.groups()
        if access_key_id != self.access_key_id:
            raise SqsError(403, "com.amazon.coral.service#UnrecognizedClientException")
        if request.headers.get("X-Amz-Security-Token") != self.session_token or region != self.region:
            raise SqsError(403, "com.amazon.coral.service#UnrecognizedClientException")
        date = request.headers["X-Amz-Date"]
        moment = datetime.strptime(date, "%Y%m%dT%H%M%SZ").replace(tzinfo=UTC)
        if abs(datetime.now(UTC) - moment) > TOLERANCE or not date.startswith(day):
            raise SqsError(403, "com.amazon.coral.service#RequestExpired")
        signed = names.split(";")
        of_aws = {name.lower() for name in request.headers if name.lower().startswith("x-amz-")}
        needed = {"host", "content-type", *of_aws}
        if signed != sorted(signed) or not needed <= set(signed):
            raise SqsError(403, "com.amazon.coral.service#IncompleteSignature")
        lines = [f"{name}:{' '.join(request.headers[name].split())}" for name in signed]
        payload = sha256(body).hexdigest()
        canonical = "\n".join([request.method, request.raw_path, "", *lines, "", names, payload])
        scope = f"{day}/{region}/sqs/aws4_request"
        text = f"AWS4-HMAC-SHA256\n{date}\n{scope}\n{sha256(canonical.encode()).hexdigest()}"
        key = f"AWS4{self.secret_access_key}".encode()
        for part in scope.split("/"):
            key = hmac.digest(key, part.encode(), sha256)
        if not hmac.compare_digest(hmac.digest(key, text.encode(), sha256).hex(), signature):
            raise SqsError(403, "com.amazon.coral.service#InvalidSignatureException")


def _json_response(value: object, *, status: int = 200) -> web.Response:
    body = json.dumps(value).encode()
    return web.Response(status=status, body=body, headers={"Content-Type": "application/x-amz-json-1.0"})


@asynccontextmanager
async def serve_fake_sqs() -> AsyncIterator[FakeSqs]:
    """Serve an empty queue on a free port as long as the context lasts."""
    sqs = FakeSqs()
    app = web.Application()
    app.router.add_post("/", sqs.answer)
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=0)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    sqs.port = runner.addresses[0][1]
    try:
        yield sqs
    finally:
        await runner.cleanup()
