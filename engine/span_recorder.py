"""Recorder that writes the spans, attempts and log lines of a run to its journal, in one numbering."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec
from msgspec import structs

from engine import content_recording, node_key
from engine import run_limits as engine_limits
from engine.node_api import TOOL_TYPE
from engine.run_errors import NodeError
from engine.run_records import (
    LOG_LEVELS,
    LOST_ATTEMPT_CODE,
    AttemptSpan,
    LogLevel,
    LogLine,
    NodeSpan,
    RunError,
    SpanStatus,
    make_storable,
)

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from datetime import datetime

    from engine.agents.agent_steps import AgentStep
    from engine.frames import NodeVisit, SectionFrame
    from engine.graph import GraphNode
    from engine.model_calls import ModelCallRecord
    from engine.run_clock import RunClock
    from engine.run_limits import RunLimits
    from engine.run_records import RunJournalWriter

MAX_PENDING = 1_000
"""Approximate maximum number of spans and log lines that wait for a commit."""
MAX_PENDING_BYTES = 10_000_000


MAX_ATTEMPT_SPANS = 10_000
"""Maximum number of attempts of one run with spans of their own; nodes in loops may have many more."""


MAX_LOGGED_PATHS = 5
"""Maximum number of paths that found nothing in one line of the log."""


MAX_METADATA_KEYS = 20
"""Maximum number of keys of metadata that the nodes of one run set."""


class SpanRecorder:
    """Span recorder of one run."""

    def __init__(
        self,
        journal: RunJournalWriter,
        sequence: int,
        limits: RunLimits,
        clock: RunClock,
        *,
        attempts: int = 0,
        log_level: str | None = None,
    ) -> None:
        """`sequence` is the highest recorded number, and `attempts` an upper bound of the recorded attempts.

        Lines below `log_level` are dropped, and `debug` adds lines about nodes; without one, all lines of nodes
        are kept.
        """
        self.clock = clock
        self.holds_lease = journal.holds_lease
        self._advance = journal.advance
        self.has_uncommitted_write = False
        """Whether a write requires a commit before any further step."""
        self._journal = journal
        self._sequence = self._committed = sequence
        self._pending_bytes = 0
        self._max_log_lines = limits.max_log_lines
        self._log_lines = 0
        self._attempts = attempts
        self._metadata_keys: set[str] = set()
        self._logs_states = log_level == LogLevel.DEBUG
        self._dropped_levels = LOG_LEVELS[: LOG_LEVELS.index(LogLevel(log_level))] if log_level else ()

    @property
    def needs_commit(self) -> bool:
        """Whether the uncommitted records have reached their limit."""
        return self._sequence - self._committed > MAX_PENDING or self._pending_bytes > MAX_PENDING_BYTES

    async def commit(self) -> None:
        """Make all records so far durable in the journal; waits while the database is unavailable. Raises `LeaseLost`.

        The limits of uncommitted records begin anew.
        """
        self.has_uncommitted_write = False
        self._committed, self._pending_bytes = self._sequence, 0
        await self._journal.commit()

    def record_node(
        self,
        visit: NodeVisit,
        status: SpanStatus,
        *,
        port: str | None = None,
        output: bytes | None = None,
        ended_at: datetime | None = None,
        wake_at: datetime | None = None,
        error: RunError | None = None,
        awaits: bytes | None = None,
    ) -> None:
        """Record the state of a node in the journal under the next sequence number; it is written with the next commit.

        None for a port, output, end, wake time or error means that the node has none so far; `awaits` is the JSON of
        the answer that it waits for. Second and later attempts are recorded by rows of their own. Data sources in use
        are added to the key. At the log level `debug`, the state is logged.
        """
        if visit.attempt > 1 or status is SpanStatus.RETRYING:
            self._record_attempt_state(visit, status, ended_at, wake_at, error)
        self._sequence += 1
        node = visit.program.node
        hashes = visit.hashes
        if visit.sources and hashes is not None:
            hashes += node_key.encode_sources(visit.sources)
            visit.note_sources_in_loops()
        if output is not None:
            self._pending_bytes += len(output)
        if visit.input is not None:
            self._pending_bytes += len(visit.input)
        if visit.rendered_config is not None:
            self._pending_bytes += len(visit.rendered_config)
        task = visit.task if status is SpanStatus.WAITING else None
        if task is not None:
            self._pending_bytes += len(task)
        calls: Sequence[ModelCallRecord] = visit.model_calls
        if calls and not visit.program.records_content:
            calls = content_recording.strip_calls(calls)
        span = NodeSpan(
            node_id=node.id,
            label=node.label,
            type=node.type,
            status=status,
            sequence=self._sequence,
            started_at=visit.started_at,
            ended_at=ended_at,
            iteration=visit.frame.iteration,
            port=port,
            attempt=visit.attempt,
            input_node=visit.input_node,
            input=visit.input,
            output=output,
            error=error,
            unresolved=tuple(dict.fromkeys(visit.unresolved)) if visit.unresolved else (),
            wake_at=wake_at,
            awaits=awaits,
            resolved_config=visit.resolved_config,
            hashes=hashes,
            key_id=visit.key_id,
            rendered_config=visit.rendered_config,
            task=task,
            model_calls=msgspec.json.encode(calls) if calls else None,
        )
        self._journal.record(span if visit.program.records_content else content_recording.strip_span(span))
        if self._logs_states:
            self._log_state(visit, status, port, ended_at, wake_at)

    def _log_state(
        self,
        visit: NodeVisit,
        status: SpanStatus,
        port: str | None,
        ended_at: datetime | None,
        wake_at: datetime | None,
    ) -> None:
        """Write a debug line about the state of a node: its end with the duration, or the time until which it
        waits.
        """
        node = visit.program.node
        parts = [f"{node.label} ({node.type}) {status.value}"]
        if ended_at is not None and visit.started_at is not None:
            parts.append(f"after {(ended_at - visit.started_at).total_seconds() * 1_000:.0f} ms")
        if port is not None:
            parts.append(f"by {port}")
        if visit.attempt > 1:
            parts.append(f"in attempt {visit.attempt}")
        if wake_at is not None:
            parts.append(f"until {wake_at:%Y-%m-%dT%H:%M:%SZ}")
        if visit.frame.iteration:
            parts.append(f"in iteration {visit.frame.iteration}")
        if visit.unresolved:
            parts.append(f"without {', '.join([*dict.fromkeys(visit.unresolved)][:MAX_LOGGED_PATHS])}")
        self.log(LogLevel.DEBUG, " ".join(parts), node.id)

    def record_reused(self, candidate: NodeSpan) -> None:
        """Record a result of an earlier run, completed or failed, as that of this run's node."""
        self._sequence += 1
        self._pending_bytes += len(candidate.output or b"") + len(candidate.input or b"")
        has_failed = candidate.error is not None
        status = SpanStatus.FAILED if has_failed else SpanStatus.COMPLETED
        ended = structs.replace(candidate, ended_at=candidate.wake_at, wake_at=None)
        self._journal.record(structs.replace(ended, status=status, sequence=self._sequence))

    def _record_attempt_state(
        self,
        visit: NodeVisit,
        status: SpanStatus,
        ended_at: datetime | None,
        wake_at: datetime | None,
        error: RunError | None,
    ) -> None:
        """Record the state of the current attempt of a node with several attempts.

        Nothing is recorded for a node that is canceled between two attempts. A lost attempt of an earlier
        worker is recorded first.
        """
        if visit.lost is not None:
            self._record_lost_attempt(visit, visit.lost)
            visit.lost = None
        number, next_attempt_at, begun_at = visit.attempt, None, visit.begun_at
        if status is SpanStatus.RETRYING:
            if error is None:
                return  # announced, and not begun
            # The visit may already have the number of the last attempt of a round.
            number, status = error.attempt or visit.attempt, SpanStatus.FAILED
            ended_at, next_attempt_at, visit.begun_at = self.clock.now(), wake_at, None
        elif status is SpanStatus.CANCELLED and begun_at is None:
            return  # between two attempts
        if begun_at is None and number == 1:
            begun_at = visit.started_at
        self._record_attempt(visit, number, status, begun_at, ended_at, next_attempt_at, error)

    def _record_lost_attempt(self, visit: NodeVisit, recorded: NodeSpan) -> None:
        """Record the unknown end of an attempt that an earlier worker began."""
        number = recorded.attempt
        message = f"The worker stopped or was lost during attempt {number}: its outcome is unknown"
        error = RunError(LOST_ATTEMPT_CODE, message, visit.program.node.id, number)
        begun_at = recorded.started_at if number == 1 else None
        self._record_attempt(visit, number, SpanStatus.FAILED, begun_at, None, None, error)

    def _record_attempt(
        self,
        visit: NodeVisit,
        number: int,
        status: SpanStatus,
        begun_at: datetime | None,
        ended_at: datetime | None,
        next_attempt_at: datetime | None,
        error: RunError | None,
    ) -> None:
        """Record the span of an attempt of a node, or its new state.

        Beyond 10,000 attempts of a run, a warning is logged once, and new ones are not recorded.
        """
        node = visit.program.node
        if number != visit.recorded_attempt:
            if self._attempts > MAX_ATTEMPT_SPANS:
                return
            self._attempts += 1
            if self._attempts > MAX_ATTEMPT_SPANS:
                self.log(
                    "warning", f"More than {MAX_ATTEMPT_SPANS:,} attempts: further ones get no spans", node.id
                )
                return
            visit.recorded_attempt = number
        self._sequence += 1
        self._journal.record_attempt(
            AttemptSpan(
                node_id=node.id,
                label=node.label,
                type=node.type,
                iteration=visit.frame.iteration,
                attempt=number,
                status=status,
                sequence=self._sequence,
                started_at=begun_at,
                ended_at=ended_at,
                next_attempt_at=next_attempt_at,
                error=error,
            )
        )

    def add_progress(self, frame: SectionFrame, share: float) -> None:
        """Add a share, from 0 to 1, to the run's progress; in an iteration also to all enclosing loops."""
        while (loop := frame.loop) is not None:
            frame.counted += share
            loop.visit.counted += share
            frame = loop.visit.frame
        self._advance(share)

    def add_node_progress(self, visit: NodeVisit) -> None:
        """Add a node's share to the run's progress; a loop adds the part that its iterations have not added."""
        frame = visit.frame
        if not frame.section.bodies:
            self.add_progress(frame, frame.share)
            return
        share = frame.share_of(visit.program.node.id) - visit.counted
        visit.counted += share
        self.add_progress(frame, share)

    def record_iteration(
        self,
        iteration_frame: SectionFrame,
        node: GraphNode,
        status: SpanStatus,
        port: str,
        output: bytes | None,
        error: RunError | None,
    ) -> None:
        """Record the end of an iteration as a span with the id of its loop."""
        self._sequence += 1
        self._pending_bytes += len(output or b"")
        self._journal.record(
            NodeSpan(
                node_id=node.id,
                label=node.label,
                type=node.type,
                status=status,
                sequence=self._sequence,
                started_at=iteration_frame.started_at,
                ended_at=self.clock.now(),
                iteration=iteration_frame.iteration,
                port=port,
                output=output,
                error=error,
            )
        )

    def record_skipped(
        self,
        node: GraphNode,
        iteration: str,
        *,
        request: bytes | None = None,
        hashes: bytes | None = None,
        key_id: str | None = None,
    ) -> None:
        """Record a node as skipped: no taken edge leads to it, so it will never run.

        A write that may have happened in an earlier run keeps its request for later replays, with the `hashes` of its
        key, and `key_id`, the execution id in its idempotency key.
        """
        self._sequence += 1
        self._journal.record(
            NodeSpan(
                node.id,
                node.label,
                node.type,
                SpanStatus.SKIPPED,
                self._sequence,
                started_at=None,
                iteration=iteration,
                resolved_config=request,
                hashes=hashes,
                key_id=key_id,
            )
        )

    def set_metadata(self, metadata: Mapping[str, str]) -> None:
        """Set metadata of the run; long values are cut, and characters that databases refuse replaced.

        Raises `NodeError` for more than 20 different keys, set by nodes since this attempt at the run began.
        """
        keys = self._metadata_keys | metadata.keys()
        if len(keys) > MAX_METADATA_KEYS:
            message = f"The nodes of a run set at most {MAX_METADATA_KEYS} keys of metadata"
            raise NodeError(message, code="too-many-keys")
        self._metadata_keys = keys
        self._journal.set_metadata({key: make_storable(value) for key, value in metadata.items()})

    def record_step(self, step: AgentStep) -> AgentStep:
        """Record the state of a step of an agent under the next sequence number; return the step with it."""
        self._sequence += 1
        self._pending_bytes += len(step.result or b"") + len(step.arguments or b"")
        step = structs.replace(step, sequence=self._sequence)
        self._journal.record_step(step)
        return step

    def record_tool_wait(
        self,
        node: GraphNode,
        iteration: str,
        started_at: datetime,
        awaits: bytes,
        *,
        expires_at: datetime | None = None,
        task: bytes | None = None,
    ) -> None:
        """Record that a tool call of an agent waits, as a span of the node of that tool.

        `awaits` describes it as in `engine.answer_payloads`. The first commit with `task` (JSON) creates that task.
        """
        self._pending_bytes += len(awaits) + len(task or b"")
        status = SpanStatus.WAITING
        span = self._build_tool_span(node, iteration, status, started_at)
        self._journal.record(structs.replace(span, wake_at=expires_at, awaits=awaits, task=task))

    def record_tool_wait_end(
        self,
        node: GraphNode,
        iteration: str,
        status: SpanStatus,
        started_at: datetime,
        *,
        port: str | None = None,
        output: bytes | None = None,
        error: RunError | None = None,
    ) -> None:
        """Record the end of the wait of a tool call, with its answer or failure."""
        self._pending_bytes += len(output or b"")
        span = self._build_tool_span(node, iteration, status, started_at)
        ended = structs.replace(span, ended_at=self.clock.now(), port=port, output=output, error=error)
        self._journal.record(ended)

    def _build_tool_span(
        self, node: GraphNode, iteration: str, status: SpanStatus, started_at: datetime
    ) -> NodeSpan:
        """Return a span of the node of a tool under the next sequence number."""
        self._sequence += 1
        return NodeSpan(
            *(node.id, node.label, TOOL_TYPE, status, self._sequence),
            started_at=started_at,
            iteration=iteration,
        )

    def log(self, level: str, message: str, node_id: str) -> None:
        """Write a line to the log of the run, unless its level is below the run's.

        At the limit of lines, one warning replaces the line, and further lines are dropped. Messages are cut
        to 8,192 characters.
        """
        if self._log_lines > self._max_log_lines or level in self._dropped_levels:
            return
        self._log_lines += 1
        if self._log_lines > self._max_log_lines:
            name = engine_limits.setting_name("max_log_lines")
            level = "warning"
            message = f"More than {self._max_log_lines:,} log lines ({name}): further lines are dropped"
        self._sequence += 1
        self._journal.log(LogLine(level, make_storable(message), node_id, self._sequence, self.clock.now()))
