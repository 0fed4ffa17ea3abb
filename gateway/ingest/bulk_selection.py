"""Selection of the objects of a bulk operation: its stored filter, their number, and the next ones behind a cursor."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Final

import msgspec
from msgspec import Struct
from msgspec.structs import replace

from gateway.executions import bulk_actions, execution_rows
from gateway.executions.bulk_filter import BulkFilter
from gateway.executions.replay_planning import ReplayChoice
from gateway.http import limits
from gateway.http.keyset import KeysetBounds, PageCursor
from gateway.ingest import dead_letter_rows
from gateway.ingest.dead_letter_selection import DeadLetterSelection
from models.bulk_operation import BulkAction, BulkOperation

if TYPE_CHECKING:
    from collections.abc import Callable

    from sqlalchemy import ColumnElement
    from sqlalchemy.ext.asyncio import AsyncConnection

    from models.access import ApiCaller

OF_DEAD_LETTERS: Final = frozenset(
    {BulkAction.REDRIVE_DEAD_LETTERS, BulkAction.REPLAY_DEAD_LETTERS, BulkAction.PURGE_DEAD_LETTERS}
)
REPLAYS: Final = frozenset({BulkAction.REPLAY_DEAD_LETTERS, BulkAction.REPLAY_EXECUTIONS})
STARTING: Final = REPLAYS | {BulkAction.REDRIVE_DEAD_LETTERS, BulkAction.RETRY_EXECUTIONS}
"""Acts that start a run for each object."""
_ALLOWED: Final[Mapping[BulkAction, Callable[[ApiCaller], ColumnElement[bool]]]] = {
    BulkAction.CANCEL_EXECUTIONS: bulk_actions.cancellable,
    BulkAction.RETRY_EXECUTIONS: bulk_actions.retryable,
    BulkAction.REPLAY_EXECUTIONS: bulk_actions.replayable,
}


class StoredReplayOptions(msgspec.Struct, frozen=True):
    """Choices of a replay, as an operation stores them."""

    definition: str
    refresh: Sequence[str]
    confirm: Sequence[str]
    failed_only: bool


class SelectedObjects(Struct, frozen=True):
    """Ids of the next objects of an operation, the oldest first, and the place behind those that were examined."""

    execution_ids: Sequence[str]
    cursor: PageCursor | None
    """None when nothing is left to examine."""


def decode_options(operation: BulkOperation) -> ReplayChoice:
    """Return the stored options of a replay operation as the planner takes them."""
    stored = msgspec.convert(operation.options, StoredReplayOptions)
    return ReplayChoice(
        definition=stored.definition,
        refreshes_reads="read" in stored.refresh,
        refreshes_models="model" in stored.refresh,
        confirmed=frozenset(stored.confirm),
        failed_only=stored.failed_only,
    )


async def count_matching(connection: AsyncConnection, caller: ApiCaller, operation: BulkOperation) -> int:
    """Return the number of objects that an operation would select now; counting stops at its total.

    Of failed runs, at most the oldest 100,000 are examined.
    """
    found, examined = 0, 0
    cursor: PageCursor | None = PageCursor()
    while cursor is not None and found < operation.total and examined < limits.EXAMINED_FOR_REDRIVE:
        page = await select_next(connection, caller, operation, cursor, operation.total - found)
        found, cursor = found + len(page.execution_ids), page.cursor
        examined += limits.EXAMINED_DEAD_LETTERS
    return found


async def select_next(
    connection: AsyncConnection, caller: ApiCaller, operation: BulkOperation, cursor: PageCursor, limit: int
) -> SelectedObjects:
    """Return the ids of the next objects behind a cursor that the operation may act on, the oldest first, at most
    `limit`.

    There may be fewer, or none, although others follow: the result's cursor is None only when none is left. Objects
    that were accepted after the operation began are left out, since the runs that it starts may fail too.
    """
    bounds = KeysetBounds(limit, is_descending=False, cursor=cursor)
    if BulkAction(operation.action) in OF_DEAD_LETTERS:
        return await _select_dead_letters(connection, caller, operation, bounds)
    return await _select_executions(connection, caller, operation, bounds)


async def _select_dead_letters(
    connection: AsyncConnection, caller: ApiCaller, operation: BulkOperation, bounds: KeysetBounds
) -> SelectedObjects:
    """Return the next open dead letters of an operation's filter; for a purge by a member, only of the
    member's workflows.
    """
    given = msgspec.convert(operation.selection, DeadLetterSelection).to_filter()
    is_purge = operation.action == BulkAction.PURGE_DEAD_LETTERS
    wanted = replace(
        given,
        until=min(given.until or operation.created_at, operation.created_at),
        owner_id=caller.user_id if is_purge and not caller.is_admin else None,
    )
    found = await dead_letter_rows.find_dead_letters(
        connection, caller, wanted, bounds, examined=limits.EXAMINED_DEAD_LETTERS
    )
    last = found.last_examined
    behind = (
        None if last is None else PageCursor(is_descending=False, created_at=last.created_at, item_id=last.id)
    )
    return SelectedObjects([one.id for one in found.rows], behind)


async def _select_executions(
    connection: AsyncConnection, caller: ApiCaller, operation: BulkOperation, bounds: KeysetBounds
) -> SelectedObjects:
    given = msgspec.convert(operation.selection, BulkFilter).to_filter(operation.organization_id)
    wanted = replace(given, until=min(given.until or operation.created_at, operation.created_at))
    condition = _ALLOWED[BulkAction(operation.action)](caller)
    rows = await execution_rows.find_behind(connection, wanted, condition, bounds=bounds)
    last = rows[-1] if len(rows) == bounds.limit else None
    behind = (
        None if last is None else PageCursor(is_descending=False, created_at=last.created_at, item_id=last.id)
    )
    return SelectedObjects([row.id for row in rows], behind)
