"""Outcome of an execution as a notification carries it, so that waiting requests need not read it."""

from __future__ import annotations

import msgspec

MAX_NOTIFIED_BYTES = 16_000
"""Largest outcome in a notification, and largest sum of outcomes in one; others are read from the database."""


class EndedExecution(msgspec.Struct, frozen=True, array_like=True):
    """Execution that one commit has begun and ended."""

    execution_id: str
    status: str
    completed_nodes: int
    percent: int
    error: str | None
    """JSON text."""
    outputs: tuple[tuple[str, str], ...]
    """Node id and JSON text of each node with an output."""
    size: int = 0
    """Number of characters of its texts."""
