"""Nodes that the engine completes: loops, questions to people, and other workflows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, cast

import pytest
from msgspec import structs
from msgspec.structs import replace

from engine.graph import ParsedGraph
from engine.node_api import AnswerSource, AnswerWait, LoopRequest, NodeResult, NodeType
from engine.program import WorkflowProgram
from engine.run_errors import NodeError
from engine.run_records import RunOutcome, RunStatus
from engine.services import NodeServices, RunCaller
from engine.values import Json, encode_json
from nodes import catalog
from tests.node_calls import NOW, NoEventWaits, NoNetwork, NoSignalWaits, call
from tests.unit.run_harness import InMemoryJournal, SimulatedWorker, require_error

CATALOG = catalog.load_catalog()
EXAMPLES = [
    pytest.param(CATALOG.get(kind), example, id=f"{kind}-{number}")
    for kind in ("loop", "human-input", "sub-workflow", "wait-for-event", "wait-for-signal")
    for number, example in enumerate(CATALOG.get(kind).examples)
]


@dataclass
class RecordedSubRuns:
    """Sub-workflow service that records requests and starts nothing."""

    asked: list[tuple[str, Json, str, str, bool]] = field(default_factory=list)
    tainted: list[bool] = field(default_factory=list)
    """Whether text of outsiders may be in the inputs, for each start."""

    async def start(
        self,
        caller: RunCaller,
        workflow_id: str,
        trigger_inputs: Json,
        *,
        node_id: str,
        iteration: str,
        awaited: bool,
    ) -> str:
        assert caller.execution_id == "exec_2"
        self.tainted.append(caller.is_tainted)
        self.asked.append((workflow_id, trigger_inputs, node_id, iteration, awaited))
        return "exec_2"

    async def may_write(self, caller: RunCaller, workflow_id: str) -> bool:
        raise AssertionError((caller, workflow_id))


def compile_node(
    kind: str, config: Mapping[str, Json], *, body: bool = True, trigger: str = "manual"
) -> WorkflowProgram:
    """Compile a graph with one node. A loop's body passes each item on unchanged."""
    nodes: list[Json] = [
        {"id": "start", "type": trigger},
        {"id": "node", "type": kind, "config": dict(config)},
        {"id": "body", "type": "merge", "config": {"mode": "any"}},
    ]
    edges: list[Json] = [{"id": "1", "source": "start", "target": "node"}]
    if kind == "loop" and body:
        edges.append({"id": "2", "source": "node", "sourcePort": "continue", "target": "body"})
    return WorkflowProgram.compile(
        ParsedGraph.from_stored({"nodes": nodes, "connections": edges}), CATALOG, CATALOG.implementation
    )


async def run(
    program: WorkflowProgram, data: Json, answer: Json = None, *, is_tainted: bool = False
) -> tuple[RunOutcome, InMemoryJournal, RecordedSubRuns]:
    """Run to the end. Answers to waits arrive as soon as the run waits."""
    runs = RecordedSubRuns()
    services = replace(
        NodeServices(http=NoNetwork()), runs=runs, events=NoEventWaits(), signals=NoSignalWaits()
    )
    worker = SimulatedWorker(program, data, services=services)
    caller = structs.replace(worker.start.caller, is_tainted=is_tainted)
    worker.start = structs.replace(worker.start, caller=caller)
    ended = await worker.work()
    if ended.status is RunStatus.WAITING:
        rows = list(worker.notebook.rows.values())
        wait_answers = {("node", ""): encode_json(answer)}
        worker = SimulatedWorker(program, data, recorded=rows, wait_answers=wait_answers, services=services)
        ended = await worker.work()
    return ended, worker.notebook, runs


@pytest.mark.parametrize(("node_type", "example"), EXAMPLES)
async def test_every_example_comes_true(node_type: NodeType, example: dict[str, Any]) -> None:
    answer = {"output": example.get("output"), "port": example["port"]}
    ended, notebook, _ = await run(compile_node(node_type.type, example["config"]), example["input"], answer)
    if "error" in example:
        assert require_error(ended).message == example["error"]
        return
    assert ended == RunOutcome(RunStatus.COMPLETED)
    assert notebook.output("node") == example["output"]
    expected = "done" if node_type.loops else example["port"]
    assert notebook.spans["node"].port == expected


# ── loop ──────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("config", "data", "expected"),
    [
        ({}, [1, 2], LoopRequest([1, 2])),
        ({"items": [3]}, [1, 2], LoopRequest([3])),
        ({"items": "{{ data.rows }}", "concurrency": 100}, {"rows": []}, LoopRequest([], concurrency=100)),
        ({"onItemError": "continue"}, [], LoopRequest([], continues_on_error=True)),
        ({"concurrency": "{{ data[0] }}"}, [7], LoopRequest([7], concurrency=7)),
    ],
)
async def test_a_loop_takes_its_items_from_its_config_or_from_the_data(
    config: dict[str, Json], data: Json, expected: LoopRequest
) -> None:
    assert (await call("loop", config, data)).outcome == expected


@pytest.mark.parametrize(
    ("config", "data", "word"),
    [
        ({}, {"rows": []}, "`items` must be a list"),
        ({}, None, "`items` must be a list"),
        ({"items": "{{ data }}"}, "text", "`items` must be a list"),
        ({"concurrency": "{{ data[0] }}"}, [101], "from 1 to 100"),
        ({"onItemError": "{{ data[0] }}"}, ["stop"], "one of fail, continue"),
    ],
)
async def test_a_loop_refuses_values_that_are_no_lists(
    config: dict[str, Json], data: Json, word: str
) -> None:
    with pytest.raises(NodeError, match=word):
        await call("loop", config, data)


# ── human input ───────────────────────────────────────────────────────────────────────────────────────────


async def test_a_person_is_asked_in_the_words_of_the_config() -> None:
    schema: Json = {"type": "object", "properties": {"amount": {"type": "number"}}}
    config: dict[str, Json] = {
        "title": "Refund order {{ data.order }}?",
        "description": "It cost {{ data.price }}.",
        "schema": schema,
        "choices": [{"port": "yes", "label": "Refund"}, {"port": "no"}],
        "expiresInSeconds": "{{ data.seconds }}",
        "onExpiry": "continue",
    }
    called = await call("human-input", config, {"order": 7, "price": 9.5, "seconds": 60})
    assert called.outcome == AnswerWait(
        AnswerSource.INPUT,
        request={
            "title": "Refund order 7?",
            "description": "It cost 9.5.",
            "schema": schema,
            "choices": [{"port": "yes", "label": "Refund"}, {"port": "no", "label": "no"}],
            "approvals": 1,
        },
        expires_at=NOW + timedelta(seconds=60),
        expired=NodeResult({"data": None, "choice": None, "by": None, "at": None}, port="expired"),
    )


async def test_a_question_waits_for_ever_unless_it_says_otherwise() -> None:
    called = await call("human-input", {"title": "Really?"})
    assert called.outcome == AnswerWait(AnswerSource.INPUT, request={"title": "Really?", "approvals": 1})


@pytest.mark.parametrize(
    ("config", "word"),
    [
        ({"title": "{{ data }}"}, "`title` must be a text"),
        ({"title": "x", "expiresInSeconds": "{{ data[0] }}"}, "from 1 to 31,536,000"),
        ({"title": "x", "onExpiry": "{{ data[0] }}"}, "one of fail, continue"),
    ],
)
async def test_a_question_that_makes_no_sense_fails(config: dict[str, Json], word: str) -> None:
    with pytest.raises(NodeError, match=word):
        await call("human-input", config, [0])


def test_each_choice_is_a_port() -> None:
    config: dict[str, Json] = {"title": "x", "choices": [{"port": "yes"}, {"port": "no"}]}
    ports = CATALOG.get("human-input").outputs_of(config)
    assert ports == ("yes", "no", "output", "expired")
    for port in ("error", "expired", "a b", ""):
        problems = CATALOG.config_problems(
            CATALOG.get("human-input"), {**config, "choices": [{"port": port}]}
        )
        assert problems, port


# ── sub-workflow ──────────────────────────────────────────────────────────────────────────────────────────


async def test_a_sub_workflow_starts_with_the_data_or_the_configured_inputs() -> None:
    answer: Json = {"output": 1}
    _, _, runs = await run(compile_node("sub-workflow", {"workflowId": "wf_2"}), {"a": 1}, answer)
    assert runs.asked == [("wf_2", {"a": 1}, "node", "", True)]
    config: dict[str, Json] = {"workflowId": "wf_2", "inputs": {"b": "{{ data.a }}"}, "wait": False}
    ended, notebook, runs = await run(compile_node("sub-workflow", config), {"a": 1})
    assert ended.status is RunStatus.COMPLETED
    assert runs.asked == [("wf_2", {"b": 1}, "node", "", False)]
    assert notebook.output("node") == {"executionId": "exec_2"}


@pytest.mark.parametrize(
    ("trigger", "is_tainted", "expected"),
    [
        ("manual", False, False),
        ("webhook", False, True),
        ("email-trigger", False, True),
        ("manual", True, True),
    ],
)
async def test_a_sub_workflow_knows_whether_outsiders_may_have_written_its_inputs(
    trigger: str,
    is_tainted: bool,  # noqa: FBT001 - pytest passes arguments by name
    expected: bool,  # noqa: FBT001 - as above
) -> None:
    program = compile_node("sub-workflow", {"workflowId": "wf_1", "wait": False}, trigger=trigger)
    _, _, runs = await run(program, {"text": "Hello"}, is_tainted=is_tainted)
    assert runs.tainted == [expected]


async def test_the_failure_of_a_sub_workflow_fails_the_node() -> None:
    answer: Json = {"error": {"code": "run-failed", "message": "The other run failed"}}
    ended, notebook, _ = await run(compile_node("sub-workflow", {"workflowId": "wf_2"}), None, answer)
    assert require_error(ended).message == "The other run failed"
    assert cast("Any", notebook.spans["node"].error).code == "run-failed"
