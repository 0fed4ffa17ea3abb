"""The letter about runs that somebody has taken, for those who wait for that."""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING, Final, Protocol

from messages.broker import BrokerUnavailable, DirectMessage

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from messages.broker import Broker, Notification

_TAKEN: Final = "taken"


class TakenRun(Protocol):
    """A run that was taken."""

    @property
    def execution_id(self) -> str: ...

    @property
    def channel(self) -> str:
        """Of the gateway that accepted it."""


async def notify_taken_runs(broker: Broker, runs: Iterable[TakenRun]) -> None:
    """Tell each gateway which of the runs that it accepted were taken; whoever isn't told looks once a second."""
    by_channel: dict[str, list[str]] = {}
    for run in runs:
        if run.channel:
            by_channel.setdefault(run.channel, []).append(run.execution_id)
    with suppress(BrokerUnavailable):
        for channel, execution_ids in by_channel.items():
            await broker.send(channel, {_TAKEN: " ".join(execution_ids)})


def parse_taken_runs(notification: Notification) -> Sequence[str]:
    """Return the executions that a notice says were taken."""
    return notification.message.get(_TAKEN, "").split() if isinstance(notification, DirectMessage) else ()
