"""Statuses, errors and outcomes of runs that have ended, in the forms of rows and notifications."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

from engine.run_records import UNFINISHED_STATUSES, RunError, RunStatus
from models.ended_execution import MAX_NOTIFIED_BYTES, EndedExecution
from models.execution_status import ExecutionStatus

if TYPE_CHECKING:
    from journal.store import RunWrite

STATUS_AFTER = {
    RunStatus.COMPLETED: ExecutionStatus.COMPLETED,
    RunStatus.FAILED: ExecutionStatus.FAILED,
    RunStatus.STOPPED: ExecutionStatus.STOPPED,
    RunStatus.CANCELLED: ExecutionStatus.CANCELLED,
    RunStatus.WAITING: ExecutionStatus.WAITING,
    RunStatus.RELEASED: ExecutionStatus.PENDING,
}


def encode_error(error: RunError | None) -> str | None:
    """Return an error as JSON text for a row and the API, with its cause if it has one; None for no error."""
    if error is None:
        return None
    shown = error.as_json() if error.cause is None else {**error.as_json(), "cause": error.cause}
    return msgspec.json.encode(shown).decode()


def ended_execution(write: RunWrite) -> EndedExecution | None:
    """Return status, error and outputs of a run that ends with this write, for a notification.

    None if the run does not end, a value is stored as a blob, or the outcome is too large. The write must
    hold all records of the run.
    """
    if write.end is None or write.end in UNFINISHED_STATUSES:
        return None
    newest = {span.node_id: span for span in write.spans if not span.iteration}
    if any(span.output_blob is not None for span in newest.values()):
        return None
    outputs = tuple(
        (node_id, span.output.decode())
        for node_id, span in newest.items()
        if span.ended_at is not None and span.output is not None
    )
    error = encode_error(write.error)
    size = len(error or "") + sum(len(node_id) + len(text) for node_id, text in outputs)
    if size > MAX_NOTIFIED_BYTES:
        return None
    status = STATUS_AFTER[write.end].value
    return EndedExecution(
        write.execution_id, status, write.completed_nodes, write.progress, error, outputs, size
    )
