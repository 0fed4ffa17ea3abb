"""Leader election among schedulers: a lease in the database, by the database's time."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any, Final

import structlog
from sqlalchemy import case, or_, update
from sqlalchemy.dialects import postgresql, sqlite
from sqlmodel import col

from models import ids
from models.database_time import DatabaseTime
from models.execution import Leadership
from telemetry import instruments
from telemetry.process_activity import ACTIVITY, Lead

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncConnection

    from models.database import Database

log = structlog.get_logger()

DUTIES: Final = "scheduler"
RENEWALS_PER_LEASE: Final = 3
MARGIN: Final = 0.15
"""Share of a lease that is not used, since the process's and the database's clock may run at different speeds."""


class LeaderElection:
    """Candidate of one process for the leadership."""

    def __init__(self, database: Database, lease_seconds: float) -> None:
        self.owner = ids.new_id("scheduler")
        self._database = database
        self._lease_seconds = lease_seconds
        self._epoch = 0
        self._until = 0.0

    def is_leading(self) -> bool:
        """Return whether this process leads: its lease has surely not ended, by the monotonic clock with a
        margin of 15%.
        """
        return time.monotonic() < self._until

    async def renew(self) -> None:
        """Renew the lease, or take it if it has expired; the state of leadership is updated, and its metric set.

        Raises `DatabaseUnavailable`; the earlier lease then still counts until its end.
        """
        since = time.monotonic()
        epoch = await self._database.transaction(self._take)
        if epoch is None:
            if self._epoch:
                ACTIVITY.lead = None
                log.warning("leadership lost", epoch=self._epoch)
            self._epoch, self._until = 0, 0.0
            instruments.gauge("leader").set(0)
            return
        if epoch != self._epoch:
            ACTIVITY.lead = Lead(self.owner, since)
            log.info("leading", epoch=epoch, owner=self.owner)
        ACTIVITY.renewed_at = time.monotonic()
        instruments.gauge("leader").set(1)
        self._epoch = epoch
        self._until = since + self._lease_seconds * (1 - MARGIN)

    async def resign(self) -> None:
        """End the lease, if it is ours, so that another process can take it at once. Raises `DatabaseUnavailable`."""
        self._epoch, self._until = 0, 0.0
        ACTIVITY.lead = None
        await self._database.transaction(self._leave)

    async def _take(self, connection: AsyncConnection) -> int | None:
        """Take or renew the lease; return its epoch, a number that increases with each change of the leader.

        None if another process leads.
        """
        insert: Any = postgresql.insert if connection.dialect.name == "postgresql" else sqlite.insert
        until = DatabaseTime() + int(self._lease_seconds * 1_000_000)
        is_ours = col(Leadership.owner) == self.owner
        statement = insert(Leadership).values(name=DUTIES, owner=self.owner, epoch=1, lease_until=until)
        statement = statement.on_conflict_do_update(
            index_elements=[col(Leadership.name)],
            set_={
                "owner": self.owner,
                "epoch": col(Leadership.epoch) + case((is_ours, 0), else_=1),
                "lease_until": until,
            },
            where=or_(is_ours, col(Leadership.lease_until) < DatabaseTime()),
        )
        epoch: int | None = await connection.scalar(statement.returning(col(Leadership.epoch)))
        return epoch

    async def _leave(self, connection: AsyncConnection) -> None:
        is_ours = (col(Leadership.name) == DUTIES, col(Leadership.owner) == self.owner)
        await connection.execute(update(Leadership).where(*is_ours).values(lease_until=DatabaseTime() - 1))
