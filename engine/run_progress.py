"""Progress of one run: node outcomes, retries, waits and answers, and the scheduling of successors."""

from __future__ import annotations

import random
import time
from collections.abc import Mapping
from datetime import datetime, timedelta
from hashlib import sha256
from typing import TYPE_CHECKING, Final, TypeAlias

from engine import answer_payloads, content_recording, run_records, values
from engine.frames import NO_PORT, NodeVisit, SectionFrame, SleepingNode, WakeAction
from engine.loops import LoopScheduler
from engine.node_api import (
    ERROR,
    OUTPUT,
    AnswerWait,
    LoopRequest,
    NodeDirective,
    NodeOutcome,
    NodeResult,
    StepWait,
    TimerWait,
)
from engine.run_errors import NodeError
from engine.run_records import EXPIRED_CODE, NodeSpan, RunError, SpanStatus, to_node_error
from engine.unfinished_writes import keep_request
from engine.values import InvalidJson

if TYPE_CHECKING:
    from engine.frames import ReadinessChange, Worklist
    from engine.graph import GraphSection
    from engine.node_inputs import NodeInputs
    from engine.program import WorkflowProgram
    from engine.run_limits import RunLimits
    from engine.services import RunControl
    from engine.span_recorder import SpanRecorder
    from engine.values import Json

NodeAnswers: TypeAlias = Mapping[tuple[str, str], bytes]
"""Wait answers by node and iteration: `{output, port}` or `{error: {code, message}}`."""

MAX_KEPT_TEXT_BYTES: Final = 16_384
WEBHOOK: Final = "webhook"
"""Kind of the trigger whose output may be as large as a body that the gateway accepts."""
MAX_ROUND_SECONDS: Final = 60.0
"""Maximum delay before a run is resumed at a failed node. The delay begins at a second and doubles."""
MAX_HOLD_SECONDS: Final = 1.0
"""Longest time for which a run keeps its worker after it has created a task or sub-workflow run: many take less."""
MAX_UNRECORDED_HOLD_SECONDS: Final = 60.0
"""Longest pause before an attempt for which a run keeps its worker, since that has contents that are not recorded."""
MAX_PROVIDER_WAITS: Final = 20
"""Waits of one node for the time that a provider has named; later failures of this kind are like others."""


class RunSignals:
    """Signals that the agents of a run read while they work: a failure of the run, a request, and wait answers.

    They refer to no other part of the run: parts that refer to each other would keep all its values until a garbage
    collection.
    """

    def __init__(self, control: RunControl, wait_answers: NodeAnswers) -> None:
        self.failure: RunError | None = None
        """Error of the run."""
        self.wait_answers = wait_answers
        self._control = control

    def is_interrupted(self) -> bool:
        """Return whether agents pause before their next step: the run has failed, or was asked to stop."""
        return self.failure is not None or self._control.request is not None

    def find_answer(self, place: tuple[str, str]) -> bytes | None:
        """Return the stored answer for which a node or a tool call waits, by node id and iteration; None if there is
        none yet.
        """
        return self.wait_answers.get(place)


class RunProgress:
    """Apply node outcomes (complete, retry, wait, fail) and schedule successors. Never calls a node."""

    def __init__(
        self,
        program: WorkflowProgram,
        recorded: Mapping[str, Mapping[str, NodeSpan]],
        signals: RunSignals,
        node_inputs: NodeInputs,
        recorder: SpanRecorder,
        worklist: Worklist,
        limits: RunLimits,
    ) -> None:
        self._nodes = program.nodes
        self._settings = program.graph.settings
        self._signals = signals
        self._node_inputs = node_inputs
        self._recorder = recorder
        self._worklist = worklist
        self._limits = limits
        self._max_output_bytes = limits.max_output_bytes
        self._recorded = recorded
        self._loop_scheduler: LoopScheduler | None = None

    @property
    def _loops(self) -> LoopScheduler:
        # Created on demand: most runs have no loops.
        if self._loop_scheduler is None:
            self._loop_scheduler = LoopScheduler(
                self, self._worklist, self._recorder, self._limits, self._recorded
            )
        return self._loop_scheduler

    def release_loops(self, root: SectionFrame) -> None:
        """Cut the references between loops and frames after the end of a run, so that its values are freed without a
        garbage collection.
        """
        self._loop_scheduler = None
        for frame in [*root.with_inner_iterations()]:
            for loop in frame.loops:
                loop.iterations.clear()
            frame.loops.clear()

    # ── node outcomes ─────────────────────────────────────────────────────────────────────────────

    def apply_outcome(self, visit: NodeVisit, outcome: NodeOutcome) -> None:
        """Apply the outcome that a node returned: complete it, let it wait, or start a loop.

        A result that can't be stored, or an unresolved path in a strict graph, is a failed attempt of the node, as by
        `fail`.
        """
        try:
            if not isinstance(outcome, NodeDirective):
                self._on_completed(visit, OUTPUT, outcome)
            elif isinstance(outcome, NodeResult):
                self._on_completed(visit, outcome.port, outcome.output)
            elif isinstance(outcome, TimerWait):
                self._begin_wait(visit, outcome)
            elif isinstance(outcome, AnswerWait):
                self._begin_answer_wait(visit, outcome)
            elif isinstance(outcome, StepWait):
                hold_seconds = MAX_HOLD_SECONDS if outcome.is_short else 0.0
                places = outcome.places
                self._recorder.has_uncommitted_write = True
                self._sleep(visit, outcome.until, WakeAction.ASKED, places=places, hold_seconds=hold_seconds)
            elif isinstance(outcome, LoopRequest):
                self._node_inputs.check_resolved(visit)
                self._loops.begin(visit, outcome)
        except (InvalidJson, NodeError) as error:
            self.fail(visit, to_node_error(error))

    def prepare_output(self, visit: NodeVisit, outcome: NodeOutcome) -> None:
        """Encode the output of an outcome, if it has one, and store it in the visit, before `apply_outcome`;
        may run in a thread.

        Raises `InvalidJson`, `NodeError` if it is too large or a strict path was unresolved, and
        `BudgetExceeded`.
        """
        if isinstance(outcome, NodeResult | TimerWait):
            visit.written = self._encode_output(visit, outcome.output)
        elif not isinstance(outcome, NodeDirective):
            visit.written = self._encode_output(visit, outcome)

    def _on_completed(self, visit: NodeVisit, port: str, output: Json) -> None:
        """Record a node as completed with an output at a port, and schedule its successors.

        Raises `InvalidJson` and `NodeError` as `_encode_output` does.
        """
        output, text, digest = visit.written or self._encode_output(visit, output)
        visit.written = None
        self._settle(visit, SpanStatus.COMPLETED, port, output, text, digest)

    def _encode_output(self, visit: NodeVisit, output: Json) -> tuple[Json, bytes, bytes]:
        """Return the output with passed-through fields, its JSON, and the SHA-256 of that.

        An output that is the unchanged input reuses its JSON. Raises `InvalidJson`, and `NodeError` if it is
        too large or a path of a strict graph was unresolved.
        """
        if visit.program.pass_through:
            output = self._pass_through(visit, output)
        if visit.unresolved:
            self._node_inputs.check_resolved(visit)
        if output is visit.data:
            # Reuse the encoded input.
            text = visit.input if visit.input_node is None else visit.frame.texts.get(visit.input_node)
            if text is not None and len(text) <= MAX_KEPT_TEXT_BYTES:
                return output, text, sha256(text).digest()
        text = run_records.encode_output(output, self._max_bytes(visit, output))
        return output, text, sha256(text).digest()

    def _max_bytes(self, visit: NodeVisit, output: Json) -> int:
        """Return the size limit of an output in bytes.

        An output passed on unchanged from another node, and that of a webhook trigger, may be as large as any
        value: the gateway has limited it by `maxBodyBytes`.
        """
        is_passed_on = output is visit.data and visit.input_node is not None
        if is_passed_on or visit.program.node_type.trigger_kind == WEBHOOK:
            return max(self._max_output_bytes, values.MAX_ENCODED_BYTES)
        return self._max_output_bytes

    def complete(self, visit: NodeVisit, output: Json, port: str) -> None:
        """Complete a node with an output at a port, as if it had returned both; used for loops."""
        self.apply_outcome(visit, NodeResult(output, port))

    def _pass_through(self, visit: NodeVisit, output: Json) -> Json:
        """Return the output with the fields that the node passes through from its data; missing ones are null
        and unresolved.

        An output that is no object is returned unchanged.
        """
        if not isinstance(output, dict):
            return output
        given = visit.data if isinstance(visit.data, dict) else {}
        passed = {key: given.get(source) for key, source in visit.program.pass_through.items()}
        visit.unresolved.extend(
            source for source in visit.program.pass_through.values() if source not in given
        )
        return {**output, **passed}

    # ── failures ──────────────────────────────────────────────────────────────────────────────────

    def fail(self, visit: NodeVisit, error: NodeError, *, is_final: bool = False) -> None:
        """Record the failed attempt of a node, and schedule a retry; without one, fail the node as `give_up` does.

        There is no retry with `is_final`, in a canceled iteration, and if `_pause_seconds` returns None.
        """
        reason = self.to_run_error(visit, error)
        pause = None if is_final or visit.frame.is_broken_off else self._pause_seconds(visit, error)
        if pause is None:
            self.give_up(visit, reason)
            return
        shown = error.message if visit.program.records_content else reason.message
        self._recorder.log("warning", f"Attempt {reason.attempt} failed: {shown}", visit.node_id)
        wake_at = self._recorder.clock.now() + timedelta(seconds=pause)
        self._recorder.record_node(visit, SpanStatus.RETRYING, wake_at=wake_at, error=reason)
        visit.attempt += 1
        # Another worker would begin a node without recorded contents again, and its model would be billed again.
        is_held = not visit.program.records_content and pause <= MAX_UNRECORDED_HOLD_SECONDS
        hold_seconds = pause + MAX_HOLD_SECONDS if is_held else 0.0
        self._sleep(visit, wake_at, WakeAction.TRIED_AGAIN, hold_seconds=hold_seconds)

    def to_run_error(self, visit: NodeVisit, error: NodeError) -> RunError:
        """Convert an error to the stored error of a node, without its message if that may quote hidden contents."""
        attempt = visit.attempt if error.attempt is None else error.attempt
        reason = run_records.to_node_run_error(error, visit.node_id, attempt)
        return reason if visit.program.records_content else content_recording.strip_error(reason)

    def _pause_seconds(self, visit: NodeVisit, error: NodeError) -> float | None:
        """Return the delay before the next attempt in seconds; None if there is none: after an error that isn't
        retryable, or when all attempts are used up.

        With `retryOnFailure`, a node whose failure would fail the run then gets up to `maxRetries` further rounds of
        attempts, each after up to a minute: `visit.attempt` is moved to the end of the round. An at-most-once node is
        repeated only after a retryable error with a known outcome. Up to 20 waits for the time that a provider of
        language models has named are no attempts.
        """
        node = visit.program.node
        named = sum(record.wait_milliseconds is not None for record in visit.model_calls)
        if error.retryable and error.retry_after_seconds is not None and named <= MAX_PROVIDER_WAITS:
            return error.retry_after_seconds
        is_known = error.retryable and error.code not in run_records.UNKNOWN_OUTCOMES
        if visit.is_at_most_once and not is_known:
            return None
        has_rounds = self._settings.retry_on_failure and visit.frame.is_fatal() and not visit.has_error_edge
        attempts = node.retry.max_attempts
        # Failures behind the last wait name a time too, and are attempts all the same.
        waits = min(named, MAX_PROVIDER_WAITS)
        spent = visit.attempt - 1 - waits
        rounds, attempt = divmod(spent, attempts) if has_rounds else (0, spent)
        if error.retryable and attempt + 1 < attempts:
            return node.retry.delay_seconds(attempt + 1, random.random())  # noqa: S311 - jitter
        if not has_rounds or rounds >= self._settings.max_retries:
            return None
        visit.attempt = (rounds + 1) * attempts + waits
        return min(2.0**rounds, MAX_ROUND_SECONDS)

    def give_up(self, visit: NodeVisit, reason: RunError) -> None:
        """Fail a node permanently: its error leaves by a connected error port, or fails its frame."""
        frame = visit.frame
        if visit.has_error_edge and not frame.is_broken_off:
            self.withdraw_waits(visit)
            output, text = run_records.error_output(reason, visit.data, self._max_output_bytes)
            digest = sha256(text).digest()
            self._settle(visit, SpanStatus.FAILED, ERROR, output, text, digest, reason)
            return
        self.withdraw_waits(visit)
        self._recorder.record_node(
            visit, SpanStatus.FAILED, ended_at=self._recorder.clock.now(), error=reason
        )
        self._recorder.add_node_progress(visit)
        if visit.program.commits_alone:
            self._recorder.has_uncommitted_write = True
        self._fail_frame(frame, reason)
        self._on_node_settled(frame)

    def withdraw_waits(self, visit: NodeVisit) -> None:
        """Record the open waits of an agent that has ended as canceled, so that nobody answers them in vain.

        Does nothing for other nodes.
        """
        if visit.program.agent is None:
            return
        from engine.agents.tool_calls import withdraw_waits  # noqa: PLC0415 - loaded by runs with agents

        withdraw_waits(visit, self._recorder)

    def _fail_frame(self, frame: SectionFrame, reason: RunError) -> None:
        """Note the failure of a frame, only its first: the run fails, or, if the frame is an iteration of a loop, that
        iteration is canceled.
        """
        if frame.failure is not None or frame.is_broken_off:
            return
        frame.failure = reason
        if frame.loop is None:
            self._signals.failure = run_records.to_run_error(reason)
        else:
            self._loops.cancel_iteration(frame)

    def record_cancelled(self, visit: NodeVisit) -> None:
        """Record a node of a canceled frame as canceled, which may end the frame."""
        self.withdraw_waits(visit)
        self._recorder.record_node(visit, SpanStatus.CANCELLED, ended_at=self._recorder.clock.now())
        self._on_node_settled(visit.frame)

    # ── successors ────────────────────────────────────────────────────────────────────────────────

    def _settle(
        self,
        visit: NodeVisit,
        status: SpanStatus,
        port: str,
        output: Json,
        text: bytes,
        digest: bytes,
        error: RunError | None = None,
    ) -> None:
        """Store a node's output, record its end, count its progress, and schedule the nodes behind the port.

        `text` is the output as JSON and `digest` its hash; `error` is None unless the node failed and
        continues at its error port.
        """
        frame, node_id = visit.frame, visit.program.node.id
        frame.outputs[node_id] = output
        frame.digests[node_id] = digest
        if len(text) <= MAX_KEPT_TEXT_BYTES:
            frame.texts[node_id] = text
        if frame.loop is not None:
            frame.nodes[node_id] = output
        self._recorder.record_node(
            visit, status, port=port, output=text, ended_at=self._recorder.clock.now(), error=error
        )
        self._recorder.add_node_progress(visit)
        if visit.program.commits_alone:
            self._recorder.has_uncommitted_write = True
        if not frame.is_broken_off:
            self.schedule_successors(frame, frame.plan.settle(node_id, port))
        self._on_node_settled(frame)

    def restore(self, frame: SectionFrame, span: NodeSpan) -> None:
        """Restore a settled node from its recorded span instead of running it, and schedule its successors.

        A recorded failure without a port fails the frame again. Call this in the order in which nodes settled, so that
        an eager node is reached by the branch that was first.
        """
        if span.status is SpanStatus.SKIPPED:
            self._leave_out(frame, span.node_id)
            return
        output = values.restore_json(span.output) if span.output is not None else None
        frame.outputs[span.node_id] = frame.nodes[span.node_id] = output
        frame.digests[span.node_id] = sha256(span.output or b"").digest()
        self._recorder.add_progress(frame, frame.share_of(span.node_id))
        if span.port is not None:
            self.schedule_successors(frame, frame.plan.settle(span.node_id, span.port))
        elif span.error is not None:
            self._fail_frame(frame, span.error)
        self._on_node_settled(frame)

    def _leave_out(self, frame: SectionFrame, node_id: str) -> None:
        """Settle a node that this replay leaves out; take none of its edges.

        The start of the replay has recorded the node as skipped. The nodes in the body of a loop are recorded as
        skipped here.
        """
        frame.skipped.add(node_id)
        self._recorder.add_progress(frame, frame.share_of(node_id))
        if node_id in frame.section.bodies:
            self.skip_body(frame.section.bodies[node_id], frame)
        self.schedule_successors(frame, frame.plan.settle(node_id, NO_PORT))
        self._on_node_settled(frame)

    def reuse(self, visit: NodeVisit, candidate: NodeSpan) -> None:
        """Complete a node with its result in an earlier run instead of running it, and schedule its successors.

        Call this only if the node's key (see `engine.node_key`) is that of the result.
        """
        frame, node_id, text = visit.frame, visit.node_id, candidate.output or b"null"
        frame.outputs[node_id] = frame.nodes[node_id] = values.restore_json(text)
        frame.digests[node_id] = sha256(candidate.output or b"").digest()
        self._recorder.record_reused(candidate)
        self._recorder.add_node_progress(visit)
        self.schedule_successors(frame, frame.plan.settle(node_id, candidate.port or OUTPUT))
        self._on_node_settled(frame)

    def schedule_successors(self, frame: SectionFrame, change: ReadinessChange) -> None:
        """Add the ready nodes of a readiness change to the worklist, and record the skipped ones, with loop bodies."""
        if change.ready:
            self._worklist.add(frame, change.ready)
        frame.skipped.update(change.skipped)
        for node_id in change.skipped:
            self._recorder.add_progress(frame, frame.share_of(node_id))
            recorded = frame.recorded.get(node_id)
            # A replay may begin with a result of a node that it then does not reach.
            if recorded is None or recorded.port is not None:
                self._record_skipped(frame, node_id)
                if node_id in frame.section.bodies:
                    self.skip_body(frame.section.bodies[node_id], frame)

    def _record_skipped(self, frame: SectionFrame, node_id: str) -> None:
        """Record a node of a frame as skipped; a write that a replay might have reused keeps its request."""
        program = self._nodes[node_id]
        earlier = frame.recorded.get(node_id) or frame.candidates.get(node_id)
        request, hashes = keep_request(earlier) if earlier is not None and program.is_write else (None, None)
        key_id = None if earlier is None or request is None else earlier.key_id
        self._recorder.record_skipped(
            program.node, frame.iteration, request=request, hashes=hashes, key_id=key_id
        )

    def skip_body(self, body: GraphSection, frame: SectionFrame) -> None:
        """Record all nodes of a loop body as skipped, unless they are recorded already."""
        for node in body.inner_nodes():
            if node.id not in frame.recorded:
                self._recorder.record_skipped(node, frame.iteration)

    def _on_node_settled(self, frame: SectionFrame) -> None:
        """Count down the open nodes of a frame (ready, running or asleep); the last one ends an iteration.

        Call this for each node that completes or fails; skipped nodes were never open.
        """
        frame.open -= 1
        if frame.open == 0 and frame.loop is not None:
            self._loops.end_iteration(frame, frame.loop)

    # ── waits and answers ─────────────────────────────────────────────────────────────────────────

    def _begin_wait(self, visit: NodeVisit, outcome: TimerWait) -> None:
        """Record that a node waits for a time, and let it sleep until then.

        Raises `InvalidJson` and `NodeError` as `_encode_output` does.
        """
        _, text, _ = visit.written or self._encode_output(visit, outcome.output)
        visit.written = None
        self._recorder.record_node(visit, SpanStatus.WAITING, output=text, wake_at=outcome.until)
        self._sleep(visit, outcome.until, WakeAction.DONE, output=text)

    def _begin_answer_wait(self, visit: NodeVisit, outcome: AnswerWait) -> None:
        """Apply the answer that a node waits for, if it is there; else record the wait and let the node sleep.

        A wait for a task is committed before other nodes begin, since only the commit creates the task. Raises
        `InvalidJson` and `NodeError` for a request that can't be stored, and for an unresolved path in a strict graph.
        """
        self._node_inputs.check_resolved(visit)
        payload = self._find_answer(visit)
        if payload is not None:
            self._apply_answer(visit, payload)
            return
        text = run_records.encode_output(answer_payloads.encode_wait(outcome), self._max_output_bytes)
        visit.task = outcome.task or None
        self._recorder.record_node(visit, SpanStatus.WAITING, wake_at=outcome.expires_at, awaits=text)
        # A worker gets the task, and a person may answer, only after the commit.
        self._recorder.has_uncommitted_write = True
        hold_seconds = MAX_HOLD_SECONDS if outcome.kind.is_short else 0.0
        expires_at, expired = outcome.expires_at, outcome.expired
        self._sleep(visit, expires_at, WakeAction.EXPIRED, expired=expired, hold_seconds=hold_seconds)

    def is_any_answered(self, sleeper: SleepingNode) -> bool:
        """Return whether a wait of a sleeping agent has an answer: that for a person, or for the result of a tool call.

        False for other nodes.
        """
        return not sleeper.places.isdisjoint(self._signals.wait_answers)

    def apply_early_answer(self, visit: NodeVisit) -> bool:
        """Apply the answer that a node has got before it began to wait, in an attempt that was cut off.

        Return False if it has no answer. Calling the node again would repeat a request that was received.
        """
        payload = self._find_answer(visit)
        if payload is None:
            return False
        if visit.lost is not None:
            visit.attempt, visit.lost = visit.lost.attempt, None
        self._apply_answer(visit, payload)
        return True

    def is_answered(self, visit: NodeVisit) -> bool:
        """Return whether the answer to a node is stored."""
        return self._find_answer(visit) is not None

    def resume_sleep(self, visit: NodeVisit, recorded: NodeSpan) -> None:
        """Continue a wait, or the pause before a retry, of an earlier attempt at the run.

        An answer that has come meanwhile is applied.
        """
        if recorded.status is SpanStatus.RETRYING:
            self._sleep(visit, recorded.wake_at, WakeAction.TRIED_AGAIN)
        elif recorded.awaits is None:
            self._sleep(visit, recorded.wake_at, WakeAction.DONE, output=recorded.output)
        elif (payload := self._find_answer(visit)) is not None:
            self._apply_answer(visit, payload)
        else:
            expired = answer_payloads.decode_expired(recorded.awaits)
            self._sleep(visit, recorded.wake_at, WakeAction.EXPIRED, expired=expired)

    def apply_answers(self, wait_answers: NodeAnswers) -> None:
        """Replace the stored wait answers, and apply those for which nodes sleep; agents must be woken by the
        caller.
        """
        self._signals.wait_answers, sleeping = wait_answers, self._worklist.sleeping
        for visit in [sleeper.visit for sleeper in sleeping.values() if sleeper.then is WakeAction.EXPIRED]:
            payload = self._find_answer(visit)
            # An earlier answer of this loop may have cancelled this node.
            if payload is not None and sleeping.pop(visit, None) is not None:
                self._apply_answer(visit, payload)

    def _find_answer(self, visit: NodeVisit) -> bytes | None:
        """Return the stored answer for a node; None if there is none yet."""
        return self._signals.find_answer((visit.node_id, visit.frame.iteration))

    def _apply_answer(self, visit: NodeVisit, payload: bytes) -> None:
        """Apply the answer to a waiting node: its log lines, and its result or final failure; a malformed answer is a
        failure, too.
        """
        try:
            for level, message in answer_payloads.decode_logs(payload):
                self._recorder.log(level, message, visit.node_id)
            result = answer_payloads.decode_answer(payload)
        except (InvalidJson, NodeError) as error:
            # Only the first answer counts, so another attempt would fail the same way.
            self.fail(visit, to_node_error(error), is_final=True)
        else:
            self.apply_outcome(visit, result)

    def wake(self, sleeping: SleepingNode) -> None:
        """Continue a sleeping node whose time has come: complete it after a timer, apply its result at
        expiry, or fail it.

        It fails without a retry if no answer has arrived and no result at expiry is set. Nodes that are called again
        when they wake (retries, agents) are left to the runner.
        """
        visit = sleeping.visit
        if sleeping.then is WakeAction.DONE:
            text = sleeping.output or b"null"
            digest = sha256(text).digest()
            self._settle(visit, SpanStatus.COMPLETED, OUTPUT, values.restore_json(text), text, digest)
        elif sleeping.expired is not None:
            self.apply_outcome(visit, sleeping.expired)
        else:
            self.fail(visit, NodeError("No answer arrived in time", code=EXPIRED_CODE), is_final=True)

    def _sleep(
        self,
        visit: NodeVisit,
        wake_at: datetime | None,
        then: WakeAction,
        *,
        output: bytes | None = None,
        expired: NodeResult | None = None,
        places: frozenset[tuple[str, str]] = frozenset(),
        hold_seconds: float = 0.0,
    ) -> None:
        """Add a node to the sleeping ones, with the time at which it wakes, and the action that the runner takes then.

        Without a time only an answer wakes it. `output` is that of a timer wait, `expired` the result of a wait without
        an answer, and `places` has node id and iteration of an agent's questions. For `hold_seconds`, the run may keep
        its worker while it only waits, as far as `RunStart.may_hold` allows.
        """
        wakes_at = None if wake_at is None else self._recorder.clock.monotonic_of(wake_at)
        held_until = time.monotonic() + hold_seconds if hold_seconds else 0.0
        self._worklist.sleeping[visit] = SleepingNode(
            visit, wakes_at, then, output, expired, places, held_until
        )
