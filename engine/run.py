"""Drives one run from wherever its journal left off to its end, a wait, or a hand-over.

Nodes that return at once are called in place, one after another; those that wait for something outside get a task, so
that independent branches run at once. The journal is told of everything and asked to commit only where the order of
effects demands it, before a write node starts and before anything follows one, or where much has piled up.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from datetime import datetime
from functools import partial
from heapq import heappop
from typing import TYPE_CHECKING, Any, TypeVar, cast

import msgspec

from concurrency import offload
from concurrency.offload import TakesLong
from engine import outcomes
from engine.agenda import Agenda
from engine.control import Control, Request
from engine.errors import LeaseLost, NodeError
from engine.events import Ended, Journal, RunError, RunStatus, Span, SpanStatus
from engine.expressions import ExpressionError
from engine.frames import Frame, Then, Visit
from engine.limits import Limits
from engine.node import Call, Outcome
from engine.outcomes import LOST_ATTEMPT, TIMEOUT, as_node_error
from engine.scribe import Scribe
from engine.settlement import Settlement, Signals
from engine.values import InvalidJson
from engine.visits import Visits

if TYPE_CHECKING:
    from engine.clock import RunClock
    from engine.graph import Node
    from engine.program import Program
    from engine.services import Caller, Services
    from engine.values import Json

T = TypeVar("T")

SHORT_WAIT_SECONDS = 1.0
"""Waits up to this long keep the worker: giving the run back and claiming it again would cost more."""
HEAR_SECONDS = 2.0
"""How long an answer may go unheard by a run that is at work elsewhere."""
CANCEL_SECONDS = 10.0
"""How long a node may take to notice that it was cancelled, before it is left behind."""
TURN_SECONDS = 0.005
"""After this long without a pause, the other runs on the loop get a turn."""
DEFAULT_LIMITS = Limits()


class Start(msgspec.Struct, frozen=True):
    """Where a stretch of work begins."""

    caller: Caller
    """For whom it runs, and under which ids."""
    trigger: Json
    clock: RunClock
    deadline: datetime
    """By the clock, as it is now: how much time is left is counted by the monotonic clock from here on."""
    started_at: datetime
    attempt: int = 1
    recorded: Sequence[Span] = ()
    """Spans of earlier attempts; settled ones are not run again."""
    sequence: int = 0
    """The highest sequence number that the journal holds."""
    signals: Signals = {}
    listen: Callable[[], Awaitable[Signals | None]] | None = None
    """Returns the answers of now, or None where it can't: some come while the run is at work elsewhere."""


async def run(
    program: Program,
    start: Start,
    journal: Journal,
    control: Control,
    services: Services,
    limits: Limits = DEFAULT_LIMITS,
) -> Ended:
    """Run until something ends this stretch of work; raises `LeaseLost` when it is no longer ours to end."""
    return await Runner(program, start, journal, control, services, limits).run()


class Runner:
    """One stretch of work on one run."""

    def __init__(
        self,
        program: Program,
        start: Start,
        journal: Journal,
        control: Control,
        services: Services,
        limits: Limits,
    ) -> None:
        self._program = program
        self._parallelism = program.graph.settings.parallelism
        self._clock = start.clock
        self._deadline = start.clock.monotonic_of(start.deadline)
        self._listen = start.listen
        self._heard_at = time.monotonic()
        self._control = control
        self._broken_off: list[Visit] = []
        self._scribe = scribe = Scribe(
            journal, start.sequence, limits, start.clock, attempts=_attempts(start.recorded)
        )
        self._agenda = agenda = Agenda()
        self._visits = visits = Visits(program, start.caller, services, scribe)
        recorded = _by_iteration(start.recorded)
        self._root = Frame(program.root, start.trigger, _roots(start), recorded.get("", {}), start.started_at)
        self._root.share = 1 / program.root.size
        self._settlement = Settlement(program, recorded, start.signals, visits, scribe, agenda, limits)

    async def run(self) -> Ended:
        """Run to the end of this stretch of work."""
        agenda, scribe = self._agenda, self._scribe
        self._settlement.follow(self._root, self._root.start())
        turn_ends = time.monotonic() + TURN_SECONDS
        try:
            while (ended := self._ended()) is None:
                if agenda.settled_before:
                    _, node_id, frame = heappop(agenda.settled_before)
                    self._settlement.restore(frame, frame.recorded[node_id])
                elif agenda.ready and self._may_start():
                    await self._enter(*agenda.ready.popleft())
                else:
                    await self._wait_for_change()
                    continue
                if time.monotonic() > turn_ends:
                    if scribe.has_much:
                        await scribe.commit()
                    await offload.rest()
                    turn_ends = time.monotonic() + TURN_SECONDS
        finally:
            await self._break_off()
        self._tell_of_what_was_broken_off(ended)
        return ended

    # ── the end ───────────────────────────────────────────────────────────────────────────────────

    def _ended(self) -> Ended | None:  # noqa: C901 - one guard for each way to end, in order of precedence
        request, agenda = self._control.request, self._agenda
        if request is Request.ABANDON or not self._scribe.holds_lease():
            raise LeaseLost
        if request is Request.CANCEL:
            return Ended(RunStatus.CANCELLED)
        if request is Request.HAND_OVER_NOW:
            return Ended(RunStatus.RELEASED)
        if self._settlement.failure is not None and not agenda.has_write_at_work:
            return Ended(RunStatus.FAILED, error=self._settlement.failure)
        if agenda.tasks:
            return self._timed_out()
        if request is Request.STOP:
            return Ended(RunStatus.STOPPED)
        is_idle = not agenda.ready and not agenda.settled_before
        if is_idle and not agenda.sleeping:
            return Ended(RunStatus.COMPLETED)
        if request is Request.HAND_OVER:
            return Ended(RunStatus.RELEASED)
        if is_idle:
            wakes_at = agenda.next_wake
            if wakes_at is None:
                return Ended(RunStatus.WAITING)
            if wakes_at - time.monotonic() > SHORT_WAIT_SECONDS:
                return Ended(RunStatus.WAITING, due_at=self._clock.moment_of(wakes_at))
        return self._timed_out()

    def _timed_out(self) -> Ended | None:
        if time.monotonic() < self._deadline:
            return None
        seconds = self._program.graph.settings.timeout_seconds
        message = f"The run took longer than its {seconds:g} s"
        return Ended(RunStatus.FAILED, error=RunError(TIMEOUT, message))

    async def _break_off(self) -> None:
        """Cancel whatever still runs; what doesn't notice within ten seconds is left behind."""
        if not self._agenda.tasks:
            return
        tasks = dict(self._agenda.tasks)
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks, timeout=CANCEL_SECONDS)
        # A node that ended all the same has said itself how.
        self._broken_off += [visit for task, visit in tasks.items() if task.cancelled() or not task.done()]

    def _tell_of_what_was_broken_off(self, ended: Ended) -> None:
        """Say of what was cut short that it was; a run that goes on elsewhere leaves it as it stands."""
        if ended.status in {RunStatus.RELEASED, RunStatus.WAITING, RunStatus.COMPLETED}:
            return
        loops = [loop.visit for frame in self._root.whole() for loop in frame.loops]
        for visit in (*self._broken_off, *loops):
            self._scribe.tell(visit, SpanStatus.CANCELLED, ended_at=self._clock.now())

    # ── one node ──────────────────────────────────────────────────────────────────────────────────

    def _may_start(self) -> bool:
        return (
            self._settlement.failure is None
            and self._control.request is None
            and len(self._agenda.tasks) < self._parallelism
        )

    async def _enter(self, frame: Frame, node_id: str) -> None:
        """Reach a node, and begin it unless it sleeps on or has failed."""
        visit: Visit | None
        try:
            visit = offload.quick(self._visits.begin, frame, node_id)
        except TakesLong:
            begin = partial(self._visits.begin, frame, node_id, frame.roots_of_now())
            visit = await self._prepared(frame, node_id, begin)
        except (ExpressionError, InvalidJson, NodeError) as error:
            self._settlement.failed(self._visits.unreached(frame, node_id), as_node_error(error))
            return
        if visit is not None and not self._is_taken_up(visit):
            await self._begin(visit)

    def _is_taken_up(self, visit: Visit) -> bool:
        """Go on with a node where an earlier attempt has left it, unless it is to be begun."""
        frame = visit.frame
        if not frame.recorded or (recorded := frame.recorded.get(visit.node_id)) is None:
            return False
        if recorded.status in {SpanStatus.WAITING, SpanStatus.RETRYING}:
            self._settlement.sleep_on(visit, recorded)
            return True
        if recorded.status is SpanStatus.RUNNING and visit.is_at_most_once:
            visit.attempt = recorded.attempt
            message = f"Nobody knows what came of attempt {visit.attempt}, and the node runs at most once"
            self._settlement.failed(visit, NodeError(message, code=LOST_ATTEMPT), is_final=True)
            return True
        return False

    async def _begin(self, visit: Visit) -> None:
        try:
            call = offload.quick(self._visits.call, visit)
        except TakesLong:
            prepare = partial(self._visits.call, visit, visit.frame.roots_of_now())
            prepared = await self._prepared(visit.frame, visit.node_id, prepare, visit)
            if prepared is None:
                return
            call = prepared
        except (ExpressionError, InvalidJson, NodeError) as error:
            self._settlement.failed(visit, as_node_error(error))
            return
        is_write = visit.program.is_write
        if is_write:
            self._scribe.tell(visit, SpanStatus.RUNNING)
            self._scribe.has_uncommitted_write = True
        if self._scribe.has_uncommitted_write:
            await self._scribe.commit()
            if not self._may_go_on_with(visit):
                return
        if is_write or visit.node_id not in self._program.inline:
            self._start(visit, self._called(visit, call))
            return
        self._call_in_place(visit, call)

    async def _prepared(
        self, frame: Frame, node_id: str, prepare: Callable[[], T], visit: Visit | None = None
    ) -> T | None:
        """Prepare a node in a thread; None: nothing comes of it now."""
        try:
            prepared = await offload.elsewhere(prepare)
        except (ExpressionError, InvalidJson, NodeError) as error:
            self._settlement.failed(visit or self._visits.unreached(frame, node_id), as_node_error(error))
            return None
        if not self._scribe.holds_lease():
            raise LeaseLost
        if frame.is_broken_off:
            self._settlement.cancelled(visit or self._visits.unreached(frame, node_id))
            return None
        if not self._may_start():
            self._agenda.ready.appendleft((frame, node_id))
            return None
        return prepared

    def _call_in_place(self, visit: Visit, call: Call) -> None:
        run = cast("Callable[[Call], Outcome]", self._program.runs[visit.node_id])
        try:
            outcome = offload.quick(run, call)
        except TakesLong:
            self._start(visit, self._called_elsewhere(visit, run, call))
            return
        except Exception as error:  # noqa: BLE001 - whatever a node raises ends that node, not the worker
            self._settlement.failed(visit, as_node_error(error))
            return
        try:
            offload.quick(self._settlement.write, visit, outcome)
        except TakesLong:
            self._start(visit, _given(outcome))
        except (InvalidJson, NodeError) as error:
            self._settlement.failed(visit, as_node_error(error))
        else:
            self._settlement.returned(visit, outcome)

    def _may_go_on_with(self, visit: Visit) -> bool:
        """Look again after a commit: the lease may have run out, something may have failed or been asked."""
        if not self._scribe.holds_lease():
            raise LeaseLost
        if visit.frame.is_broken_off:
            self._settlement.cancelled(visit)
            return False
        if self._may_start():
            return True
        self._agenda.ready.appendleft((visit.frame, visit.node_id))
        if visit.is_at_most_once:
            # It was announced and not begun: whoever goes on may still begin it.
            visit.attempt -= 1
            self._scribe.tell(visit, SpanStatus.RETRYING, wake_at=self._clock.now())
        if visit.is_write:
            self._broken_off.append(visit)
        return False

    def _start(self, visit: Visit, coming: Coroutine[Any, Any, Outcome]) -> None:
        task = asyncio.create_task(self._perform(visit, coming))
        self._agenda.tasks[task] = visit
        task.add_done_callback(partial(self._see_that_it_left, visit, coming))

    def _see_that_it_left(
        self, visit: Visit, coming: Coroutine[Any, Any, Outcome], task: asyncio.Task[None]
    ) -> None:
        """Take leave of a node for a task that was cancelled before it had begun, and so can't do it itself."""
        coming.close()
        if task in self._agenda.tasks:
            self._leave(task)
            if visit.frame.is_broken_off:
                self._settlement.cancelled(visit)

    async def _perform(self, visit: Visit, coming: Coroutine[Any, Any, Outcome]) -> None:
        """See a node through in a task of its own."""
        task = cast("asyncio.Task[None]", asyncio.current_task())
        try:
            outcome = await self._in_time(visit.program.node, coming, task)
            await offload.patiently(self._settlement.write, visit, outcome)
        except asyncio.CancelledError:
            self._leave(task)
            if visit.frame.is_broken_off:
                self._settlement.cancelled(visit)
            raise
        except (InvalidJson, NodeError) as error:
            self._leave(task)
            self._settlement.failed(visit, as_node_error(error))
        else:
            self._leave(task)
            self._settlement.returned(visit, outcome)

    async def _in_time(
        self, node: Node, coming: Coroutine[Any, Any, Outcome], task: asyncio.Task[None]
    ) -> Outcome:
        limit = asyncio.timeout(node.timeout_seconds)
        try:
            async with limit:
                return await coming
        except asyncio.CancelledError:
            if task.cancelling():
                raise
            raise NodeError("The node cancelled itself") from None
        except Exception as error:
            raise (outcomes.too_slow(node) if limit.expired() else as_node_error(error)) from error

    async def _called(self, visit: Visit, call: Call) -> Outcome:
        run = self._program.runs[visit.node_id]
        if visit.node_id in self._program.repeatable:
            return await offload.whole(lambda: cast("Coroutine[Any, Any, Outcome]", run(call)))
        outcome = run(call)
        return await outcome if asyncio.iscoroutine(outcome) else cast("Outcome", outcome)

    async def _called_elsewhere(self, visit: Visit, run: Callable[[Call], Outcome], call: Call) -> Outcome:
        """Call a node in a thread; what it logs is told afterwards, where everything is numbered."""
        lines: list[tuple[str, str]] = []
        call = msgspec.structs.replace(call, log=lambda level, message: lines.append((level, message)))
        outcome = await offload.elsewhere(run, call)
        for level, message in lines:
            self._scribe.log(level, message, visit.node_id)
        return outcome

    def _leave(self, task: asyncio.Task[None]) -> None:
        # First: what follows may break off whatever is still at work.
        del self._agenda.tasks[task]
        self._control.changed.set()

    # ── time ──────────────────────────────────────────────────────────────────────────────────────

    async def _wait_for_change(self) -> None:
        # Cleared before anything is awaited: what changes from here on must end the wait below.
        self._control.changed.clear()
        if self._scribe.has_uncommitted_write:
            await self._scribe.commit()
        until = self._deadline
        if self._may_start():
            until = min(until, self._agenda.next_wake or until)
        # At most a second: the lease is looked at by the clock, and no event tells that it is about to end.
        seconds = min(max(until - time.monotonic(), 0.0), 1.0)
        alarm = asyncio.get_running_loop().call_later(seconds, self._control.changed.set)
        try:
            await self._control.changed.wait()
        finally:
            alarm.cancel()
        if self._may_start():
            await self._wake()

    async def _wake(self) -> None:
        now, sleeping = time.monotonic(), self._agenda.sleeping
        due = [one for one in sleeping.values() if one.wakes_at is not None and one.wakes_at <= now]
        if not await self._hear(is_due=any(one.then is Then.EXPIRED for one in due)):
            due = [one for one in due if one.then is not Then.EXPIRED]
        for one in due:
            if not self._may_start():
                return
            # What came of one of them may have broken off another.
            if sleeping.pop(one.visit, None) is None:
                continue
            if one.then is Then.TRIED_AGAIN:
                await self._begin(one.visit)
            else:
                self._settlement.woken(one)

    async def _hear(self, *, is_due: bool) -> bool:
        """Take answers that came since the run was taken up, now and then, and before any wait for one has expired.

        Returns False where nobody can tell whether there are any.
        """
        awaits = any(one.then is Then.EXPIRED for one in self._agenda.sleeping.values())
        is_time = is_due or time.monotonic() > self._heard_at + HEAR_SECONDS
        if self._listen is None or not awaits or not is_time:
            return True
        self._heard_at = time.monotonic()
        signals = await self._listen()
        if signals is None:
            return False
        self._settlement.hear(signals)
        return True


async def _given(outcome: Outcome) -> Outcome:
    return outcome


def _by_iteration(recorded: Sequence[Span]) -> Mapping[str, Mapping[str, Span]]:
    found: dict[str, dict[str, Span]] = {}
    for span in recorded:
        found.setdefault(span.iteration, {})[span.node_id] = span
    return found


def _attempts(recorded: Sequence[Span]) -> int:
    """Return how many attempts were recorded as spans of their own, at most."""
    return sum(span.attempt for span in recorded if span.attempt > 1)


def _roots(start: Start) -> dict[str, Json]:
    """Return the roots of expressions that are the same for all nodes."""
    return {
        "trigger": start.trigger,
        "execution": {
            "id": start.caller.execution_id,
            "workflowId": start.caller.workflow_id,
            "startedAt": start.started_at.isoformat().replace("+00:00", "Z"),
        },
    }
