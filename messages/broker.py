"""Broker through which processes wake and notify one another, over Redis, PostgreSQL or inside one process.

The broker holds nothing that must happen. A message that is lost, late or doubled only changes the time at which a
process reads the rows.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Final, Protocol, TypeAlias

import msgspec
from msgspec import Struct

from messages.deployer_messages import DeployerMessage
from messages.token_buckets import TokenDemand, TokenGrant
from messages.worker_wakeup import ALL_SHARDS
from models.ended_execution import EndedExecution

WATCH_SECONDS: Final = 15 * 60
CHANGED_EXECUTIONS: Final = "changed executions"
"""Subject of notifications about changed executions; that of a direct message is any key of it."""
GRANT_SECONDS: Final = 2.0
"""Time for which a grant is valid: workers renew it each second."""
GATEWAYS: Final = "gateways"
"""Channel of all gateways together."""
SLOT_GRANTS: Final = "slot grants"
"""Subject of grants, for listeners."""


class BrokerError(Exception):
    """Base class of the broker's errors."""


class BrokerUnavailable(BrokerError):
    """Redis or PostgreSQL did not answer. Continue: the rows are committed, and the sweep finds due work."""


class RedisMayEvict(BrokerError):
    """A full Redis would evict keys: its settings must change before the process can start."""


class ChangedExecutions(Struct, frozen=True):
    """Notification about changed executions that this process watches or accepted."""

    execution_ids: tuple[str, ...]
    outcomes: Sequence[EndedExecution] = ()
    """Outcomes of some of them, for the process that accepted them."""


class DirectMessage(Struct, frozen=True):
    """Message of another process to this one, such as "stop" or "cancel"."""

    message: Mapping[str, str]


class SlotGrant(msgspec.Struct, frozen=True):
    """Grant of a worker to one gateway, which replaces its earlier grants."""

    worker: str
    """Channel of the worker, the owner of its leases."""
    received: int
    """Number of the last run that it has received from this gateway."""
    slots: int
    """Number of further runs that it takes."""


class DirectRuns(msgspec.Struct, frozen=True):
    """Runs that a gateway has assigned to one worker; the rows are committed."""

    gateway: str
    """Channel of the gateway."""
    number: int
    """Number of the last of them: the gateway counts the runs that it assigns to this worker."""
    content: msgspec.Raw
    """Runs as JSON, as a claim returns them."""


Notification: TypeAlias = ChangedExecutions | DirectMessage | SlotGrant
NO_GRANTS: Final[Mapping[str, SlotGrant]] = {}


class RunBroker(Protocol):
    """Broker as executors of runs use it.

    Every method that waits may raise `BrokerUnavailable`, except those that start, stop and close.
    """

    @property
    def channel(self) -> str:
        """Name of this process to which other processes send direct messages and notifications."""

    async def wake_workers(self, shard: int = ALL_SHARDS) -> None:
        """Announce after the commit that runs of a shard, by default of any,
        are pending, so that workers claim them at once.

        Sends nothing while an equal wakeup is still in the queue. Raises `BrokerUnavailable`.
        """

    async def publish(
        self,
        channels: Mapping[str, str],
        outcomes: Sequence[EndedExecution] = (),
        grants: Mapping[str, SlotGrant] = NO_GRANTS,
    ) -> None:
        """Notify each process that watches one of the changed executions, and end these watches.

        `channels` maps each changed execution id to a channel that is notified also without a watch, or to "" for none.
        That channel alone gets the outcomes of its executions, encrypted, as many as fit into one notification.
        `grants` are slot grants to send along, by the channels of their gateways. Raises `BrokerUnavailable`.
        """

    async def listen(self, on_notification: Callable[[Notification], None]) -> None:
        """Call `on_notification` on the running event loop for each message of the channel, until `close`.

        Returns when the channel is open, or after two seconds if the server is away: it opens once that is back. Each
        of several listeners receives all messages except slot grants, which only `Broker.listen` can request.
        """

    def start_worker(self, on_wakeup: Callable[[int], None]) -> None:
        """Start to receive wakeups of workers; call `on_wakeup(shard)` on the running event loop for each,
        until `stop_worker`.

        The shard is -1 for all. Returns at once.
        """

    def receive_direct(self, on_runs: Callable[[DirectRuns], None]) -> None:
        """Start to receive runs that gateways assign to this process; call `on_runs` on the running event loop,
        until `stop_worker`.
        """

    async def stop_worker(self) -> None:
        """Receive no more wakeups and no more assigned runs; unprocessed wakeups return to the queue for
        other workers.
        """

    async def close(self) -> None:
        """Stop receiving messages of all kinds, and close all connections; the broker can't be used afterwards."""


class Broker(RunBroker, Protocol):
    """Complete broker, for processes with a database."""

    @property
    def uses_redis(self) -> bool:
        """Whether Redis carries the messages, not PostgreSQL or the memory of one process."""

    async def listen(
        self, on_notification: Callable[[Notification], None], *, subject: str | None = None
    ) -> None:
        """Listen as `RunBroker` does; with a `subject`, only to it.

        A subject is a key in the fields of direct messages, or the constant of a kind of notification:
        `CHANGED_EXECUTIONS` or `SLOT_GRANTS`.
        """

    async def wake_mail_parsers(self) -> None:
        """Announce unparsed mail after the commit. Sends nothing while an earlier wakeup is in the queue.
        Raises `BrokerUnavailable`.
        """

    async def watch(self, execution_ids: Sequence[str]) -> None:
        """Have this process notified once of the next change of each of these executions, within 15 minutes.

        Watch, then read the row, then wait: a change between reading and watching would be missed. To continue waiting
        after a notification, watch again before reading again. Raises `BrokerUnavailable`.
        """

    async def send(self, channel: str, message: Mapping[str, str]) -> None:
        """Send a direct message to the channel of another process, or to all gateways; it is lost silently if none
        listens. Raises `BrokerUnavailable`.
        """

    async def send_direct(self, worker: str, message: DirectRuns) -> bool:
        """Send runs to the worker that they are assigned to; return False, with nothing sent, if no process listens on
        its channel, or this broker can't assign runs.

        `worker` is the name of that channel. Raises `BrokerUnavailable`.
        """

    async def is_heard(self, channel: str) -> bool:
        """Return whether a process listens on a channel, which a dead one does not. Raises `BrokerUnavailable`."""

    def start_mail_parser(self, on_wakeup: Callable[[], None]) -> None:
        """Start to receive wakeups about unparsed mail; call `on_wakeup` on the running event loop for each,
        until `stop_mail_parser`.
        """

    async def stop_mail_parser(self) -> None:
        """Receive no more wakeups about unparsed mail; queued ones are left to other parsers."""

    async def notify_deployer(self, message: DeployerMessage) -> None:
        """Queue a message for one deployer after the commit, unless an equal one is still in the queue.
        Raises `BrokerUnavailable`.
        """

    def start_deployer(self, on_message: Callable[[DeployerMessage], None]) -> None:
        """Start to receive messages to deployers, each of which one deployer gets;
        call `on_message` on the running event loop, until `stop_deployer`.
        """

    async def stop_deployer(self) -> None:
        """Receive no more messages to deployers; queued ones are left to other deployers."""

    async def take_tokens(self, demands: Sequence[TokenDemand]) -> Sequence[TokenGrant]:
        """Take tokens from several different buckets at once; return grants in the order of the demands.

        A bucket without enough tokens keeps them: its grant has 0 tokens, and the seconds to wait. Raises
        `BrokerUnavailable`.
        """

    async def ping(self) -> None:
        """Raise `BrokerUnavailable` unless the server of the broker answers within two seconds."""
