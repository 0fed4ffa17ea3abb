"""Duty that keeps the hourly counts of runs and groups of failures, which the dashboard shows."""

from __future__ import annotations

import time
from datetime import timedelta
from typing import TYPE_CHECKING, Final

from journal import run_hours
from journal.run_hours import HOUR
from models.database_time import read_database_time
from models.run_hour import ALL_WORKFLOWS
from models.timestamps import hour_of

if TYPE_CHECKING:
    from collections.abc import Iterable
    from datetime import datetime

    from sqlalchemy.ext.asyncio import AsyncConnection

    from models.database import Database
    from models.failure_hour import FailureHour
    from models.run_hour import RunHour

COUNT_SECONDS: Final = 5.0
REST_FACTOR: Final = 20
"""A turn is followed by a rest of this many times its length, so that counts take 5 % of the time at most."""
TURN_SECONDS: Final = 2.0
"""Time after which a turn counts no further hour; the others follow in the next turns."""
LEAST_HOURS: Final = 2
"""Hours that each turn counts, however long they take: the present one and another, so that none is never counted."""
SETTLING_TIME: Final = timedelta(minutes=1)
"""Time after the end of an hour until which runs may still be stored that were accepted within it."""


class RunHourCounter:
    """Counter of the runs of the last 24 hours by hour.

    A turn counts the present hour, and hours with runs that have ended since the last count.
    """

    def __init__(self, database: Database) -> None:
        self._database = database
        self._rest_until = 0.0
        self._first: datetime | None = None
        """Earliest hour that is kept."""
        self._unfinished: dict[datetime, int] = {}
        """Unfinished runs of each hour at its last count."""
        self._counted_at: dict[datetime, datetime] = {}
        self._written: dict[datetime, int] = {}
        """Hash of the rows that were written last, by hour."""

    async def count_runs(self) -> None:
        """Count the runs of the current hour and of earlier hours that have changed, group their failures, and store
        both.

        Does nothing while it rests after an earlier turn. Hours for which a turn has no time are left to later ones.
        Raises `DatabaseUnavailable`.
        """
        begun_at = time.monotonic()
        if begun_at < self._rest_until:
            return
        # The first turn counts every hour, whether it has runs or not, and is no measure of those that follow.
        rest_factor = REST_FACTOR if self._counted_at else 0
        try:
            async with self._database.read() as connection:
                now = await read_database_time(connection)
                unfinished = await run_hours.count_unfinished(connection, run_hours.first_hour(now))
            await self._forget_hours(run_hours.first_hour(now))
            for number, starts_at in enumerate(self._list_changed(now, unfinished)):
                if number >= LEAST_HOURS and time.monotonic() - begun_at > TURN_SECONDS:
                    break
                await self._count_hour(starts_at)
                self._unfinished[starts_at] = unfinished.get(starts_at, 0)
                self._counted_at[starts_at] = now
        finally:
            ended_at = time.monotonic()
            self._rest_until = ended_at + rest_factor * (ended_at - begun_at)

    def _list_changed(self, now: datetime, unfinished: dict[datetime, int]) -> Iterable[datetime]:
        """Return the hours to count: the current one, then others that have changed, those counted longest ago first.

        `unfinished` has the present number of unfinished runs by hour.
        """
        present = hour_of(now)
        earlier = [present - number * HOUR for number in range(1, run_hours.HOURS)]
        never = run_hours.first_hour(now)
        changed = [
            hour
            for hour in earlier
            if self._counted_at.get(hour, never) < hour + HOUR + SETTLING_TIME
            or self._unfinished[hour] != unfinished.get(hour, 0)
        ]
        return [
            present,
            *sorted(changed, key=lambda hour: (self._counted_at.get(hour, never), -hour.timestamp())),
        ]

    async def _count_hour(self, starts_at: datetime) -> None:
        """Count the runs of an hour and group its failed ones; write both if they differ from those written last."""
        # Loaded with the first count: the start of a scheduler does without it.
        from journal import failure_hours  # noqa: PLC0415 - see above

        failures: list[FailureHour] = []
        async with self._database.read() as connection:
            rows = await run_hours.count_hour(connection, starts_at)
            for of_organization in rows:
                if of_organization.workflow_id == ALL_WORKFLOWS and of_organization.failed:
                    failures += await failure_hours.count_failures(
                        connection, of_organization.organization_id, starts_at
                    )

        async def write(connection: AsyncConnection) -> None:
            await run_hours.replace_hour(connection, starts_at, rows)
            await failure_hours.replace_hour(connection, starts_at, failures)

        digest = _hash_rows([*rows, *failures])
        if self._written.get(starts_at) != digest:
            await self._database.transaction(write)
            self._written[starts_at] = digest

    async def _forget_hours(self, first: datetime) -> None:
        """Delete the counts of hours before `first`, which statistics no longer show; nothing happens if the last call
        had the same `first`.
        """
        if first == self._first:
            return

        from journal import failure_hours  # noqa: PLC0415 - as for counts

        async def delete(connection: AsyncConnection) -> None:
            await run_hours.delete_hours(connection, first)
            await failure_hours.delete_hours(connection, first)

        await self._database.transaction(delete)
        self._first = first
        for remembered in (self._unfinished, self._counted_at, self._written):
            for hour in [hour for hour in remembered if hour < first]:
                del remembered[hour]


def _hash_rows(rows: Iterable[RunHour | FailureHour]) -> int:
    return hash(tuple(sorted(repr(row) for row in rows)))
