"""Spans of runs: a segment for each claim, and a span for each attempt of a node, from the records of its commit."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Final

import structlog

from engine.run_records import SETTLED_STATUSES, SpanStatus
from models import ids
from telemetry import log_context

if TYPE_CHECKING:
    from engine.run_records import AttemptSpan, NodeSpan, RunError
    from journal.store import ClaimedRun
    from telemetry.tracing import RunTrace, Tracer

log = structlog.get_logger()

_CODE: Final = re.compile(r"[a-z][a-z0-9-]{0,63}")


def begin_segment(tracer: Tracer, run: ClaimedRun, now: datetime) -> SegmentTrace:
    """Begin the trace segment of a run that was just claimed, and return it; only the first claim has the
    time of acceptance.

    Log lines of the current task carry the id of the trace from now on.
    """
    accepted_at = (ids.time_of(run.execution_id) or run.started_at) if run.token == 1 else None
    trace = tracer.begin_segment(
        run.execution_id,
        run.workflow_id,
        run.trace_origin,
        token=run.token,
        accepted_at=accepted_at,
        started_at=run.started_at,
        claimed_at=run.claimed_at or now,
    )
    log_context.fields.set({**log_context.fields.get(log_context.EMPTY), "trace_id": trace.trace_id})
    return SegmentTrace(trace)


def error_code(error: RunError | None) -> str | None:
    """Return the code of an error for a trace: letters, digits and hyphens; `error` for other codes, which
    may contain data.

    None without an error.
    """
    if error is None:
        return None
    return error.code if _CODE.fullmatch(error.code) else "error"


@dataclass(slots=True)
class SegmentTrace:
    """Trace of a claimed run, which turns committed records into spans."""

    run: RunTrace

    def add_committed(self, spans: Sequence[NodeSpan], attempts: Sequence[AttemptSpan]) -> None:
        """Send a trace span for each ended attempt in these records, which are stored by now.

        Iterations of loops and reused results are left out. The record of a node counts only for its first
        attempt; later ones have records of their own. A run that is not sampled sends nothing. Failures are
        only logged.
        """
        if not self.run.is_sampled:
            return
        try:
            for attempt in attempts:
                self._add(attempt, attempt.attempt)
            for span in spans:
                if span.attempt == 1 and not span.is_iteration and span.reused_from is None:
                    self._add(span, span.attempt)
        except Exception:
            log.exception("spans not sent")  # the run goes on: its records are durable

    def _add(self, record: NodeSpan | AttemptSpan, attempt: int) -> None:
        """Send a trace span for a record that has ended; others are ignored."""
        has_ended = record.status in SETTLED_STATUSES or record.status is SpanStatus.FAILED
        if not has_ended or record.started_at is None or record.ended_at is None:
            return
        self.run.add_node(
            record.node_id,
            record.type,
            record.iteration,
            attempt,
            record.started_at,
            record.ended_at,
            record.status.value,
            error_code(record.error),
        )

    def end(self, now: datetime, status: str, error: str | None) -> None:
        """Send the span of the segment, which ends at `now` with a status and the code of an error, if any."""
        self.run.end(now, status, error)
