"""Scheduling of loops: one iteration per item, limited concurrency, results in the order of the items."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Final, Protocol

from engine import node_key, run_records, values
from engine import run_limits as engine_limits
from engine.frames import LoopProgress, SectionFrame
from engine.node_api import CONTINUE, DONE
from engine.run_errors import NodeError
from engine.run_records import SETTLED_STATUSES, RunError, SpanStatus
from engine.values import InvalidJson

if TYPE_CHECKING:
    from engine.frames import NodeVisit, ReadinessChange, Worklist
    from engine.graph import GraphSection
    from engine.node_api import LoopRequest
    from engine.run_limits import RunLimits
    from engine.run_records import NodeSpan
    from engine.span_recorder import SpanRecorder
    from engine.values import Json

MAX_ITERATIONS_AT_ONCE: Final = 1_000
"""Maximum number of iterations in progress in all loops of a run. Each loop always has one, or enclosing
loops could never end.
"""


class LoopOwner(Protocol):
    """Progress of the run that a loop belongs to."""

    def fail(self, visit: NodeVisit, error: NodeError, *, is_final: bool = False) -> None: ...
    def complete(self, visit: NodeVisit, output: Json, port: str) -> None: ...
    def record_cancelled(self, visit: NodeVisit) -> None: ...
    def withdraw_waits(self, visit: NodeVisit) -> None: ...
    def give_up(self, visit: NodeVisit, reason: RunError) -> None: ...
    def schedule_successors(self, frame: SectionFrame, change: ReadinessChange) -> None: ...
    def skip_body(self, body: GraphSection, frame: SectionFrame) -> None: ...
    def to_run_error(self, visit: NodeVisit, error: NodeError) -> RunError: ...


class LoopScheduler:
    """Scheduler of the loops of one run."""

    def __init__(
        self,
        owner: LoopOwner,
        worklist: Worklist,
        recorder: SpanRecorder,
        limits: RunLimits,
        recorded: Mapping[str, Mapping[str, NodeSpan]],
    ) -> None:
        """`recorded` holds the spans of earlier attempts, by iteration and node."""
        self._owner = owner
        self._worklist = worklist
        self._recorder = recorder
        self._limits = limits
        self._recorded = recorded
        self._iterations_at_once = 0
        self._iterations = sum(span.is_iteration for spans in recorded.values() for span in spans.values())

    # ── loops ─────────────────────────────────────────────────────────────────────────────────────────

    def begin(self, visit: NodeVisit, each: LoopRequest) -> None:
        """Begin a loop, or continue it after the recorded iterations; without items or a body, complete it at once.

        The node of the loop fails, without a retry, for more items than the limit, and after a recorded failed
        iteration unless the loop continues on errors.
        """
        frame, node_id = visit.frame, visit.node_id
        if len(each.items) > self._limits.max_loop_items:
            self._owner.fail(visit, _too_many_items(len(each.items), self._limits), is_final=True)
            return
        body = frame.section.bodies.get(node_id)
        if body is None or not each.items:
            if body is not None:
                self._owner.skip_body(body, frame)
            self._owner.complete(visit, _empty_output(len(each.items)), DONE)
            return
        if node_id in frame.recorded:
            self._restore_sources(visit)
        else:
            count = values.encode_json({"count": len(each.items)})
            self._recorder.record_node(visit, SpanStatus.RUNNING, output=count)
        loop = LoopProgress(visit, body, each.items, max(each.concurrency, 1), each.continues_on_error)
        frame.loops.add(loop)
        if not loop.continues_on_error:
            loop.failure = self._recorded_failure(loop)
        self._advance(loop)

    def _restore_sources(self, visit: NodeVisit) -> None:
        """Add to the visit of a loop the data sources that its body has used in earlier attempts, by the hashes of the
        recorded spans.
        """
        body, found = visit.program.body, set(visit.sources or ())
        for spans in self._recorded.values():
            for span in spans.values():
                if span.node_id in body and (key := node_key.decode_sources(span.hashes)) is not None:
                    found |= set(key)
        visit.sources = found

    def _advance(self, loop: LoopProgress) -> None:
        """Begin as many iterations as the loop's concurrency and the limits allow; end the loop if none is in
        progress.
        """
        while loop.can_start_iteration and (
            not loop.iterations or self._iterations_at_once < MAX_ITERATIONS_AT_ONCE
        ):
            self._begin_iteration(loop)
        if not loop.iterations and loop in loop.visit.frame.loops:
            self._end(loop)

    def _end(self, loop: LoopProgress) -> None:
        """End a loop without iterations in progress: record it as canceled, failed or completed."""
        visit = loop.visit
        visit.frame.loops.discard(loop)
        visit.resolved_config = None
        if loop.is_broken_off:
            self._owner.record_cancelled(visit)
        elif loop.failure is not None:
            self._owner.give_up(visit, loop.failure)
        else:
            self._owner.complete(visit, loop.output(), DONE)

    # ── iterations ────────────────────────────────────────────────────────────────────────────────────

    def _begin_iteration(self, loop: LoopProgress) -> None:
        """Begin the next iteration of a loop, or apply its recorded end; the loop fails beyond the run's maximum."""
        index = loop.next_index
        loop.next_index += 1
        recorded = self._recorded.get(loop.name_iteration(index), {})
        span = recorded.get(loop.visit.node_id)
        if span is not None and span.status in SETTLED_STATUSES:
            self._restore_iteration(loop, index, span)
            return
        self._iterations += 1
        if self._iterations > self._limits.max_iterations:
            self._fail(loop, _too_many_iterations(loop, self._limits))
            return
        iteration_frame = SectionFrame.for_iteration(loop, index, recorded, self._recorder.clock.now())
        loop.iterations[index] = iteration_frame
        self._iterations_at_once += 1
        self._owner.schedule_successors(iteration_frame, iteration_frame.start())

    def _restore_iteration(self, loop: LoopProgress, index: int, span: NodeSpan) -> None:
        """Apply the recorded end of an iteration, its result or failure, without running its nodes."""
        loop.visit.counted += loop.iteration_share
        self._recorder.add_progress(loop.visit.frame, loop.iteration_share)
        if span.error is not None:
            self._on_iteration_failed(loop, index, span.error)
            return
        loop.result_bytes += len(span.output or b"")
        loop.results[index] = values.restore_json(span.output) if span.output is not None else None

    def end_iteration(self, iteration_frame: SectionFrame, loop: LoopProgress) -> None:
        """End an iteration in which nothing is left to do: record its result, failure or cancellation.

        Then begin further iterations, or end the loop.
        """
        del loop.iterations[iteration_frame.index]
        self._iterations_at_once -= 1
        self._recorder.add_progress(iteration_frame, loop.iteration_share - iteration_frame.counted)
        if iteration_frame.failure is not None:
            self._record_iteration(iteration_frame, loop, SpanStatus.FAILED, error=iteration_frame.failure)
            self._on_iteration_failed(loop, iteration_frame.index, iteration_frame.failure)
        elif iteration_frame.is_broken_off:
            self._record_iteration(iteration_frame, loop, SpanStatus.CANCELLED)
        else:
            self._on_iteration_completed(iteration_frame, loop)
        self._advance(loop)

    def _on_iteration_completed(self, iteration_frame: SectionFrame, loop: LoopProgress) -> None:
        """Store and record the result of an iteration; the loop fails if it, or all results together, are too large."""
        result = iteration_frame.result()
        try:
            encoded = run_records.encode_output(result, self._limits.max_output_bytes)
            loop.result_bytes += len(encoded)
            if loop.result_bytes > self._limits.max_output_bytes:
                raise run_records.build_size_error(self._limits.max_output_bytes)
        except (InvalidJson, NodeError) as error:
            self._fail(loop, self._owner.to_run_error(loop.visit, run_records.to_node_error(error)))
            return
        loop.results[iteration_frame.index] = result
        self._record_iteration(iteration_frame, loop, SpanStatus.COMPLETED, output=encoded)

    def _on_iteration_failed(self, loop: LoopProgress, index: int, error: RunError) -> None:
        """Note the failure of an iteration: a loop that continues on errors will list it, any other loop fails."""
        if loop.continues_on_error:
            loop.errors[index] = error
        else:
            self._fail(loop, error)

    def _fail(self, loop: LoopProgress, error: RunError) -> None:
        """Fail a loop with its first error, and cancel its other iterations; later errors are ignored."""
        if loop.failure is None:
            loop.failure = error
            for iteration_frame in list(loop.iterations.values()):
                self.cancel_iteration(iteration_frame)

    def cancel_iteration(self, iteration_frame: SectionFrame) -> None:
        """Stop an iteration and the loops inside it: begin nothing more, cancel reads, and record sleeping
        nodes as canceled.

        Writes in progress complete first; an iteration without any ends at once.
        """
        frames = list(iteration_frame.with_inner_iterations())
        for frame in frames:
            frame.is_broken_off = True
            for loop in frame.loops:
                loop.is_broken_off = True
        for visit in self._worklist.drop_frames(set(frames)):
            self._owner.withdraw_waits(visit)
            self._recorder.record_node(visit, SpanStatus.CANCELLED, ended_at=self._recorder.clock.now())
        for frame in reversed(frames):
            enclosing_loop = frame.loop
            if (
                frame.open == 0
                and enclosing_loop is not None
                and enclosing_loop.iterations.get(frame.index) is frame
            ):
                self.end_iteration(frame, enclosing_loop)

    # ── records ───────────────────────────────────────────────────────────────────────────────────

    def _recorded_failure(self, loop: LoopProgress) -> RunError | None:
        for index in range(len(loop.items)) if self._recorded else ():
            span = self._recorded.get(loop.name_iteration(index), {}).get(loop.visit.node_id)
            if span is not None and span.status is SpanStatus.FAILED:
                return span.error
        return None

    def _record_iteration(
        self,
        iteration_frame: SectionFrame,
        loop: LoopProgress,
        status: SpanStatus,
        *,
        output: bytes | None = None,
        error: RunError | None = None,
    ) -> None:
        self._recorder.record_iteration(
            iteration_frame, loop.visit.program.node, status, CONTINUE, output, error
        )


def _empty_output(count: int) -> dict[str, Json]:
    return {"results": [None] * count, "count": count, "errors": []}


def _too_many_items(count: int, limits: RunLimits) -> NodeError:
    name = engine_limits.setting_name("max_loop_items")
    message = f"The loop has {count:,} items; the maximum is {limits.max_loop_items:,} ({name})"
    return NodeError(message, code="too-many-items")


def _too_many_iterations(loop: LoopProgress, limits: RunLimits) -> RunError:
    name = engine_limits.setting_name("max_iterations")
    message = f"The loops of one run may have at most {limits.max_iterations:,} iterations in total ({name})"
    return RunError("too-many-iterations", message, loop.visit.node_id, loop.visit.attempt)
