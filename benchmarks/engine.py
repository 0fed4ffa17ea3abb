"""Cost of the engine alone, without database, broker or HTTP: expressions, nodes, loops and large graphs."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Awaitable, Callable, Mapping
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from statistics import median
from time import perf_counter_ns
from typing import TYPE_CHECKING, Any, TypeAlias

from engine.agents.agent_steps import AgentStep
from engine.conditions import compile_condition
from engine.expressions import compile_template, compile_value
from engine.graph import ParsedGraph
from engine.program import WorkflowProgram
from engine.run_records import AttemptSpan, LogLine, NodeSpan, RunStatus
from engine.services import NodeServices, RunCaller, RunControl
from engine.validation import validate_graph
from engine.workflow_runner import RunStart, run_workflow
from models.timestamps import DatabaseClock
from nodes import catalog as catalogs
from tests.node_calls import NoNetwork, call

if TYPE_CHECKING:
    from benchmarks.workflows import BenchmarkWorkflow
    from engine.values import Json

CATALOG = catalogs.load_catalog()
CALLER = RunCaller("org", "user", "wf", "exec", "exec")
ROUNDS = 7
EXPRESSIONS_PER_ROUND = 20_000
CALLS_PER_ROUND = 200
RUNS_PER_ROUND = 300
LOOP_ITEMS = 10_000
LARGE_GRAPH_NODES = 10_000
SCOPE: Mapping[str, Json] = {
    "data": {"user": {"name": "Ada", "tags": ["a", "b"]}, "total": 42, "tier": "gold"},
    "trigger": {"body": {"x": 1}},
    "nodes": {},
    "execution": {"id": "exec"},
}
NODES: Mapping[str, str] = {
    "set": "set",
    "conditional": "conditional",
    "switch": "switch",
    "template": "template",
    "map": "map",
    "filter": "filter",
    "sort": "sort",
    "aggregate": "aggregate",
    "regex": "regex",
    "hash": "hash",
    "date_time": "date-time",
}
"""Kinds of nodes, measured by the first example of each in the catalog."""


Nodes: TypeAlias = "list[dict[str, Any]]"
Connections: TypeAlias = "list[dict[str, Any]]"


async def measure() -> dict[str, float]:
    """Return nanoseconds per expression, microseconds per node and run, milliseconds of a loop and of large graphs."""
    figures = _measure_expressions()
    figures |= await _measure_nodes()
    figures["run_of_three_nodes_us"] = await _measure_run(_build_chain(3))
    figures["run_of_forty_nodes_us"] = await _measure_run(_build_chain(40), runs=RUNS_PER_ROUND // 10)
    figures |= await _measure_loop()
    figures |= await _measure_large_graph()
    return figures


async def measure_run_ms(workflow: BenchmarkWorkflow) -> float:
    """Return the median milliseconds of one run of a workflow that takes a number `x`, without database and HTTP."""
    program = _compile(_build_graph([*map(dict, workflow.nodes)], [*map(dict, workflow.connections)]))
    times: list[float] = []
    for x in range(RUNS_PER_ROUND):
        since = perf_counter_ns()
        await _run(program, {"body": {"x": x}})
        times.append((perf_counter_ns() - since) / 1_000_000)
    return median(times)


class DiscardingJournal:
    """Journal that discards its records, so that only the engine is measured."""

    def __init__(self) -> None:
        self.spans = 0

    def record(self, _span: NodeSpan) -> None:
        self.spans += 1

    def log(self, line: LogLine) -> None:
        """Discard a line."""

    def record_attempt(self, attempt: AttemptSpan) -> None:
        """Discard an attempt."""

    def record_step(self, step: AgentStep) -> None:
        """Discard a step."""

    def set_metadata(self, metadata: Mapping[str, str]) -> None:
        """Discard metadata."""

    def advance(self, share: float) -> None:
        """Discard the progress of the run."""

    async def commit(self) -> None:
        """Do nothing."""

    def holds_lease(self) -> bool:
        return True


# ── expressions and nodes ───────────────────────────────────────────────────────────────────────────────────


def _measure_expressions() -> dict[str, float]:
    path = compile_template("{{ data.user.name }}")
    text = compile_template("Hello, {{ data.user.name }}: {{ data.total }}")
    value = compile_value({"$op": "add", "args": ["{{ data.total }}", 1]})
    condition = compile_condition({"left": "{{ data.total }}", "operator": "greater-than", "right": 10})
    unresolved: list[str] = []
    works: Mapping[str, Callable[[], object]] = {
        "path_ns": lambda: path.render(SCOPE, unresolved),
        "text_ns": lambda: text.render(SCOPE, unresolved),
        "operation_ns": lambda: value.render(SCOPE, unresolved),
        "condition_ns": lambda: condition.test(SCOPE, unresolved),
    }
    return {name: _measure_nanoseconds(work) for name, work in works.items()}


def _measure_nanoseconds(work: Callable[[], object]) -> float:
    """Return the nanoseconds of `work`: the least of several rounds, because disturbances only ever add time."""
    rounds: list[float] = []
    for _ in range(ROUNDS):
        since = perf_counter_ns()
        for _ in range(EXPRESSIONS_PER_ROUND):
            work()
        rounds.append((perf_counter_ns() - since) / EXPRESSIONS_PER_ROUND)
    return min(rounds)


async def _measure_nodes() -> dict[str, float]:
    figures: dict[str, float] = {}
    for name, node_type in NODES.items():
        example = CATALOG.get(node_type).examples[0]
        figures[f"node_{name}_us"] = await _measure_node(node_type, example["config"], example["input"])
    return figures


async def _measure_node(node_type: str, config: Any, data: Json) -> float:  # noqa: ANN401 - JSON of the catalog
    """Return the microseconds of a node: a run of a trigger and the node, minus a run of the trigger alone."""
    await call(node_type, config, data)  # it must work before it is timed
    alone = await _measure_run([{"id": "start", "type": "manual"}], trigger=data)
    graph = [{"id": "start", "type": "manual"}, {"id": "node", "type": node_type, "config": config}]
    return await _measure_run(graph, trigger=data, runs=CALLS_PER_ROUND) - alone


# ── runs ────────────────────────────────────────────────────────────────────────────────────────────────────


def _build_chain(nodes: int) -> Nodes:
    add = {"$op": "add", "args": ["{{ data.sum }}", 1]}
    first = {"$op": "add", "args": ["{{ data.body.x }}", 1]}
    return [
        {"id": "start", "type": "manual"},
        *(
            {"id": f"add-{number}", "type": "set", "config": {"values": {"sum": add if number else first}}}
            for number in range(nodes)
        ),
    ]


def _build_graph(nodes: Nodes, connections: Connections | None = None) -> ParsedGraph:
    """Return a graph of nodes, connected in a row by default."""
    if connections is None:
        connections = [{"source": one["id"], "target": other["id"]} for one, other in pairwise(nodes)]
    edges: Any = [{"id": f"edge-{number}", **edge} for number, edge in enumerate(connections)]
    drawn: Any = nodes
    return ParsedGraph.from_stored({"nodes": drawn, "connections": edges, "settings": {}})


def _compile(graph: ParsedGraph) -> WorkflowProgram:
    return WorkflowProgram.compile(graph, CATALOG, CATALOG.implementation)


async def _run(program: WorkflowProgram, trigger: Json) -> int:
    """Run a program once, to its completion, and return the number of spans that it recorded."""
    now = datetime.now(UTC)
    start = RunStart(
        caller=CALLER,
        trigger=trigger,
        clock=DatabaseClock(),
        deadline=now + timedelta(hours=1),
        started_at=now,
    )
    journal = DiscardingJournal()
    ended = await run_workflow(program, start, journal, RunControl(), NodeServices(http=NoNetwork()))
    assert ended.status is RunStatus.COMPLETED, ended
    return journal.spans


async def _measure_run(nodes: Nodes, *, trigger: Json = None, runs: int = RUNS_PER_ROUND) -> float:
    """Return the microseconds of one run of these nodes, connected in a row."""
    program = _compile(_build_graph(nodes))
    given: Json = {"body": {"x": 1}} if trigger is None else trigger

    async def round_of_runs() -> None:
        for _ in range(runs):
            await _run(program, given)

    return await _measure_milliseconds(round_of_runs) * 1000 / runs


async def _measure_milliseconds(
    work: Callable[[], object | Awaitable[object]], rounds: int = ROUNDS
) -> float:
    times: list[int] = []
    for _ in range(rounds):
        since = perf_counter_ns()
        result = work()
        if inspect.isawaitable(result):
            await result
        times.append(perf_counter_ns() - since)
    return min(times) / 1_000_000


# ── large inputs ────────────────────────────────────────────────────────────────────────────────────────────


async def _measure_loop() -> dict[str, float]:
    """Loop over many items with a body of one node, and run the same node as often in separate runs."""
    config = {"values": {"sum": {"$op": "add", "args": ["{{ item }}", 1]}}, "mode": "replace"}
    body = {"id": "body", "type": "set", "config": config}
    loop = {"id": "loop", "type": "loop", "config": {"items": "{{ data.body.items }}"}}
    connections = [
        {"source": "start", "target": "loop"},
        {"source": "loop", "sourcePort": "continue", "target": "body"},
    ]
    program = _compile(_build_graph([{"id": "start", "type": "manual"}, loop, body], connections))
    trigger: Json = {"body": {"items": list(range(LOOP_ITEMS))}}
    milliseconds = await _measure_milliseconds(lambda: _run(program, trigger), rounds=3)
    longest = await _measure_longest_pause(_run(program, trigger))
    return {
        f"loop_of_{LOOP_ITEMS}_ms": milliseconds,
        "loop_us_per_item": 1000 * milliseconds / LOOP_ITEMS,
        "loop_longest_pause_ms": longest,
    }


async def _measure_large_graph() -> dict[str, float]:
    """Validate, compile and run a chain and a ladder of diamonds, which has two to the power of its length
    paths.
    """
    figures: dict[str, float] = {}
    for name, graph in {
        "chain": _build_graph(_build_chain(LARGE_GRAPH_NODES - 1)),
        "diamonds": _build_diamonds(),
    }.items():
        figures |= {f"{figure}_{name}_ms": took for figure, took in (await _measure_lifecycle(graph)).items()}
    return figures


async def _measure_lifecycle(graph: ParsedGraph) -> dict[str, float]:
    trigger: Json = {"body": {"x": 1}}
    program = _compile(graph)
    return {
        "validate": await _measure_milliseconds(lambda: validate_graph(graph, CATALOG), rounds=3),
        "compile": await _measure_milliseconds(lambda: _compile(graph), rounds=3),
        "run": await _measure_milliseconds(lambda: _run(program, trigger), rounds=3),
        "longest_pause_in": await _measure_longest_pause(_run(program, trigger)),
    }


def _build_diamonds() -> ParsedGraph:
    """Return a graph of diamonds in a row: each branches into two paths that join again."""
    nodes: Nodes = [{"id": "start", "type": "manual"}]
    connections: Connections = []
    before = "start"
    for number in range(LARGE_GRAPH_NODES // 3):
        left, right, join = f"left-{number}", f"right-{number}", f"join-{number}"
        nodes += [
            {"id": node_id, "type": "set", "config": {"values": {"n": number}, "mode": "replace"}}
            for node_id in (left, right, join)
        ]
        connections += [
            {"source": before, "target": left},
            {"source": before, "target": right},
            {"source": left, "target": join},
            {"source": right, "target": join},
        ]
        before = join
    return _build_graph(nodes, connections)


async def _measure_longest_pause(work: Awaitable[object]) -> float:
    """Return the longest time in milliseconds for which `work` kept another task of the event loop waiting."""
    pauses: list[int] = []

    async def beat() -> None:
        while True:
            since = perf_counter_ns()
            await asyncio.sleep(0)
            pauses.append(perf_counter_ns() - since)

    beating = asyncio.create_task(beat())
    await work
    beating.cancel()
    return max(pauses) / 1_000_000


if __name__ == "__main__":
    for figure, measured in asyncio.run(measure()).items():
        print(f"{figure:32} {measured:12,.1f}")
