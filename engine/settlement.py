"""What follows from what nodes gave: outputs and failures, pauses and answers, and who is ready by that."""

from __future__ import annotations

import random
from collections.abc import Mapping
from datetime import datetime, timedelta
from hashlib import sha256
from typing import TYPE_CHECKING, Final, TypeAlias

from engine import answers, outcomes, values
from engine.errors import NodeError
from engine.events import RunError, Span, SpanStatus
from engine.frames import Frame, Sleeping, Then, Visit
from engine.loops import Loops
from engine.node import ERROR, OUTPUT, Await, Directive, Outcome, Result, Wait
from engine.outcomes import EXPIRED, as_node_error
from engine.values import InvalidJson

if TYPE_CHECKING:
    from engine.agenda import Agenda
    from engine.limits import Limits
    from engine.plan import Step
    from engine.program import Program
    from engine.scribe import Scribe
    from engine.sections import Section
    from engine.values import Json
    from engine.visits import Visits

Signals: TypeAlias = Mapping[tuple[str, str], bytes]
"""Answers that waiting nodes were given, by node and iteration: `{output, port}` or `{error: {code, message}}`."""

MAX_KEPT_TEXT_BYTES: Final = 16_384
WEBHOOK: Final = "webhook"
"""Kind of the trigger whose output may be as large as a body that the gateway takes in."""
MAX_ROUND_SECONDS: Final = 60.0
"""Before a run is taken up again from a node that has failed, it rests for a second, then for twice as long, …"""


class Settlement:
    """Carries one run from node to node; calls none."""

    def __init__(
        self,
        program: Program,
        recorded: Mapping[str, Mapping[str, Span]],
        signals: Signals,
        visits: Visits,
        scribe: Scribe,
        agenda: Agenda,
        limits: Limits,
    ) -> None:
        self.failure: RunError | None = None
        """That of the run."""
        self._nodes = program.nodes
        self._settings = program.graph.settings
        self._signals = signals
        self._visits = visits
        self._scribe = scribe
        self._agenda = agenda
        self._limits = limits
        self._max_output_bytes = limits.max_output_bytes
        self._recorded = recorded
        self._begun_loops: Loops | None = None

    @property
    def _loops(self) -> Loops:
        # Made when it is needed: the two know one another, and so only the garbage collector frees them.
        if self._begun_loops is None:
            self._begun_loops = Loops(self, self._agenda, self._scribe, self._limits, self._recorded)
        return self._begun_loops

    # ── what nodes gave ───────────────────────────────────────────────────────────────────────────

    def returned(self, visit: Visit, outcome: Outcome) -> None:
        """Take what a node returned."""
        try:
            if not isinstance(outcome, Directive):
                self._completed(visit, OUTPUT, outcome)
            elif isinstance(outcome, Result):
                self._completed(visit, outcome.port, outcome.output)
            elif isinstance(outcome, Wait):
                self._wait(visit, outcome)
            elif isinstance(outcome, Await):
                self._await(visit, outcome)
            else:
                self._visits.check_resolved(visit)
                self._loops.begin(visit, outcome)
        except (InvalidJson, NodeError) as error:
            self.failed(visit, as_node_error(error))

    def write(self, visit: Visit, outcome: Outcome) -> None:
        """Write down the output that a node returned, if it has; raises `InvalidJson`, `NodeError` and `TakesLong`."""
        if isinstance(outcome, Result | Wait):
            visit.written = self._kept(visit, outcome.output)
        elif not isinstance(outcome, Directive):
            visit.written = self._kept(visit, outcome)

    def _completed(self, visit: Visit, port: str, output: Json) -> None:
        output, text, digest = visit.written or self._kept(visit, output)
        visit.written = None
        self._settle(visit, SpanStatus.COMPLETED, port, output, text, digest)

    def _kept(self, visit: Visit, output: Json) -> tuple[Json, bytes, bytes]:
        """Return an output as others see it and as it is kept, and its digest; raises `InvalidJson` and `NodeError`."""
        if visit.program.pass_through:
            output = self._pass_through(visit, output)
        if visit.unresolved:
            self._visits.check_resolved(visit)
        if output is visit.data:
            # As it was written before.
            text = visit.input if visit.input_node is None else visit.frame.texts.get(visit.input_node)
            if text is not None and len(text) <= MAX_KEPT_TEXT_BYTES:
                return output, text, sha256(text).digest()
        text = outcomes.encoded(output, self._max_bytes(visit, output))
        return output, text, sha256(text).digest()

    def _max_bytes(self, visit: Visit, output: Json) -> int:
        """Return the limit of an output.

        A webhook is limited by `maxBodyBytes` of its trigger alone, when the gateway takes it in; nodes that pass the
        output of another on unchanged add nothing to it.
        """
        is_passed_on = output is visit.data and visit.input_node is not None
        if is_passed_on or visit.program.node_type.trigger_kind == WEBHOOK:
            return max(self._max_output_bytes, values.MAX_ENCODED_BYTES)
        return self._max_output_bytes

    def completed(self, visit: Visit, output: Json, port: str) -> None:
        """Settle a node with an output that it has not returned itself."""
        self.returned(visit, Result(output, port))

    def _pass_through(self, visit: Visit, output: Json) -> Json:
        if not isinstance(output, dict):
            return output
        given = visit.data if isinstance(visit.data, dict) else {}
        passed = {key: given.get(source) for key, source in visit.program.pass_through.items()}
        visit.unresolved.extend(
            source for source in visit.program.pass_through.values() if source not in given
        )
        return {**output, **passed}

    # ── failures ──────────────────────────────────────────────────────────────────────────────────

    def failed(self, visit: Visit, error: NodeError, *, is_final: bool = False) -> None:
        """Take the failure of a node: it is tried again, unless that is ruled out or was done often enough."""
        reason = self.reason(visit, error)
        pause = None if is_final or visit.frame.is_broken_off else self._pause_seconds(visit, error)
        if pause is None:
            self.give_up(visit, reason)
            return
        self._scribe.log("warning", f"Attempt {reason.attempt} failed: {error.message}", visit.node_id)
        wake_at = self._scribe.clock.now() + timedelta(seconds=pause)
        self._scribe.tell(visit, SpanStatus.RETRYING, wake_at=wake_at, error=reason)
        visit.attempt += 1
        self._sleep(visit, wake_at, Then.TRIED_AGAIN)

    def reason(self, visit: Visit, error: NodeError) -> RunError:
        """Return an error as that of a node."""
        return outcomes.error_of_node(error, visit.node_id, visit.attempt)

    def _pause_seconds(self, visit: Visit, error: NodeError) -> float | None:
        """Return how long to wait before the next attempt; None: there is none.

        Attempts come in rounds. Where the settings say so, the run is taken up again from a node that has used up one
        round; the attempt that it goes on with tells in which.
        """
        node = visit.program.node
        is_known = error.retryable and error.code not in outcomes.UNKNOWN_OUTCOMES
        if visit.is_at_most_once and not is_known:
            return None
        has_rounds = (
            self._settings.retry_on_failure and visit.frame.fails_the_run() and not visit.has_error_edge
        )
        attempts = node.retry.max_attempts
        rounds, attempt = divmod(visit.attempt - 1, attempts) if has_rounds else (0, visit.attempt - 1)
        if error.retryable and attempt + 1 < attempts:
            return node.retry.delay_seconds(attempt + 1, random.random())  # noqa: S311 - jitter
        if not has_rounds or rounds >= self._settings.max_retries:
            return None
        visit.attempt = (rounds + 1) * attempts
        return min(2.0**rounds, MAX_ROUND_SECONDS)

    def give_up(self, visit: Visit, reason: RunError) -> None:
        """Let a node fail for good: by its error port, or with all that it is a part of."""
        frame = visit.frame
        if visit.has_error_edge and not frame.is_broken_off:
            output, text = outcomes.error_output(reason, visit.data, self._max_output_bytes)
            digest = sha256(text).digest()
            self._settle(visit, SpanStatus.FAILED, ERROR, output, text, digest, reason)
            return
        self._scribe.tell(visit, SpanStatus.FAILED, ended_at=self._scribe.clock.now(), error=reason)
        self._scribe.count_node(visit)
        if visit.is_write:
            self._scribe.has_uncommitted_write = True
        self._fail(frame, reason)
        self._left(frame)

    def _fail(self, frame: Frame, reason: RunError) -> None:
        if frame.failure is not None or frame.is_broken_off:
            return
        frame.failure = reason
        if frame.loop is None:
            self.failure = outcomes.end_of_run(reason)
        else:
            self._loops.break_off(frame)

    def cancelled(self, visit: Visit) -> None:
        """Note that a node of a part that was broken off has been cut short."""
        self._scribe.tell(visit, SpanStatus.CANCELLED, ended_at=self._scribe.clock.now())
        self._left(visit.frame)

    # ── on to the next ────────────────────────────────────────────────────────────────────────────

    def _settle(
        self,
        visit: Visit,
        status: SpanStatus,
        port: str,
        output: Json,
        text: bytes,
        digest: bytes,
        error: RunError | None = None,
    ) -> None:
        frame, node_id = visit.frame, visit.program.node.id
        frame.outputs[node_id] = output
        frame.digests[node_id] = digest
        if len(text) <= MAX_KEPT_TEXT_BYTES:
            frame.texts[node_id] = text
        if frame.loop is not None:
            frame.nodes[node_id] = output
        self._scribe.tell(
            visit, status, port=port, output=text, ended_at=self._scribe.clock.now(), error=error
        )
        self._scribe.count_node(visit)
        if visit.program.is_write:
            self._scribe.has_uncommitted_write = True
        if not frame.is_broken_off:
            self.follow(frame, frame.plan.settle(node_id, port))
        self._left(frame)

    def restore(self, frame: Frame, span: Span) -> None:
        """Take a settled node from the journal instead of running it.

        They come in the order in which they settled, so that an eager node is reached by the branch that was first.
        """
        output = values.restored(span.output) if span.output is not None else None
        frame.outputs[span.node_id] = frame.nodes[span.node_id] = output
        frame.digests[span.node_id] = sha256(span.output or b"").digest()
        self._scribe.count(frame, frame.share_of(span.node_id))
        if span.port is not None:
            self.follow(frame, frame.plan.settle(span.node_id, span.port))
        elif span.error is not None:
            self._fail(frame, span.error)
        self._left(frame)

    def follow(self, frame: Frame, step: Step) -> None:
        """Note what has become known of the nodes of a frame."""
        if step.ready:
            self._agenda.add(frame, step.ready)
        frame.skipped.update(step.skipped)
        for node_id in step.skipped:
            self._scribe.count(frame, frame.share_of(node_id))
            if node_id not in frame.recorded:
                self._scribe.tell_skipped(self._nodes[node_id].node, frame.iteration)
                if node_id in frame.section.bodies:
                    self.skip_body(frame.section.bodies[node_id], frame)

    def skip_body(self, body: Section, frame: Frame) -> None:
        """Record of each node in a body without turns that it is not run."""
        for node in body.inner_nodes():
            if node.id not in frame.recorded:
                self._scribe.tell_skipped(node, frame.iteration)

    def _left(self, frame: Frame) -> None:
        """Note that one node of a frame is through."""
        frame.open -= 1
        if frame.open == 0 and frame.loop is not None:
            self._loops.end_turn(frame, frame.loop)

    # ── pauses and answers ────────────────────────────────────────────────────────────────────────

    def _wait(self, visit: Visit, outcome: Wait) -> None:
        _, text, _ = visit.written or self._kept(visit, outcome.output)
        visit.written = None
        self._scribe.tell(visit, SpanStatus.WAITING, output=text, wake_at=outcome.until)
        self._sleep(visit, outcome.until, Then.DONE, output=text)

    def _await(self, visit: Visit, outcome: Await) -> None:
        self._visits.check_resolved(visit)
        payload = self._answer_to(visit)
        if payload is not None:
            self._answered(visit, payload)
            return
        text = outcomes.encoded(answers.awaits(outcome), self._max_output_bytes)
        self._scribe.tell(visit, SpanStatus.WAITING, wake_at=outcome.expires_at, awaits=text)
        if visit.is_write:
            self._scribe.has_uncommitted_write = True
        self._sleep(visit, outcome.expires_at, Then.EXPIRED, expired=outcome.expired)

    def sleep_on(self, visit: Visit, recorded: Span) -> None:
        """Go on with a pause of an earlier attempt, which an answer may have ended meanwhile."""
        if recorded.status is SpanStatus.RETRYING:
            self._sleep(visit, recorded.wake_at, Then.TRIED_AGAIN)
        elif recorded.awaits is None:
            self._sleep(visit, recorded.wake_at, Then.DONE, output=recorded.output)
        elif (payload := self._answer_to(visit)) is not None:
            self._answered(visit, payload)
        else:
            expired = answers.expired(recorded.awaits)
            self._sleep(visit, recorded.wake_at, Then.EXPIRED, expired=expired)

    def hear(self, signals: Signals) -> None:
        """Take the answers of now."""
        self._signals, sleeping = signals, self._agenda.sleeping
        for visit in [one.visit for one in sleeping.values() if one.then is Then.EXPIRED]:
            payload = self._answer_to(visit)
            # What came of one of them may have broken off another.
            if payload is not None and sleeping.pop(visit, None) is not None:
                self._answered(visit, payload)

    def _answer_to(self, visit: Visit) -> bytes | None:
        return self._signals.get((visit.node_id, visit.frame.iteration))

    def _answered(self, visit: Visit, payload: bytes) -> None:
        try:
            result = answers.result(payload)
        except (InvalidJson, NodeError) as error:
            # The first answer counts, and there is no second: another attempt has no other end.
            self.failed(visit, as_node_error(error), is_final=True)
        else:
            self.returned(visit, result)

    def woken(self, sleeping: Sleeping) -> None:
        """End a wait whose time has come."""
        visit = sleeping.visit
        if sleeping.then is Then.DONE:
            text = sleeping.output or b"null"
            digest = sha256(text).digest()
            self._settle(visit, SpanStatus.COMPLETED, OUTPUT, values.restored(text), text, digest)
        elif sleeping.expired is not None:
            self.returned(visit, sleeping.expired)
        else:
            self.failed(visit, NodeError("Nobody has answered in time", code=EXPIRED), is_final=True)

    def _sleep(
        self,
        visit: Visit,
        wake_at: datetime | None,
        then: Then,
        *,
        output: bytes | None = None,
        expired: Result | None = None,
    ) -> None:
        wakes_at = None if wake_at is None else self._scribe.clock.monotonic_of(wake_at)
        self._agenda.sleeping[visit] = Sleeping(visit, wakes_at, then, output, expired)
