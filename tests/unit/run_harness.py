"""Runs against an in-memory journal that keeps the protocol: uncommitted records are lost with their worker."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from hashlib import sha256
from itertools import pairwise
from typing import Any, cast

import msgspec.structs

from engine.agents.agent_steps import AgentStep
from engine.graph import Definition, ParsedGraph
from engine.node_api import EffectRule, FieldCompilation, NodeCall, NodeEffect, NodeType, RunNode, TimerWait
from engine.node_key import PART_BYTES
from engine.program import WorkflowProgram
from engine.run_errors import LeaseLost, NodeError
from engine.run_limits import RunLimits
from engine.run_records import AttemptSpan, LogLine, NodeSpan, RunError, RunOutcome, RunStatus, SpanStatus
from engine.services import NodeServices, RunCaller, RunControl
from engine.values import Json, decode_json
from engine.workflow_runner import DEFAULT_LIMITS, RunStart, run_workflow
from models.timestamps import DatabaseClock
from tests.node_calls import NoNetwork

PATIENCE_SECONDS = 5.0
FAST_RETRY: dict[str, Json] = {"retry": {"maxAttempts": 3, "backoff": 0.01}}


@dataclass(frozen=True)
class MadeUpNodeType:
    """A node type made up for a test."""

    effect: NodeEffect
    run: RunNode
    compiled: Mapping[str, FieldCompilation] = field(default_factory=dict)
    version: str = "1.0.0"
    joins: bool = False
    loops: bool = False
    code: bytes = b"code"
    defaults: Mapping[str, Json] = field(default_factory=dict)


def pure_node(run: RunNode, **more: Any) -> MadeUpNodeType:  # noqa: ANN401 - the other fields of Kind
    return MadeUpNodeType(NodeEffect.PURE, run, **more)


def read_world(run: RunNode) -> MadeUpNodeType:
    return MadeUpNodeType(NodeEffect.READ, run)


def write_world(run: RunNode, **more: Any) -> MadeUpNodeType:  # noqa: ANN401 - the other fields of Kind
    return MadeUpNodeType(NodeEffect.WRITE, run, **more)


@dataclass(frozen=True)
class MadeUpNodeTypes:
    """Catalog of these node types, which accepts every config."""

    kinds: Mapping[str, MadeUpNodeType]
    default_model_id: str | None = None

    def get(self, type: str, version: str | None = None) -> NodeType:  # noqa: A002, ARG002 - the protocol's words
        kind = self.kinds[type]
        return NodeType(
            type=type,
            name=type,
            version=kind.version,
            category="test",
            description="",
            effect=EffectRule(kind.effect),
            config_schema={},
            trigger_kind="manual" if type == "start" else None,
            compiled=kind.compiled,
            joins=kind.joins,
            loops=kind.loops,
            outputs=("continue", "done") if kind.loops else ("output",),
        )

    def with_defaults(self, node_type: NodeType, config: Mapping[str, Json]) -> dict[str, Json]:
        return {**self.kinds[node_type.type].defaults, **config}

    def implementation_digest(self, node_type: NodeType) -> bytes:
        return sha256(self.kinds[node_type.type].code).digest()[:PART_BYTES]

    def rendered_config_problems(self, node_type: NodeType, config: Mapping[str, Json]) -> list[Any]:  # noqa: ARG002 - the protocol's signature
        return []

    def config_problems(self, node_type: NodeType, config: Mapping[str, Json]) -> list[Any]:  # noqa: ARG002 - the protocol's signature
        return []


def compile_drawing(
    drawing: str,
    kinds: Mapping[str, MadeUpNodeType] | None = None,
    nodes: Mapping[str, Mapping[str, Json]] | None = None,
    settings: Mapping[str, Json] | None = None,
    trial: Mapping[str, Json] | None = None,
) -> WorkflowProgram:
    """Compile a graph drawn as `start > look > pay1; look:error > pay2` and return the program.

    The type of a node is its id without digits, and `:error` a port. `kinds` are made-up types, and `nodes` further
    fields of nodes by id.
    """
    paths = [[step.strip() for step in path.split(">")] for path in drawing.split(";")]
    edges = [edge for path in paths for edge in pairwise(path)]
    ids = dict.fromkeys(step.partition(":")[0] for path in paths for step in path)
    options = nodes or {}
    stored: Definition = {
        "nodes": [
            {"id": node_id, "type": node_id.rstrip("0123456789"), **options.get(node_id, {})}
            for node_id in ids
        ],
        "connections": [
            {
                "id": f"{source} {target}",
                "source": source.partition(":")[0],
                "sourcePort": source.partition(":")[2],
                "target": target.partition(":")[0],
            }
            for source, target in edges
        ],
        "settings": cast("Json", settings or {}),
        **(trial or {}),
    }
    known: dict[str, MadeUpNodeType] = {
        "start": pure_node(echo_data),
        "echo": pure_node(echo_data),
        **(kinds or {}),
    }
    return WorkflowProgram.compile(
        ParsedGraph.from_stored(stored), MadeUpNodeTypes(known), lambda kind: known[kind].run
    )


def echo_data(call: NodeCall) -> Json:
    return call.data


async def pause_node(call: NodeCall) -> Json:
    await asyncio.sleep(0)
    return call.data


async def wait_forever(_call: NodeCall) -> Json:
    return await asyncio.Event().wait()


def fail_node(call: NodeCall) -> Json:
    raise NodeError(f"{call.idempotency_key} is broken", retryable=True)


class InMemoryJournal:
    """Journal in memory: `rows` and `lines` are committed, the rest would be lost with the worker."""

    def __init__(self, recorded: Sequence[NodeSpan] = ()) -> None:
        self.rows = {(span.node_id, span.iteration): span for span in recorded}
        self.lines: list[LogLine] = []
        self.commits = 0
        self.metadata: dict[str, str] = {}
        self.attempts: dict[tuple[str, str, int], AttemptSpan] = {}
        self.steps: dict[tuple[str, str, int], AgentStep] = {}
        self.done: list[float] = []
        """The part of the run that was done after each step of it."""
        self.is_held = True
        self.may_commit = asyncio.Event()
        self.may_commit.set()
        self.is_committing = asyncio.Event()
        self._told: list[NodeSpan | AttemptSpan | AgentStep | LogLine] = []

    def record(self, span: NodeSpan) -> None:
        self._told.append(span)

    def log(self, line: LogLine) -> None:
        self._told.append(line)

    def record_attempt(self, attempt: AttemptSpan) -> None:
        self._told.append(attempt)

    def record_step(self, step: AgentStep) -> None:
        self._told.append(step)

    def set_metadata(self, metadata: Mapping[str, str]) -> None:
        self.metadata.update(metadata)

    def advance(self, share: float) -> None:
        """Record progress: the share of the run that one more step has done."""
        self.done.append(share + (self.done[-1] if self.done else 0.0))

    def holds_lease(self) -> bool:
        return self.is_held

    async def commit(self) -> None:
        """Commit all records so far, once `may_commit` is set; raises `LeaseLost` without a lease, and loses them."""
        taken, self._told = self._told, []
        if not taken:
            return
        self.is_committing.set()
        await asyncio.sleep(0)
        await self.may_commit.wait()
        self.is_committing.clear()
        if not self.is_held:
            raise LeaseLost
        self.commits += 1
        for one in taken:
            if isinstance(one, NodeSpan):
                self.rows[one.node_id, one.iteration] = one
            elif isinstance(one, AttemptSpan):
                self.attempts[one.node_id, one.iteration, one.attempt] = one
            elif isinstance(one, AgentStep):
                self.steps[one.node_id, one.iteration, one.number] = one
            else:
                self.lines.append(one)

    @property
    def spans(self) -> dict[str, NodeSpan]:
        """Committed spans by node id: of nodes outside of loops, and of loops as a whole."""
        return {node_id: span for (node_id, iteration), span in self.rows.items() if not iteration}

    def status(self, node_id: str, iteration: str = "") -> SpanStatus | None:
        span = self.rows.get((node_id, iteration))
        return None if span is None else span.status

    def output(self, node_id: str, iteration: str = "") -> Json:
        output = self.rows[node_id, iteration].output
        return None if output is None else decode_json(output)

    @property
    def statuses(self) -> dict[str, str]:
        return {node_id: span.status.value for node_id, span in self.spans.items()}


class SpanHistory(InMemoryJournal):
    """Journal that stores every span in the order of its recording."""

    def __init__(self, recorded: Sequence[NodeSpan] = ()) -> None:
        super().__init__(recorded)
        self.stream: list[NodeSpan] = []

    def record(self, span: NodeSpan) -> None:
        super().record(span)
        self.stream.append(span)

    async def commit(self) -> None:
        # Long enough for several branches to arrive meanwhile.
        for _ in range(4):
            await asyncio.sleep(0)
        await super().commit()


class SimulatedWorker:
    """Work of one worker on a run, from its claim on, as an executor does it."""

    def __init__(
        self,
        program: WorkflowProgram,
        trigger: Json = None,
        *,
        recorded: Sequence[NodeSpan] = (),
        seconds: float = 60.0,
        wait_answers: Mapping[tuple[str, str], bytes] | None = None,
        limits: RunLimits = DEFAULT_LIMITS,
        services: NodeServices | None = None,
    ) -> None:
        self.program = program
        self.limits = limits
        self.services = services or NodeServices(http=NoNetwork())
        self.notebook = InMemoryJournal(recorded)
        self.control = RunControl()
        now = datetime.now(UTC)
        self.start = RunStart(
            caller=RunCaller("org_1", "user_1", "wf_1", "exec_2", "exec_1"),
            trigger=trigger,
            clock=DatabaseClock(),
            deadline=now + timedelta(seconds=seconds),
            started_at=now,
            recorded=recorded,
            sequence=max((span.sequence for span in recorded), default=0),
            wait_answers=wait_answers or {},
        )

    async def work(self) -> RunOutcome:
        """Execute the run to its end, or to a wait, commit the records, and return the outcome."""
        ended = await run_workflow(
            self.program, self.start, self.notebook, self.control, self.services, self.limits
        )
        await self.notebook.commit()
        return ended

    def begin(self) -> asyncio.Task[RunOutcome]:
        return asyncio.create_task(self.work())


async def run_to_completion(worker: SimulatedWorker) -> InMemoryJournal:
    """Execute a run, which must complete, and return its journal."""
    assert await worker.work() == RunOutcome(RunStatus.COMPLETED)
    return worker.notebook


async def wait_soon(event: asyncio.Event) -> None:
    await asyncio.wait_for(event.wait(), PATIENCE_SECONDS)


def require_error(ended: RunOutcome) -> RunError:
    assert ended.status is RunStatus.FAILED
    assert ended.error is not None
    return ended.error


# ── waits ───────────────────────────────────────────────────────────────────────────────────────────────────


def expire_waits(notebook: InMemoryJournal) -> list[NodeSpan]:
    """Return the committed spans with the ends of all waits moved into the past."""
    past = datetime.now(UTC) - timedelta(seconds=1)
    return [msgspec.structs.replace(span, wake_at=span.wake_at and past) for span in notebook.rows.values()]


def wait_of(seconds: float) -> RunNode:
    """Return a node that waits for so many seconds, and then outputs its input."""

    def wait(call: NodeCall) -> TimerWait:
        return TimerWait(call.now + timedelta(seconds=seconds), output=call.data)

    return wait


# ── the outside ─────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class OutsideCall:
    """Call that reached the outside world, with its idempotency key."""

    key: str
    body: Json


class OutsideWorld:
    """External systems: they record every call, and the committed state of the run at each moment."""

    def __init__(self) -> None:
        self.effects: list[OutsideCall] = []
        self.moments: list[tuple[list[NodeSpan], list[OutsideCall]]] = []
        self.notebook = InMemoryJournal()

    async def write(self, call: NodeCall) -> Json:
        """Record a call of a node that writes; the worker may die before, within and after it."""
        self.look()
        body: Json = {"config": dict(call.config), "data": call.data}
        self.effects.append(OutsideCall(call.idempotency_key, body))
        self.look()
        await asyncio.sleep(0)
        self.look()
        return {"n": len(call.idempotency_key), "seen": call.data}

    def look(self) -> None:
        """Record a moment at which the worker may die: the committed spans, and the calls so far."""
        self.moments.append((list(self.notebook.rows.values()), list(self.effects)))


class CrashPointJournal(InMemoryJournal):
    """Journal that treats each of its steps as a moment at which the worker may die."""

    def __init__(self, ledger: OutsideWorld, recorded: Sequence[NodeSpan]) -> None:
        super().__init__(recorded)
        self._ledger = ledger
        ledger.notebook = self

    def record(self, span: NodeSpan) -> None:
        super().record(span)
        self._ledger.look()

    async def commit(self) -> None:
        await super().commit()
        self._ledger.look()
