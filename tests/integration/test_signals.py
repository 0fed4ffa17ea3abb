"""Signals to runs: kept in order, and received once by one waiting node, even if a process dies in between."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from datetime import UTC, datetime
from itertools import pairwise
from typing import Any

import httpx2
import pytest
from sqlalchemy.ext.asyncio import AsyncConnection

from engine.run_errors import NodeError
from engine.run_records import NodeSpan, SpanStatus
from engine.services import RunCaller, SignalRequest
from execution.signal_waits import SignalWaits
from gateway.http import limits
from journal.store import RunWrite
from journal.waits import node_answers, signals
from models.execution_status import TERMINAL_STATUSES
from tests.integration.gateway_harness import GatewayHarness, OrganizationUsers, UserClient, assert_refused
from tests.integration.test_waiting_runs import (
    EXECUTIONS,
    ON_ONE,
    claim_for_dead_worker,
    execute_workflow,
    get_json,
    serve_worker,
    wait_until_ended,
)

pytestmark = pytest.mark.timeout(60)

SCHEMA = {"type": "object", "required": ["n"], "properties": {"n": {"type": "integer"}}}
START = {"id": "start", "nodeId": "manual"}


def waiting_graph(*names: str, **config: Any) -> dict[str, Any]:  # noqa: ANN401 - any JSON value
    """Return a graph of nodes that wait for signals one after another."""
    nodes = [
        {"id": f"wait{index}", "nodeId": "wait-for-signal", "config": {"name": name, **config}}
        for index, name in enumerate(names)
    ]
    path: list[dict[str, Any]] = [START, *nodes]
    edges = [{"source": before["id"], "target": after["id"]} for before, after in pairwise(path)]
    return {"nodes": path, "connections": edges}


def loop_graph(turns: int, concurrency: int) -> dict[str, Any]:
    """Return a graph whose loop waits for the same signal in each turn."""
    return {
        "nodes": [
            START,
            {
                "id": "loop",
                "nodeId": "loop",
                "config": {"items": list(range(turns)), "concurrency": concurrency},
            },
            {"id": "wait", "nodeId": "wait-for-signal", "config": {"name": "item"}},
        ],
        "connections": [
            {"source": "start", "target": "loop"},
            {"source": "loop", "sourcePort": "continue", "target": "wait"},
        ],
    }


async def send(person: UserClient, run: str, name: str, payload: Any = None, **more: Any) -> httpx2.Response:  # noqa: ANN401 - any JSON value
    body = {"name": name, "payload": payload}
    return await person.api.post(f"{EXECUTIONS}/{run}/signals", json=body, **more)


async def send_accepted(person: UserClient, run: str, name: str, payload: Any = None) -> dict[str, Any]:  # noqa: ANN401 - any JSON value
    response = await send(person, run, name, payload)
    assert response.status_code == 202, response.text
    receipt: dict[str, Any] = response.json()
    return receipt


async def list_signals(person: UserClient, run: str, query: str = "") -> Sequence[dict[str, Any]]:
    found: Sequence[dict[str, Any]] = (await get_json(person, f"/{run}/signals{query}"))["signals"]
    return found


async def wait_for_wait(person: UserClient, run: str) -> dict[str, Any]:
    """Wait until a run waits for a signal; return why."""
    while (why := await get_json(person, f"/{run}/why"))["primary"] != "awaiting-signal":
        progress = await get_json(person, f"/{run}/progress?wait=0")
        assert progress["status"] not in TERMINAL_STATUSES, progress
        await asyncio.sleep(0.02)
    return why


async def read_payloads(person: UserClient, run: str, node_id: str) -> list[Any]:
    """Return the payloads that a node has received, by iteration."""
    spans = (await get_json(person, f"/{run}/spans?limit=1000&node_id={node_id}"))["spans"]
    received = sorted(spans, key=lambda one: int(one["iteration"] or 0))
    return [one["outputData"]["payload"] for one in received]


@pytest.mark.every_database
async def test_signals_sent_before_a_node_waits_are_received_in_order(
    harness: GatewayHarness, people: OrganizationUsers
) -> None:
    run = await execute_workflow(
        people.owner, await people.owner.create(**waiting_graph("item", "item", "last"))
    )
    sent = [await send_accepted(people.owner, run, "item", {"n": number}) for number in range(3)]
    assert [(one["number"], one["state"], one["nodeId"]) for one in sent] == [
        (number, "unread", None) for number in (1, 2, 3)
    ]
    async with serve_worker(harness):
        why = await wait_for_wait(people.owner, run)
        blocker = why["blockers"][0]
        assert blocker["details"]["signal"] == "last"
        assert blocker["actions"][0]["path"] == f"{EXECUTIONS}/{run}/signals"
        last = await send_accepted(people.owner, run, "last", "done")
        assert (last["state"], last["nodeId"], last["iteration"]) == ("delivered", "wait2", "")
        ended = await wait_until_ended(people.owner, run)
    assert ended["status"] == "completed"
    assert [ended["outputs"][f"wait{index}"]["payload"] for index in range(3)] == [{"n": 0}, {"n": 1}, "done"]
    assert ended["outputs"]["wait2"]["by"] == people.owner.user.id
    listed = await list_signals(people.owner, run)
    assert [(one["number"], one["state"], one["nodeId"]) for one in listed] == [
        (1, "delivered", "wait0"),
        (2, "delivered", "wait1"),
        (3, "unread", None),
        (4, "delivered", "wait2"),
    ]
    (unread,) = await list_signals(people.owner, run, "?state=unread")
    assert (unread["payload"], unread["sentBy"]) == ({"n": 2}, people.owner.user.id)
    page = await get_json(people.owner, f"/{run}/signals?limit=2&after=1")
    assert ([one["number"] for one in page["signals"]], page["next"]) == ([2, 3], 3)


async def test_a_page_of_signals_has_few_large_payloads(
    people: OrganizationUsers, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = await execute_workflow(people.owner, await people.owner.create(**waiting_graph("item")))
    for text in ("x" * 9, "", "", "x" * 30, ""):
        await send_accepted(people.owner, run, "item", text)
    monkeypatch.setattr(signals, "PAGE_CHARACTERS", 20)
    pages, after = [], 0
    while after is not None:
        page = await get_json(people.owner, f"/{run}/signals?limit=3&after={after}")
        pages.append([one["number"] for one in page["signals"]])
        after = page["next"]
    assert pages == [[1, 2, 3], [4], [5]]


async def test_each_of_many_concurrent_signals_is_received_once(
    harness: GatewayHarness, people: OrganizationUsers
) -> None:
    turns = 24
    run = await execute_workflow(people.owner, await people.owner.create(**loop_graph(turns, concurrency=4)))
    async with serve_worker(harness):
        await asyncio.gather(*(send_accepted(people.owner, run, "item", number) for number in range(turns)))
        assert (await wait_until_ended(people.owner, run))["status"] == "completed"
    assert sorted(await read_payloads(people.owner, run, "wait")) == list(range(turns))
    assert {one["state"] for one in await list_signals(people.owner, run)} == {"delivered"}


@pytest.mark.every_database
@pytest.mark.parametrize("order", ["signal first", "wait first"])
async def test_a_signal_is_received_once_although_the_worker_of_its_node_died(
    harness: GatewayHarness, people: OrganizationUsers, order: str
) -> None:
    run = await execute_workflow(people.owner, await people.owner.create(**waiting_graph("item", "item")))
    claimed = await claim_for_dead_worker(harness, run)
    now = datetime.now(UTC)
    start = NodeSpan(
        "start", "start", "manual", SpanStatus.COMPLETED, 1, now, ended_at=now, port="output", output=b"{}"
    )
    wait = NodeSpan("wait0", "wait0", "wait-for-signal", SpanStatus.RUNNING, 2, now, input_node="start")
    write = RunWrite(claimed.execution_id, claimed.shard, claimed.token, spans=[start, wait])
    assert await harness.gateway.store.record([write])
    caller = RunCaller(claimed.organization_id, claimed.user_id, claimed.workflow_id, run, run)
    waits = SignalWaits(harness.gateway.database, harness.gateway.broker)

    async def begin_wait() -> bytes | None:
        return (await waits.expect(caller, SignalRequest("item"), node_id="wait0", iteration="")).answer

    if order == "signal first":
        await send_accepted(people.owner, run, "item", 1)
        answer = await begin_wait()
        assert answer is not None
    else:
        assert await begin_wait() is None
        receipt = await send_accepted(people.owner, run, "item", 1)
        assert (receipt["state"], receipt["nodeId"]) == ("delivered", "wait0")
        answer = await begin_wait()
    await send_accepted(people.owner, run, "item", 2)
    # The next worker repeats the call, whose answer is stored.
    assert await begin_wait() == answer
    async with serve_worker(harness):
        ended = await wait_until_ended(people.owner, run)
    assert [ended["outputs"][node]["payload"] for node in ("wait0", "wait1")] == [1, 2]


async def test_a_repeated_signal_with_its_idempotency_key_is_stored_once(
    harness: GatewayHarness, people: OrganizationUsers
) -> None:
    run = await execute_workflow(people.owner, await people.owner.create(**waiting_graph("item", "item")))
    key = {"Idempotency-Key": "order-7"}
    answers = await asyncio.gather(*(send(people.owner, run, "item", 1, headers=key) for _ in range(3)))
    assert [(one.status_code, one.json()["number"]) for one in answers] == [(202, 1)] * 3
    assert sorted(one.headers.get("Idempotent-Replayed", "") for one in answers) == ["", "true", "true"]
    assert_refused(await send(people.owner, run, "item", 2, headers=key), 422, "idempotency-mismatch")
    await send_accepted(people.owner, run, "item", 2)
    async with serve_worker(harness):
        ended = await wait_until_ended(people.owner, run)
    assert [ended["outputs"][node]["payload"] for node in ("wait0", "wait1")] == [1, 2]
    again = await send(people.owner, run, "item", 1, headers=key)
    assert (again.status_code, again.json()["nodeId"]) == (202, "wait0")


@pytest.mark.parametrize("headers", [{}, {"Idempotency-Key": "order-8"}])
async def test_a_signal_without_a_confirmed_commit_is_stored_once(
    harness: GatewayHarness,
    people: OrganizationUsers,
    monkeypatch: pytest.MonkeyPatch,
    headers: dict[str, str],
) -> None:
    run = await execute_workflow(people.owner, await people.owner.create(**waiting_graph("item", "item")))
    transaction = harness.gateway.database.transaction

    async def confirmed_the_second_time(
        work: Callable[[AsyncConnection], Awaitable[Any]], *, locks: str
    ) -> Any:  # noqa: ANN401 - passed on
        await transaction(work, locks=locks)
        return await transaction(work, locks=locks)

    with monkeypatch.context() as patch:
        patch.setattr(harness.gateway.database, "transaction", confirmed_the_second_time)
        answer = await send(people.owner, run, "item", 1, headers=headers)
    assert (answer.status_code, answer.json()["number"]) == (202, 1)
    assert "Idempotent-Replayed" not in answer.headers
    assert [one["number"] for one in await list_signals(people.owner, run)] == [1]


async def test_a_signal_near_the_end_of_a_wait_is_kept_for_the_next_node(
    harness: GatewayHarness, people: OrganizationUsers, monkeypatch: pytest.MonkeyPatch
) -> None:
    definition = waiting_graph("item", "item")
    definition["nodes"][1]["config"]["timeoutSeconds"] = 2
    definition["connections"][1] |= {"sourcePort": "timeout"}
    run = await execute_workflow(people.owner, await people.owner.create(**definition))
    # The end of any wait is near.
    monkeypatch.setattr(node_answers, "MAX_CLOCK_SKEW_MICROSECONDS", 60_000_000)
    async with serve_worker(harness):
        await wait_for_wait(people.owner, run)
        assert (await send_accepted(people.owner, run, "item", 1))["state"] == "unread"
        ended = await wait_until_ended(people.owner, run)
    assert ended["outputs"]["wait0"] == {"name": None, "payload": None, "by": None, "at": None}
    assert ended["outputs"]["wait1"]["payload"] == 1


@ON_ONE
async def test_signals_that_no_node_can_receive_are_refused(
    people: OrganizationUsers, monkeypatch: pytest.MonkeyPatch
) -> None:
    workflow_id = await people.owner.create(**waiting_graph("item", "other", schema=SCHEMA))
    run = await execute_workflow(people.owner, workflow_id)
    unknown = await send(people.owner, run, "itme", {"n": 1})
    assert_refused(unknown, 422, "validation-failed")
    problem = unknown.json()["error"]["details"][0]
    assert (problem["path"], problem["code"]) == ("name", "unknown-signal")
    assert "item, other" in problem["message"]
    wrong = await send(people.owner, run, "item", {"n": "one"})
    assert_refused(wrong, 422, "validation-failed")
    assert wrong.json()["error"]["details"][0]["path"] == "payload.n"
    large = await send(people.owner, run, "item", {"n": 1, "text": "x" * limits.SIGNAL_BYTES})
    assert_refused(large, 413, "payload-too-large")
    assert_refused(await send(people.stranger, run, "item", {"n": 1}), 404, "not-found")
    assert_refused(await people.stranger.api.get(f"{EXECUTIONS}/{run}/signals"), 404, "not-found")
    assert await list_signals(people.owner, run) == []

    monkeypatch.setattr(signals, "MAX_UNREAD", 2)
    for number in range(2):
        await send_accepted(people.owner, run, "item", {"n": number})
    assert_refused(await send(people.owner, run, "other", {"n": 3}), 409, "too-many-signals")
    await people.owner.api.post(f"{EXECUTIONS}/{run}/cancel")
    assert (await wait_until_ended(people.owner, run))["status"] == "cancelled"
    ended = await send(people.owner, run, "item", {"n": 4})
    assert_refused(ended, 409, "execution-ended")
    assert ended.json()["error"]["details"][0]["status"] == "cancelled"


# ── replies ─────────────────────────────────────────────────────────────────────────────────────────────────


def replying_graph() -> dict[str, Any]:
    """Return a graph that waits for two signals, and replies twice to the first one."""
    first, second = ({"got": "{{ data.payload.n }}"}, "too late")
    nodes: list[dict[str, Any]] = [
        START,
        {"id": "ask", "nodeId": "wait-for-signal", "config": {"name": "order", "schema": SCHEMA}},
        {"id": "reply", "nodeId": "reply-to-signal", "config": {"receivedBy": "ask", "value": first}},
        {"id": "again", "nodeId": "reply-to-signal", "config": {"receivedBy": "ask", "value": second}},
        {"id": "last", "nodeId": "wait-for-signal", "config": {"name": "end"}},
        {"id": "none", "nodeId": "reply-to-signal", "config": {"receivedBy": "start", "value": 1}},
    ]
    edges = [{"source": before["id"], "target": after["id"]} for before, after in pairwise(nodes)]
    return {"nodes": nodes, "connections": edges}


async def ask(person: UserClient, run: str, name: str, payload: Any = None, **more: Any) -> httpx2.Response:  # noqa: ANN401 - any JSON value
    body = {"name": name, "payload": payload}
    url = f"{EXECUTIONS}/{run}/signals?wait=30"
    return await person.api.post(url, json=body, timeout=60, **more)


@pytest.mark.every_database
async def test_a_sender_waits_for_the_reply_of_the_run(
    harness: GatewayHarness, people: OrganizationUsers
) -> None:
    run = await execute_workflow(people.owner, await people.owner.create(**replying_graph()))
    key = {"Idempotency-Key": "order-1"}
    async with serve_worker(harness):
        # It is sent before its node waits, or after.
        replied = await ask(people.owner, run, "order", {"n": 21}, headers=key)
        assert (replied.status_code, replied.json()["reply"]) == (200, {"got": 21})
        repeated = await ask(people.owner, run, "order", {"n": 21}, headers=key)
        assert (repeated.status_code, repeated.json()["reply"]) == (200, {"got": 21})
        assert repeated.json()["number"] == replied.json()["number"]
        # Nothing replies to this one: the end of the run ends the wait.
        unanswered = await ask(people.owner, run, "end")
        assert (unanswered.status_code, unanswered.json()["reply"]) == (202, None)
        assert (await wait_until_ended(people.owner, run))["status"] == "completed"
    listed = await get_json(people.owner, f"/{run}/signals")
    assert [one["reply"] for one in listed["signals"]] == [{"got": 21}, None]


async def test_replies_in_a_loop_reach_the_signals_of_their_iterations(
    harness: GatewayHarness, people: OrganizationUsers
) -> None:
    graph = loop_graph(3, 3)
    value = "{{ data.payload }}"
    graph["nodes"].append(
        {"id": "reply", "nodeId": "reply-to-signal", "config": {"receivedBy": "wait", "value": value}}
    )
    graph["connections"].append({"source": "wait", "target": "reply"})
    run = await execute_workflow(people.owner, await people.owner.create(**graph))
    async with serve_worker(harness):
        answers = await asyncio.gather(*(ask(people.owner, run, "item", number) for number in range(3)))
        assert [one.json()["reply"] for one in answers] == [0, 1, 2]
        assert (await wait_until_ended(people.owner, run))["status"] == "completed"


async def test_replies_have_limits(
    harness: GatewayHarness, people: OrganizationUsers, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = await execute_workflow(people.owner, await people.owner.create(**replying_graph()))
    user = people.owner.user
    waits = SignalWaits(harness.gateway.database, harness.gateway.broker)
    caller = RunCaller(user.organization_id, user.id, "wf", run, run)
    with pytest.raises(NodeError, match="256,000 bytes") as refused:
        await waits.reply(caller, "ask", "", b'"%s"' % (b"x" * 256_000))
    assert refused.value.code == "reply-too-large"
    monkeypatch.setattr(limits, "REPLIES_AWAITED", 0)
    assert_refused(await ask(people.owner, run, "order", {"n": 1}), 409, "too-many-signals")
    assert (await get_json(people.owner, f"/{run}/signals"))["count"] == 0
    # A caller of another organization changes nothing.
    await send_accepted(people.owner, run, "order", {"n": 1})
    async with serve_worker(harness):
        await wait_for_wait(people.owner, run)
    foreign = RunCaller(people.stranger.user.organization_id, user.id, "wf", run, run)
    await send_accepted(people.owner, run, "end")
    await waits.reply(foreign, "last", "", b"1")
    listed = await get_json(people.owner, f"/{run}/signals")
    assert [one["reply"] for one in listed["signals"]] == [{"got": 1}, None]
