"""Transfer loop of the bridge: take messages, post them, and acknowledge those that the gateway has committed."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, suppress
from typing import Protocol, TypeVar

import structlog

from bridge.bridge_errors import BridgeError, BridgeRefused, BridgeStopped, ContentRefused
from bridge.message_source import MessageSource, SourceMessage
from bridge.queue_gateway import MAX_PART_BYTES, MessageResult, RefusalDetail
from bridge.retry import until_available
from bridge.settings import RefusalAction

T = TypeVar("T")

log = structlog.get_logger()


class QueueTarget(Protocol):
    """Receiver of messages; see `bridge.queue_gateway.QueueGateway`."""

    async def enqueue(self, messages: Sequence[SourceMessage], *, source: str) -> Sequence[MessageResult]:
        """Hand over messages of the queue named `source`; return one result for each, in order."""


class QueueTransfer:
    """Moves batches of messages from a source to a workflow, one batch after the other."""

    def __init__(
        self,
        source: MessageSource,
        gateway: QueueTarget,
        stop: asyncio.Event,
        *,
        on_refused: RefusalAction = RefusalAction.STOP,
        batch: int = 100,
        wait_seconds: float = 5.0,
        hold_seconds: float = 60.0,
    ) -> None:
        self._source = source
        self._gateway = gateway
        self._stop = stop
        self._on_refused = on_refused
        self._batch = batch
        self._wait_seconds = wait_seconds
        self._hold_every_seconds = hold_seconds / 3
        self._in_hand: set[str] = set()
        self.accepted = 0
        self.duplicates = 0

    async def run(self) -> None:
        """Move messages from the source to the gateway, batch after batch, until the stop event is set.

        The current batch is finished first, unless it has to wait for source or gateway; unacknowledged messages are
        released at the end. Raises `BridgeRefused` for failures that an operator must fix, and other `BridgeError`s of
        the source.
        """
        try:
            while not self._stop.is_set():
                messages = await self._until_available(
                    lambda: self._source.take(self._batch, self._wait_seconds)
                )
                self._in_hand = {one.id for one in messages}
                async with self._extend_holds():
                    for part in split_requests(messages):
                        await self._hand_off(part)
        except BridgeStopped:
            await self._release()
        except BridgeError:
            await self._release()
            raise

    async def _hand_off(self, messages: Sequence[SourceMessage]) -> None:
        """Post messages to the gateway, acknowledge the accepted and duplicate ones,
        which are counted, and handle the refused.

        Waits while source or gateway are unavailable; raises `BridgeStopped` if the process stops meanwhile, and
        `BridgeRefused`.
        """
        answers = await self._enqueue_halving(messages)
        both = list(zip(messages, answers, strict=True))
        taken = [message.id for message, answer in both if answer.status != "refused"]
        refused = [(message, answer) for message, answer in both if answer.status == "refused"]
        if taken:
            await self._until_available(lambda: self._source.acknowledge(taken))
            self._in_hand.difference_update(taken)
        self.accepted += sum(answer.status == "accepted" for answer in answers)
        self.duplicates += sum(answer.status == "duplicate" for answer in answers)
        log.debug("messages sent", taken=len(taken), refused=len(refused))
        if refused:
            await self._handle_refused(refused)

    async def _enqueue_halving(self, messages: Sequence[SourceMessage]) -> Sequence[MessageResult]:
        """Post messages, and return one result for each, in order; waits while the gateway is unavailable.

        A request with refused content is halved until the message to blame is alone; that one gets a refused
        result. A message with a `problem`, always alone, is refused without a request. Raises `BridgeStopped` if the
        process stops during a wait.
        """
        problem = messages[0].problem
        if problem is not None:
            return [_build_refusal("unreadable", problem)]
        try:
            return await self._until_available(
                lambda: self._gateway.enqueue(messages, source=self._source.label)
            )
        except ContentRefused as error:
            if len(messages) == 1:
                return [_build_refusal(error.code, str(error))]
        middle = len(messages) // 2
        return [
            *await self._enqueue_halving(messages[:middle]),
            *await self._enqueue_halving(messages[middle:]),
        ]

    async def _handle_refused(self, refused: Sequence[tuple[SourceMessage, MessageResult]]) -> None:
        """Log messages that are refused for good, and treat them as the settings say: make them dead letters, drop
        them, or stop.

        To stop, raises `BridgeRefused` and leaves them in their queue. Raises `BridgeStopped` if the process stops
        during a wait.
        """
        policy = self._on_refused
        reasons: dict[str, str] = {}
        for message, answer in refused:
            reason = answer.error or RefusalDetail()
            reasons[message.id] = f"{reason.code}: {reason.message}"
            about = {"code": reason.code, "reason": reason.message, "on_refused": policy.value}
            log.error("message refused", message=message.deduplication_id, **about)
        match policy:
            case RefusalAction.STOP:
                first = refused[0][0]
                raise BridgeRefused(
                    f"The message {first.deduplication_id} was refused, and left in its queue: {reasons[first.id]}"
                )
            case RefusalAction.DROP:
                await self._until_available(lambda: self._source.acknowledge(list(reasons)))
            case RefusalAction.DEAD_LETTER:
                await self._until_available(lambda: self._source.dead_letter(reasons))
        self._in_hand.difference_update(reasons)

    @asynccontextmanager
    async def _extend_holds(self) -> AsyncIterator[None]:
        """Renew the hold on all messages in hand periodically for the duration of the block."""
        ended = asyncio.Event()
        task = asyncio.create_task(self._hold_until(ended))
        try:
            yield
        finally:
            # Not canceled: clients of sources may swallow a cancellation, or lose a connection by it.
            ended.set()
            await task

    async def _hold_until(self, ended: asyncio.Event) -> None:
        """Renew the hold on all messages in hand periodically until the event is set; errors of the source
        are ignored.
        """
        while not ended.is_set():
            with suppress(TimeoutError):
                await asyncio.wait_for(ended.wait(), self._hold_every_seconds)
            if self._in_hand and not ended.is_set():
                with suppress(BridgeError):  # The next call that matters meets the same failure.
                    await self._source.hold(sorted(self._in_hand))

    async def _release(self) -> None:
        """Return all messages in hand to their source; a failure is ignored, since their hold ends by itself."""
        if self._in_hand:
            with suppress(
                BridgeError
            ):  # Without a release, the messages are delivered again after their hold period.
                await self._source.release(sorted(self._in_hand))

    async def _until_available(self, work: Callable[[], Awaitable[T]]) -> T:
        """Return the result of `work`, which is repeated while source or gateway are unavailable.

        Raises `BridgeStopped` if the stop event is set while it waits.
        """
        return await until_available(work, self._stop)


def split_requests(messages: Sequence[SourceMessage]) -> Iterator[Sequence[SourceMessage]]:
    """Split messages, in order, into groups with at most 4,000,000 bytes of bodies each.

    A message with a `problem`, or one that is larger alone, gets a group of its own.
    """
    part: list[SourceMessage] = []
    size = 0
    for message in messages:
        length = len(message.body)
        if part and (message.problem or part[-1].problem or size + length > MAX_PART_BYTES):
            yield part
            part, size = [], 0
        part.append(message)
        size += length
    if part:
        yield part


def _build_refusal(code: str, message: str) -> MessageResult:
    """Return the result of a message that is refused without asking the gateway."""
    return MessageResult("refused", error=RefusalDetail(code, message))
