"""Replays over HTTP: plan, refusals, and runs on real databases with a ledger of all writes."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any
from uuid import uuid4

import httpx2
import pytest

from engine.services import NodeServices
from execution.executor import RunExecutor
from journal.blobs.blob_storage import BlobOwner
from messages.local_broker import LocalBroker
from models.execution_status import TERMINAL_STATUSES
from nodes.catalog import load_catalog
from nodes.outbound_http import OutboundOutageCode, OutboundUnavailable
from tests.integration.gateway_harness import GatewayHarness, OrganizationUsers, UserClient, assert_refused
from tests.unit.test_agent_runs import ScriptedModel, turn
from workers.settings import WorkerSettings

EXECUTIONS = "/api/v1/executions"
PATIENCE_SECONDS = 30.0
LARGE = "x" * 4_000
AGENT_TURNS = [turn(("look", "Oslo"), ("look", "Rome")), turn(("send", "Oslo")), turn(("look", "Kyiv"))]


@dataclass
class LedgerAnswer:
    """Answer of the ledger."""

    status: int = 200
    headers: Mapping[str, str] = field(default_factory=lambda: {"content-type": "application/json"})
    body: bytes = b'{"ok":true}'
    url: str = ""


@dataclass
class Ledger:
    """Outside server: it notes every write, and fails where it is told to."""

    writes: list[tuple[str, str, bytes | None]] = field(default_factory=list)
    """Path, idempotency key and body of each write."""
    failing: dict[str, int] = field(default_factory=dict)
    """Status by path; 0: the answer is lost."""
    reads: list[str] = field(default_factory=list)
    """Paths of the other requests."""

    async def request(
        self, method: str, url: str, *, headers: Mapping[str, str], body: bytes | None, **_options: object
    ) -> LedgerAnswer:
        path = url.removeprefix("http://ledger")
        await asyncio.sleep(0)
        if method not in {"GET", "HEAD"}:
            self.writes.append((path, headers["Idempotency-Key"], body))
        else:
            self.reads.append(path)
        status = self.failing.get(path, 200)
        if status == 0:
            raise OutboundUnavailable(OutboundOutageCode.TIMED_OUT, "no answer")
        return LedgerAnswer(status)

    @property
    def paths(self) -> list[str]:
        return [path for path, _, _ in self.writes]


@dataclass
class ReplayHarness:
    """Gateway, executor and ledger."""

    person: UserClient
    ledger: Ledger
    executor: RunExecutor
    model: ScriptedModel

    async def create(self, nodes: list[dict[str, Any]], *edges: str, **fields: Any) -> str:  # noqa: ANN401 - any JSON value
        return await self.person.create(**drawn(nodes, *edges), **fields)

    async def run(self, workflow_id: str, **body: Any) -> str:  # noqa: ANN401 - any JSON value
        answer = await self.person.api.post(f"/api/v1/workflows/{workflow_id}/execute", json=body)
        assert answer.status_code == 201, answer.text
        return await self.wait(answer.json()["executionId"])

    async def wait(self, execution_id: str) -> str:
        async with asyncio.timeout(PATIENCE_SECONDS):
            while (await self.show(execution_id))["status"] not in TERMINAL_STATUSES:
                self.executor.wake()
                await asyncio.sleep(0.01)
        return execution_id

    async def show(self, execution_id: str) -> dict[str, Any]:
        answer = await self.person.api.get(f"{EXECUTIONS}/{execution_id}")
        shown: dict[str, Any] = answer.json()
        return shown

    async def spans(self, execution_id: str) -> dict[str, dict[str, Any]]:
        answer = await self.person.api.get(f"{EXECUTIONS}/{execution_id}/spans?limit=500")
        return {span["nodeId"]: span for span in answer.json()["spans"] if not span["iteration"]}

    async def post(self, execution_id: str, what: str = "replay", **body: Any) -> httpx2.Response:  # noqa: ANN401 - any JSON value
        headers = body.pop("headers", None)
        given = None if what == "resume" and not body else body
        return await self.person.api.post(f"{EXECUTIONS}/{execution_id}/{what}", json=given, headers=headers)

    async def plan(self, execution_id: str, **body: Any) -> dict[str, Any]:  # noqa: ANN401 - any JSON value
        answer = await self.post(execution_id, dryRun=True, **body)
        assert answer.status_code == 200, answer.text
        plan: dict[str, Any] = answer.json()
        return plan

    async def replay(self, execution_id: str, **body: Any) -> str:  # noqa: ANN401 - any JSON value
        answer = await self.post(execution_id, **body)
        assert answer.status_code == 201, answer.text
        assert answer.json()["replayOf"] == execution_id
        return await self.wait(answer.json()["executionId"])

    async def change(self, workflow_id: str, nodes: list[dict[str, Any]], *edges: str) -> None:
        graph = drawn(nodes, *edges)
        answer = await self.person.api.put(f"/api/v1/workflows/{workflow_id}", json=graph)
        assert answer.status_code == 200, answer.text


def drawn(nodes: list[dict[str, Any]], *edges: str) -> dict[str, Any]:
    """Return a graph whose edges are drawn as `a > b:port > c`."""
    connections = []
    for path in edges:
        steps = path.split(" > ")
        for source, target in pairwise(steps):
            node_id, _, port = source.partition(":")
            edge = {"sourceNodeId": node_id, "targetNodeId": target.partition(":")[0]}
            connections.append({**edge, **({"sourcePort": port} if port else {})})
    return {"nodes": [{"id": "start", "nodeId": "manual", "config": {}}, *nodes], "connections": connections}


def step(node_id: str, **values: Any) -> dict[str, Any]:  # noqa: ANN401 - any JSON value
    return {"id": node_id, "nodeId": "set", "config": {"mode": "replace", "values": values}}


def post(node_id: str, **config: Any) -> dict[str, Any]:  # noqa: ANN401 - any JSON value
    request = {"method": "POST", "url": f"http://ledger/{node_id}", "body": {"data": "{{ data }}"}}
    return {"id": node_id, "nodeId": "http-request", "config": {**request, **config}}


def decisions(plan: dict[str, Any]) -> dict[str, str]:
    return {node["nodeId"]: node["decision"] for node in plan["nodes"]}


@pytest.fixture
async def harness_of(harness: GatewayHarness, people: OrganizationUsers) -> AsyncIterator[ReplayHarness]:
    ledger, model = Ledger(), ScriptedModel(AGENT_TURNS)
    async with run_executor(harness, ledger, model) as executor:
        yield ReplayHarness(people.owner, ledger, executor, model)


@asynccontextmanager
async def run_executor(
    harness: GatewayHarness, ledger: Ledger, model: ScriptedModel | None = None
) -> AsyncIterator[RunExecutor]:
    executor = RunExecutor(
        harness.gateway.store,
        LocalBroker(channel=uuid4().hex),
        load_catalog(),
        NodeServices(http=ledger) if model is None else NodeServices(http=ledger, models=model),
        WorkerSettings(
            lease_seconds=3600, sweep_seconds=3600, commit_seconds=0.02, max_row_output_bytes=1_024
        ),
        blobs=harness.gateway.blobs,
    )
    await executor.start()
    try:
        yield executor
    finally:
        await executor.drain()


# ── the common repair ───────────────────────────────────────────────────────────────────────────────────────


async def test_a_failed_run_goes_on_behind_the_last_good_node_with_the_mended_graph(
    harness_of: ReplayHarness,
) -> None:
    here = harness_of
    edges = "start > pay > note > send > last"
    nodes = [post("pay"), step("note", text="a"), post("send"), step("last", done=True)]
    workflow_id = await here.create(nodes, edges)
    here.ledger.failing = {"/send": 422}
    failed = await here.run(workflow_id, inputs={"order": 7})
    assert (await here.show(failed))["status"] == "failed"
    nodes[2] = post("send", url="http://ledger/sent")
    await here.change(workflow_id, nodes, edges)
    plan = await here.plan(failed, definition="current")
    assert plan["counts"] == {"reuse": 3, "rerun": 2, "maybe": 0, "ask": 0}
    assert plan["definition"] == "current"
    (mended,) = [node for node in plan["nodes"] if node["nodeId"] == "send"]
    assert mended["reasons"] == [{"code": "failed", "paths": []}]
    replayed = await here.replay(failed, definition="current", planHash=plan["planHash"])
    shown = await here.show(replayed)
    assert (shown["status"], shown["replayOf"], shown["resumedFrom"]) == ("completed", failed, None)
    assert shown["trigger"]["data"] == {"body": {"order": 7}}
    assert Counter(here.ledger.paths) == {"/pay": 1, "/send": 1, "/sent": 1}
    spans = await here.spans(replayed)
    assert {name: span["reusedFrom"] for name, span in spans.items()} == {
        "start": failed, "pay": failed, "note": failed, "send": None, "last": None,
    }  # fmt: skip
    # The failed write was refused, so it runs with a key of the new run.
    assert here.ledger.writes[-1][1] == f"{replayed}:send:0"


async def test_an_unknown_end_is_repeated_under_the_recorded_key_and_only_as_it_was(
    harness_of: ReplayHarness,
) -> None:
    here = harness_of
    workflow_id = await here.create([post("pay")], "start > pay")
    here.ledger.failing = {"/pay": 0}
    failed = await here.run(workflow_id, inputs={"order": 7})
    assert decisions(await here.plan(failed)) == {"start": "reuse", "pay": "rerun"}
    assert decisions(await here.plan(failed, input={"order": 8})) == {"start": "rerun", "pay": "ask"}
    # The second attempt fails too; a third, the replay of a replay, still has the first key.
    second = await here.replay(failed)
    here.ledger.failing = {}
    third = await here.replay(second)
    assert (await here.show(third))["status"] == "completed"
    assert {key for _, key, _ in here.ledger.writes} == {f"{failed}:pay:0"}
    assert len({body for _, _, body in here.ledger.writes}) == 1


async def test_writes_are_repeated_only_if_they_are_named(harness_of: ReplayHarness) -> None:
    here = harness_of
    workflow_id = await here.create([step("note", n="{{ data.body.n }}"), post("pay")], "start > note > pay")
    done = await here.run(workflow_id, inputs={"n": 1})
    assert decisions(await here.plan(done)) == {"start": "reuse", "note": "reuse", "pay": "reuse"}
    refused = await here.post(done, input={"n": 2})
    assert_refused(refused, 409, "confirmation-required")
    (detail,) = refused.json()["error"]["details"]
    assert decisions(detail["plan"]) == {"start": "rerun", "note": "rerun", "pay": "ask"}
    assert len(here.ledger.writes) == 1
    stale = await here.post(done, input={"n": 2}, confirm=["pay"], planHash="0" * 64)
    assert_refused(stale, 409, "plan-changed")
    plan = detail["plan"]["planHash"]
    replayed = await here.replay(done, input={"n": 2}, confirm=["pay"], planHash=plan)
    assert [(path, key) for path, key, _ in here.ledger.writes] == [
        ("/pay", f"{done}:pay:0"),
        ("/pay", f"{replayed}:pay:0"),
    ]
    assert json.loads(here.ledger.writes[-1][2] or b"") == {"data": {"n": 2}}


@pytest.mark.every_database
async def test_a_write_that_is_left_out_sends_nothing_and_the_nodes_behind_it_go_on_or_are_skipped(
    harness_of: ReplayHarness,
) -> None:
    here = harness_of
    nodes = [
        step("note", n="{{ data.body.n }}"),
        post("pay"),
        step("thank", done=True),
        step("log", done=True),
    ]
    edges = ("start > note > pay > thank", "note > log")
    workflow_id = await here.create(nodes, *edges)
    done = await here.run(workflow_id, inputs={"n": 1})
    plan = await here.plan(done, input={"n": 2}, skip=["pay"])
    assert decisions(plan) == {
        "start": "rerun",
        "note": "rerun",
        "pay": "reuse",
        "thank": "maybe",
        "log": "maybe",
    }
    (pay,) = [node for node in plan["nodes"] if node["nodeId"] == "pay"]
    assert (pay["reasons"], pay["skippable"]) == ([{"code": "left-out", "paths": []}], True)
    assert plan["planHash"] != (await here.plan(done, input={"n": 2}))["planHash"]
    stale = await here.post(done, input={"n": 2}, confirm=["pay"], planHash=plan["planHash"])
    assert_refused(stale, 409, "plan-changed")
    replayed = await here.replay(done, input={"n": 2}, skip=["pay"], planHash=plan["planHash"])
    assert (await here.show(replayed))["status"] == "completed"
    spans = await here.spans(replayed)
    assert {name: span["reusedFrom"] for name, span in spans.items()} == {
        "start": None,
        "note": None,
        "pay": done,
        "thank": done,
        "log": None,
    }
    assert here.ledger.paths == ["/pay"]

    here.ledger.failing = {"/pay": 0}
    failed = await here.run(workflow_id, inputs={"n": 3})
    plan = await here.plan(failed, skip=["pay"])
    assert {name: what for name, what in decisions(plan).items() if what == "skip"} == {
        "pay": "skip",
        "thank": "skip",
    }
    assert plan["counts"]["skip"] == 2
    replayed = await here.replay(failed, skip=["pay"])
    assert (await here.show(replayed))["status"] == "completed"
    spans = await here.spans(replayed)
    assert {name: span["status"] for name, span in spans.items()} == {
        "start": "completed",
        "note": "completed",
        "log": "completed",
        "pay": "skipped",
        "thank": "skipped",
    }
    assert here.ledger.paths == ["/pay", "/pay"]
    # It may have happened before it was left out: the same request keeps its key, and another is refused.
    refused = await here.show(await here.replay(replayed, input={"n": 4}))
    assert (refused["status"], refused["error"]["cause"]["code"]) == ("failed", "write-needs-confirm")
    here.ledger.failing = {}
    again = await here.replay(replayed, again=True)
    assert (await here.show(again))["status"] == "completed"
    assert here.ledger.writes[-1][1] == f"{failed}:pay:0"


async def test_a_write_that_was_never_reached_and_a_loop_that_writes_are_left_out(
    harness_of: ReplayHarness,
) -> None:
    here = harness_of
    loop = {"id": "loop", "nodeId": "loop", "config": {"items": [1, 2]}}
    nodes = [post("first"), loop, post("each"), post("last"), step("end", done=True)]
    workflow_id = await here.create(
        nodes, "start > first > loop", "loop:continue > each", "loop:done > last > end"
    )
    here.ledger.failing = {"/first": 422}
    failed = await here.run(workflow_id)
    here.ledger.failing = {}
    plan = await here.plan(failed, skip=["last"])
    assert decisions(plan)["last"] == decisions(plan)["end"] == "skip"
    skippable = {node["nodeId"] for node in plan["nodes"] if node["skippable"]}
    assert skippable == {"first", "loop", "last"}
    replayed = await here.replay(failed, skip=["last"])
    spans = await here.spans(replayed)
    assert (spans["last"]["status"], spans["end"]["status"]) == ("skipped", "skipped")
    assert Counter(here.ledger.paths) == {"/first": 2, "/each": 2}
    without = await here.replay(failed, skip=["loop"], again=True)
    spans = await here.spans(without)
    assert {name for name, span in spans.items() if span["status"] == "skipped"} == {
        "loop",
        "each",
        "last",
        "end",
    }
    assert Counter(here.ledger.paths) == {"/first": 3, "/each": 2}
    for body, code in (
        ({"skip": ["each"]}, "in-loop"),
        ({"skip": ["end"]}, "not-a-write"),
        ({"skip": ["pey"]}, "unknown-node"),
        ({"skip": ["last"], "confirm": ["last"]}, "ambiguous"),
    ):
        refused = await here.post(failed, "replay", **body)
        assert_refused(refused, 422, "validation-failed")
        assert [one["code"] for one in refused.json()["error"]["details"]] == [code]


async def test_writes_in_a_loop_that_a_replay_has_left_out_or_reused_are_asked_for_by_later_replays(
    harness_of: ReplayHarness,
) -> None:
    here = harness_of
    loop = {"id": "loop", "nodeId": "loop", "config": {"items": [1, 2]}}
    nodes = [loop, post("each"), post("then"), step("end", done=True)]
    workflow_id = await here.create(nodes, "start > loop", "loop:continue > each > then", "loop:done > end")
    here.ledger.failing = {"/then": 422}
    failed = await here.run(workflow_id)
    here.ledger.failing = {}
    written = len(here.ledger.writes)
    without = await here.replay(failed, skip=["loop"])
    twice = await here.replay(without, skip=["loop"])
    for source in (without, twice):
        assert decisions(await here.plan(source, again=True))["each"] == "ask"
        assert_refused(await here.post(source, again=True), 409, "confirmation-required")
    assert len(here.ledger.writes) == written

    done = await here.run(workflow_id)
    reused = await here.replay(done, **{"from": ["end"]})
    for choice in ({}, {"failedOnly": True}):
        plan = decisions(await here.plan(reused, **{"from": ["loop"]}, **choice))
        assert (plan["each"], plan["then"]) == ("ask", "ask"), choice


async def test_a_refused_write_that_was_left_out_is_sent_later_under_a_key_of_its_own(
    harness_of: ReplayHarness,
) -> None:
    here = harness_of
    nodes = [step("note", n="{{ data.body.n }}"), post("pay")]
    workflow_id = await here.create(nodes, "start > note > pay")
    here.ledger.failing = {"/pay": 422}
    failed = await here.run(workflow_id, inputs={"n": 1})
    here.ledger.failing = {}
    without = await here.replay(failed, skip=["pay"])
    assert decisions(await here.plan(without, input={"n": 2}))["pay"] == "maybe"
    replayed = await here.replay(without)
    assert here.ledger.writes[-1][1] == f"{replayed}:pay:0"


async def test_an_unchanged_output_stops_the_rerun_and_a_changed_one_a_write(
    harness_of: ReplayHarness,
) -> None:
    here = harness_of
    edges = "start > first > second > pay"
    nodes = [step("first", n=1), step("second", n="{{ data.n }}"), post("pay")]
    workflow_id = await here.create(nodes, edges)
    done = await here.run(workflow_id)
    plan = await here.plan(done, **{"from": ["first"]})
    assert decisions(plan) == {"start": "reuse", "first": "rerun", "second": "maybe", "pay": "maybe"}
    same = await here.replay(done, **{"from": ["first"]})
    spans = await here.spans(same)
    assert [spans[name]["reusedFrom"] for name in ("first", "second", "pay")] == [None, done, done]
    assert spans["pay"]["endedAt"] == (await here.spans(done))["pay"]["endedAt"]
    await here.change(workflow_id, [step("first", n=2), *nodes[1:]], edges)
    refused = await here.replay(done, definition="current", again=True)
    shown = await here.show(refused)
    assert (shown["status"], shown["error"]["cause"]["code"]) == ("failed", "write-needs-confirm")
    assert here.ledger.paths == ["/pay"]
    # A candidate that was not reached is shown nowhere, and is not forgotten.
    assert set(await here.spans(refused)) == {"start", "first", "second", "pay"}
    again = await here.post(refused, definition="current")
    assert_refused(again, 409, "confirmation-required")
    resumed = await here.wait((await here.post(refused, "resume")).json()["executionId"])
    assert (await here.show(resumed))["error"]["cause"]["code"] == "write-needs-confirm"
    assert here.ledger.paths == ["/pay"]


async def test_candidates_outlive_a_failure_before_they_are_reached(harness_of: ReplayHarness) -> None:
    here = harness_of
    edges = "start > first > second > pay"
    nodes = [step("first", n=1), step("second", n="{{ data.n }}"), post("pay")]
    workflow_id = await here.create(nodes, edges)
    done = await here.run(workflow_id)
    await here.change(workflow_id, [step("first", n="{{ data.nothing }}"), *nodes[1:]], edges)
    failed = await here.replay(done, definition="current")
    assert (await here.show(failed))["status"] == "failed"
    assert set(await here.spans(failed)) == {"start", "first"}
    await here.change(workflow_id, [step("first", n=1), *nodes[1:]], edges)
    plan = await here.plan(failed, definition="current")
    assert decisions(plan) == {"start": "reuse", "first": "rerun", "second": "maybe", "pay": "maybe"}
    mended = await here.replay(failed, definition="current")
    assert (await here.show(mended))["status"] == "completed"
    assert {name: span["reusedFrom"] for name, span in (await here.spans(mended)).items()} == {
        "start": done, "first": None, "second": done, "pay": done,
    }  # fmt: skip
    assert here.ledger.paths == ["/pay"]


# ── the walk of "When a run fails" ──────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Repair:
    """Workflow that fails, and the change or the request that repairs it."""

    nodes: list[dict[str, Any]]
    edges: tuple[str, ...]
    failing: dict[str, int]
    cause: str
    """Code of the node's error."""
    mended: list[dict[str, Any]] | None = None
    replay: dict[str, Any] = field(default_factory=dict)
    writes: dict[str, int] = field(default_factory=dict)
    """Number of requests by path at the end."""


ITEMS: dict[str, Any] = {"id": "each", "nodeId": "loop", "config": {"items": [1, 2]}}
ITEM = post("pay", url="http://ledger/pay/{{ item }}")
CURRENT: dict[str, Any] = {"definition": "current"}
REPAIRS = {
    "a wrong URL": Repair(
        [post("pay"), post("tell")],
        ("start > pay > tell",),
        {"/tell": 404},
        "http-404",
        [post("pay"), post("tell", url="http://ledger/told")],
        CURRENT,
        {"/pay": 1, "/tell": 1, "/told": 1},
    ),
    "a misspelled path": Repair(
        [post("pay"), step("sum", total="{{ data.body.totl }}"), post("tell")],
        ("start > pay > sum > tell",),
        {},
        "unresolved-mapping",
        [post("pay"), step("sum", total="{{ data.body.ok }}"), post("tell")],
        CURRENT,
        {"/pay": 1, "/tell": 1},
    ),
    "a server that was away": Repair(
        [post("pay"), post("tell")],
        ("start > pay > tell",),
        {"/tell": 0},
        "timed-out",
        replay={},
        writes={"/pay": 1, "/tell": 2},
    ),
    "an item of a loop": Repair(
        [ITEMS, ITEM, post("tell")],
        ("start > each", "each:continue > pay", "each:done > tell"),
        {"/pay/2": 422},
        "http-422",
        replay={},
        writes={"/pay/1": 1, "/pay/2": 2, "/tell": 1},
    ),
    "wrong inputs": Repair(
        [step("check", order="{{ data.body.order }}"), post("pay")],
        ("start > check > pay",),
        {},
        "unresolved-mapping",
        replay={"input": {"order": 7}},
        writes={"/pay": 1},
    ),
}


@pytest.mark.parametrize("repair", REPAIRS.values(), ids=REPAIRS.keys())
async def test_a_failed_run_is_found_explained_mended_replayed_and_proved(
    harness_of: ReplayHarness, repair: Repair
) -> None:
    here = harness_of
    workflow_id = await here.create(repair.nodes, *repair.edges)
    here.ledger.failing = dict(repair.failing)
    failed = await here.run(workflow_id)
    listed = (await here.person.api.get(f"{EXECUTIONS}?workflow_id={workflow_id}&status=failed")).json()
    assert [one["id"] for one in listed["executions"]] == [failed]
    assert (await here.show(failed))["error"]["cause"]["code"] == repair.cause
    assert (await here.person.api.get(f"{EXECUTIONS}/{failed}/why")).json()["status"] == "failed"
    if repair.mended is not None:
        await here.change(workflow_id, repair.mended, *repair.edges)
    here.ledger.failing = {}
    before = {path: key for path, key, _ in here.ledger.writes}
    replayed = await here.replay(failed, **repair.replay)
    assert (await here.show(replayed))["status"] == "completed"
    assert Counter(here.ledger.paths) == repair.writes
    # What was written before has its old key, or was refused and has a new one.
    for path, key, _ in here.ledger.writes[len(before) :]:
        is_repeated = path in before and repair.failing.get(path) == 0
        assert key == (before[path] if is_repeated else f"{replayed}:{key.partition(':')[2]}")


# ── loops, blobs, versions ──────────────────────────────────────────────────────────────────────────────────

LOOP_EDGES = ("start > each", "each:continue > pay > check", "each:done > last")


async def test_a_loop_runs_its_failed_iterations_alone_also_with_a_mended_body(
    harness_of: ReplayHarness,
) -> None:
    here = harness_of
    loop = {"id": "each", "nodeId": "loop", "config": {"items": "{{ data.body.items }}"}}
    pay = post("pay", url="http://ledger/pay/{{ item }}")
    check = post("check", url="http://ledger/check/{{ nodes.each.item }}", method="PUT")
    workflow_id = await here.create([loop, pay, check, step("last", done=True)], *LOOP_EDGES)
    here.ledger.failing = {"/check/2": 422}
    failed = await here.run(workflow_id, inputs={"items": [1, 2, 3]})
    assert (await here.show(failed))["status"] == "failed"
    before = Counter(here.ledger.paths)
    plan = await here.plan(failed)
    (each,) = [node for node in plan["nodes"] if node["nodeId"] == "each"]
    assert (each["decision"], each["failedOnly"], plan["counts"]["ask"]) == ("rerun", True, 0)
    mended = {**check, "config": {**check["config"], "headers": {"X-Mended": "yes"}}}
    await here.change(workflow_id, [loop, pay, mended, step("last", done=True)], *LOOP_EDGES)
    assert_refused(await here.post(failed, definition="current"), 409, "confirmation-required")
    here.ledger.failing = {}
    replayed = await here.replay(failed, definition="current", failedOnly=True)
    assert (await here.show(replayed))["status"] == "completed"
    after = Counter(here.ledger.paths) - before
    assert {path for path in after if path.startswith("/pay")} <= {"/pay/3"} - set(before)
    assert "/check/1" not in after
    assert after["/check/2"] == 1
    assert (await here.spans(replayed))["each"]["outputData"]["count"] == 3


async def test_large_results_are_reused_and_a_lost_one_is_a_reason(
    harness: GatewayHarness, harness_of: ReplayHarness
) -> None:
    here = harness_of
    broken = {"id": "last", "nodeId": "stop-with-error", "config": {"message": "no"}}
    edges = "start > big > size > last"
    nodes = [step("big", text=LARGE), step("size", first="{{ data.text }}"), broken]
    workflow_id = await here.create(nodes, edges)
    failed = await here.run(workflow_id)
    await here.change(workflow_id, [*nodes[:2], step("last", same="{{ data.first }}")], edges)
    replayed = await here.replay(failed, definition="current")
    output = (await here.person.api.get(f"{EXECUTIONS}/{replayed}?expand=blobs")).json()["outputs"]["last"]
    assert output == {"same": LARGE}
    # The blobs belong to the whole chain, and stay while one run of it is left.
    deleted = await here.person.api.post(
        f"{EXECUTIONS}/bulk-delete", json={"filter": {"workflowId": workflow_id, "status": "failed"}}
    )
    assert deleted.json()["affected"] == 1
    shown = (await here.person.api.get(f"{EXECUTIONS}/{replayed}?expand=blobs")).json()
    assert shown["outputs"]["big"] == {"text": LARGE}
    owner = (await here.show(replayed))["organizationId"]
    await harness.gateway.blobs.delete_all([BlobOwner(owner, failed)])
    plan = await here.plan(replayed)
    assert {node["nodeId"]: node["reasons"][0]["code"] for node in plan["nodes"]}["big"] == "result-expired"


@pytest.mark.every_database
async def test_a_version_can_be_replayed_and_an_unknown_one_is_refused(harness_of: ReplayHarness) -> None:
    here = harness_of
    workflow_id = await here.create([step("note", n=1)], "start > note")
    done = await here.run(workflow_id)
    await here.change(workflow_id, [step("note", n=2)], "start > note")
    tagged = await here.person.api.post(
        f"/api/v1/workflows/{workflow_id}/versions", json={"versionTag": "v2"}
    )
    number = tagged.json()["version"]
    await here.change(workflow_id, [step("note", n=3)], "start > note")
    plan = await here.plan(done, definition=number)
    assert (plan["definition"], decisions(plan)["note"]) == (f"version {number}", "rerun")
    replayed = await here.replay(done, definition=number)
    assert (await here.show(replayed))["outputs"]["note"] == {"n": 2}
    assert_refused(await here.post(done, definition=99, again=True), 422, "validation-failed")


@pytest.mark.every_database
async def test_many_runs_are_replayed_by_a_filter_after_a_dry_run(harness_of: ReplayHarness) -> None:
    here = harness_of
    nodes = [step("first", n=1), post("pay"), step("last", n="{{ data.missing }}")]
    edges = "start > first > pay > last"
    workflow_id = await here.create(nodes, edges)
    failed = [await here.run(workflow_id) for _ in range(3)]
    await here.replay(failed[0])
    await here.change(workflow_id, [*nodes[:2], step("last", n=1)], edges)
    body: dict[str, Any] = {
        "filter": {"workflowId": workflow_id, "status": "failed"},
        "definition": "current",
    }
    api = here.person.api
    preview = (await api.post(f"{EXECUTIONS}/bulk-replay", json={**body, "dryRun": True})).json()
    assert (preview["matched"], preview["affected"], preview["newExecutionIds"]) == (3, 0, [])
    assert preview["counts"] == {"reuse": 9, "rerun": 3, "maybe": 0, "ask": 0}
    once = {"Idempotency-Key": uuid4().hex}
    answers = [await api.post(f"{EXECUTIONS}/bulk-replay", json=body, headers=once) for _ in range(2)]
    first, second = [answer.json() for answer in answers]
    # The replay of the first is itself failed, and is replayed in its place.
    assert first["affected"] == 3
    assert set(first["executionIds"]) >= set(failed[1:])
    assert second["refused"] == [] or second["newExecutionIds"] == first["newExecutionIds"]
    for execution_id in first["newExecutionIds"]:
        await here.wait(execution_id)
        assert (await here.show(execution_id))["status"] == "completed"
    assert here.ledger.paths == ["/pay"] * 3
    await here.change(workflow_id, [step("first", n=2), *nodes[1:]], edges)
    completed = {"filter": {"workflowId": workflow_id, "status": "completed"}, "definition": "current"}
    refused = (await api.post(f"{EXECUTIONS}/bulk-replay", json=completed)).json()
    assert (refused["affected"], len(refused["refused"])) == (0, 3)
    assert {(one["code"], *one["nodeIds"]) for one in refused["refused"]} == {
        ("confirmation-required", "pay")
    }


# ── refusals ────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.every_database
async def test_an_execution_is_taken_up_once_and_by_one_request(harness_of: ReplayHarness) -> None:
    here = harness_of
    workflow_id = await here.create([post("pay")], "start > pay")
    here.ledger.failing = {"/pay": 422}
    failed = await here.run(workflow_id)
    once = {"Idempotency-Key": "once"}
    answers = await asyncio.gather(*(here.post(failed, headers=once) for _ in range(3)))
    assert [answer.status_code for answer in answers] == [201, 201, 201]
    (first,) = {answer.json()["executionId"] for answer in answers}
    assert len({answer.json()["planHash"] for answer in answers}) == 1
    for what in ("replay", "resume"):
        refused = await here.post(failed, what)
        assert_refused(refused, 409, "already-resumed")
        assert refused.json()["error"]["details"][0]["executionId"] == first
    assert_refused(await here.post(failed, headers=once, again=True), 422, "idempotency-mismatch")
    retried = await here.person.api.post(
        f"{EXECUTIONS}/bulk-retry", json={"filter": {"workflowId": workflow_id}, "dryRun": True}
    )
    await here.wait(first)
    assert failed not in retried.json()["executionIds"]
    second = await here.replay(failed, again=True)
    assert second != first


async def test_a_replay_that_makes_no_sense_is_refused(
    harness_of: ReplayHarness, people: OrganizationUsers
) -> None:
    here = harness_of
    workflow_id = await here.create([post("pay")], "start > pay")
    done = await here.run(workflow_id)
    for body in ({"from": ["pey"]}, {"confirm": ["nothing"]}, {"definition": "newest"}, {"fresh": True}):
        assert_refused(await here.post(done, **body), 422, "validation-failed")
    pending = (await here.person.api.post(f"/api/v1/workflows/{workflow_id}/execute", json={})).json()
    answer = await here.post(pending["executionId"], dryRun=True)
    assert answer.status_code in {200, 409}
    if answer.status_code == 409:
        assert_refused(answer, 409, "execution-not-ended")
    await here.wait(pending["executionId"])
    assert_refused(await people.stranger.api.post(f"{EXECUTIONS}/{done}/replay", json={}), 404, "not-found")
    await here.person.api.put(f"/api/v1/workflows/{workflow_id}/status", json={"status": "paused"})
    assert_refused(await here.post(done), 409, "workflow-paused")


async def test_of_replays_at_once_one_begins_and_the_others_name_it(harness_of: ReplayHarness) -> None:
    here = harness_of
    workflow_id = await here.create([post("pay")], "start > pay")
    here.ledger.failing = {"/pay": 422}
    failed = await here.run(workflow_id)
    here.ledger.failing = {}
    answers = await asyncio.gather(*(here.post(failed, what) for what in ("replay", "resume") * 3))
    begun = [answer.json()["executionId"] for answer in answers if answer.status_code == 201]
    assert len(begun) == 1
    for answer in answers:
        if answer.status_code != 201:
            assert_refused(answer, 409, "already-resumed")
            assert answer.json()["error"]["details"][0]["executionId"] == begun[0]
    await here.wait(begun[0])
    assert here.ledger.paths == ["/pay", "/pay"]


WRONG_BODIES: list[Any] = [
    [],
    "replay",
    {"from": "pay"},
    {"from": [""]},
    {"from": ["x" * 5_000]},
    {"from": ["pay\x00"]},
    {"from": ["pay"] * 2, "confirm": [None]},
    {"definition": 0},
    {"definition": -1},
    {"definition": 2.5},
    {"definition": 10**30},
    {"definition": "version 1"},
    {"definition": True},
    {"input": []},
    {"input": "text"},
    {"refresh": ["write"]},
    {"refresh": ["read", "model", "read"]},
    {"dryRun": "yes"},
    {"planHash": ""},
    {"planHash": 7},
    {"again": 1},
    {"failedOnly": None},
    {"dry_run": True},
]


async def test_a_body_with_a_wrong_value_is_refused(harness_of: ReplayHarness) -> None:
    here = harness_of
    workflow_id = await here.create([post("pay")], "start > pay")
    done = await here.run(workflow_id)
    for body in WRONG_BODIES:
        bulk = {"filter": {"workflowId": workflow_id}, **body} if isinstance(body, dict) else body
        for path, given in ((f"{done}/replay", body), ("bulk-replay", bulk)):
            answer = await here.person.api.post(f"{EXECUTIONS}/{path}", json=given)
            assert answer.status_code in {400, 422}, (path, given, answer.text)
            assert answer.json()["error"]["code"] in {"validation-failed", "invalid-json", "nul-character"}
    assert here.ledger.paths == ["/pay"]


async def test_bulk_replays_leave_runs_of_other_organizations_alone(
    harness_of: ReplayHarness, people: OrganizationUsers
) -> None:
    here = harness_of
    workflow_id = await here.create([post("pay")], "start > pay")
    here.ledger.failing = {"/pay": 422}
    failed = await here.run(workflow_id)
    for chosen in ({"workflowId": workflow_id}, {"executionIds": [failed]}, {"status": "failed"}):
        answer = await people.stranger.api.post(f"{EXECUTIONS}/bulk-replay", json={"filter": chosen})
        assert answer.status_code in {200, 404, 422}, answer.text
        assert answer.json().get("affected", 0) == 0
    unknown = await people.stranger.api.post(f"{EXECUTIONS}/{failed}/replay", json={"dryRun": True})
    assert_refused(unknown, 404, "not-found")
    assert_refused(await people.owner.api.post(f"{EXECUTIONS}/exec_0/replay", json={}), 404, "not-found")


# ── agents ──────────────────────────────────────────────────────────────────────────────────────────────────


WRITING = ["read", "write"]


def draw_agent(**config: Any) -> dict[str, Any]:  # noqa: ANN401 - any JSON value
    """Return the graph of an agent with the tool `look`, which reads, and if it may write with `send`."""
    nodes: list[dict[str, Any]] = [
        {"id": "start", "nodeId": "manual", "config": {}},
        {
            "id": "agent",
            "nodeId": "agent",
            "config": {"model": "echo", "prompt": "Report.", "approval": "never", **config},
        },
    ]
    edges = [{"sourceNodeId": "start", "targetNodeId": "agent"}]
    for name, method in (("look", "GET"), ("send", "POST"))[: len(config.get("effects", "1"))]:
        request = {"method": method, "url": f"http://ledger/{name}"}
        tool = {
            "name": name,
            "description": f"Lets you {name}.",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
            "target": {"node": {"type": "http-request", "config": request}},
        }
        nodes.append({"id": name, "nodeId": "tool", "config": tool})
        edges.append({"sourceNodeId": name, "targetNodeId": "agent", "targetPort": "tools"})
    return {"nodes": nodes, "connections": edges}


async def fail_agent(here: ReplayHarness, graph: dict[str, Any], answers: int) -> tuple[str, str]:
    """Run an agent whose model refuses to answer after so many answers; return the workflow and the run."""
    here.model.on_request = lambda: setattr(here.model, "refusals", int(len(here.model.billed) >= answers))
    workflow_id = await here.person.create(**graph)
    failed = await here.run(workflow_id)
    assert await find_error(here, failed) == "model-budget-exceeded"
    here.model.on_request, here.model.refusals = lambda: None, 0
    return workflow_id, failed


async def find_error(here: ReplayHarness, execution_id: str) -> str:
    """Return the code of the error with which the agent has failed."""
    return str((await here.spans(execution_id))["agent"]["error"]["code"])


async def list_steps(here: ReplayHarness, execution_id: str) -> list[dict[str, Any]]:
    answer = await here.person.api.get(f"{EXECUTIONS}/{execution_id}/steps")
    steps: list[dict[str, Any]] = answer.json()["steps"]
    return steps


async def test_an_agent_is_replayed_by_its_recorded_answers(harness_of: ReplayHarness) -> None:
    here = harness_of
    _, failed = await fail_agent(here, draw_agent(effects=WRITING), 3)
    plan = await here.plan(failed)
    (planned,) = [node for node in plan["nodes"] if node["nodeId"] == "agent"]
    assert planned["decision"] == "rerun"
    assert planned["answers"] == {"count": 3, "onDifference": "fail"}
    reads, billed = list(here.ledger.reads), len(here.model.billed)
    replayed = await here.replay(failed, planHash=plan["planHash"])
    assert (await here.show(replayed))["status"] == "completed"
    assert len(here.model.billed) == billed + 1
    assert (here.ledger.reads, here.ledger.paths) == (reads, ["/send"]), "no tool is called again"
    steps = await list_steps(here, replayed)
    assert [step for step in steps if "usage" in step] == steps[-1:], "the failed run has paid for the others"
    assert [step["reused"] for step in steps] == [True] * 7 + [False]
    assert [step["name"] for step in steps[:3]] == ["echo", "look", "look"]


async def test_an_agent_without_recorded_contents_is_asked_again(harness_of: ReplayHarness) -> None:
    here = harness_of
    here.model.turns = [AGENT_TURNS[0], AGENT_TURNS[2]]
    _, failed = await fail_agent(here, draw_agent(recordContent=False), 2)
    plan = await here.plan(failed)
    (planned,) = [node for node in plan["nodes"] if node["nodeId"] == "agent"]
    assert planned["decision"] == "rerun"
    assert [reason["code"] for reason in planned["reasons"]] == ["failed", "content-not-recorded"]
    assert "answers" not in planned
    replayed = await here.replay(failed, planHash=plan["planHash"])
    assert (await here.show(replayed))["status"] == "completed"
    assert len(here.model.billed) == 2 + 3
    resumed = await here.person.api.post(f"{EXECUTIONS}/{failed}/resume", json={})
    assert resumed.status_code == 409, "it was replayed"
    steps = await list_steps(here, replayed)
    assert {step["conversation"] for step in steps} == {0}
    assert [step["number"] for step in steps] == list(range(len(steps)))
    assert {(step["arguments"], step["result"]) for step in steps} == {(None, None)}


async def test_answers_are_copied_into_no_replay_that_does_not_record_them(harness_of: ReplayHarness) -> None:
    here = harness_of
    here.model.turns = [AGENT_TURNS[0], AGENT_TURNS[2]]
    workflow_id, failed = await fail_agent(here, draw_agent(), 2)
    answer = await here.person.api.put(
        f"/api/v1/workflows/{workflow_id}", json=draw_agent(recordContent=False)
    )
    assert answer.status_code == 200, answer.text
    (planned,) = [
        n for n in (await here.plan(failed, definition="current"))["nodes"] if n["nodeId"] == "agent"
    ]
    assert "content-not-recorded" in [reason["code"] for reason in planned["reasons"]]
    replayed = await here.replay(failed, definition="current")
    assert (await here.show(replayed))["status"] == "completed"
    assert len(here.model.billed) == 2 + 3
    steps = await list_steps(here, replayed)
    assert {(step["arguments"], step["result"], step["reused"]) for step in steps} == {(None, None, False)}


async def test_another_request_ends_a_replay_unless_the_model_is_asked_anew(
    harness_of: ReplayHarness,
) -> None:
    here = harness_of
    here.model.turns = [AGENT_TURNS[0], AGENT_TURNS[2]]
    # The prompt differs in each execution, which no plan can show before.
    _, failed = await fail_agent(here, draw_agent(prompt="Report as {{ execution.id }}."), 2)
    diverged = await here.replay(failed)
    assert await find_error(here, diverged) == "replay-diverged"
    assert len(here.model.billed) == 2
    assert await list_steps(here, diverged) == [], "recorded steps that were not taken over are not shown"
    (planned,) = [n for n in (await here.plan(diverged, refresh=["model"]))["nodes"] if "answers" in n]
    assert planned["answers"] == {"count": 2, "onDifference": "ask"}
    live = await here.replay(diverged, refresh=["model"])
    assert (await here.show(live))["status"] == "completed"
    assert len(here.model.billed) == 2 + 3


async def test_a_conversation_that_a_replay_has_left_binds_no_later_replay(harness_of: ReplayHarness) -> None:
    here = harness_of
    here.model.turns = [AGENT_TURNS[0], AGENT_TURNS[2], AGENT_TURNS[0], AGENT_TURNS[2]]
    workflow_id, failed = await fail_agent(here, draw_agent(), 4)
    changed = draw_agent(prompt="Report again.")
    answer = await here.person.api.put(f"/api/v1/workflows/{workflow_id}", json=changed)
    assert answer.status_code == 200, answer.text
    # It leaves the recorded conversation at once, and ends long before it.
    here.model.on_request = lambda: setattr(here.model, "refusals", int(len(here.model.billed) >= 5))
    left = await here.replay(failed, definition="current")
    assert await find_error(here, left) == "model-budget-exceeded"
    here.model.on_request, here.model.refusals = lambda: None, 0
    (planned,) = [node for node in (await here.plan(left))["nodes"] if "answers" in node]
    assert planned["answers"] == {"count": 1, "onDifference": "fail"}
    replayed = await here.replay(left)
    assert (await here.show(replayed))["status"] == "completed"
    assert len(here.model.billed) == 5 + 4


@pytest.mark.every_database
async def test_a_text_of_outsiders_stays_one_in_a_replay_with_another_trigger(
    harness_of: ReplayHarness,
) -> None:
    here = harness_of
    here.model.turns = [AGENT_TURNS[1]]
    mended = draw_agent(effects=WRITING, approval="tainted")
    sent = {**mended, "nodes": [{"id": "start", "nodeId": "webhook", "config": {}}, *mended["nodes"][1:]]}
    workflow_id, failed = await fail_agent(here, sent, 0)
    answer = await here.person.api.put(f"/api/v1/workflows/{workflow_id}", json=mended)
    assert answer.status_code == 200, answer.text
    choices: list[tuple[dict[str, Any], int]] = [({}, 0), ({"input": {"body": {}}}, 1)]
    for given, count in choices:
        begun = await here.post(failed, definition="current", confirm=["agent"], again=True, **given)
        assert begun.status_code == 201, begun.text
        shown = begun.json()
        async with asyncio.timeout(PATIENCE_SECONDS):
            while shown.get("status") not in {"waiting", *TERMINAL_STATUSES}:
                here.executor.wake()
                await asyncio.sleep(0.01)
                shown = await here.show(begun.json()["executionId"])
        assert (shown["status"], len(here.ledger.writes)) == ("completed" if count else "waiting", count)


async def test_a_higher_limit_continues_the_recorded_conversation(harness_of: ReplayHarness) -> None:
    here = harness_of
    here.model.turns = [AGENT_TURNS[0], AGENT_TURNS[2]]
    graph = draw_agent(maxIterations=1, onLimit="error")
    workflow_id = await here.person.create(**graph)
    failed = await here.run(workflow_id)
    assert await find_error(here, failed) == "agent-limit"
    changed = await here.person.api.put(f"/api/v1/workflows/{workflow_id}", json=draw_agent(maxIterations=9))
    assert changed.status_code == 200, changed.text
    replayed = await here.replay(failed, definition="current")
    assert (await here.show(replayed))["status"] == "completed"
    assert len(here.model.billed) == 3
    assert Counter(here.ledger.reads) == {"/look": 3}
    begun_anew = await here.replay(failed, **{"from": ["agent"]}, definition="current", again=True)
    assert (await here.show(begun_anew))["status"] == "completed"
    assert len(here.model.billed) == 6


async def test_a_resumed_agent_continues_its_conversation_or_begins_a_new_one(
    harness_of: ReplayHarness,
) -> None:
    here = harness_of
    graph = draw_agent(effects=WRITING)
    for fresh, answers, writes in ((False, 1, 1), (True, 4, 2)):
        here.model.billed.clear()
        here.ledger.writes.clear()
        _, failed = await fail_agent(here, graph, 3)
        answer = await here.post(failed, "resume", **({"fresh": True} if fresh else {}))
        assert answer.status_code == 201, answer.text
        resumed = await here.wait(answer.json()["executionId"])
        assert (await here.show(resumed))["status"] == "completed"
        assert len(here.model.billed) == 3 + answers
        assert len({key for _, key, _ in here.ledger.writes}) == writes
        assert len(here.ledger.writes) == writes
