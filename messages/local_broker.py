"""The broker of a single process: Dramatiq's in-process queues for hints, and dictionaries for the rest."""

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from queue import Queue

import dramatiq
from dramatiq.brokers.stub import StubBroker

from messages import executions, hint_worker
from messages.broker import WATCH_SECONDS, ExecutionsChanged, Letter, Notice
from messages.buckets import Demand, Grant, LocalBuckets
from messages.deployments import DeployerMessage
from messages.executions import ALL_LANES, RunExecutions


class LocalQueues(StubBroker):
    def __init__(self) -> None:
        super().__init__(middleware=[])
        self.declare_queue(executions.QUEUE)

    def declare_queue(self, queue_name: str) -> None:
        """Without the delay queue, which would only be polled: nothing is ever delayed in the broker."""
        if queue_name in self.queues:
            return
        self.emit_before("declare_queue", queue_name)
        self.queues[queue_name] = Queue()
        self.emit_after("declare_queue", queue_name)


class LocalBroker:
    def __init__(self, *, inbox: str) -> None:
        self.inbox = inbox
        self._queues = LocalQueues()
        self._worker: dramatiq.Worker | None = None
        self._listeners: list[Callable[[Notice], None]] = []
        self._deployer: Callable[[DeployerMessage], None] | None = None
        self._reader: Callable[[], None] | None = None
        self._hinted: set[int] = set()
        self._watched_until: dict[str, float] = {}
        self._buckets = LocalBuckets()

    async def wake(self, lane: int = ALL_LANES) -> None:
        if lane in self._hinted:
            return
        self._hinted.add(lane)
        hint = asdict(RunExecutions(lane=lane))
        self._queues.enqueue(dramatiq.Message(executions.QUEUE, executions.ACTOR, (), hint, {}))

    async def watch(self, execution_ids: Sequence[str]) -> None:
        now = asyncio.get_running_loop().time()
        for execution_id in execution_ids:
            self._watched_until.pop(execution_id, None)
            self._watched_until[execution_id] = now + WATCH_SECONDS
        self._forget_watches_before(now)

    async def announce(self, inboxes: Mapping[str, str]) -> None:
        self._forget_watches_before(asyncio.get_running_loop().time())
        told = tuple(
            execution_id
            for execution_id, inbox in inboxes.items()
            if self._watched_until.pop(execution_id, None) is not None or inbox == self.inbox
        )
        if told:
            self._deliver(ExecutionsChanged(told))

    async def send(self, inbox: str, message: Mapping[str, str]) -> None:
        if inbox == self.inbox:
            self._deliver(Letter(dict(message)))

    async def is_heard(self, inbox: str) -> bool:
        return inbox == self.inbox and bool(self._listeners)

    async def listen(self, on_notice: Callable[[Notice], None]) -> None:
        self._listeners.append(on_notice)

    def start_worker(self, on_hint: Callable[[int], None]) -> None:
        def taken(lane: int) -> None:
            self._hinted.discard(lane)
            on_hint(lane)

        self._worker = hint_worker.start(self._queues, taken)

    async def stop_worker(self) -> None:
        worker, self._worker = self._worker, None
        if worker is not None:
            await asyncio.to_thread(hint_worker.stop, worker)

    async def wake_readers(self) -> None:
        """Without a queue: readers are right here, or there are none."""
        if self._reader is not None:
            asyncio.get_running_loop().call_soon(self._reader)

    def start_reader(self, on_hint: Callable[[], None]) -> None:
        self._reader = on_hint

    async def stop_reader(self) -> None:
        self._reader = None

    async def tell_deployer(self, message: DeployerMessage) -> None:
        """Without a queue: the one deployer that there can be is right here, or there is none."""
        if self._deployer is not None:
            asyncio.get_running_loop().call_soon(self._deployer, message)

    def start_deployer(self, on_message: Callable[[DeployerMessage], None]) -> None:
        self._deployer = on_message

    async def stop_deployer(self) -> None:
        self._deployer = None

    async def take_tokens(self, demands: Sequence[Demand]) -> Sequence[Grant]:
        now = asyncio.get_running_loop().time()
        return [self._buckets.take(demand, now) for demand in demands]

    async def ping(self) -> None:
        """Always there."""

    async def close(self) -> None:
        self._listeners.clear()
        await self.stop_worker()

    def _deliver(self, notice: Notice) -> None:
        loop = asyncio.get_running_loop()
        for on_notice in self._listeners:
            loop.call_soon(on_notice, notice)

    def _forget_watches_before(self, now: float) -> None:
        # All watches last equally long and a renewed one moves to the end: the first is the next to run out.
        while self._watched_until:
            execution_id, until = next(iter(self._watched_until.items()))
            if until > now:
                return
            del self._watched_until[execution_id]
