"""How processes wake and tell one another, with Redis between them or all inside one process.

Nothing that must happen is held here: a wakeup or notice that is lost, late or doubled changes only the time at
which somebody looks at the rows.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Protocol, TypeAlias
from uuid import uuid4

from messages.deployer_messages import DeployerMessage
from messages.token_buckets import TokenDemand, TokenGrant
from messages.worker_wakeup import ALL_SHARDS

WATCH_SECONDS: Final = 15 * 60


class BrokerError(Exception):
    """Base of what a broker raises."""


class BrokerUnavailable(BrokerError):
    """Redis did not answer: carry on, for the rows are committed and the sweep finds what is due."""


class RedisMayEvict(BrokerError):
    """Redis would throw keys away when it is full: its settings must change before a new start."""


@dataclass(frozen=True, slots=True)
class ChangedExecutions:
    execution_ids: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class DirectMessage:
    """What another process sent to this one, such as "stop" or "cancel"."""

    message: Mapping[str, str]


Notification: TypeAlias = ChangedExecutions | DirectMessage


class RunBroker(Protocol):
    """What whoever runs executions hears and tells others.

    Every method that waits may raise `BrokerUnavailable`, except those that start, stop and close.
    """

    @property
    def channel(self) -> str:
        """The name under which others reach this process."""

    async def wake_workers(self, shard: int = ALL_SHARDS) -> None:
        """Say "there is work", after the commit; nothing is sent while an earlier wakeup lies there untaken."""

    async def publish(self, channels: Mapping[str, str]) -> None:
        """Tell of changed executions, each process with one notice, and end the watch of those that watch them.

        Each comes with the channel that is told without having watched it, or an empty text for nobody.
        """

    async def listen(self, on_notification: Callable[[Notification], None]) -> None:
        """Call `on_notice` on the running event loop for whatever reaches the channel, until `close`.

        Returns when the channel is open, or after two seconds if Redis is away: it opens once Redis is back.
        Each of several listeners hears everything.
        """

    def start_worker(self, on_wakeup: Callable[[int], None]) -> None:
        """Take wakeups on threads of this process; `on_wakeup(shard)` is called on the running event loop."""

    async def stop_worker(self) -> None:
        """Take no more wakeups; what was taken and not handed over goes back for other workers."""

    async def close(self) -> None: ...


class Broker(RunBroker, Protocol):
    """The broker whole."""

    async def wake_mail_parsers(self) -> None:
        """Say "something is unread", after the commit; nothing is sent while an earlier wakeup lies there untaken."""

    async def watch(self, execution_ids: Sequence[str]) -> None:
        """Have this process told once when each of these changes, within 15 minutes.

        Watch, then read the row, then wait: a change between reading and watching would go unheard. Who goes
        on waiting after a notice watches again before reading again.
        """

    async def send(self, channel: str, message: Mapping[str, str]) -> None:
        """Put a letter into another process's channel; lost without a word when nobody listens there."""

    async def is_heard(self, channel: str) -> bool:
        """Tell whether a process listens at an channel: one that has died does not."""

    def start_mail_parser(self, on_wakeup: Callable[[], None]) -> None:
        """Take wakeups that something is unread; `on_wakeup` is called on the running event loop."""

    async def stop_mail_parser(self) -> None: ...

    async def notify_deployer(self, message: DeployerMessage) -> None:
        """Tell one of the deployers something, after the commit; nothing is sent while the same lies there untaken."""

    def start_deployer(self, on_message: Callable[[DeployerMessage], None]) -> None:
        """Take what deployers are told; `on_message` is called on the running event loop."""

    async def stop_deployer(self) -> None:
        """Take no more of that."""

    async def take_tokens(self, demands: Sequence[TokenDemand]) -> Sequence[TokenGrant]:
        """Take tokens from several buckets, no bucket twice; answers in their order."""

    async def ping(self) -> None: ...


async def connect_broker(url: str | None, *, channel: str | None = None) -> Broker:
    """A broker on the Redis at `url`, or one inside this process for None; it starts though Redis be away.

    Raises `EvictingRedis`, and ValueError for what is no Redis URL.
    """
    name = channel or uuid4().hex
    if url is None:
        from messages.local_broker import LocalBroker  # noqa: PLC0415 - each process pays for one broker only

        return LocalBroker(channel=name)

    from messages import redis_broker  # noqa: PLC0415 - redis costs 40 MB that a single process saves

    return await redis_broker.connect(url, channel=name)
