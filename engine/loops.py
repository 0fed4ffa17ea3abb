"""Loops in progress: a turn for each item, so many at once, results in the order of the items."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Final

from engine import limits as engine_limits
from engine import outcomes, values
from engine.errors import NodeError
from engine.events import SETTLED, RunError, SpanStatus
from engine.frames import Frame, Loop
from engine.node import CONTINUE, DONE
from engine.values import InvalidJson

if TYPE_CHECKING:
    from engine.agenda import Agenda
    from engine.events import Span
    from engine.frames import Visit
    from engine.limits import Limits
    from engine.node import Each
    from engine.scribe import Scribe
    from engine.settlement import Settlement
    from engine.values import Json

MAX_TURNS_AT_ONCE: Final = 1_000
"""Of all loops of a run; a loop has one all the same, or those around it could never end."""


class Loops:
    """Those of one run."""

    def __init__(
        self,
        settlement: Settlement,
        agenda: Agenda,
        scribe: Scribe,
        limits: Limits,
        recorded: Mapping[str, Mapping[str, Span]],
    ) -> None:
        """`recorded` holds the spans of earlier attempts, by iteration and node."""
        self._settlement = settlement
        self._agenda = agenda
        self._scribe = scribe
        self._limits = limits
        self._recorded = recorded
        self._turns_at_once = 0
        self._iterations = sum(span.is_turn for spans in recorded.values() for span in spans.values())

    # ── from beginning to end ─────────────────────────────────────────────────────────────────────

    def begin(self, visit: Visit, each: Each) -> None:
        """Begin a loop, or go on with it behind the turns that were recorded."""
        frame, node_id = visit.frame, visit.node_id
        if len(each.items) > self._limits.max_loop_items:
            self._settlement.failed(visit, _too_many_items(len(each.items), self._limits), is_final=True)
            return
        body = frame.section.bodies.get(node_id)
        if body is None or not each.items:
            if body is not None:
                self._settlement.skip_body(body, frame)
            self._settlement.completed(visit, _output_without_turns(len(each.items)), DONE)
            return
        if node_id not in frame.recorded:
            count = values.encode({"count": len(each.items)})
            self._scribe.tell(visit, SpanStatus.RUNNING, output=count)
        loop = Loop(visit, body, each.items, max(each.concurrency, 1), each.goes_on)
        frame.loops.add(loop)
        if not loop.goes_on:
            loop.failure = self._recorded_failure(loop)
        self._advance(loop)

    def _advance(self, loop: Loop) -> None:
        """Begin as many turns as may be, or end the loop where there is nothing more to wait for."""
        while loop.wants_a_turn and (not loop.turns or self._turns_at_once < MAX_TURNS_AT_ONCE):
            self._begin_turn(loop)
        if not loop.turns and loop in loop.visit.frame.loops:
            self._end(loop)

    def _end(self, loop: Loop) -> None:
        visit = loop.visit
        visit.frame.loops.discard(loop)
        visit.resolved_config = None
        if loop.is_broken_off:
            self._settlement.cancelled(visit)
        elif loop.failure is not None:
            self._settlement.give_up(visit, loop.failure)
        else:
            self._settlement.completed(visit, loop.output(), DONE)

    # ── turns ─────────────────────────────────────────────────────────────────────────────────────

    def _begin_turn(self, loop: Loop) -> None:
        index = loop.next_index
        loop.next_index += 1
        recorded = self._recorded.get(loop.iteration(index), {})
        span = recorded.get(loop.visit.node_id)
        if span is not None and span.status in SETTLED:
            self._take_over(loop, index, span)
            return
        self._iterations += 1
        if self._iterations > self._limits.max_iterations:
            self._fail(loop, _too_many_iterations(loop, self._limits))
            return
        turn = Frame.of_turn(loop, index, recorded, self._scribe.clock.now())
        loop.turns[index] = turn
        self._turns_at_once += 1
        self._settlement.follow(turn, turn.start())

    def _take_over(self, loop: Loop, index: int, span: Span) -> None:
        """Take the end of a turn from the journal: nothing of it is looked at again."""
        loop.visit.counted += loop.turn_share
        self._scribe.count(loop.visit.frame, loop.turn_share)
        if span.error is not None:
            self._failed(loop, index, span.error)
            return
        loop.result_bytes += len(span.output or b"")
        loop.results[index] = values.restored(span.output) if span.output is not None else None

    def end_turn(self, turn: Frame, loop: Loop) -> None:
        """Note what has come of a turn in which nothing is left to do."""
        del loop.turns[turn.index]
        self._turns_at_once -= 1
        self._scribe.count(turn, loop.turn_share - turn.counted)
        if turn.failure is not None:
            self._tell(turn, loop, SpanStatus.FAILED, error=turn.failure)
            self._failed(loop, turn.index, turn.failure)
        elif turn.is_broken_off:
            self._tell(turn, loop, SpanStatus.CANCELLED)
        else:
            self._completed(turn, loop)
        self._advance(loop)

    def _completed(self, turn: Frame, loop: Loop) -> None:
        result = turn.result()
        try:
            encoded = outcomes.encoded(result, self._limits.max_output_bytes)
            loop.result_bytes += len(encoded)
            if loop.result_bytes > self._limits.max_output_bytes:
                raise outcomes.too_large(self._limits.max_output_bytes)
        except (InvalidJson, NodeError) as error:
            self._fail(loop, self._settlement.reason(loop.visit, outcomes.as_node_error(error)))
            return
        loop.results[turn.index] = result
        self._tell(turn, loop, SpanStatus.COMPLETED, output=encoded)

    def _failed(self, loop: Loop, index: int, error: RunError) -> None:
        if loop.goes_on:
            loop.errors[index] = error
        else:
            self._fail(loop, error)

    def _fail(self, loop: Loop, error: RunError) -> None:
        """Let a loop fail: its other turns are broken off, and their end is awaited."""
        if loop.failure is None:
            loop.failure = error
            for turn in list(loop.turns.values()):
                self.break_off(turn)

    def break_off(self, turn: Frame) -> None:
        """Begin nothing more in a turn and the loops inside it; writes that are under way end by themselves."""
        frames = list(turn.whole())
        for frame in frames:
            frame.is_broken_off = True
            for loop in frame.loops:
                loop.is_broken_off = True
        for visit in self._agenda.drop(set(frames)):
            self._scribe.tell(visit, SpanStatus.CANCELLED, ended_at=self._scribe.clock.now())
        for frame in reversed(frames):
            loop_around = frame.loop
            if frame.open == 0 and loop_around is not None and loop_around.turns.get(frame.index) is frame:
                self.end_turn(frame, loop_around)

    # ── records ───────────────────────────────────────────────────────────────────────────────────

    def _recorded_failure(self, loop: Loop) -> RunError | None:
        for index in range(len(loop.items)) if self._recorded else ():
            span = self._recorded.get(loop.iteration(index), {}).get(loop.visit.node_id)
            if span is not None and span.status is SpanStatus.FAILED:
                return span.error
        return None

    def _tell(
        self,
        turn: Frame,
        loop: Loop,
        status: SpanStatus,
        *,
        output: bytes | None = None,
        error: RunError | None = None,
    ) -> None:
        self._scribe.tell_turn(turn, loop.visit.program.node, status, CONTINUE, output, error)


def _output_without_turns(count: int) -> dict[str, Json]:
    return {"results": [None] * count, "count": count, "errors": []}


def _too_many_items(count: int, limits: Limits) -> NodeError:
    name = engine_limits.setting("max_loop_items")
    message = f"The loop was given {count:,} items, and may have {limits.max_loop_items:,} ({name})"
    return NodeError(message, code="too-many-items")


def _too_many_iterations(loop: Loop, limits: Limits) -> RunError:
    name = engine_limits.setting("max_iterations")
    message = f"The loops of one run may take {limits.max_iterations:,} turns in all ({name})"
    return RunError("too-many-iterations", message, loop.visit.node_id, loop.visit.attempt)
