"""Hourly groups of failed runs, derived from the rows of all failed runs that were accepted within an hour.

As counts of runs, they are exact at their time, and counting again corrects them: the end of a run writes nothing
for them, however it fails, and a run that is resumed or deleted leaves them with the next count.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final

from sqlalchemy import and_, delete, insert, literal, literal_column, or_, select, text
from sqlmodel import col

from journal import failure_causes
from journal.run_hours import HOUR, INSERTED_ROWS
from models.column_types import TimestampColumn, column_values
from models.execution import UNSUCCESSFUL_CONDITION, Execution
from models.execution_status import ExecutionStatus
from models.failure_hour import OTHER_CAUSES, FailureHour

if TYPE_CHECKING:
    from datetime import datetime

    from sqlalchemy import Row, Select
    from sqlalchemy.ext.asyncio import AsyncConnection

    from journal.failure_causes import ErrorCause

BATCH_RUNS: Final = 1_000
"""Failed runs that one statement reads."""
MAX_GROUPS: Final = 500
"""Groups of an organization that an hour keeps, those with the most runs."""
MAX_MESSAGES: Final = 20
"""Kinds of message of one node and code that have groups of their own; further ones share one."""


async def count_failures(
    connection: AsyncConnection, organization_id: str, starts_at: datetime
) -> Sequence[FailureHour]:
    """Return the groups of an organization's failed runs that were accepted within the hour from `starts_at` on, 500 at
    most.

    Further groups, those with the fewest runs, are added up in the row of `OTHER_CAUSES`.
    """
    groups = _FailureGroups(organization_id, starts_at)
    last: Row[*tuple[Any, ...]] | None = None
    while True:
        rows = (await connection.execute(failures_statement(organization_id, starts_at, last))).all()
        for row in rows:
            groups.add(row)
        if len(rows) < BATCH_RUNS:
            return groups.list_rows()
        last = rows[-1]


def failures_statement(
    organization_id: str, starts_at: datetime, last: Row[*tuple[Any, ...]] | None = None
) -> Select[*tuple[Any, ...]]:
    """Return the statement of an organization's failed runs of an hour, in the order of their acceptance, 1,000 at
    most: the next ones behind the row `last`, None at first.

    Private runs, such as node tests, are left out, as they are of all counts by hour: few may see them.
    """
    created_at, execution_id = col(Execution.created_at), col(Execution.id)
    statement = select(
        *(execution_id, created_at, col(Execution.workflow_id), col(Execution.error), col(Execution.ended_at))
    ).where(
        text(f"execution.{UNSUCCESSFUL_CONDITION}"),
        col(Execution.organization_id) == organization_id,
        col(Execution.status) == literal_column(f"'{ExecutionStatus.FAILED}'"),
        created_at >= (starts_at if last is None else last.created_at),
        created_at < starts_at + HOUR,
        col(Execution.is_private) == literal_column("false"),
    )
    if last is not None:
        moment = literal(last.created_at, TimestampColumn)
        statement = statement.where(
            or_(created_at > moment, and_(created_at == moment, execution_id > last.id))
        )
    return statement.order_by(created_at, execution_id).limit(BATCH_RUNS)


class _FailureGroups:
    """Groups of the failed runs of an organization's hour while they are counted."""

    def __init__(self, organization_id: str, starts_at: datetime) -> None:
        self._organization_id = organization_id
        self._starts_at = starts_at
        self._groups: dict[str, FailureHour] = {}
        self._messages: Counter[tuple[str, str | None, str]] = Counter()
        """Number of groups by workflow, node and code."""

    def add(self, run: Any) -> None:  # noqa: ANN401 - a row of `failures_statement`
        """Count a failed run in the group of its cause."""
        cause = failure_causes.describe_error(run.workflow_id, run.error)
        failed_at = run.ended_at or run.created_at
        group = self._groups.get(cause.fingerprint)
        if group is None:
            fingerprint = self._choose_fingerprint(run.workflow_id, cause)
            group = self._groups.get(fingerprint)
        if group is None:
            group = FailureHour(
                organization_id=self._organization_id,
                starts_at=self._starts_at,
                fingerprint=fingerprint,
                workflow_id=run.workflow_id,
                node_id=cause.node_id,
                code=cause.code,
                runs=0,
                first_at=failed_at,
                last_at=failed_at,
                execution_id=run.id,
            )
            self._groups[fingerprint] = group
        _add_runs(group, 1, failed_at, failed_at, run.id)

    def _choose_fingerprint(self, workflow_id: str, cause: ErrorCause) -> str:
        """Return the fingerprint of the group for a new cause, and count the cause: its own for the first
        `MAX_MESSAGES` causes of its node and code, a common one for all further ones.
        """
        place = (workflow_id, cause.node_id, cause.code)
        self._messages[place] += 1
        if self._messages[place] <= MAX_MESSAGES:
            return cause.fingerprint
        return failure_causes.build_fingerprint(workflow_id, cause.node_id, cause.code, "")

    def list_rows(self) -> Sequence[FailureHour]:
        """Return the groups with the most runs, and the sum of the others in the row of `OTHER_CAUSES`."""
        ordered = sorted(self._groups.values(), key=lambda one: (-one.runs, one.fingerprint))
        kept, others = ordered[:MAX_GROUPS], ordered[MAX_GROUPS:]
        if not others:
            return kept
        first = others[0]
        rest = FailureHour(
            **{**column_values(first), "fingerprint": OTHER_CAUSES, "workflow_id": "", "node_id": None}
        )
        for one in others[1:]:
            _add_runs(rest, one.runs, one.first_at, one.last_at, one.execution_id)
        return [*kept, rest]


def _add_runs(
    group: FailureHour, runs: int, first_at: datetime, last_at: datetime, execution_id: str
) -> None:
    """Add runs to a group; `execution_id` is the last of them, which failed at `last_at`."""
    group.runs += runs
    group.first_at = min(group.first_at, first_at)
    if last_at >= group.last_at:
        group.last_at, group.execution_id = last_at, execution_id


async def replace_hour(connection: AsyncConnection, starts_at: datetime, rows: Sequence[FailureHour]) -> None:
    """Replace all groups of an hour, those of every organization, in the caller's transaction."""
    await connection.execute(delete(FailureHour).where(col(FailureHour.starts_at) == starts_at))
    for start in range(0, len(rows), INSERTED_ROWS):
        part = [column_values(row) for row in rows[start : start + INSERTED_ROWS]]
        await connection.execute(insert(FailureHour), part)


async def delete_hours(connection: AsyncConnection, before: datetime) -> None:
    """Delete the groups of all hours that began before a time."""
    await connection.execute(delete(FailureHour).where(col(FailureHour.starts_at) < before))
