"""Broker of a single process: dictionaries, and calls on its event loop.

No queue is needed, since sender and receiver live and die together.
"""

import asyncio
from collections.abc import Callable, Mapping, Sequence

from messages.broker import (
    GATEWAYS,
    NO_GRANTS,
    WATCH_SECONDS,
    ChangedExecutions,
    DirectMessage,
    DirectRuns,
    Notification,
    SlotGrant,
)
from messages.deployer_messages import DeployerMessage
from messages.token_buckets import LocalTokenBuckets, TokenDemand, TokenGrant
from messages.wakeups import NotificationListeners
from messages.worker_wakeup import ALL_SHARDS
from models.ended_execution import EndedExecution


class LocalBroker:
    """Broker of a process that has all roles, without a server; implements `messages.broker.Broker`."""

    uses_redis = False

    def __init__(self, *, channel: str) -> None:
        self.channel = channel
        self._worker: Callable[[int], None] | None = None
        self._direct: Callable[[DirectRuns], None] | None = None
        self._listeners = NotificationListeners()
        self._deployer: Callable[[DeployerMessage], None] | None = None
        self._mail_parser: Callable[[], None] | None = None
        self._queued_shards: set[int] = set()
        self._watched_until: dict[str, float] = {}
        self._buckets = LocalTokenBuckets()

    async def wake_workers(self, shard: int = ALL_SHARDS) -> None:
        if shard in self._queued_shards:
            return
        self._queued_shards.add(shard)
        if self._worker is not None:
            asyncio.get_running_loop().call_soon(self._wake, shard)

    async def watch(self, execution_ids: Sequence[str]) -> None:
        """Watch executions, until the next change of each or for 15 minutes."""
        now = asyncio.get_running_loop().time()
        for execution_id in execution_ids:
            self._watched_until.pop(execution_id, None)
            self._watched_until[execution_id] = now + WATCH_SECONDS
        self._forget_watches_before(now)

    async def publish(
        self,
        channels: Mapping[str, str],
        outcomes: Sequence[EndedExecution] = (),
        grants: Mapping[str, SlotGrant] = NO_GRANTS,
    ) -> None:
        """Notify the listeners of this process about executions that are watched or have its channel, with the outcomes
        and the grant for that channel.
        """
        self._forget_watches_before(asyncio.get_running_loop().time())
        notified = tuple(
            execution_id
            for execution_id, channel in channels.items()
            if self._watched_until.pop(execution_id, None) is not None or channel == self.channel
        )
        if notified:
            own = tuple(one for one in outcomes if channels[one.execution_id] == self.channel)
            self._listeners.deliver(ChangedExecutions(notified, own))
        if self.channel in grants:
            self._listeners.deliver(grants[self.channel])

    async def send(self, channel: str, message: Mapping[str, str]) -> None:
        if channel in {self.channel, GATEWAYS}:
            self._listeners.deliver(DirectMessage(dict(message)))

    async def is_heard(self, channel: str) -> bool:
        return channel == self.channel and bool(self._listeners)

    async def listen(
        self, on_notification: Callable[[Notification], None], *, subject: str | None = None
    ) -> None:
        self._listeners.add(on_notification, subject)

    def start_worker(self, on_wakeup: Callable[[int], None]) -> None:
        self._worker = on_wakeup
        for shard in self._queued_shards:
            asyncio.get_running_loop().call_soon(self._wake, shard)

    def receive_direct(self, on_runs: Callable[[DirectRuns], None]) -> None:
        self._direct = on_runs

    async def send_direct(self, worker: str, message: DirectRuns) -> bool:
        if self._direct is None or worker != self.channel:
            return False
        asyncio.get_running_loop().call_soon(self._direct, message)
        return True

    async def stop_worker(self) -> None:
        self._worker = self._direct = None

    async def wake_mail_parsers(self) -> None:
        """Call the mail parser of this process on the event loop, if there is one; no queue is needed."""
        if self._mail_parser is not None:
            asyncio.get_running_loop().call_soon(self._mail_parser)

    def start_mail_parser(self, on_wakeup: Callable[[], None]) -> None:
        self._mail_parser = on_wakeup

    async def stop_mail_parser(self) -> None:
        self._mail_parser = None

    async def notify_deployer(self, message: DeployerMessage) -> None:
        """Call the only possible deployer, in this process, on the event loop, if there is one; no queue is needed."""
        if self._deployer is not None:
            asyncio.get_running_loop().call_soon(self._deployer, message)

    def start_deployer(self, on_message: Callable[[DeployerMessage], None]) -> None:
        self._deployer = on_message

    async def stop_deployer(self) -> None:
        self._deployer = None

    async def take_tokens(self, demands: Sequence[TokenDemand]) -> Sequence[TokenGrant]:
        now = asyncio.get_running_loop().time()
        return [self._buckets.take(demand, now) for demand in demands]

    async def ping(self) -> None:
        """Do nothing: this broker is always available."""

    async def close(self) -> None:
        self._listeners.clear()
        await self.stop_worker()

    def _wake(self, shard: int) -> None:
        """Call the worker of this process for a queued shard, and take the shard out of the queue; without a worker it
        stays there.
        """
        # Taken out before the claim, so that a wakeup after a later commit is sent again. Without a worker, it waits
        # for the next one.
        if self._worker is not None and shard in self._queued_shards:
            self._queued_shards.discard(shard)
            self._worker(shard)

    def _forget_watches_before(self, now: float) -> None:
        # All watches last equally long, and a renewed one moves to the end: the first expires next.
        while self._watched_until:
            execution_id, until = next(iter(self._watched_until.items()))
            if until > now:
                return
            del self._watched_until[execution_id]
