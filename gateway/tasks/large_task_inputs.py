"""Tasks by id, and their inputs: those too large for a claim are read from the spans of the run."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec
from sqlalchemy import select, type_coerce
from sqlalchemy.types import NullType
from sqlmodel import col

from gateway.http import errors
from journal.blobs.blob_storage import BlobOwner, BlobsUnavailable
from journal.blobs.large_values import LargeValues, RecordedValueLost
from journal.run_rows import SPAN_COLUMNS, decode_span
from models.execution import Execution, SpanRow
from models.task import Task

if TYPE_CHECKING:
    from engine.run_records import NodeSpan
    from journal.blobs.blob_store import BlobStore
    from models.database import Database


class HeldTask(msgspec.Struct, frozen=True):
    """Task with its lease and place in a run."""

    id: str
    execution_id: str
    node_id: str
    iteration: str
    state: str
    lease: str | None
    worker_id: str | None
    input: str | None


async def find_task(database: Database, organization_id: str, task_id: str) -> HeldTask | None:
    """Return a task (work of a custom node for an external worker) of an organization by its id, in any state; None if
    it is missing.

    The caller checks its state and lease.
    """
    columns = (col(getattr(Task, name)) for name in HeldTask.__struct_fields__)
    statement = select(*columns).where(col(Task.id) == task_id, col(Task.organization_id) == organization_id)
    async with database.read() as connection:
        row = (await connection.execute(statement)).first()
    return None if row is None else HeldTask(*row)


async def read(database: Database, blobs: BlobStore, task: HeldTask) -> bytes:
    """Return the input of a task as JSON.

    It is stored in the task's span, or only as the output of an earlier node if it equals that; large ones
    are blobs. Raises a 404 error if it is not stored any more, and 503 while the blob storage is away.
    """
    span = await _find_span(database, task.execution_id, task.node_id, task.iteration)
    if span is None:
        raise errors.not_found("input")
    is_own = span.input_node is None
    if span.input_node is not None:
        span = await _find_span(database, task.execution_id, span.input_node, task.iteration)
    if span is None:
        raise errors.not_found("input")
    if span.input_blob is not None or span.output_blob is not None:
        span = await _restore(database, blobs, task.execution_id, span)
    found = span.input if is_own else span.output
    if found is None:
        raise errors.not_found("input")
    return found


async def _find_span(database: Database, execution_id: str, node_id: str, iteration: str) -> NodeSpan | None:
    """Return the span of a node in an iteration of a run; None if it is missing."""
    # The columns as the row has them: `decode_span` converts times and JSON itself.
    columns = (type_coerce(col(getattr(SpanRow, name)), NullType) for name in SPAN_COLUMNS)
    statement = select(*columns).where(
        col(SpanRow.execution_id) == execution_id,
        col(SpanRow.node_id) == node_id,
        col(SpanRow.iteration) == iteration,
    )
    async with database.read() as connection:
        row = (await connection.execute(statement)).first()
    return None if row is None else decode_span(row)


async def _restore(database: Database, blobs: BlobStore, execution_id: str, span: NodeSpan) -> NodeSpan:
    """Return a span of a run with its input and output from the blob storage.

    Raises a 404 error if they are not stored any more, and 503 while the blob storage is away.
    """
    async with database.read() as connection:
        row = (
            await connection.execute(
                select(col(Execution.organization_id), col(Execution.key_id)).where(
                    col(Execution.id) == execution_id
                )
            )
        ).first()
    if row is None:
        raise errors.not_found("input")
    try:
        (restored,) = await LargeValues(blobs, BlobOwner(row.organization_id, row.key_id), 0).restore([span])
    except RecordedValueLost as error:
        raise errors.not_found("input") from error
    except BlobsUnavailable as error:
        raise errors.not_ready("The blob storage does not answer: try again") from error
    return restored
