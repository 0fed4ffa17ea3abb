"""Direct message about claimed runs, for gateways whose clients wait for that."""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING, Final, Protocol

from messages.broker import BrokerUnavailable, DirectMessage

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from messages.broker import Broker, Notification

_TAKEN: Final = "taken"


class TakenRun(Protocol):
    """Claimed run with the channel of its gateway."""

    @property
    def execution_id(self) -> str: ...

    @property
    def channel(self) -> str:
        """Channel of the gateway that accepted it."""


async def notify_taken_runs(broker: Broker, runs: Iterable[TakenRun]) -> None:
    """Notify each gateway of the claimed runs that it accepted.

    If a message is lost, the gateway polls once a second.
    """
    by_channel: dict[str, list[str]] = {}
    for run in runs:
        if run.channel:
            by_channel.setdefault(run.channel, []).append(run.execution_id)
    with suppress(BrokerUnavailable):
        for channel, execution_ids in by_channel.items():
            await broker.send(channel, {_TAKEN: " ".join(execution_ids)})


def parse_taken_runs(notification: Notification) -> Sequence[str]:
    """Return the IDs of the claimed executions in a notification."""
    return notification.message.get(_TAKEN, "").split() if isinstance(notification, DirectMessage) else ()
