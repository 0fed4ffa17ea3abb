"""Spans of runs from the records of their commits.

A segment for each claim, a span for each attempt of a node, and one for each call of a language model and each tool
call of an agent.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import TYPE_CHECKING

import structlog
from msgspec import Struct

from engine.agents.agent_steps import AGENT_TYPE
from engine.run_records import SETTLED_STATUSES, SpanStatus
from models import ids
from telemetry import log_context, tracing

if TYPE_CHECKING:
    from engine.agents.agent_steps import AgentStep
    from engine.run_records import AttemptSpan, NodeSpan, RunError
    from execution.call_spans import CallSpans
    from journal.store import ClaimedRun
    from telemetry.tracing import RunTrace, Tracer

log = structlog.get_logger()


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
    return tracing.limit_code(error.code)


class SegmentTrace(Struct):
    """Trace of a claimed run, which turns committed records into spans."""

    run: RunTrace
    _calls: CallSpans | None = None

    def add_committed(
        self, spans: Sequence[NodeSpan], attempts: Sequence[AttemptSpan], steps: Sequence[AgentStep]
    ) -> None:
        """Send a trace span for each ended attempt, and each call of a model or tool, in these stored records.

        Iterations of loops and reused results are left out. The record of a node counts only for its first
        attempt; later ones have records of their own. A run that is not sampled sends nothing. Failures are
        only logged.
        """
        if not self.run.is_sampled:
            return
        try:
            for span in spans:
                if span.model_calls is not None or span.type == AGENT_TYPE:
                    self.calls.add_node(span)
            for step in steps:
                self.calls.add_step(step)
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
        node_id, iteration, name = record.node_id, record.iteration, record.type
        attributes = self.run.node_attributes(node_id, name, iteration, attempt, record.status.value)
        if name == AGENT_TYPE:
            described = self.calls.describe_agent(node_id, iteration)
            name, attributes = described.name, {**attributes, **described.attributes}
        self.run.add_span(
            name,
            "internal",
            self.run.node_context(node_id, iteration, attempt),
            self.run.context,
            record.started_at,
            record.ended_at,
            attributes,
            error_code(record.error),
        )

    @property
    def calls(self) -> CallSpans:
        """Spans of the calls of this segment, loaded with the first one."""
        if self._calls is None:
            from execution.call_spans import CallSpans  # noqa: PLC0415 - loaded with the first call of a model

            self._calls = CallSpans(self.run)
        return self._calls

    def end(self, now: datetime, status: str, error: str | None) -> None:
        """Send the span of the segment, which ends at `now` with a status and the code of an error, if any."""
        self.run.end(now, status, error)
