"""Limits of backlogs: runs of a workflow and of an organization that have not started.

No request counts rows. Each gateway adds the runs that it accepts to a count that is at most a second old, or
twenty times as old as counting takes. A limit can therefore be exceeded by the runs that other gateways
accept within that time, and by runs that are committed during a count. No request is refused because of an
outdated count.
"""

from __future__ import annotations

import asyncio
import math
from collections import OrderedDict
from dataclasses import dataclass
from time import monotonic
from typing import TYPE_CHECKING, Final

import structlog

from gateway.http import errors
from journal import backlog
from models.errors import DatabaseUnavailable

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from sqlalchemy.ext.asyncio import AsyncConnection

    from gateway.settings import GatewaySettings
    from models.database import Database

log = structlog.get_logger()

FRESH_SECONDS: Final = 1.0
COUNTING_SHARE: Final = 20
"""Counting one backlog takes at most one part in this many of the time."""
UNKNOWN_RETRY_SECONDS: Final = 5
MAX_TALLIES: Final = 20_000


@dataclass(slots=True)
class BacklogCount:
    """Known size and trend of one backlog."""

    counted: int | None = None
    """Number of rows at the last count."""
    added: int = 0
    """Runs that this gateway has accepted since the last count."""
    counted_at: float = 0.0
    fresh_until: float = 0.0
    begun_per_second: float = 0.0
    counting: asyncio.Task[None] | None = None

    @property
    def size(self) -> int:
        return (self.counted or 0) + self.added

    def lacks_capacity(self, count: int, limit: int) -> bool:
        return self.size + count > limit

    def recount(self, found: int, *, added_before: int, began: float, ended: float) -> None:
        """Store the result of a count, and update the speed at which the backlog shrinks."""
        if self.counted is not None:
            begun = max(self.counted + added_before - found, 0)
            self.begun_per_second = begun / max(began - self.counted_at, FRESH_SECONDS)
        self.counted = found
        self.added -= added_before
        self.counted_at = began
        self.fresh_until = ended + max(FRESH_SECONDS, COUNTING_SHARE * (ended - began))

    def retry_seconds(self, count: int, limit: int) -> int:
        """Estimate the seconds until there is capacity, from the recent speed of the backlog."""
        if not self.begun_per_second:
            return UNKNOWN_RETRY_SECONDS
        seconds = math.ceil((self.size + count - limit) / self.begun_per_second)
        return min(max(seconds, 1), errors.MAX_RETRY_SECONDS)


class BacklogLimits:
    """Backlog limits for the runs that one gateway accepts."""

    def __init__(self, database: Database, settings: GatewaySettings) -> None:
        self._database = database
        self._per_workflow = settings.max_backlog_per_workflow
        self._per_organization = settings.max_backlog_per_organization
        self._tallies: OrderedDict[str, BacklogCount] = OrderedDict()
        self._counting: set[asyncio.Task[None]] = set()

    async def require_capacity(self, organization_id: str, workflow_id: str, count: int = 1) -> None:
        """Add runs to the backlogs of a workflow and its organization; raises 429 without capacity for all."""
        organization = self._tally(organization_id)
        whole = self._per_organization

        async def count_organization(connection: AsyncConnection) -> int:
            return await backlog.count_organization_backlog(connection, organization_id, at_most=whole + 1)

        await self._refresh(organization, count, whole, count_organization)
        if organization.lacks_capacity(count, whole):
            raise errors.queue_full("the organization", whole, organization.retry_seconds(count, whole))
        workflow = self._tallies.get(workflow_id)
        if organization.lacks_capacity(
            count, self._per_workflow
        ):  # otherwise no workflow of the organization can exceed its limit
            workflow = await self._require_workflow_capacity(organization_id, workflow_id, count)
        organization.added += count
        if workflow is not None:
            workflow.added += count

    async def close(self) -> None:
        """Finish running counts."""
        await asyncio.gather(*self._counting, return_exceptions=True)

    async def _require_workflow_capacity(
        self, organization_id: str, workflow_id: str, count: int
    ) -> BacklogCount:
        workflow = self._tally(workflow_id)
        limit = self._per_workflow

        async def count_workflow(connection: AsyncConnection) -> int:
            return await backlog.count_workflow_backlog(
                connection, organization_id, workflow_id, at_most=limit + 1
            )

        await self._refresh(workflow, count, limit, count_workflow)
        if workflow.lacks_capacity(count, limit):
            raise errors.queue_full("the workflow", limit, workflow.retry_seconds(count, limit))
        return workflow

    def _tally(self, key: str) -> BacklogCount:
        tally = self._tallies.get(key)
        if tally is None:
            tally = self._tallies[key] = BacklogCount()
        self._tallies.move_to_end(key)
        if len(self._tallies) > MAX_TALLIES:
            self._tallies.popitem(last=False)
        return tally

    async def _refresh(
        self,
        tally: BacklogCount,
        count: int,
        limit: int,
        find: Callable[[AsyncConnection], Awaitable[int]],
    ) -> None:
        """Start a new count if the last one is outdated.

        Wait for it only before the first answer and before a refusal.
        """
        if tally.counting is None and monotonic() >= tally.fresh_until:
            tally.counting = asyncio.create_task(self._count(tally, find))
            self._counting.add(tally.counting)
            tally.counting.add_done_callback(self._counting.discard)
        if tally.counting is not None and (tally.counted is None or tally.lacks_capacity(count, limit)):
            await asyncio.shield(tally.counting)

    async def _count(self, tally: BacklogCount, find: Callable[[AsyncConnection], Awaitable[int]]) -> None:
        began, added = monotonic(), tally.added
        try:
            async with self._database.read() as connection:
                found = await find(connection)
            tally.recount(found, added_before=added, began=began, ended=monotonic())
        except DatabaseUnavailable as error:
            # The insertion of the run reports the outage anyway.
            log.debug("backlog not counted", error=str(error))
            tally.fresh_until = monotonic() + FRESH_SECONDS
        finally:
            tally.counting = None
