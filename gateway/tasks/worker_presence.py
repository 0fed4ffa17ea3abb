"""Presence of task workers: a row for each, updated at most twice a minute while it polls."""

from __future__ import annotations

from collections import OrderedDict
from time import monotonic
from typing import TYPE_CHECKING, Final

import msgspec
import structlog
from sqlalchemy import select
from sqlalchemy.exc import IntegrityError
from sqlmodel import col

from gateway.http import errors
from models.access import ApiKey
from models.database_time import PresentTime
from models.task import TaskWorker

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from sqlalchemy.ext.asyncio import AsyncConnection

    from gateway.http.errors import ApiError
    from models.database import Database

log = structlog.get_logger()

SEEN_SECONDS: Final = 25.0
"""Age of the stored time of a worker from which it is stored again."""
MAX_REMEMBERED: Final = 50_000
STORED_TOGETHER: Final = 500


class WorkerDescription(msgspec.Struct, frozen=True):
    """Worker as it describes itself in a claim."""

    organization_id: str
    shard: int
    id: str
    name: str
    sdk: str
    key_id: str
    user_id: str
    types: Sequence[Mapping[str, str]]
    pools: Sequence[str]
    is_limited: bool = False
    """Whether it gets only tasks of runs that its user may see."""


class TaskWorkerPresence:
    """Workers that have polled this gateway."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._stored: OrderedDict[tuple[str, str], tuple[bytes, float, str]] = OrderedDict()
        """Description, time of the last store, and API key, by organization and id."""
        self._seen: set[tuple[str, str]] = set()

    async def note(self, worker: WorkerDescription) -> None:
        """Note a poll of a worker: store a new or changed worker at once.

        An unchanged one is stored by the next `flush`, unless it was stored within the last 25 seconds. Raises a 409
        error for a worker of another user, and `DatabaseUnavailable`.
        """
        key = (worker.organization_id, worker.id)
        content = msgspec.json.encode(worker)
        stored = self._stored.get(key)
        if stored is not None and stored[0] == content:
            if monotonic() - stored[1] > SEEN_SECONDS:
                self._seen.add(key)
            return
        await self._store(worker)
        if worker.is_limited:
            log.warning("task worker limited to its user", worker_id=worker.id, key_id=worker.key_id)
        self._remember(key, content, worker.key_id)

    def note_open_poll(self, organization_id: str, worker_id: str) -> None:
        """Note that the poll of a worker is still open; the next `flush` stores that."""
        self._seen.add((organization_id, worker_id))

    async def require_own(self, organization_id: str, worker_id: str, key_id: str) -> None:
        """Raise a 409 error for a worker whose claims have another API key; an unknown worker holds no tasks.

        Raises `DatabaseUnavailable`.
        """
        stored = self._stored.get((organization_id, worker_id))
        owner = None if stored is None else stored[2]
        if owner != key_id:
            statement = select(col(TaskWorker.key_id)).where(
                col(TaskWorker.organization_id) == organization_id, col(TaskWorker.id) == worker_id
            )
            async with self._database.read() as connection:
                owner = await connection.scalar(statement)
        if owner not in {None, key_id}:
            raise _taken_error()

    def _remember(self, key: tuple[str, str], content: bytes, key_id: str) -> None:
        """Remember when a worker was stored, and with which content, for the last ones up to a maximum number."""
        self._stored[key] = content, monotonic(), key_id
        self._stored.move_to_end(key)
        while len(self._stored) > MAX_REMEMBERED:
            self._stored.popitem(last=False)

    async def _store(self, worker: WorkerDescription) -> None:
        """Insert or update the row of a worker of tasks, with the time of its last call.

        Raises a 409 error if it belongs to another user.
        """
        values = {
            "name": worker.name,
            "sdk": worker.sdk,
            "key_id": worker.key_id,
            "types": list(worker.types),
            "pools": list(worker.pools),
            "last_seen_at": PresentTime(),
        }
        key = {"organization_id": worker.organization_id, "id": worker.id}
        table = TaskWorker.__table__  # type: ignore[attr-defined]  # SQLModel adds it
        condition = (
            col(TaskWorker.organization_id) == worker.organization_id,
            col(TaskWorker.id) == worker.id,
            col(TaskWorker.key_id).in_(select(col(ApiKey.id)).where(col(ApiKey.user_id) == worker.user_id)),
        )

        async def work(connection: AsyncConnection) -> None:
            changed = await connection.execute(table.update().where(*condition).values(values))
            if changed.rowcount == 0:
                await connection.execute(
                    table.insert().values(
                        {
                            **key,
                            **values,
                            "shard": worker.shard,
                            "is_draining": False,
                            "first_seen_at": PresentTime(),
                        }
                    )
                )

        try:
            await self._database.transaction(work)
        except IntegrityError:
            try:
                await self._database.transaction(work)  # another poll of the worker was faster
            except IntegrityError as error:
                raise _taken_error() from error

    async def flush(self) -> None:
        """Store the present time for the workers that were noted since the last `flush`, 500 with one statement.

        If it raises `DatabaseUnavailable`, the others are forgotten.
        """
        seen, self._seen = sorted(self._seen), set()
        for start in range(0, len(seen), STORED_TOGETHER):
            part = seen[start : start + STORED_TOGETHER]
            statement = (
                TaskWorker.__table__.update()  # type: ignore[attr-defined]  # SQLModel adds it
                .where(
                    col(TaskWorker.organization_id).in_({key[0] for key in part}),
                    col(TaskWorker.id).in_({key[1] for key in part}),
                    # Workers choose their ids: those of two organizations may be equal.
                    (col(TaskWorker.organization_id) + " " + col(TaskWorker.id)).in_(map(" ".join, part)),
                )
                .values(last_seen_at=PresentTime())
            )

            async def work(connection: AsyncConnection, statement: object = statement) -> None:
                await connection.execute(statement)  # type: ignore[call-overload]  # an update

            await self._database.transaction(work)
            for key in part:
                if key in self._stored:
                    content, _, key_id = self._stored[key]
                    self._stored[key] = content, monotonic(), key_id

    async def close(self) -> None:
        """Forget the polls of workers that were noted and are not stored yet, since the process stops."""
        self._seen.clear()


def _taken_error() -> ApiError:
    """Return the 409 error for a worker id under which another key claims tasks."""
    return errors.conflict(
        "worker-id-taken", "Another key has claimed tasks under this worker id: choose another id"
    )
