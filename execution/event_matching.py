"""Delivery of events to waiting nodes: earlier events when a node begins to wait, and later ones on arrival."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Final

import structlog

from concurrency.loop_share import LoopShare
from engine import event_filters, values
from engine.expressions import ExpressionError
from execution.retry import until_available
from journal import concurrency_limits
from journal.waits import event_waits
from messages import wakeups
from models.errors import LockWaitTimeout

if TYPE_CHECKING:
    from datetime import datetime

    from sqlalchemy.ext.asyncio import AsyncConnection

    from engine.services import EventWaitRequest, RunCaller
    from engine.values import Json
    from journal.waits.event_waits import EventAnnouncement
    from journal.waits.node_answers import AnswerResult
    from messages.broker import Broker
    from models.database import Database
    from models.event_wait import EventWait

log = structlog.get_logger()

MAX_SCANNED_EVENTS: Final = 10_000
"""Maximum number of earlier events that are scanned for one node."""
ANSWER_BATCH: Final = 50
"""Number of waiting nodes that one transaction answers with an event."""


class EventMatcher:
    """Matching of events with waiting nodes; implements `engine.services.EventWaitService`."""

    def __init__(self, database: Database, broker: Broker) -> None:
        self._database = database
        self._broker = broker

    async def expect(
        self, caller: RunCaller, wanted: EventWaitRequest, *, node_id: str, iteration: str
    ) -> datetime | None:
        """Store that a node waits for an event, and answer it from earlier events within its period; return
        the end of the wait.

        None if it waits without a limit, the run is gone, or the node has an answer already or never started. Waits
        while the database is unavailable.
        """
        add = partial(
            event_waits.add_wait, caller=caller, wanted=wanted, node_id=node_id, iteration=iteration
        )
        wait = await until_available(lambda: self._database.transaction(add))
        if wait is None:
            return None
        await until_available(lambda: self._look_back(wait))
        return wait.expires_at

    async def deliver(self, event_ids: Sequence[str]) -> None:
        """Answer the nodes that wait for these committed events, and mark the events as delivered; may be repeated.

        An event stays undelivered while another transaction locks the run of a node that waits for it. Raises
        `DatabaseUnavailable`.
        """
        async with self._database.read() as connection:
            wanted = await event_waits.filter_awaited(connection, event_ids)
        locked = {
            announcement.event_id for announcement in wanted if not await self._deliver_event(announcement)
        }
        delivered = [event_id for event_id in event_ids if event_id not in locked]
        await self._database.transaction(partial(event_waits.mark_delivered, event_ids=delivered))

    async def deliver_undelivered(self) -> None:
        """Deliver events that were stored over five seconds ago and are undelivered, for example by a dead gateway.

        Raises `DatabaseUnavailable`.
        """
        while True:
            async with self._database.read() as connection:
                event_ids = await event_waits.list_undelivered(connection)
            if event_ids:
                log.info("events delivered late", events=len(event_ids))
                await self.deliver(event_ids)
            if len(event_ids) < event_waits.BATCH_EVENTS:
                return

    async def delete_finished_waits(self) -> None:
        """Delete the stored waits for events of runs that have ended or are deleted, in batches; raises
        `DatabaseUnavailable`.
        """
        after: str | None = None
        while True:
            after = await self._database.transaction(partial(event_waits.delete_finished_waits, after=after))
            if after is None:
                return

    async def _look_back(self, wait: EventWait) -> None:
        """Answer a wait with the first earlier event in its period that matches it, among the first 10,000."""
        after, looked_at, share = None, 0, LoopShare()
        while looked_at < MAX_SCANNED_EVENTS:
            async with self._database.read() as connection:
                found = await event_waits.list_events_since(connection, wait, after)
            for event in found:
                await share.yield_if_due()
                if _matches_filter(wait, values.restore_json(event.data.encode())):
                    await self._answer([wait], event.data)
                    return
            if len(found) < event_waits.BATCH_SCANNED:
                return
            after, looked_at = (found[-1].created_at, found[-1].id), looked_at + len(found)
        log.warning(
            "scan of earlier events reached its limit", execution_id=wait.execution_id, node_id=wait.node_id
        )

    async def _deliver_event(self, announcement: EventAnnouncement) -> bool:
        """Deliver an event to all nodes whose wait matches its type, time and filter; return False if one of
        their runs is locked.

        A deleted event counts as delivered.
        """
        is_complete = True
        after: tuple[str, str, str] | None = None
        data: str | None = None
        trigger: Json = None
        share = LoopShare()
        while True:
            async with self._database.read() as connection:
                found = await event_waits.list_waits(connection, announcement, after)
                if found and data is None:
                    data = await event_waits.read_event_data(connection, announcement.event_id)
                    trigger = values.restore_json(data.encode()) if data is not None else None
            if not found or data is None:
                return is_complete
            chosen = []
            for wait in found:
                await share.yield_if_due()
                if _matches_filter(wait, trigger):
                    chosen.append(wait)
            for start in range(0, len(chosen), ANSWER_BATCH):
                is_complete &= await self._answer_unlocked(chosen[start : start + ANSWER_BATCH], data)
            after = event_waits.wait_key(found[-1])

    async def _answer_unlocked(self, waits: Sequence[EventWait], data: str) -> bool:
        """Answer nodes together, or one at a time if some of their runs are locked; return False if a lock remains."""
        try:
            await self._answer(waits, data)
        except LockWaitTimeout:
            if len(waits) == 1:
                return False
            return all([await self._answer_unlocked([wait], data) for wait in waits])
        return True

    async def _answer(self, waits: Sequence[EventWait], data: str) -> None:
        """Answer nodes with the data of an event in one transaction, admit the runs that may take a slot, and wake
        workers.

        Raises `LockWaitTimeout` if one of their runs is locked, and `DatabaseUnavailable`.
        """

        async def answer(connection: AsyncConnection) -> list[AnswerResult]:
            return await event_waits.answer_waits(connection, waits, data)

        results = await self._database.transaction(answer)
        for key in _concurrency_keys(results):
            await concurrency_limits.admit_waiting_runs(self._database, key)
        if any(result.is_woken for result in results):
            await wakeups.wake_workers(self._broker)


def _concurrency_keys(results: Iterable[AnswerResult]) -> Iterable[str]:
    return dict.fromkeys(result.concurrency_key for result in results if result.concurrency_key is not None)


def _matches_filter(wait: EventWait, event: Json) -> bool:
    """Return whether an event passes the filter of a wait; False if the filter can't be evaluated on it."""
    if wait.condition is None:
        return True
    scope: dict[str, Json] = {
        event_filters.EVENT_ROOT: event,
        "data": values.restore_json(wait.given.encode()),
    }
    try:
        return event_filters.matches_event(wait.condition, scope)
    except ExpressionError as error:
        log.debug(
            "event not matched", execution_id=wait.execution_id, node_id=wait.node_id, reason=str(error)
        )
        return False
