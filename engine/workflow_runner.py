"""Runner of one attempt at a run, from its journaled state to its end, a wait, or a hand-off.

Nodes that return at once are called in place, one after another. Nodes that wait for external work get a
task, so that independent branches run concurrently. The journal records everything. A commit is requested
only if the order of effects requires it (before a write node starts, and before anything follows one), or if
many records have accumulated.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from contextlib import suppress
from datetime import datetime
from functools import partial
from heapq import heappop
from typing import TYPE_CHECKING, Any, TypeVar, cast

import msgspec

from concurrency import offload
from concurrency.offload import BudgetExceeded
from engine import approval_links, node_key, run_records
from engine.expressions import ExpressionError
from engine.frames import NodeVisit, SectionFrame, WakeAction, Worklist
from engine.node_api import NodeCall, NodeOutcome, StepPause
from engine.node_inputs import NodeInputs
from engine.run_errors import LeaseLost, NodeError
from engine.run_limits import RunLimits
from engine.run_progress import NodeAnswers, RunProgress, RunSignals
from engine.run_records import (
    CANDIDATE_STATUSES,
    LOST_ATTEMPT_CODE,
    NEEDS_CONFIRM_CODE,
    TIMEOUT_CODE,
    NodeSpan,
    RunError,
    RunJournalWriter,
    RunOutcome,
    RunStatus,
    SpanStatus,
    to_node_error,
)
from engine.services import ControlRequest, RunControl, collect_source_uses
from engine.span_recorder import SpanRecorder
from engine.values import InvalidJson
from telemetry import log_context

if TYPE_CHECKING:
    from engine.agents.agent_steps import AgentStep
    from engine.graph import GraphNode, ParsedGraph
    from engine.program import WorkflowProgram
    from engine.run_clock import RunClock
    from engine.services import NodeServices, RunCaller
    from engine.values import Json

T = TypeVar("T")

SHORT_WAIT_SECONDS = 1.0
"""Longest wait that keeps the worker: releasing and reclaiming the run would cost more."""
ANSWER_POLL_SECONDS = 2.0
"""Maximum delay until a run in progress sees a wait answer."""
CANCEL_SECONDS = 10.0
"""Maximum time for a node to react to its cancellation, before it is abandoned."""
SLICE_SECONDS = 0.005
"""Time without a pause after which the runner yields to the other runs on the loop."""
DEFAULT_LIMITS = RunLimits()


class RunStart(msgspec.Struct, frozen=True):
    """State at the beginning of an attempt at a run."""

    caller: RunCaller
    """Identity of the run, and of the user that it works for."""
    trigger: Json
    clock: RunClock
    deadline: datetime
    """Deadline by the stored clock. From here on, the remaining time is measured by the monotonic clock."""
    started_at: datetime
    attempt: int = 1
    recorded: Sequence[NodeSpan] = ()
    """Spans of earlier attempts; settled nodes are not run again."""
    steps: Sequence[AgentStep] = ()
    """Steps of agents that have not ended."""
    sequence: int = 0
    """Highest sequence number in the journal."""
    log_level: str | None = None
    """Log level of the workflow, set for a limited time."""
    wait_answers: NodeAnswers = {}
    read_wait_answers: Callable[[], Awaitable[NodeAnswers | None]] | None = None
    """Returns the current wait answers, or None if they are unavailable; answers may arrive while other nodes
    run.
    """
    may_hold: Callable[[], bool] | None = None
    """Returns whether the run may keep its worker while it waits for the answer to a new task; None: never."""


async def run_workflow(
    program: WorkflowProgram,
    start: RunStart,
    journal: RunJournalWriter,
    control: RunControl,
    services: NodeServices,
    limits: RunLimits = DEFAULT_LIMITS,
) -> RunOutcome:
    """Run a workflow until this attempt ends, waits or is handed off, and return its outcome; nodes are recorded in the
    journal.

    The caller stores the outcome, together with the records that are not committed yet. Failures of nodes and of the
    run are outcomes; raises `LeaseLost` if another process may hold the run.
    """
    return await WorkflowRunner(program, start, journal, control, services, limits).run()


class WorkflowRunner:
    """Runner of one attempt at a run."""

    def __init__(
        self,
        program: WorkflowProgram,
        start: RunStart,
        journal: RunJournalWriter,
        control: RunControl,
        services: NodeServices,
        limits: RunLimits,
    ) -> None:
        self._program = program
        self._parallelism = program.graph.settings.parallelism
        self._clock = start.clock
        self._deadline = start.clock.monotonic_of(start.deadline)
        self._listen = start.read_wait_answers
        self._may_hold = start.may_hold
        self._answers_read_at = time.monotonic()
        self._control = control
        self._interrupted: list[NodeVisit] = []
        self._recorder = recorder = SpanRecorder(
            journal,
            start.sequence,
            limits,
            start.clock,
            attempts=_count_attempts(start.recorded),
            log_level=start.log_level,
        )
        self._worklist = worklist = Worklist()
        self._signals = signals = RunSignals(control, start.wait_answers)
        self._node_inputs = node_inputs = NodeInputs(
            *(program, start.caller, services, recorder, start.steps),
            signals.is_interrupted,
            signals.find_answer,
        )
        recorded = _group_by_iteration(start.recorded)
        self._root = SectionFrame(
            program.root,
            start.trigger,
            _build_roots(start, program.graph),
            recorded.get("", {}),
            start.started_at,
        )
        self._root.share = 1 / program.root.size
        self._root.candidates = {
            span.node_id: span for span in start.recorded if span.status in CANDIDATE_STATUSES
        }
        self._progress = RunProgress(program, recorded, signals, node_inputs, recorder, worklist, limits)

    async def run(self) -> RunOutcome:
        """Run nodes until the run ends, waits, or leaves this process; return the outcome to store.

        Nodes that still run are canceled then. It gives other tasks a turn every five milliseconds. Raises
        `LeaseLost`.
        """
        try:
            ended = await self._run_nodes()
            self._record_cancelled(ended)
        finally:
            if not self._worklist.tasks:  # An abandoned node may still end in its loop.
                self._progress.release_loops(self._root)
        return ended

    async def _run_nodes(self) -> RunOutcome:
        """Run nodes until the run ends, waits or has to leave this process, and cancel those that still run.

        Raises `LeaseLost`.
        """
        worklist, recorder = self._worklist, self._recorder
        self._progress.schedule_successors(self._root, self._root.start())
        slice_ends = time.monotonic() + SLICE_SECONDS
        try:
            while (ended := self._determine_end()) is None:
                if worklist.settled_before:
                    _, node_id, frame = heappop(worklist.settled_before)
                    self._progress.restore(frame, frame.recorded[node_id])
                elif worklist.ready and self._may_start():
                    await self._prepare_node(*worklist.ready.popleft())
                else:
                    await self._wait_for_change()
                    continue
                if time.monotonic() > slice_ends:
                    if recorder.needs_commit:
                        await recorder.commit()
                    await offload.yield_to_loop()
                    slice_ends = time.monotonic() + SLICE_SECONDS
        finally:
            await self._cancel_tasks()
        return ended

    # ── outcome ───────────────────────────────────────────────────────────────────────────────────

    def _determine_end(self) -> RunOutcome | None:  # noqa: C901 - one guard for each way to end, in order of precedence
        """Return the outcome if the run has ended, waits or has to leave this process; None while there is work.

        Raises `LeaseLost` if the run must be abandoned or its lease is over.
        """
        request, worklist = self._control.request, self._worklist
        if request is ControlRequest.ABANDON or not self._recorder.holds_lease():
            raise LeaseLost
        if request is ControlRequest.CANCEL:
            return RunOutcome(RunStatus.CANCELLED)
        if request is ControlRequest.HAND_OFF_NOW:
            return RunOutcome(RunStatus.RELEASED)
        if self._signals.failure is not None and not worklist.has_write_at_work:
            return RunOutcome(RunStatus.FAILED, error=self._signals.failure)
        if worklist.tasks:
            return self._find_timeout_outcome()
        if request is ControlRequest.STOP:
            return RunOutcome(RunStatus.STOPPED)
        is_idle = not worklist.ready and not worklist.settled_before
        if is_idle and not worklist.sleeping:
            return RunOutcome(RunStatus.COMPLETED)
        if request is ControlRequest.HAND_OFF:
            return RunOutcome(RunStatus.RELEASED)
        # Before a wait: a task may have used up the time of a run that waits for it.
        timeout = self._find_timeout_outcome()
        if timeout is not None or not is_idle or self._is_held():
            return timeout
        wakes_at = worklist.next_wake
        if wakes_at is None:
            return RunOutcome(RunStatus.WAITING)
        if wakes_at - time.monotonic() > SHORT_WAIT_SECONDS:
            return RunOutcome(RunStatus.WAITING, due_at=self._clock.moment_of(wakes_at))
        return None

    def _is_held(self) -> bool:
        """Return whether the run keeps its worker for a moment, though it only waits: a new task may end soon.

        That saves the release and the next claim of the run.
        """
        return (
            self._may_hold is not None and time.monotonic() < self._worklist.held_until and self._may_hold()
        )

    def _find_timeout_outcome(self) -> RunOutcome | None:
        """Return the outcome of a run that has exceeded its timeout; None before."""
        if time.monotonic() < self._deadline:
            return None
        seconds = self._program.graph.settings.timeout_seconds
        message = f"The run exceeded its timeout of {seconds:g} s"
        return RunOutcome(RunStatus.FAILED, error=RunError(TIMEOUT_CODE, message))

    async def _cancel_tasks(self) -> None:
        """Cancel the running nodes and wait for them; one that doesn't react within ten seconds is abandoned: it runs
        on unattended.

        Canceled and abandoned nodes are noted as interrupted, to be recorded.
        """
        if not self._worklist.tasks:
            return
        tasks = dict(self._worklist.tasks)
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks, timeout=CANCEL_SECONDS)
        # A node that ended nonetheless has recorded its own end.
        self._interrupted += [visit for task, visit in tasks.items() if task.cancelled() or not task.done()]

    def _record_cancelled(self, ended: RunOutcome) -> None:
        """Record interrupted nodes and open loops as canceled, unless the run continues later or completed."""
        if ended.status in {RunStatus.RELEASED, RunStatus.WAITING, RunStatus.COMPLETED}:
            return
        loops = [loop.visit for frame in self._root.with_inner_iterations() for loop in frame.loops]
        for visit in (*self._interrupted, *loops):
            self._recorder.record_node(visit, SpanStatus.CANCELLED, ended_at=self._clock.now())

    # ── nodes ─────────────────────────────────────────────────────────────────────────────────────

    def _may_start(self) -> bool:
        """Return whether another node may start: the limit of parallel nodes is not reached, and nothing
        stops the run.
        """
        return not self._signals.is_interrupted() and len(self._worklist.tasks) < self._parallelism

    async def _prepare_node(self, frame: SectionFrame, node_id: str) -> None:
        """Prepare the input of a ready node, in a thread if it is large, and begin the node.

        A node with a recorded wait continues to wait instead; errors fail the node. Raises `LeaseLost`.
        """
        visit: NodeVisit | None
        try:
            visit = offload.try_inline(self._node_inputs.build_visit, frame, node_id)
        except BudgetExceeded:
            begin = partial(self._node_inputs.build_visit, frame, node_id, frame.current_roots())
            visit = await self._prepare_in_thread(frame, node_id, begin)
        except (ExpressionError, InvalidJson, NodeError) as error:
            self._progress.fail(self._node_inputs.build_failed_visit(frame, node_id), to_node_error(error))
            return
        if visit is not None and not self._resume_node(visit):
            await self._begin(visit)

    def _resume_node(self, visit: NodeVisit) -> bool:
        """Continue the wait of a node from an earlier attempt at the run, or fail an interrupted at-most-once node.

        Return False if the node has to be begun.
        """
        frame = visit.frame
        if not frame.recorded or (recorded := frame.recorded.get(visit.node_id)) is None:
            return False
        if recorded.status in {SpanStatus.WAITING, SpanStatus.RETRYING}:
            self._progress.resume_sleep(visit, recorded)
            return True
        is_lost = recorded.status is SpanStatus.RUNNING and not self._progress.is_answered(visit)
        if is_lost and visit.is_at_most_once:
            visit.attempt = recorded.attempt
            message = f"The outcome of attempt {visit.attempt} is unknown, and the node runs at most once"
            self._progress.fail(visit, NodeError(message, code=LOST_ATTEMPT_CODE), is_final=True)
            return True
        return False

    async def _begin(self, visit: NodeVisit) -> None:
        """Render the config of a node, in a thread if it is large, and call the node, or begin a task that calls it.

        A result of an earlier run that still holds, or an early answer, completes the node without a call. A write or
        paid call is recorded as running and committed first. Errors fail the node. Raises `LeaseLost`.
        """
        try:
            call = offload.try_inline(self._node_inputs.build_call, visit)
        except BudgetExceeded:
            prepare = partial(self._node_inputs.build_call, visit, visit.frame.current_roots())
            prepared = await self._prepare_in_thread(visit.frame, visit.node_id, prepare, visit)
            if prepared is None:
                return
            call = prepared
        except (ExpressionError, InvalidJson, NodeError) as error:
            self._progress.fail(visit, to_node_error(error))
            return
        has_candidate = visit.candidate is not None
        if self._settle_without_call(visit):
            return
        if has_candidate:
            call = msgspec.structs.replace(call, **self._node_inputs.identify_call(visit))
        # A task is created by the commit that records its ancestors: nothing has begun before that.
        is_task = visit.program.node_type.task is not None
        is_announced = visit.program.commits_alone and not is_task
        if is_announced:
            self._recorder.record_node(visit, SpanStatus.RUNNING)
            self._recorder.has_uncommitted_write = True
        if self._recorder.has_uncommitted_write and not is_task:
            await self._recorder.commit()
            if not self._may_continue(visit):
                return
        if is_announced or visit.node_id not in self._program.inline:
            self._start(visit, self._call_node(visit, call))
            return
        self._call_in_place(visit, call)

    def _settle_without_call(self, visit: NodeVisit) -> bool:
        """Settle a node without calling it; return False if it has to run.

        It gets its result of an earlier run, or an answer that was stored before the node began to wait. A write fails
        if it would repeat an earlier one with another request that nobody has confirmed.
        """
        if visit.candidate is not None and self._apply_candidate(visit, visit.candidate):
            return True
        return self._progress.apply_early_answer(visit)

    def _apply_candidate(self, visit: NodeVisit, candidate: NodeSpan) -> bool:
        """Settle a node by its span of an earlier run; return False if it has to run.

        A result with the same key is reused. A write with another key fails if that needs a confirmation. An equal
        request with an unknown end is repeated under its earlier idempotency key.
        """
        visit.candidate = None
        if node_key.is_same(visit.hashes, candidate.hashes):
            if candidate.port is not None:
                self._progress.reuse(visit, candidate)
                return True
            # An attempt with an unknown end: the same request is repeated under its own key.
            visit.key_id = candidate.key_id
        elif candidate.status is SpanStatus.UNCONFIRMED:
            message = (
                "The node would repeat a write with another request than before:"
                " replay with its id in `confirm` to allow that"
            )
            visit.hashes = candidate.hashes  # the key of the result that stays valid
            self._progress.fail(visit, NodeError(message, code=NEEDS_CONFIRM_CODE), is_final=True)
            return True
        return False

    async def _prepare_in_thread(
        self, frame: SectionFrame, node_id: str, prepare: Callable[[], T], visit: NodeVisit | None = None
    ) -> T | None:
        """Prepare a node in a thread and return the result; None if the node must not start now.

        It has then failed, was canceled or is queued again. `prepare` raises the errors that fail it. Raises
        `LeaseLost`.
        """
        try:
            prepared = await offload.run_in_thread(prepare)
        except (ExpressionError, InvalidJson, NodeError) as error:
            self._progress.fail(
                visit or self._node_inputs.build_failed_visit(frame, node_id), to_node_error(error)
            )
            return None
        if not self._recorder.holds_lease():
            raise LeaseLost
        if frame.is_broken_off:
            self._progress.record_cancelled(visit or self._node_inputs.build_failed_visit(frame, node_id))
            return None
        if not self._may_start():
            self._worklist.ready.appendleft((frame, node_id))
            return None
        return prepared

    def _call_in_place(self, visit: NodeVisit, call: NodeCall) -> None:
        """Call a synchronous node at once, or in a thread if it exceeds its budget, and apply its outcome."""
        run = cast("Callable[[NodeCall], NodeOutcome]", self._program.runs[visit.node_id])
        try:
            outcome = offload.try_inline(run, call)
        except BudgetExceeded:
            self._start(visit, self._call_in_thread(visit, run, call))
            return
        except Exception as error:  # noqa: BLE001 - an exception of a node ends that node, not the worker
            self._progress.fail(visit, to_node_error(error))
            return
        try:
            offload.try_inline(self._progress.prepare_output, visit, outcome)
        except BudgetExceeded:
            self._start(visit, _output_of(outcome))
        except (InvalidJson, NodeError) as error:
            self._progress.fail(visit, to_node_error(error))
        else:
            self._progress.apply_outcome(visit, outcome)

    def _may_continue(self, visit: NodeVisit) -> bool:
        """Return whether a node may still start after a commit.

        If not, it is recorded as canceled or queued again, since the run has failed or was asked to stop
        meanwhile. Raises `LeaseLost`.
        """
        if not self._recorder.holds_lease():
            raise LeaseLost
        if visit.frame.is_broken_off:
            self._progress.record_cancelled(visit)
            return False
        if self._may_start():
            return True
        self._worklist.ready.appendleft((visit.frame, visit.node_id))
        if visit.is_at_most_once:
            # It was announced and not begun, so the next worker may still begin it.
            visit.attempt -= 1
            self._recorder.record_node(visit, SpanStatus.RETRYING, wake_at=self._clock.now())
        if visit.program.commits_alone:
            self._interrupted.append(visit)
        return False

    def _start(self, visit: NodeVisit, pending: Coroutine[Any, Any, NodeOutcome]) -> None:
        """Begin a task that performs a node, and note the node as running; returns at once."""
        task = asyncio.create_task(self._perform_node(visit, pending))
        self._worklist.tasks[task] = visit
        task.add_done_callback(partial(self._finish_cancelled, visit, pending))

    def _finish_cancelled(
        self, visit: NodeVisit, pending: Coroutine[Any, Any, NodeOutcome], task: asyncio.Task[None]
    ) -> None:
        """Finish a node whose task was canceled before it began, which the task itself can't do; called at the end of
        each task.

        The cancellation is retrieved, since its traceback would keep the task and values of the run. Other errors are
        left to the event loop, which logs those that nobody expects.
        """
        if task.cancelled():
            with suppress(asyncio.CancelledError):
                task.exception()
        pending.close()
        if task in self._worklist.tasks:
            self._finish_task(task)
            if visit.frame.is_broken_off:
                self._progress.record_cancelled(visit)

    async def _perform_node(self, visit: NodeVisit, pending: Coroutine[Any, Any, NodeOutcome]) -> None:
        """Run an asynchronous node to its end in the current task, and apply its outcome or failure.

        A cancellation is recorded if the frame was broken off, and raised again.
        """
        task = cast("asyncio.Task[None]", asyncio.current_task())
        try:
            outcome = await self._limit_time(visit.program.node, pending, task)
            await offload.run(self._progress.prepare_output, visit, outcome)
        except asyncio.CancelledError:
            self._finish_task(task)
            if visit.frame.is_broken_off:
                self._progress.record_cancelled(visit)
            raise
        except (InvalidJson, NodeError) as error:
            self._finish_task(task)
            self._progress.fail(visit, to_node_error(error))
        else:
            self._finish_task(task)
            if isinstance(outcome, StepPause):
                self._pause_node(visit)
            else:
                self._progress.apply_outcome(visit, outcome)

    def _pause_node(self, visit: NodeVisit) -> None:
        """Queue a node again that has paused between two steps, or record it as canceled if its frame was."""
        if visit.frame.is_broken_off:
            self._progress.record_cancelled(visit)
            return
        self._interrupted.append(visit)
        self._worklist.ready.appendleft((visit.frame, visit.node_id))

    async def _limit_time(
        self, node: GraphNode, pending: Coroutine[Any, Any, NodeOutcome], task: asyncio.Task[None]
    ) -> NodeOutcome:
        """Await a node within its timeout, and return its outcome; raises `NodeError` for its errors and its timeout.

        A cancellation of `task` by the run is raised as it is; one by the node itself becomes a `NodeError`.
        """
        limit = asyncio.timeout(node.timeout_seconds)
        try:
            async with limit:
                return await pending
        except asyncio.CancelledError:
            if task.cancelling():
                raise
            raise NodeError("The node cancelled itself") from None
        except Exception as error:
            if isinstance(error, NodeError) and not limit.expired():
                raise  # As its own cause, it would keep the values of the run.
            raise (
                run_records.build_timeout_error(node) if limit.expired() else to_node_error(error)
            ) from error

    async def _call_node(self, visit: NodeVisit, call: NodeCall) -> NodeOutcome:
        """Call the function of a node and return its outcome; the data sources that it uses are collected."""
        run = self._program.runs[visit.node_id]
        visit.sources = collect_source_uses()
        log_context.fields.set({**log_context.fields.get(log_context.EMPTY), "node_id": visit.node_id})
        if visit.node_id in self._program.repeatable:
            return await offload.run_coroutine(lambda: cast("Coroutine[Any, Any, NodeOutcome]", run(call)))
        outcome = run(call)
        return await outcome if asyncio.iscoroutine(outcome) else cast("NodeOutcome", outcome)

    async def _call_in_thread(
        self, visit: NodeVisit, run: Callable[[NodeCall], NodeOutcome], call: NodeCall
    ) -> NodeOutcome:
        """Call a synchronous node in a thread and return its outcome.

        Its log lines and metadata are recorded after it has ended successfully.
        """
        lines: list[tuple[str, str]] = []
        metadata: dict[str, str] = {}
        call = msgspec.structs.replace(
            call,
            log=lambda level, message: lines.append((level, message)),
            set_metadata=metadata.update,
        )
        outcome = await offload.run_in_thread(run, call)
        if metadata:
            self._recorder.set_metadata(metadata)
        for level, message in lines:
            self._recorder.log(level, message, visit.node_id)
        return outcome

    def _finish_task(self, task: asyncio.Task[None]) -> None:
        """Remove the task of a node that has ended, and wake the run."""
        # First, since the next steps may cancel tasks in progress.
        del self._worklist.tasks[task]
        self._control.changed.set()

    # ── time ──────────────────────────────────────────────────────────────────────────────────────

    async def _wait_for_change(self) -> None:
        """Wait until a task ends, a sleeping node is due, an answer may be stored, or a request arrives, for at most a
        second; then wake sleeping nodes.

        A write that requires a commit is committed first.
        """
        # Cleared before the first await: any later change must end the wait below.
        self._control.changed.clear()
        if self._recorder.has_uncommitted_write:
            await self._recorder.commit()
        until = self._deadline
        if time.monotonic() < self._worklist.held_until:
            until = min(until, self._worklist.held_until)
        if self._may_start():
            until = min(until, self._worklist.next_wake or until)
        # At most a second: the lease is checked by the clock, and no event announces its end.
        seconds = min(max(until - time.monotonic(), 0.0), 1.0)
        alarm = asyncio.get_running_loop().call_later(seconds, self._control.changed.set)
        try:
            await self._control.changed.wait()
        finally:
            alarm.cancel()
        if self._may_start():
            await self._wake()

    async def _wake(self) -> None:
        """Read new wait answers, and continue the sleeping nodes whose time has come or, for agents, that have an
        answer.

        Nodes whose wait for an answer is over keep sleeping while the answers can't be read.
        """
        now, sleeping = time.monotonic(), self._worklist.sleeping
        due = [
            sleeper
            for sleeper in sleeping.values()
            if sleeper.wakes_at is not None and sleeper.wakes_at <= now
        ]
        if not await self._read_new_answers(is_due=any(sleeper.then.awaits_answer for sleeper in due)):
            due = [sleeper for sleeper in due if not sleeper.then.awaits_answer]
        answered = [sleeper for sleeper in sleeping.values() if self._progress.is_any_answered(sleeper)]
        for sleeper in (*due, *answered):
            if not self._may_start():
                return
            # An earlier node of this loop may have cancelled this node, and it may be in both lists.
            if sleeping.get(sleeper.visit) is not sleeper:
                continue
            del sleeping[sleeper.visit]
            if sleeper.then in {WakeAction.TRIED_AGAIN, WakeAction.ASKED}:
                sleeper.visit.has_fresh_answers = sleeper.then is WakeAction.ASKED
                await self._begin(sleeper.visit)
            else:
                self._progress.wake(sleeper)

    async def _read_new_answers(self, *, is_due: bool) -> bool:
        """Read and apply new wait answers once one is announced, every two seconds, and (`is_due`) before a wait
        for an answer expires.

        Return False if the answers can't be read now, so that no wait may expire.
        """
        awaits = any(sleeper.then.awaits_answer for sleeper in self._worklist.sleeping.values())
        is_time = (
            is_due
            or self._control.has_new_answers
            or time.monotonic() > self._answers_read_at + ANSWER_POLL_SECONDS
        )
        if self._listen is None or not awaits or not is_time:
            return True
        self._answers_read_at = time.monotonic()
        self._control.has_new_answers = False  # before the read: a later answer must be read again
        wait_answers = await self._listen()
        if wait_answers is None:
            return False
        self._progress.apply_answers(wait_answers)
        return True


async def _output_of(outcome: NodeOutcome) -> NodeOutcome:
    return outcome


def _group_by_iteration(recorded: Sequence[NodeSpan]) -> Mapping[str, Mapping[str, NodeSpan]]:
    found: dict[str, dict[str, NodeSpan]] = {}
    for span in recorded:
        if span.status not in CANDIDATE_STATUSES:
            found.setdefault(span.iteration, {})[span.node_id] = span
    return found


def _count_attempts(recorded: Sequence[NodeSpan]) -> int:
    """Return an upper bound of the attempts that were recorded as spans of their own."""
    return sum(span.attempt for span in recorded if span.attempt > 1)


def _build_roots(start: RunStart, graph: ParsedGraph) -> dict[str, Json]:
    """Return the roots of expressions that all nodes share: `approval`, `trigger` and `execution`."""
    asks = [node for node in graph.nodes if node.type == approval_links.APPROVAL_TYPE]
    return {
        "approval": approval_links.build_root(asks) if asks else {},
        "trigger": start.trigger,
        "execution": {
            "id": start.caller.execution_id,
            "workflowId": start.caller.workflow_id,
            "startedAt": start.started_at.isoformat().replace("+00:00", "Z"),
        },
    }
