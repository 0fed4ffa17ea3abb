"""States of tasks, and the key by which processes watch the tasks of an organization."""

from __future__ import annotations

from enum import StrEnum
from typing import Final


class TaskState(StrEnum):
    """State of a task."""

    READY = "ready"
    LIMITED = "limited"
    """Waits for a place under its concurrency key."""
    DELAYED = "delayed"
    """Waits for the time of its next attempt; shown as `ready` with `dueAt`."""
    LEASED = "leased"
    CANCEL_REQUESTED = "cancel_requested"
    """Leased, and its worker is asked to stop."""
    COMPLETED = "completed"
    FAILED = "failed"
    CANCELLED = "cancelled"


UNBEGUN_STATES: Final = (TaskState.READY, TaskState.LIMITED, TaskState.DELAYED)
HELD_STATES: Final = (TaskState.LEASED, TaskState.CANCEL_REQUESTED)
HELD_CONDITION: Final = "state IN ('leased', 'cancel_requested')"
WORK_SINCE_SQL: Final = (
    "(SELECT CASE WHEN task.claimed_at > execution.updated_at THEN task.claimed_at ELSE execution.updated_at END"
    " FROM task WHERE task.execution_id = execution.id AND task.ended_at IS NULL AND task.state = 'leased'"
    " ORDER BY task.claimed_at LIMIT 1)"
)
"""SQL of the time since which the clock of a waiting run counts: its oldest claim of a leased task, or the later time
at which the run began to wait or its clock was last read; NULL while no worker holds a task of it.
"""
WATCH_PREFIX: Final = "tasks:"
WORKERS_PREFIX: Final = "task-workers:"


def watch_key(organization_id: str) -> str:
    """Return the key, for the broker, by which processes watch all tasks of an organization; others watch a single run
    by its execution id.
    """
    return f"{WATCH_PREFIX}{organization_id}"


def workers_key(organization_id: str) -> str:
    """Return the key, for the broker, by which processes watch for workers of an organization that stop, or are asked
    to.
    """
    return f"{WORKERS_PREFIX}{organization_id}"


def organization_of_key(key: str, prefix: str = WATCH_PREFIX) -> str | None:
    """Return the id of the organization in a key that begins with `prefix`, by default a key of `watch_key`; None for
    any other key.
    """
    return key.removeprefix(prefix) if key.startswith(prefix) else None
