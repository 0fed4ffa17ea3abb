"""The letter about runs that somebody has taken, for those who wait for that."""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING, Final, Protocol

from messages.broker import BrokerUnavailable, Letter

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from messages.broker import Broker, Notice

_TAKEN: Final = "taken"


class Taken(Protocol):
    """A run that was taken."""

    @property
    def execution_id(self) -> str: ...

    @property
    def inbox(self) -> str:
        """Of the gateway that accepted it."""


async def tell(broker: Broker, runs: Iterable[Taken]) -> None:
    """Tell each gateway which of the runs that it accepted were taken; whoever isn't told looks once a second."""
    by_inbox: dict[str, list[str]] = {}
    for run in runs:
        if run.inbox:
            by_inbox.setdefault(run.inbox, []).append(run.execution_id)
    with suppress(BrokerUnavailable):
        for inbox, execution_ids in by_inbox.items():
            await broker.send(inbox, {_TAKEN: " ".join(execution_ids)})


def taken(notice: Notice) -> Sequence[str]:
    """Return the executions that a notice says were taken."""
    return notice.message.get(_TAKEN, "").split() if isinstance(notice, Letter) else ()
