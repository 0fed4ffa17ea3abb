"""Rows of tasks for tests that need no worker."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

from models.task import Task


def make_task_row(task_id: str, run: Any, node_id: str, **fields: Any) -> dict[str, Any]:  # noqa: ANN401 - a row, and values of columns
    """Return the columns of a ready task of a run, with `fields` replaced."""
    now = datetime.now(UTC)
    given: dict[str, Any] = {
        "id": task_id,
        "execution_id": run.id,
        "node_id": node_id,
        "organization_id": run.organization_id,
        "workflow_id": run.workflow_id,
        "shard": run.shard,
        "rank": run.rank,
        "queue_turn": 0,
        "type": "acme/resize",
        "version": "1.2.0",
        "content_hash": "x",
        "pool": "default",
        "queue": "acme/resize@1.2.0#default",
        "is_write": True,
        "is_at_most_once": False,
        "key": f"{run.id}:{node_id}:0",
        "config": "{}",
        "input": "{}",
        "input_bytes": 2,
        "timeout_microseconds": 60_000_000,
        "lease_microseconds": 30_000_000,
        "max_attempts": 1,
        "first_delay_microseconds": 1_000_000,
        "max_delay_microseconds": 60_000_000,
        "delay_grows": True,
        "created_at": now,
        "updated_at": now,
    }
    return Task(**{**given, **fields}).model_dump()


def held_by(worker_id: str, lease: str) -> dict[str, Any]:
    """Return the columns that make a task leased by a worker for a day."""
    later = datetime.now(UTC) + timedelta(days=1)
    return {
        "state": "leased",
        "worker_id": worker_id,
        "lease": lease,
        "is_acknowledged": True,
        "lease_until": later,
        "deadline_at": later,
        "check_at": later,
    }
