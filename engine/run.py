"""Drives one run from wherever its journal left off to its end, a wait, or a hand-over.

Nodes that return at once are called in place, one after another; those that wait for something outside get a task, so
that independent branches run at once. The journal is told of everything and asked to commit only where the order of
effects demands it: before a write node starts, and before anything follows one.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import re
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from hashlib import sha256
from heapq import heappop, heappush
from typing import TYPE_CHECKING, cast

import msgspec

from engine import values
from engine.control import Control, Request
from engine.errors import LeaseLost, NodeError
from engine.events import SETTLED, Ended, Journal, LogLine, RunError, RunStatus, Span, SpanStatus
from engine.expressions import MISSING, ExpressionError, Path
from engine.joins import Mode
from engine.node import ERROR, OUTPUT, Call, Effect, Outcome, Result, Services, Wait
from engine.plan import Plan, Step
from engine.values import InvalidJson

if TYPE_CHECKING:
    from engine.graph import Node
    from engine.program import NodeProgram, Program
    from engine.values import Json

MAX_OUTPUT_BYTES = 10_000_000
MAX_KEPT_TEXT_BYTES = 16_384
MAX_LOG_LINES = 10_000
MAX_MESSAGE_LENGTH = 8_192
_UNSTORABLE = re.compile("[\0\ud800-\udfff]")
SHORT_WAIT_SECONDS = 1.0
"""Waits up to this long keep the worker: giving the run back and claiming it again would cost more."""
CANCEL_SECONDS = 10.0
"""How long a node may take to notice that it was cancelled, before it is left behind."""
TURN_SECONDS = 0.005
"""After this long without a pause, the other runs on the loop get a turn."""


class Start(msgspec.Struct, frozen=True):
    """Where a stretch of work begins."""

    execution_id: str
    workflow_id: str
    key_id: str
    """The execution whose id stands in idempotency keys: the first of a line of resumed ones."""
    trigger: Json
    deadline: datetime
    started_at: datetime
    attempt: int = 1
    recorded: Sequence[Span] = ()
    """Spans of earlier attempts; settled ones are not run again."""
    sequence: int = 0
    """The highest sequence number that the journal holds."""


class Visit(msgspec.Struct):
    """One node on its way through one run."""

    program: NodeProgram
    data: Json
    input_node: str | None
    input: bytes | None
    input_digest: bytes
    started_at: datetime
    attempt: int = 1
    config: Mapping[str, Json] = {}
    resolved_config: bytes | None = None
    hashes: bytes | None = None
    unresolved: list[str] = []

    @property
    def node_id(self) -> str:
        return self.program.node.id

    @property
    def is_write(self) -> bool:
        return self.program.effect is Effect.WRITE


@dataclass(frozen=True, slots=True)
class Sleeping:
    """A node that goes on at a set time: to end its wait, or to be tried again."""

    wake_at: datetime
    visit: Visit
    output: bytes | None
    """What a wait ends with; None for a retry."""


async def run(
    program: Program, start: Start, journal: Journal, control: Control, services: Services
) -> Ended:
    """Run until something ends this stretch of work; raises `LeaseLost` when it is no longer ours to end."""
    return await Runner(program, start, journal, control, services).run()


class Runner:
    """The state of one stretch of work on one run."""

    def __init__(
        self, program: Program, start: Start, journal: Journal, control: Control, services: Services
    ) -> None:
        self._program = program
        self._parallelism = program.graph.settings.parallelism
        self._start = start
        self._journal = journal
        self._control = control
        self._services = services
        self._plan = Plan(program.graph, program.triggers, program.eager)
        self._recorded = {span.node_id: span for span in start.recorded}
        self._settled_before: list[tuple[int, str]] = []
        """Nodes that are ready and have settled in an earlier attempt, by when: a heap."""
        self._ready: deque[str] = deque()
        self._tasks: dict[asyncio.Task[None], Visit] = {}
        self._sleeping: dict[str, Sleeping] = {}
        self._outputs: dict[str, Json] = {}
        self._digests: dict[str, bytes] = {}
        self._texts: dict[str, bytes] = {}
        """Small outputs as JSON, for the nodes that hand on what they were given."""
        self._failure: RunError | None = None
        self._broken_off: list[Visit] = []
        self._sequence = start.sequence
        self._log_lines = 0
        self._has_uncommitted_write = False
        self._execution_root: Json = {
            "id": start.execution_id,
            "workflowId": start.workflow_id,
            "startedAt": start.started_at.isoformat().replace("+00:00", "Z"),
        }

    async def run(self) -> Ended:
        """Run to the end of this stretch of work."""
        self._follow(self._plan.start())
        turn_ends = time.monotonic() + TURN_SECONDS
        try:
            while (ended := self._ended()) is None:
                if self._settled_before:
                    _, node_id = heappop(self._settled_before)
                    self._restore(self._recorded[node_id])
                elif self._ready and self._may_start():
                    await self._enter(self._ready.popleft())
                else:
                    await self._wait_for_change()
                    continue
                if time.monotonic() > turn_ends:
                    await asyncio.sleep(0)
                    turn_ends = time.monotonic() + TURN_SECONDS
        finally:
            await self._break_off()
        self._record_broken_off(ended)
        return ended

    def _ended(self) -> Ended | None:  # noqa: C901 - one guard for each way to end, in order of precedence
        request = self._control.request
        if request is Request.ABANDON or not self._journal.holds_lease():
            raise LeaseLost
        if request is Request.CANCEL:
            return Ended(RunStatus.CANCELLED)
        if request is Request.HAND_OVER_NOW:
            return Ended(RunStatus.RELEASED)
        if self._failure is not None and not any(visit.is_write for visit in self._tasks.values()):
            return Ended(RunStatus.FAILED, error=self._failure)
        if self._tasks:
            return self._timed_out()
        if request is Request.STOP:
            return Ended(RunStatus.STOPPED)
        is_idle = not self._ready and not self._settled_before
        if is_idle and not self._sleeping:
            return Ended(RunStatus.COMPLETED)
        if request is Request.HAND_OVER:
            return Ended(RunStatus.RELEASED)
        if is_idle:
            due_at = min(sleeping.wake_at for sleeping in self._sleeping.values())
            if (due_at - datetime.now(UTC)).total_seconds() > SHORT_WAIT_SECONDS:
                return Ended(RunStatus.WAITING, due_at=due_at)
        return self._timed_out()

    def _timed_out(self) -> Ended | None:
        if datetime.now(UTC) < self._start.deadline:
            return None
        seconds = self._program.graph.settings.timeout_seconds
        return Ended(
            RunStatus.FAILED, error=RunError("timeout", f"The run took longer than its {seconds:g} s")
        )

    def _may_start(self) -> bool:
        return (
            self._failure is None and self._control.request is None and len(self._tasks) < self._parallelism
        )

    # ── one node ──────────────────────────────────────────────────────────────────────────────────

    async def _enter(self, node_id: str) -> None:
        recorded = self._recorded.get(node_id)
        try:
            visit = self._visit(node_id, recorded)
        except (ExpressionError, InvalidJson, NodeError) as error:
            self._failed(
                Visit(self._program.nodes[node_id], None, None, None, b"", datetime.now(UTC)),
                _as_node_error(error),
            )
            return
        if recorded is not None and recorded.wake_at is not None:
            output = recorded.output if recorded.status is SpanStatus.WAITING else None
            self._sleeping[node_id] = Sleeping(recorded.wake_at, visit, output)
            return
        await self._begin(visit)

    async def _begin(self, visit: Visit) -> None:
        try:
            call = self._call(visit)
        except (ExpressionError, InvalidJson, NodeError) as error:
            self._failed(visit, _as_node_error(error))
            return
        if visit.is_write:
            self._journal.record(self._span(visit, SpanStatus.RUNNING))
            self._has_uncommitted_write = True
        if self._has_uncommitted_write:
            await self._commit()
            if not self._may_go_on_with(visit):
                return
        if visit.is_write or visit.program.node.type not in self._program.inline:
            task = asyncio.create_task(self._perform(visit, call))
            self._tasks[task] = visit
            return
        try:
            outcome = self._program.runs[visit.program.node.type](call)
        except Exception as error:  # noqa: BLE001 - whatever a node raises ends that node, not the worker
            self._failed(visit, _as_node_error(error))
            return
        self._returned(visit, cast("Outcome", outcome))

    def _may_go_on_with(self, visit: Visit) -> bool:
        """Look again after a commit: the lease may have run out, something may have failed or been asked."""
        if not self._journal.holds_lease():
            raise LeaseLost
        if self._may_start():
            return True
        self._ready.appendleft(visit.node_id)
        if visit.is_write:
            self._broken_off.append(visit)
        return False

    async def _perform(self, visit: Visit, call: Call) -> None:
        """Run a node in a task of its own."""
        node = visit.program.node
        task = cast("asyncio.Task[None]", asyncio.current_task())
        limit = asyncio.timeout(node.timeout_seconds)
        try:
            async with limit:
                outcome = self._program.runs[node.type](call)
                if asyncio.iscoroutine(outcome):
                    outcome = await outcome
        except asyncio.CancelledError:
            if task.cancelling():
                raise
            self._failed(visit, NodeError("The node cancelled itself"))
        except Exception as error:  # noqa: BLE001 - whatever a node raises ends that node, not the worker
            self._failed(visit, _too_slow(node) if limit.expired() else _as_node_error(error))
        else:
            self._returned(visit, cast("Outcome", outcome))
        finally:
            self._tasks.pop(task, None)
            self._control.changed.set()

    def _visit(self, node_id: str, recorded: Span | None) -> Visit:
        program = self._program.nodes[node_id]
        data, input_node = self._gather(program)
        unresolved: list[str] = []
        if program.mappings:
            data, input_node = self._mapped(program, data, unresolved), None
        encoded = None if input_node is not None else values.encode(data)
        digest = self._digests[input_node] if input_node is not None else sha256(encoded or b"").digest()
        visit = Visit(program, data, input_node, encoded, digest, datetime.now(UTC), unresolved=unresolved)
        if recorded is not None:
            _take_up(visit, recorded)
        return visit

    def _gather(self, program: NodeProgram) -> tuple[Json, str | None]:
        """Return what arrives at a node, and the parent whose output it is, unchanged, if there is just one."""
        parents = list(dict.fromkeys(edge.source for edge in self._plan.parents(program.node.id)))
        if not parents:
            return self._start.trigger, None
        if program.join is not None and program.join.mode is Mode.ALL:
            return program.join.data({parent: self._outputs[parent] for parent in parents}), None
        if len(parents) == 1:
            return self._outputs[parents[0]], parents[0]
        merged: dict[str, Json] = {}
        for parent in parents:
            output = self._outputs[parent]
            if isinstance(output, dict):
                merged.update(output)
        merged.update({parent: self._outputs[parent] for parent in parents})
        return merged, None

    def _mapped(self, program: NodeProgram, data: Json, unresolved: list[str]) -> Json:
        scope = self._scope(data)
        mapped: dict[str, Json] = {}
        for name, source in program.mappings.items():
            if not isinstance(source, Path):
                mapped[name] = source.render(scope, unresolved)
                continue
            value = source.resolve(scope)
            if value is MISSING:
                unresolved.append(source.text)
                value = None
            mapped[name] = value
        return {**data, **mapped} if isinstance(data, dict) else mapped

    def _scope(self, data: Json) -> dict[str, Json]:
        return {
            "data": data,
            "trigger": self._start.trigger,
            "nodes": self._outputs,
            "execution": self._execution_root,
        }

    def _call(self, visit: Visit) -> Call:
        """Render the config; raises `ExpressionError`, `InvalidJson`, and `NodeError` for what is missing."""
        program = visit.program
        if program.missing is not None:
            raise NodeError(f"The node needs configuration: {program.missing}", code="missing-config")
        scope = self._scope(visit.data)
        if visit.resolved_config is not None:
            visit.config = cast("Mapping[str, Json]", values.decode(visit.resolved_config))
        else:
            visit.config = cast("Mapping[str, Json]", program.config.render(scope, visit.unresolved))
        self._check_resolved(visit)
        dynamic = visit.input_digest
        if visit.is_write or not program.config.is_static:
            rendered = visit.resolved_config or values.encode(visit.config)
            visit.resolved_config = rendered if visit.is_write else None
            if visit.is_write and not program.config.is_static:
                # What is sent is what is recorded: `nodes` may grow while that is being committed.
                visit.config = cast("Mapping[str, Json]", values.decode(rendered))
            dynamic = sha256(dynamic + rendered).digest()
        visit.hashes = program.static_hashes + dynamic
        node_id = visit.node_id
        return Call(
            config=visit.config,
            data=visit.data,
            scope=scope,
            conditions=program.conditions,
            values=program.values,
            unresolved=visit.unresolved,
            log=lambda level, message: self._log(level, message, node_id),
            idempotency_key=f"{self._start.key_id}:{node_id}:0",
            attempt=visit.attempt,
            now=datetime.now(UTC),
            services=self._services,
        )

    def _check_resolved(self, visit: Visit) -> None:
        if visit.unresolved and self._program.graph.settings.strict_mappings:
            names = ", ".join(dict.fromkeys(visit.unresolved))
            raise NodeError(f"Nothing was found at {names}", code="unresolved-mapping")

    # ── what came of it ───────────────────────────────────────────────────────────────────────────

    def _returned(self, visit: Visit, outcome: Outcome) -> None:
        output = outcome.output if isinstance(outcome, Result | Wait) else outcome
        try:
            output = self._pass_through(visit, output)
            self._check_resolved(visit)
            encoded = self._given(visit, output) or _encoded(output)
        except (InvalidJson, NodeError) as error:
            self._failed(visit, _as_node_error(error))
            return
        if isinstance(outcome, Wait):
            self._sleep(visit, outcome.until, SpanStatus.WAITING, encoded)
            return
        port = outcome.port if isinstance(outcome, Result) else OUTPUT
        self._settle(visit, SpanStatus.COMPLETED, port, output, encoded)

    def _given(self, visit: Visit, output: Json) -> bytes | None:
        """Return the text of an output that is the node's input, as it was written before."""
        if output is not visit.data:
            return None
        text = visit.input if visit.input_node is None else self._texts.get(visit.input_node)
        return text if text is not None and len(text) <= MAX_KEPT_TEXT_BYTES else None

    def _pass_through(self, visit: Visit, output: Json) -> Json:
        if not visit.program.pass_through or not isinstance(output, dict):
            return output
        given = visit.data if isinstance(visit.data, dict) else {}
        passed = {key: given.get(source) for key, source in visit.program.pass_through.items()}
        visit.unresolved.extend(
            source for source in visit.program.pass_through.values() if source not in given
        )
        return {**output, **passed}

    def _failed(self, visit: Visit, error: NodeError) -> None:
        node = visit.program.node
        if error.retryable and visit.attempt < node.retry.max_attempts:
            delay = timedelta(seconds=node.retry.delay_seconds(visit.attempt, random.random()))  # noqa: S311 - jitter
            self._log("warning", f"Attempt {visit.attempt} failed: {error.message}", node.id)
            self._sleep(visit, datetime.now(UTC) + delay, SpanStatus.RETRYING, None, _run_error(visit, error))
            return
        reason = _run_error(visit, error)
        if any(edge.source_port == ERROR for edge in self._program.graph.outbound[node.id]):
            self._settle(visit, SpanStatus.FAILED, ERROR, *_error_output(reason, visit.data), reason)
            return
        self._record(self._span(visit, SpanStatus.FAILED, ended_at=datetime.now(UTC), error=reason))
        self._has_uncommitted_write = self._has_uncommitted_write or visit.is_write
        self._failure = self._failure or _end_of_run(reason)

    def _settle(
        self,
        visit: Visit,
        status: SpanStatus,
        port: str,
        output: Json,
        encoded: bytes,
        error: RunError | None = None,
    ) -> None:
        node_id = visit.node_id
        self._outputs[node_id] = output
        self._digests[node_id] = sha256(encoded).digest()
        if len(encoded) <= MAX_KEPT_TEXT_BYTES:
            self._texts[node_id] = encoded
        self._record(
            self._span(visit, status, port=port, output=encoded, ended_at=datetime.now(UTC), error=error)
        )
        self._has_uncommitted_write = self._has_uncommitted_write or visit.is_write
        self._follow(self._plan.settle(node_id, port))

    def _sleep(
        self,
        visit: Visit,
        wake_at: datetime,
        status: SpanStatus,
        output: bytes | None,
        error: RunError | None = None,
    ) -> None:
        self._record(self._span(visit, status, output=output, wake_at=wake_at, error=error))
        if status is SpanStatus.RETRYING:
            visit.attempt += 1
        self._sleeping[visit.node_id] = Sleeping(wake_at, visit, output)

    def _restore(self, span: Span) -> None:
        """Take a settled node from the journal instead of running it.

        They come in the order in which they settled, so that an eager node is reached by the branch that was first.
        """
        self._outputs[span.node_id] = values.decode(span.output) if span.output is not None else None
        self._digests[span.node_id] = sha256(span.output or b"").digest()
        if span.port is None:
            self._failure = self._failure or (span.error and _end_of_run(span.error))
            return
        self._follow(self._plan.settle(span.node_id, span.port))

    def _follow(self, step: Step) -> None:
        if self._recorded:
            self._follow_recorded(step.ready)
        else:
            self._ready.extend(step.ready)
        for node_id in step.skipped:
            if node_id not in self._recorded:
                node = self._program.nodes[node_id].node
                self._sequence += 1
                self._journal.record(
                    Span(node_id, node.label, node.type, SpanStatus.SKIPPED, self._sequence, started_at=None)
                )

    def _follow_recorded(self, ready: Sequence[str]) -> None:
        for node_id in ready:
            recorded = self._recorded.get(node_id)
            if recorded is not None and recorded.status in SETTLED:
                heappush(self._settled_before, (recorded.sequence, node_id))
            else:
                self._ready.append(node_id)

    # ── time ──────────────────────────────────────────────────────────────────────────────────────

    async def _wait_for_change(self) -> None:
        # Cleared before anything is awaited: what changes from here on must end the wait below.
        self._control.changed.clear()
        if self._has_uncommitted_write:
            await self._commit()
        wakes = [sleeping.wake_at for sleeping in self._sleeping.values()] if self._may_start() else []
        until = min([self._start.deadline, *wakes])
        # At most a second: the lease is looked at by the clock, and no event tells that it is about to end.
        seconds = min(max((until - datetime.now(UTC)).total_seconds(), 0.0), 1.0)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._control.changed.wait()
        if self._may_start():
            await self._wake()

    async def _wake(self) -> None:
        now = datetime.now(UTC)
        due = [node_id for node_id, sleeping in self._sleeping.items() if sleeping.wake_at <= now]
        for node_id in due:
            if not self._may_start():
                return
            sleeping = self._sleeping.pop(node_id)
            if sleeping.output is None:
                await self._begin(sleeping.visit)
            else:
                output = values.decode(sleeping.output)
                self._settle(sleeping.visit, SpanStatus.COMPLETED, OUTPUT, output, sleeping.output)

    async def _commit(self) -> None:
        self._has_uncommitted_write = False
        await self._journal.commit()

    async def _break_off(self) -> None:
        """Cancel whatever still runs; what doesn't notice within ten seconds is left behind."""
        if not self._tasks:
            return
        tasks = dict(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks, timeout=CANCEL_SECONDS)
        # A node that ended all the same has said itself how.
        self._broken_off += [visit for task, visit in tasks.items() if task.cancelled() or not task.done()]

    # ── records ───────────────────────────────────────────────────────────────────────────────────

    def _record_broken_off(self, ended: Ended) -> None:
        """Say of each node that was cut short that it was; a run that is handed over leaves them as they stand."""
        if ended.status is RunStatus.RELEASED:
            return
        for visit in self._broken_off:
            self._record(self._span(visit, SpanStatus.CANCELLED, ended_at=datetime.now(UTC)))

    def _span(
        self,
        visit: Visit,
        status: SpanStatus,
        *,
        port: str | None = None,
        output: bytes | None = None,
        ended_at: datetime | None = None,
        wake_at: datetime | None = None,
        error: RunError | None = None,
    ) -> Span:
        self._sequence += 1
        node = visit.program.node
        return Span(
            node_id=node.id,
            label=node.label,
            type=node.type,
            status=status,
            sequence=self._sequence,
            started_at=visit.started_at,
            ended_at=ended_at,
            port=port,
            attempt=visit.attempt,
            input_node=visit.input_node,
            input=visit.input,
            output=output,
            error=error,
            unresolved=tuple(dict.fromkeys(visit.unresolved)),
            wake_at=wake_at,
            resolved_config=visit.resolved_config,
            hashes=visit.hashes,
        )

    def _record(self, span: Span) -> None:
        self._journal.record(span)

    def _log(self, level: str, message: str, node_id: str) -> None:
        if self._log_lines > MAX_LOG_LINES:
            return
        self._log_lines += 1
        if self._log_lines > MAX_LOG_LINES:
            level, message = "warning", f"More than {MAX_LOG_LINES:,} log lines: the rest is left out"
        self._sequence += 1
        self._journal.log(LogLine(level, _storable(message), node_id, self._sequence, datetime.now(UTC)))


def _take_up(visit: Visit, recorded: Span) -> None:
    """Go on with a node where an earlier attempt left it: a write is given what it was given before."""
    visit.started_at = recorded.started_at or visit.started_at
    if recorded.status is SpanStatus.WAITING:
        visit.attempt, visit.hashes = recorded.attempt, recorded.hashes
        visit.unresolved = list(recorded.unresolved)
        return
    visit.attempt = recorded.attempt + 1
    if recorded.resolved_config is None:
        return
    visit.resolved_config = recorded.resolved_config
    if recorded.input is not None:
        visit.input, visit.data = recorded.input, values.decode(recorded.input)
        visit.input_digest = sha256(recorded.input).digest()


def _encoded(output: Json) -> bytes:
    try:
        return values.encode(output, max_bytes=MAX_OUTPUT_BYTES)
    except InvalidJson as error:
        if error.code != "too-large":
            raise
        message = f"The output takes more than the {MAX_OUTPUT_BYTES:,} bytes that can be kept"
        raise NodeError(message, code="output-too-large") from error


def _error_output(reason: RunError, data: Json) -> tuple[Json, bytes]:
    """Return what leaves by the error port; data that would not fit beside the error is left out."""
    output: Json = {"error": reason.as_json(), "data": data}
    try:
        return output, _encoded(output)
    except (InvalidJson, NodeError):
        output = {"error": reason.as_json(), "data": None}
        return output, _encoded(output)


def _run_error(visit: Visit, error: NodeError) -> RunError:
    return RunError(error.code, _storable(error.message), visit.node_id, visit.attempt)


def _too_slow(node: Node) -> NodeError:
    message = f"The node took longer than its {node.timeout_seconds:g} s"
    return NodeError(message, code="timeout", retryable=True)


def _end_of_run(reason: RunError) -> RunError:
    """Return what a node's failure is to its run, which has fewer codes."""
    return replace(reason, code="timeout" if reason.code == "timeout" else "node-error")


def _storable(text: str) -> str:
    """Return a text of anybody's making as every database takes it."""
    return _UNSTORABLE.sub("\ufffd", text[:MAX_MESSAGE_LENGTH])


def _as_node_error(error: Exception) -> NodeError:
    """Translate what a node raised: its own words where it chose them, else the kind of surprise."""
    if isinstance(error, NodeError):
        return error
    if isinstance(error, ExpressionError):
        return NodeError(str(error), code="expression-error")
    if isinstance(error, InvalidJson):
        return NodeError(str(error), code=error.code)
    if isinstance(error, TimeoutError):
        return NodeError(str(error) or "Timed out", code="timeout", retryable=True)
    return NodeError(f"{type(error).__name__}: {error}")
