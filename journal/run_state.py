"""State of runs: publish the value of a key, and read all values with the number of their last change."""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum
from typing import TYPE_CHECKING, Any, Final

from msgspec import Struct
from sqlalchemy import select
from sqlalchemy.dialects import postgresql, sqlite
from sqlmodel import col

from models import database_time
from models.column_types import build_row
from models.execution import Execution
from models.execution_status import TERMINAL_STATUSES
from models.published_value import PublishedValue

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncConnection

    from engine.services import RunCaller
    from journal.store import ExecutionKey

MAX_STATE_BYTES: Final = 64_000
"""Maximum size of the keys and values of a run together, as JSON."""


class PublishVerdict(StrEnum):
    """Verdict on a published value."""

    STORED = "stored"
    """It is in the state, or was before."""
    TOO_LARGE = "too-large"
    """The state would exceed its maximum size."""
    ENDED = "ended"
    """The run has ended or is gone."""


class RunState(Struct, frozen=True):
    """State of a run at one moment."""

    status: str
    values: Sequence[PublishedValue]
    """In the order of their keys."""

    @property
    def revision(self) -> int:
        """Number of changes of the state; 0 before the first."""
        return max((one.revision for one in self.values), default=0)

    @property
    def has_ended(self) -> bool:
        return self.status in TERMINAL_STATUSES


async def publish_value(
    connection: AsyncConnection, caller: RunCaller, key: str, value: bytes
) -> PublishVerdict:
    """Store the value (JSON) of a key in the state of the caller's run, in the caller's transaction; return whether it
    is stored, the state would be too large, or the run has ended or is gone.

    An equal value changes nothing.
    """
    run = (
        await connection.execute(
            select(col(Execution.shard), col(Execution.status))
            .where(
                col(Execution.id) == caller.execution_id,
                col(Execution.organization_id) == caller.organization_id,
            )
            .with_for_update()
        )
    ).first()
    if run is None or run.status in TERMINAL_STATUSES:
        return PublishVerdict.ENDED
    present = await _list_values(connection, caller.execution_id)
    text = value.decode()
    others = [one for one in present if one.key != key]
    if len(others) < len(present) and text in {one.value for one in present if one.key == key}:
        return PublishVerdict.STORED
    size = sum(len(one.key) + len(one.value.encode()) for one in others)
    if size + len(key) + len(value) > MAX_STATE_BYTES:
        return PublishVerdict.TOO_LARGE
    row = PublishedValue(
        execution_id=caller.execution_id,
        key=key,
        shard=run.shard,
        value=text,
        revision=max((one.revision for one in present), default=0) + 1,
        updated_at=await database_time.read_database_time(connection),
    )
    dialect: Any = postgresql if connection.dialect.name == "postgresql" else sqlite
    statement = dialect.insert(PublishedValue).values(row.model_dump())
    changed = {name: statement.excluded[name] for name in ("value", "revision", "updated_at")}
    await connection.execute(
        statement.on_conflict_do_update(index_elements=["execution_id", "key"], set_=changed)
    )
    return PublishVerdict.STORED


async def read_state(connection: AsyncConnection, key: ExecutionKey) -> RunState | None:
    """Return the state of a run, also after its end; None if the run is gone."""
    status = await connection.scalar(
        select(col(Execution.status)).where(
            col(Execution.id) == key.execution_id, col(Execution.shard) == key.shard
        )
    )
    return None if status is None else RunState(status, await _list_values(connection, key.execution_id))


async def _list_values(connection: AsyncConnection, execution_id: str) -> Sequence[PublishedValue]:
    statement = (
        select(PublishedValue)
        .where(col(PublishedValue.execution_id) == execution_id)
        .order_by(col(PublishedValue.key))
    )
    return [build_row(PublishedValue, row) for row in (await connection.execute(statement)).mappings()]
