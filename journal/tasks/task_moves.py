"""Moves of a task between its states, as pure functions: the caller locks the row, and stores the result."""

from __future__ import annotations

from enum import StrEnum
from typing import Final

import msgspec

from engine.run_records import LOST_ATTEMPT_CODE, TIMEOUT_CODE, make_storable
from json_text import decoding
from models.task_states import HELD_STATES, UNBEGUN_STATES, TaskState

SECOND: Final = 1_000_000
FIRST_LEASE_MICROSECONDS: Final = 10 * SECOND
"""Lease of a claim until a report of its worker names the task."""
MAX_LOSSES: Final = 3
MAX_UNACKNOWLEDGED: Final = 10
START_TIMEOUT_CODE: Final = "start-timeout"
_ENDED: Final = frozenset({TaskState.COMPLETED, TaskState.FAILED, TaskState.CANCELLED})


class ReportStatus(StrEnum):
    """Result of one item of a report."""

    OK = "ok"
    REPEATED = "repeated"
    """The same report was stored before."""
    LOST = "lost"
    """The worker no longer holds the task."""
    CANCELLED = "cancelled"
    """The run has no use for the task: the worker should stop."""
    REFUSED = "refused"
    """The item is invalid; `error` says why."""


class TaskRow(msgspec.Struct):
    """Row of a task with the columns that moves read or change; times are microseconds since 1970."""

    id: str
    execution_id: str
    node_id: str
    iteration: str
    shard: int
    organization_id: str
    workflow_id: str
    type: str
    version: str
    queue: str
    concurrency_key: str | None
    timeout_microseconds: int
    lease_microseconds: int
    max_attempts: int
    first_delay_microseconds: int
    max_delay_microseconds: int
    delay_grows: bool
    is_at_most_once: bool
    fence: int
    state: str
    failures: int
    losses: int
    unacknowledged: int
    lease: str | None
    worker_id: str | None
    claim_id: str | None
    claimed_at: int | None
    is_acknowledged: bool
    lease_until: int | None
    deadline_at: int | None
    due_at: int | None
    check_at: int | None
    checkpoint: str | None
    progress: str | None
    output: str | None
    output_lease: str | None
    pending_logs: str | None
    log_lines: int
    error: str | None
    ended_at: int | None

    @property
    def is_ended(self) -> bool:
        return self.state in _ENDED

    @property
    def is_held(self) -> bool:
        return self.state in HELD_STATES


ROW_COLUMNS: Final = TaskRow.__struct_fields__
CHANGING_COLUMNS: Final = ROW_COLUMNS[ROW_COLUMNS.index("state") :]
"""Columns that moves change."""


def is_holder(task: TaskRow, lease: str | None) -> bool:
    """Return whether `lease` is the one under which a task worker holds the task; False for a task that
    nobody holds.
    """
    return task.is_held and lease is not None and task.lease == lease


def renew(task: TaskRow, now: int) -> None:
    """Note that a worker has reported a task after its claim, and extend its lease from `now` (microseconds since
    1970); its deadline stays.

    The lease of a task that shall be canceled is not extended.
    """
    task.is_acknowledged = True
    if task.state == TaskState.LEASED:
        task.lease_until = now + task.lease_microseconds
        _set_check(task)


def complete(task: TaskRow, lease: str, now: int) -> ReportStatus:
    """Complete a task of the worker with this lease. Only `OK` means that its node gets the output.

    Otherwise return `REPEATED` for a repetition, `LOST` for a lost lease, and `CANCELLED` for a task that is, or was to
    be, canceled and ends so. `now` is in microseconds since 1970.
    """
    if task.state == TaskState.COMPLETED and task.lease == lease:
        return ReportStatus.REPEATED
    if not is_holder(task, lease):
        return _status_of_other(task, lease)
    if task.state == TaskState.CANCEL_REQUESTED:
        _end(task, TaskState.CANCELLED, now)
        return ReportStatus.CANCELLED
    _end(task, TaskState.COMPLETED, now)
    return ReportStatus.OK


def fail(
    task: TaskRow,
    lease: str,
    now: int,
    code: str,
    message: str,
    *,
    is_final: bool = False,
    delay: int | None = None,
) -> ReportStatus:
    """Count a failed attempt of a task: it waits for its next one, or has failed after the last one or if
    `is_final`.

    `delay` is the time until the next attempt in microseconds, in place of the computed one; `now` is in microseconds
    since 1970. The results are those of `complete`: only `OK` means that the attempt counts.
    """
    is_stored = task.state in {TaskState.FAILED, TaskState.DELAYED, TaskState.READY, TaskState.LIMITED}
    if is_stored and task.lease == lease and _error_code(task) == code:
        return ReportStatus.REPEATED
    if not is_holder(task, lease):
        return _status_of_other(task, lease)
    if task.state == TaskState.CANCEL_REQUESTED:
        _end(task, TaskState.CANCELLED, now)
        return ReportStatus.CANCELLED
    # A worker that has ended an attempt at its deadline doesn't know the outcome of a write.
    is_final = is_final or (task.is_at_most_once and code == TIMEOUT_CODE)
    _fail_attempt(task, now, code, message, is_final=is_final, delay=delay)
    return ReportStatus.OK


def release(task: TaskRow, lease: str, now: int) -> ReportStatus:
    """Free a task that its worker has not begun; that costs no attempt.

    The results are those of `complete`: only `OK` means that the task can be claimed again. `now` is in microseconds
    since 1970.
    """
    if task.state == TaskState.READY and task.lease == lease:
        return ReportStatus.REPEATED
    if not is_holder(task, lease):
        return _status_of_other(task, lease)
    if task.state == TaskState.CANCEL_REQUESTED:
        _end(task, TaskState.CANCELLED, now)
        return ReportStatus.CANCELLED
    _free(task, TaskState.READY)
    return ReportStatus.OK


def return_unreceived(task: TaskRow, now: int) -> None:
    """Free a task whose claim its worker has never received, or end it if it is to be canceled; a task that no worker
    holds stays as it is. `now` is in microseconds since 1970.
    """
    if task.state == TaskState.CANCEL_REQUESTED:
        _end(task, TaskState.CANCELLED, now)
    elif task.state == TaskState.LEASED:
        _free(task, TaskState.READY)
        task.lease = None


def cancel(task: TaskRow, now: int) -> None:
    """Cancel a task that nobody holds, or ask its worker to stop; an ended task stays. `now` is in microseconds since
    1970.
    """
    if task.state in UNBEGUN_STATES:
        _end(task, TaskState.CANCELLED, now)
    elif task.state == TaskState.LEASED:
        task.state = TaskState.CANCEL_REQUESTED
        task.check_at = task.lease_until


def retry(task: TaskRow) -> bool:
    """Let a task be claimed at once: after its delay, or in place of its current attempt, which then does not count.

    Return False for a task that has ended or is to be canceled.
    """
    if task.state == TaskState.DELAYED:
        task.due_at = task.check_at = None
        task.state = TaskState.READY if task.concurrency_key is None else TaskState.LIMITED
    elif task.state == TaskState.LEASED:
        _free(task, TaskState.READY)
        task.lease = None
    return task.state in UNBEGUN_STATES


def move_if_due(task: TaskRow, now: int) -> None:
    """Move a task whose time has come: the end of its lease, deadline, delay or start timeout; others stay.

    A delayed task can be claimed, or waits for a slot of its concurrency key. An attempt over its timeout has failed;
    one with an ended lease is lost. One that the remaining time of its run limits stays until the run has ended, which
    cancels it. A task that no worker has begun in time fails, and one that is to be canceled ends
    with its lease. `now` is in microseconds since 1970.
    """
    if task.check_at is None or task.check_at > now:
        return
    if task.state == TaskState.DELAYED:
        task.due_at = task.check_at = None
        task.state = TaskState.READY if task.concurrency_key is None else TaskState.LIMITED
    elif task.state in UNBEGUN_STATES:
        message = "No worker has begun the task within its start timeout"
        _end(task, TaskState.FAILED, now, START_TIMEOUT_CODE, message)
    elif task.state == TaskState.CANCEL_REQUESTED:
        _end(task, TaskState.CANCELLED, now)
    elif task.state == TaskState.LEASED:
        timeout_at = (task.claimed_at or 0) + task.timeout_microseconds
        if timeout_at <= now:
            seconds = task.timeout_microseconds / SECOND
            _fail_attempt(
                task,
                now,
                TIMEOUT_CODE,
                f"The task exceeded its timeout of {seconds:g} s",
                is_final=task.is_at_most_once,
            )
        elif task.lease_until is not None and task.lease_until <= now:
            _lose(task, now)
        else:
            task.deadline_at = min(timeout_at, now + SECOND)
            _set_check(task)


def _lose(task: TaskRow, now: int) -> None:
    """Count an attempt whose lease has ended: the worker is gone, or has never received the claim.

    The task has failed after three lost attempts or ten unreceived claims, or if it runs at most once;
    otherwise it can be claimed again.
    """
    worker = task.worker_id or "a worker"
    if task.is_acknowledged:
        task.losses += 1
        message = f"The lease of {worker} ended without a report: the outcome of the attempt is unknown"
        is_last = task.losses >= MAX_LOSSES
    else:
        task.unacknowledged += 1
        message = f"{worker} has not reported the task after its claim"
        is_last = task.unacknowledged >= MAX_UNACKNOWLEDGED
    if is_last or task.is_at_most_once:
        _end(task, TaskState.FAILED, now, LOST_ATTEMPT_CODE, message)
        return
    task.error = encode_error(LOST_ATTEMPT_CODE, message)
    _free(task, TaskState.READY)
    task.lease = None


def _fail_attempt(
    task: TaskRow, now: int, code: str, message: str, *, is_final: bool, delay: int | None = None
) -> None:
    """Count a failed attempt; end the task as failed, or delay it until the next attempt."""
    task.failures += 1
    if is_final or task.failures >= task.max_attempts:
        _end(task, TaskState.FAILED, now, code, message)
        return
    pause = delay_after(task, task.failures) if delay is None else delay
    task.error = encode_error(code, message)
    _free(task, TaskState.DELAYED)
    task.due_at = task.check_at = now + max(pause, 0)


def delay_after(task: TaskRow, failures: int) -> int:
    """Return the microseconds until the next attempt after a number of failures, from 1; at most the task's maximum.

    The first delay doubles with each failure if `delay_grows`; otherwise it stays the same.
    """
    growth = 2 ** min(failures - 1, 30) if task.delay_grows else 1
    return min(task.first_delay_microseconds * growth, task.max_delay_microseconds)


def encode_error(code: str, message: str) -> str:
    """Return the JSON text of an error; characters that a database refuses are replaced."""
    return msgspec.json.encode({"code": code, "message": make_storable(message)}).decode()


def _error_code(task: TaskRow) -> str | None:
    return None if task.error is None else decoding.decode(task.error).get("code")


def _status_of_other(task: TaskRow, lease: str) -> ReportStatus:
    """Return the status for a report under a lease that no longer holds the task: canceled if that ended the
    lease, else lost.
    """
    is_own = task.lease == lease
    return ReportStatus.CANCELLED if is_own and task.state == TaskState.CANCELLED else ReportStatus.LOST


def _free(task: TaskRow, state: TaskState) -> None:
    """Let a task be claimed again in the given state; its last lease is kept, so that a repeated report is
    recognized, and an uploaded output is dropped.
    """
    task.state = state
    task.worker_id = task.claim_id = None
    task.claimed_at = task.lease_until = task.deadline_at = task.check_at = None
    task.is_acknowledged = False
    task.output = task.output_lease = None


def _end(task: TaskRow, state: TaskState, now: int, code: str = "", message: str = "") -> None:
    """End a task in the given state, with an error if there is a code; its last lease is kept to recognize a
    repeated report.
    """
    task.state = state
    task.ended_at = now
    task.lease_until = task.deadline_at = task.due_at = task.check_at = None
    task.output = task.output_lease = None
    if code:
        task.error = encode_error(code, message)


def _set_check(task: TaskRow) -> None:
    """Set the time of the next check to the end of the lease or the deadline, the earlier one."""
    ends = [end for end in (task.lease_until, task.deadline_at) if end is not None]
    task.check_at = min(ends, default=None)
