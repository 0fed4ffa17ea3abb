"""What a run leaves behind: spans, log lines and its end, as the journal keeps them."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from typing import TYPE_CHECKING, Protocol

import msgspec

from engine.node_api import CONTINUE
from engine.run_errors import FailureCause

if TYPE_CHECKING:
    from engine.values import Json


class SpanStatus(StrEnum):
    """A node's state within one run."""

    RUNNING = "running"
    WAITING = "waiting"
    RETRYING = "retrying"
    COMPLETED = "completed"
    FAILED = "failed"
    SKIPPED = "skipped"
    CANCELLED = "cancelled"


SETTLED_STATUSES = frozenset({SpanStatus.COMPLETED, SpanStatus.FAILED, SpanStatus.SKIPPED})


@dataclass(frozen=True, slots=True)
class RunError:
    """Why a run, or a node in it, failed."""

    code: str
    message: str
    node_id: str | None = None
    attempt: int | None = None
    cause: FailureCause | None = None
    """Of a node's failure, only where it says more than `code` and `message`; of a run, the node's failure."""

    def as_json(self) -> dict[str, Json]:
        """Return the error as nodes are given it."""
        return {"code": self.code, "message": self.message, "nodeId": self.node_id, "attempt": self.attempt}


class NodeSpan(msgspec.Struct, frozen=True):
    """One node in one run: the newest row replaces the one before it."""

    node_id: str
    label: str
    type: str
    status: SpanStatus
    sequence: int
    """Counts a run's spans and log lines up, over all its attempts."""
    started_at: datetime | None
    ended_at: datetime | None = None
    iteration: str = ""
    """Which turn of the loops around it: empty outside of any, `3`, or `3.0` in a loop in a loop.

    Each turn has a span of its own, under the id of its loop.
    """
    port: str | None = None
    attempt: int = 1
    input_node: str | None = None
    """The node whose output is this one's input, unchanged; else `input` holds it."""
    input: bytes | None = None
    output: bytes | None = None
    error: RunError | None = None
    unresolved: tuple[str, ...] = ()
    wake_at: datetime | None = None
    awaits: bytes | None = None
    """JSON: whose answer it waits for, and what it gives when none comes: `{kind, request, expired: {output, port}}`.

    Where `expired` is null, it fails then.
    """
    resolved_config: bytes | None = None
    """A write node's config as it was rendered for its first attempt: the second attempt uses it again."""
    hashes: bytes | None = None
    """Four SHA-256 digests: type and version; config after defaults; mappings; resolved input."""
    input_blob: bytes | None = None
    """JSON: where the journal keeps an input that is too large for a row; `input` is None in the row then."""
    output_blob: bytes | None = None

    @property
    def is_turn(self) -> bool:
        """Whether it tells of one turn of a loop, and not of a node, which has hashes before it leaves by any port."""
        return self.port == CONTINUE and self.hashes is None


class AttemptSpan(msgspec.Struct, frozen=True):
    """One attempt of a node that was tried more than once: the newest row replaces the one before it."""

    node_id: str
    label: str
    type: str
    iteration: str
    attempt: int
    status: SpanStatus
    sequence: int
    """Counts with the spans and log lines of the run."""
    started_at: datetime | None
    """None: as it was recorded before, or unknown."""
    ended_at: datetime | None = None
    """None: it goes on, or its worker was lost and nobody knows."""
    next_attempt_at: datetime | None = None
    error: RunError | None = None


class LogLine(msgspec.Struct, frozen=True):
    """One line of an execution's log."""

    level: str
    message: str
    node_id: str | None
    sequence: int
    created_at: datetime


class RunStatus(StrEnum):
    """How one stretch of work on a run ended."""

    COMPLETED = "completed"
    FAILED = "failed"
    STOPPED = "stopped"
    CANCELLED = "cancelled"
    WAITING = "waiting"
    RELEASED = "released"
    """Handed over to whoever claims it next."""


UNFINISHED_STATUSES = frozenset({RunStatus.WAITING, RunStatus.RELEASED})
"""After these the run goes on, sooner or later."""


@dataclass(frozen=True, slots=True)
class RunOutcome:
    """The end of one stretch of work."""

    status: RunStatus
    error: RunError | None = None
    due_at: datetime | None = None
    """When a waiting run wants to go on."""


class RunJournalWriter(Protocol):
    """Where a run writes what happened. Nothing counts before `commit` has returned."""

    def record(self, span: NodeSpan) -> None:
        """Keep a span for the next commit."""

    def record_attempt(self, attempt: AttemptSpan) -> None:
        """Keep an attempt for the next commit; a span of its node follows."""

    def log(self, line: LogLine) -> None:
        """Keep a log line for the next commit."""

    def advance(self, share: float) -> None:
        """Count a part of the run as done; all parts of a run make 1."""

    async def commit(self) -> None:
        """Make everything recorded so far durable; raises `LeaseLost` when the run is no longer ours."""

    def holds_lease(self) -> bool:
        """Tell, by the monotonic clock, whether the lease is certain to last a moment longer."""
