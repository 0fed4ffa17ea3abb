"""Service of tasks: whether a worker of the organization performs them, and if not, why."""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any, Final

from msgspec import Struct
from sqlalchemy import Select, select
from sqlmodel import col

from engine.node_api import parse_version
from journal.tasks.task_polls import is_served
from models.access import ApiCaller, ApiKey, User, UserRole
from models.execution import Execution
from models.execution_visibility import visibility_condition
from models.task import TaskWorker
from models.workflow import Workflow, is_readable_by

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from sqlalchemy.ext.asyncio import AsyncConnection

PRESENT_TIME: Final = timedelta(seconds=100)
"""Age of the last poll or heartbeat of a worker up to which it counts as present: a poll of up to 72 seconds without
heartbeats, and its repetition."""
MAX_WORKERS: Final = 1_000
SHOWN_VERSIONS: Final = 3


class SeenWorker(Struct, frozen=True):
    """Worker with its last poll."""

    id: str
    versions: dict[str, str]
    pools: tuple[str, ...]
    seen_at: datetime
    is_present: bool
    may_see: bool
    """Whether its key's user may see the runs whose tasks are asked about."""


class TaskService(Struct, frozen=True):
    """Workers for the tasks of one type, version and pool."""

    present: int
    """Number of present workers that perform them."""
    last_seen_at: datetime | None
    """Last poll of any worker of the type."""
    explanation: str | None
    """Why nothing performs them; None if a worker does."""


async def read_workers(
    connection: AsyncConnection,
    organization_id: str,
    now: datetime,
    select_visible: Callable[[ApiCaller], Select[*tuple[Any, ...]]],
) -> list[SeenWorker]:
    """Return up to 1,000 task workers of an organization, the last seen first, each with whether it counts as
    present.

    A present one has polled, or had an open poll, within 100 seconds, and neither stops nor is asked to. For users who
    are no admins, `select_visible` returns the statement that finds a row if they may see the run or workflow.
    """
    statement = (
        select(TaskWorker, col(ApiKey.user_id), col(User.role))
        .join(ApiKey, col(ApiKey.id) == col(TaskWorker.key_id))
        .join(User, col(User.id) == col(ApiKey.user_id))
        .where(col(TaskWorker.organization_id) == organization_id)
        .order_by(col(TaskWorker.last_seen_at).desc())
        .limit(MAX_WORKERS)
    )
    rows = (await connection.execute(statement)).all()
    may_see: dict[str, bool] = {}
    for row in rows:
        if row.user_id not in may_see:
            role = UserRole(row.role)
            caller = ApiCaller(row.key_id, row.user_id, organization_id, row.shard, role, frozenset())
            may_see[row.user_id] = (
                caller.is_admin or (await connection.execute(select_visible(caller))).first() is not None
            )
    return [
        SeenWorker(
            id=row.id,
            versions={one["type"]: one["version"] for one in row.types},
            pools=tuple(row.pools),
            seen_at=row.last_seen_at,
            is_present=row.stopped_at is None
            and not row.is_draining
            and now - row.last_seen_at < PRESENT_TIME,
            may_see=may_see[row.user_id],
        )
        for row in rows
    ]


def select_run(execution_id: str) -> Callable[[ApiCaller], Select[*tuple[Any, ...]]]:
    """Return the function that builds the statement which finds a run if a caller may see it."""
    return lambda caller: select(col(Execution.id)).where(
        col(Execution.id) == execution_id, visibility_condition(caller)
    )


def select_workflow(workflow_id: str) -> Callable[[ApiCaller], Select[*tuple[Any, ...]]]:
    """Return the function that builds the statement which finds a workflow if a caller may read it."""
    return lambda caller: select(col(Workflow.id)).where(
        col(Workflow.id) == workflow_id, is_readable_by(caller)
    )


def find_service(
    workers: Sequence[SeenWorker], type_name: str, version: str, pool: str, now: datetime
) -> TaskService:
    """Return how many present workers perform the tasks of a type, version and pool, with an explanation if
    none does.
    """
    of_type = [one for one in workers if type_name in one.versions]
    last_seen = max((one.seen_at for one in of_type), default=None)
    serving = [
        one
        for one in of_type
        if one.is_present and pool in one.pools and is_served(version, one.versions[type_name])
    ]
    seeing = [one for one in serving if one.may_see]
    if seeing:
        return TaskService(len(seeing), last_seen, None)
    if serving:
        message = (
            f"present workers of {type_name} ({len(serving)}) have keys of users who may not see it: give"
            " a worker a key of an admin with the scope tasks:work"
        )
        return TaskService(0, last_seen, message)
    # Code of another first number does not perform it, however new it is.
    wanted = (
        f"no worker of {type_name} {version}, or a newer {version.partition('.')[0]}.x, serves pool {pool}"
    )
    if not of_type:
        return TaskService(0, None, f"{wanted}; none has ever polled for this type")
    return TaskService(0, last_seen, f"{wanted}; {_describe(of_type, type_name, pool, now)}")


def _describe(workers: Sequence[SeenWorker], type_name: str, pool: str, now: datetime) -> str:
    """Return a text about the workers of a type, which perform another version or pool: up to three versions with their
    numbers, and when the last was seen if none is present.
    """
    present = [one for one in workers if one.is_present]
    shown = present or list(workers)
    counts: dict[str, int] = {}
    for one in shown:
        place = (
            one.versions[type_name] if pool in one.pools else f"{one.versions[type_name]} in {one.pools[0]}"
        )
        counts[place] = counts.get(place, 0) + 1
    newest = sorted(counts, key=lambda text: parse_version(text.partition(" ")[0]), reverse=True)
    versions = ", ".join(f"{text} \u00d7{counts[text]}" for text in newest[:SHOWN_VERSIONS])
    if present:
        return f"{versions} poll now"
    return f"{versions}, last seen {describe_age(now - max(one.seen_at for one in workers))} ago"


def describe_age(age: timedelta) -> str:
    """Return a duration in its largest unit from seconds to days, rounded down, such as `3 min`."""
    seconds = max(int(age.total_seconds()), 0)
    for unit, size in (("d", 86_400), ("h", 3_600), ("min", 60)):
        if seconds >= size:
            return f"{seconds // size} {unit}"
    return f"{seconds} s"
