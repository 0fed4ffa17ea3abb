"""Wakeups and notifications for processes that would otherwise notice a change later: by a sweep, poll or renewal.

Send them after the commit. An unavailable broker is ignored, since the rows are committed.
"""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import TYPE_CHECKING, Final, Protocol

import structlog

from messages.broker import (
    CHANGED_EXECUTIONS,
    SLOT_GRANTS,
    Broker,
    BrokerUnavailable,
    DirectMessage,
    SlotGrant,
)
from messages.deployer_messages import ReconcileRequest
from models import task_states

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Sequence

    from messages.broker import Notification, RunBroker

log = structlog.get_logger()

TAKEN_RUNS: Final = "taken"
"""Subject of direct messages about claimed runs."""
ANSWERED_RUNS: Final = "answered"
"""Subject of direct messages about runs with new answers."""


async def wake_workers(broker: RunBroker) -> None:
    """Announce pending runs after their commit, so that a worker claims them at once; an unavailable broker
    is ignored.

    Workers find them at their next sweep too.
    """
    try:
        await broker.wake_workers()
    except BrokerUnavailable as error:
        log.debug("workers not woken", reason=str(error))


async def wake_mail_parsers(broker: Broker) -> None:
    """Announce unparsed mail after its commit, so that a worker parses it at once; an unavailable broker is
    ignored.

    Workers find it at their next sweep too.
    """
    try:
        await broker.wake_mail_parsers()
    except BrokerUnavailable as error:
        log.debug("mail parsers not woken", reason=str(error))


async def wake_deployer(broker: Broker, workflow_id: str) -> None:
    """Wake a deployer for a deployment with a new desired state; an unavailable broker is ignored.

    Its sweep finds the change too.
    """
    try:
        await broker.notify_deployer(ReconcileRequest(workflow_id))
    except BrokerUnavailable as error:
        log.debug("deployer not woken", reason=str(error))


class TakenRun(Protocol):
    """Claimed run with the channel of its gateway."""

    @property
    def execution_id(self) -> str: ...

    @property
    def channel(self) -> str:
        """Channel of the gateway that accepted the run; empty without one."""


async def notify_taken_runs(broker: Broker, runs: Iterable[TakenRun]) -> None:
    """Send each gateway the ids of the claimed runs that it accepted, in one message;
    runs without a channel are left out.

    An unavailable broker is ignored: the gateway also polls once a second.
    """
    by_channel: dict[str, list[str]] = {}
    for run in runs:
        if run.channel:
            by_channel.setdefault(run.channel, []).append(run.execution_id)
    with suppress(BrokerUnavailable):
        for channel, execution_ids in by_channel.items():
            await broker.send(channel, {TAKEN_RUNS: " ".join(execution_ids)})


def parse_taken_runs(notification: Notification) -> Sequence[str]:
    """Return the ids of the claimed executions in a message of `notify_taken_runs`; empty for other notifications."""
    return notification.message.get(TAKEN_RUNS, "").split() if isinstance(notification, DirectMessage) else ()


class AnsweredRun(Protocol):
    """Run that got an answer to a node while a process held it."""

    @property
    def execution_id(self) -> str: ...

    @property
    def lease_owner(self) -> str:
        """Channel of the process that holds the run."""


async def notify_answered_runs(broker: Broker, runs: Iterable[AnsweredRun]) -> None:
    """Send each process the ids of the runs that it holds and that have new answers, in one message.

    An unavailable broker is ignored: the run also reads its answers when it is released, after a second.
    """
    by_owner: dict[str, list[str]] = {}
    for run in runs:
        by_owner.setdefault(run.lease_owner, []).append(run.execution_id)
    with suppress(BrokerUnavailable):
        for owner, execution_ids in by_owner.items():
            await broker.send(owner, {ANSWERED_RUNS: " ".join(execution_ids)})


def parse_answered_runs(message: DirectMessage) -> Sequence[str]:
    """Return the ids of the runs in a message of `notify_answered_runs`; empty for other messages."""
    return message.message.get(ANSWERED_RUNS, "").split()


async def notify_end_request(
    broker: Broker,
    execution_id: str,
    request: str,
    *,
    lease_owner: str | None,
    channel: str,
    organization_id: str = "",
) -> None:
    """Send a request ("stop" or "cancel") to the process that holds a run;
    without a `lease_owner`, announce that it ended.

    The announcement goes to watchers of the run, to `channel` (of the gateway that accepted it), and to task workers of
    the organization, if that is given. An unavailable broker is ignored.
    """
    # Without the broker, the worker learns of it when it renews its lease, and clients poll once a second.
    with suppress(BrokerUnavailable):
        if lease_owner is None:
            # Workers may hold tasks of the run.
            tasks = {task_states.watch_key(organization_id): ""} if organization_id else {}
            await broker.publish({execution_id: channel, **tasks})
        else:
            await broker.send(lease_owner, {"execution_id": execution_id, "request": request})


class NotificationListeners:
    """Listeners of one process, each to all notifications or to those of one subject."""

    def __init__(self) -> None:
        self._listeners: list[tuple[Callable[[Notification], None], str | None]] = []

    def add(self, on_notification: Callable[[Notification], None], subject: str | None) -> None:
        """Add a listener to all notifications but grants, or only to those of a subject."""
        self._listeners.append((on_notification, subject))

    def deliver(self, notification: Notification) -> None:
        """Schedule a call of each listener to the subject of a notification on the event loop.

        An exception of one listener ends neither the others nor this task.
        """
        subjects: Collection[str | None]
        if isinstance(notification, DirectMessage):
            subjects = [None, *notification.message]
        else:
            subjects = (SLOT_GRANTS,) if isinstance(notification, SlotGrant) else (None, CHANGED_EXECUTIONS)
        loop = asyncio.get_running_loop()
        for on_notification, subject in self._listeners:
            if subject in subjects:
                loop.call_soon(on_notification, notification)

    def clear(self) -> None:
        self._listeners.clear()

    def __bool__(self) -> bool:
        return bool(self._listeners)


def deployment_watch_key(workflow_id: str) -> str:
    """Return the key with which a deployment is watched, in place of an execution id."""
    return f"deployment:{workflow_id}"
