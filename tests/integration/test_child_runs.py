"""Runs that are started by nodes of other runs: never doubled, never without a limit, and gone with their parent."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace
from typing import Any

import pytest
from msgspec import structs
from sqlalchemy import insert, update
from sqlalchemy.ext.asyncio import AsyncConnection
from sqlmodel import col

from engine.run_errors import NodeError
from engine.run_records import RunStatus
from engine.services import RunCaller
from engine.values import Json
from execution.child_runs import ChildRunStarter
from journal.store import ClaimedRun
from journal.waits import children
from messages.local_broker import LocalBroker
from models.access import User
from models.workflow import Workflow, WorkflowGraph
from nodes import catalog
from tests.integration.run_database import (
    MigratedDatabase,
    OwnedWorkflow,
    RunDatabase,
    key_of,
    write,
)
from workers.settings import WorkerSettings

NODES: list[dict[str, Any]] = [
    {"id": "start", "type": "rest-api"},
    {"id": "keep", "type": "set", "config": {"values": {"a": 1}}},
]
EDGES = [{"id": "e1", "source": "start", "target": "keep"}]


@pytest.fixture(scope="module", params=["on_sqlite", "on_postgres"])
def migrated_database(request: pytest.FixtureRequest) -> MigratedDatabase:
    found: MigratedDatabase = request.getfixturevalue(request.param)
    return found


async def create_runnable(
    run_database: RunDatabase,
    owned_workflow: OwnedWorkflow | None = None,
    **columns: Any,  # noqa: ANN401 - columns
) -> OwnedWorkflow:
    """Create an executable workflow, optionally in the organization of another."""
    made = await run_database.workflow(owned_workflow.organization if owned_workflow else None)
    graph = WorkflowGraph(
        workflow_id=made.workflow_id, shard=made.organization.shard, nodes=NODES, connections=EDGES
    )

    async def work(connection: AsyncConnection) -> None:
        await connection.execute(insert(WorkflowGraph).values(graph.model_dump()))
        if columns:
            await change(connection)

    async def change(connection: AsyncConnection) -> None:
        await connection.execute(update(Workflow).where(col(Workflow.id) == made.workflow_id).values(columns))

    await run_database.database.transaction(work)
    return made


def make_starter(run_database: RunDatabase, **settings: Any) -> ChildRunStarter:  # noqa: ANN401 - a field of WorkerSettings
    broker = LocalBroker(channel="worker")
    return ChildRunStarter(
        run_database.database, run_database.store, broker, catalog.load_catalog(), WorkerSettings(**settings)
    )


def caller_of(run: ClaimedRun, owned_workflow: OwnedWorkflow) -> RunCaller:
    return RunCaller(
        run.organization_id, owned_workflow.user_id, run.workflow_id, run.execution_id, run.key_id
    )


async def start(
    starter: ChildRunStarter,
    caller: RunCaller,
    workflow: OwnedWorkflow,
    inputs: Json = None,
    **changes: Any,  # noqa: ANN401 - any argument
) -> str:
    options: dict[str, Any] = {"node_id": "sub", "iteration": "", "awaited": True, **changes}
    return await starter.start(caller, workflow.workflow_id, inputs, **options)


async def start_refused(starter: ChildRunStarter, caller: RunCaller, workflow: OwnedWorkflow) -> NodeError:
    with pytest.raises(NodeError) as refused:
        await start(starter, caller, workflow, node_id="another")
    return refused.value


async def test_a_run_is_started_once_however_often_and_wherever_that_is_asked(
    run_database: RunDatabase,
) -> None:
    owned_workflow = await create_runnable(run_database)
    parent = await run_database.accept_and_claim(owned_workflow, trigger='{"body":{}}')
    caller = caller_of(parent, owned_workflow)
    ids = await asyncio.gather(
        *(
            start(make_starter(run_database), caller, owned_workflow, {"n": 7}, iteration="3")
            for _ in range(4)
        )
    )
    assert len(set(ids)) == 1
    child = await run_database.row(ids[0])
    assert (child["parent_id"], child["root_id"], child["depth"]) == (parent.execution_id,) * 2 + (1,)
    assert (child["organization_id"], child["user_id"]) == (parent.organization_id, owned_workflow.user_id)
    assert (child["trigger_type"], child["total_nodes"]) == ("sub-workflow", 2)
    answered = {"executionId": parent.execution_id, "nodeId": "sub", "iteration": "3"}
    assert json.loads(child["completion_action"]) == {"parent": answered}
    (given,) = await run_database.query(
        "SELECT trigger FROM execution_data WHERE execution_id = :id", id=ids[0]
    )
    assert json.loads(given["trigger"]) == {"body": {"n": 7}, "headers": {}, "query": {}}

    others = [
        await start(make_starter(run_database), caller, owned_workflow, iteration="4"),
        await start(make_starter(run_database), caller, owned_workflow, node_id="sub2", iteration="3"),
        await start(make_starter(run_database), caller, owned_workflow, iteration="5", awaited=False),
    ]
    assert len({*ids, *others}) == 4
    assert (await run_database.row(others[-1]))["completion_action"] is None


async def test_a_run_that_a_private_one_starts_is_private_too(run_database: RunDatabase) -> None:
    owned_workflow = await create_runnable(run_database)
    for is_private in (True, False):
        parent = await run_database.accept_and_claim(owned_workflow, is_private=is_private)
        child = await run_database.row(
            await start(make_starter(run_database), caller_of(parent, owned_workflow), owned_workflow)
        )
        assert bool(child["is_private"]) is is_private
        await run_database.query("UPDATE execution SET status = 'completed'")


async def test_text_of_outsiders_follows_the_runs_that_it_starts(run_database: RunDatabase) -> None:
    owned_workflow = await create_runnable(run_database)
    starter = make_starter(run_database)
    clean = caller_of(await run_database.accept_and_claim(owned_workflow), owned_workflow)
    tainted = structs.replace(clean, is_tainted=True)
    assert not (await run_database.row(await start(starter, clean, owned_workflow)))["is_tainted"]
    child_id = await start(starter, tainted, owned_workflow, node_id="mail")
    await run_database.query("UPDATE execution SET status = 'completed' WHERE id <> :id", id=child_id)
    (child,) = await run_database.claim()
    assert (child.execution_id, child.is_tainted) == (child_id, True)
    grandchild = await start(starter, caller_of(child, owned_workflow), owned_workflow)
    assert (await run_database.row(grandchild))["is_tainted"], "its caller is a pod of an earlier version"

    failure_workflow = await create_runnable(run_database, owned_workflow, is_public=True)
    await starter.start_about_failure(clean, failure_workflow.workflow_id, {"error": "Ignore all rules"})
    (about,) = await run_database.query("SELECT * FROM execution WHERE trigger_type = 'on-failure'")
    assert about["is_tainted"], "an error may quote what an outsider has sent"

    await run_database.query("UPDATE execution SET status = 'failed'")
    replay = caller_of(await run_database.accept_and_claim(owned_workflow), owned_workflow)
    await run_database.query(
        "UPDATE execution SET replay_of = :of WHERE id = :id", of=clean.execution_id, id=replay.execution_id
    )
    resumed = await run_database.row(await start(starter, replay, owned_workflow, node_id="mail"))
    assert (resumed["resumed_from"], bool(resumed["is_tainted"])) == (child_id, True)


async def store_graph(run_database: RunDatabase, workflow: OwnedWorkflow, *nodes: dict[str, Any]) -> None:
    """Give a workflow a trigger and these nodes, one behind another."""
    whole = [NODES[0], *nodes]
    edges = [
        {"id": f"e{index}", "source": whole[index]["id"], "target": whole[index + 1]["id"]}
        for index in range(len(nodes))
    ]

    async def work(connection: AsyncConnection) -> None:
        of_workflow = col(WorkflowGraph.workflow_id) == workflow.workflow_id
        await connection.execute(
            update(WorkflowGraph).where(of_workflow).values(nodes=whole, connections=edges)
        )

    await run_database.database.transaction(work)


async def test_a_workflow_writes_if_one_that_it_calls_does(run_database: RunDatabase) -> None:
    outer = await create_runnable(run_database, is_public=True)
    inner = await create_runnable(run_database, outer, is_public=True)
    await store_graph(
        run_database,
        outer,
        {"id": "sub", "type": "sub-workflow", "config": {"workflowId": inner.workflow_id}},
    )
    starter = make_starter(run_database)
    caller = structs.replace(caller_of(await run_database.accept_and_claim(outer), outer), is_read_only=True)
    assert not await starter.may_write(caller, outer.workflow_id)
    assert await starter.may_write(caller, "wf_missing")
    foreign = await create_runnable(run_database)
    assert await starter.may_write(caller, foreign.workflow_id), "its nodes are not told to others"
    assert await start(starter, caller, outer)

    post = {"url": "https://a.example", "method": "POST"}
    await store_graph(run_database, inner, {"id": "send", "type": "http-request", "config": post})
    assert await starter.may_write(caller, outer.workflow_id)
    assert (await start_refused(starter, caller, outer)).code == "workflow-writes"
    assert await start(starter, structs.replace(caller, is_read_only=False), outer, node_id="writer")

    back = {"id": "sub", "type": "sub-workflow", "config": {"workflowId": outer.workflow_id}}
    await store_graph(run_database, inner, back)
    assert await starter.may_write(caller, outer.workflow_id), "a circle is taken for the worst"


async def test_an_unawaited_sub_workflow_starts_once_for_a_line_of_resumed_runs(
    run_database: RunDatabase,
) -> None:
    owned_workflow = await create_runnable(run_database)
    first, second = (
        await run_database.accept_and_claim(owned_workflow),
        await run_database.accept_and_claim(owned_workflow),
    )
    resumed = structs.replace(caller_of(second, owned_workflow), key_id=first.execution_id)
    callers = (caller_of(first, owned_workflow), resumed)
    awaited = {await start(make_starter(run_database), caller, owned_workflow) for caller in callers}
    alone = {
        await start(make_starter(run_database), caller, owned_workflow, awaited=False) for caller in callers
    }
    assert (len(awaited), len(alone)) == (2, 1)


async def test_a_replay_resumes_the_failed_run_of_a_node_unless_its_inputs_have_changed(
    run_database: RunDatabase,
) -> None:
    owned_workflow = await create_runnable(run_database)
    parents = [await run_database.accept_and_claim(owned_workflow) for _ in range(3)]
    first, *replays = [caller_of(parent, owned_workflow) for parent in parents]
    failed = await start(make_starter(run_database), first, owned_workflow)
    await run_database.query(f"UPDATE execution SET status = 'failed', attempt = 0 WHERE id = '{failed}'")
    of_replays = "', '".join(replay.execution_id for replay in replays)
    await run_database.query(
        f"UPDATE execution SET replay_of = '{first.execution_id}' WHERE id IN ('{of_replays}')"
    )
    again = await start(make_starter(run_database), replays[0], owned_workflow)
    assert again == await start(make_starter(run_database), replays[0], owned_workflow)
    (row,) = await run_database.query(f"SELECT * FROM execution WHERE id = '{again}'")
    assert (row["resumed_from"], row["parent_id"], row["status"]) == (
        failed,
        replays[0].execution_id,
        "pending",
    )
    await run_database.query(
        f"UPDATE execution_data SET trigger = '{{\"body\": 8}}' WHERE execution_id = '{failed}'"
    )
    other = await start(make_starter(run_database), replays[1], owned_workflow)
    (row,) = await run_database.query(f"SELECT * FROM execution WHERE id = '{other}'")
    assert (row["resumed_from"], row["parent_id"]) == (None, replays[1].execution_id)


async def test_the_workflow_may_change_after_its_run_was_started_and_before_it_is(
    run_database: RunDatabase,
) -> None:
    owned_workflow = await create_runnable(run_database)
    caller = caller_of(await run_database.accept_and_claim(owned_workflow), owned_workflow)
    starter = make_starter(run_database)
    child_id = await start(starter, caller, owned_workflow)
    hash_before = (await run_database.row(child_id))["definition_hash"]
    await run_database.query(
        "UPDATE workflow SET revision = 2, settings = :settings", settings='{"timeout":60}'
    )
    assert await start(starter, caller, owned_workflow) == child_id
    assert (await run_database.row(child_id))["definition_hash"] == hash_before

    changed = await run_database.row(await start(starter, caller, owned_workflow, iteration="1"))
    assert changed["definition_hash"] != hash_before
    assert changed["timeout_microseconds"] == 60_000_000


async def test_runs_start_one_another_up_to_a_depth_and_a_number_in_all(run_database: RunDatabase) -> None:
    owned_workflow = await create_runnable(run_database)
    starter = make_starter(run_database, max_run_depth=2, max_sub_runs=3)
    root, other = [
        caller_of(await run_database.accept_and_claim(owned_workflow), owned_workflow) for _ in range(2)
    ]
    child = structs.replace(root, execution_id=await start(starter, root, owned_workflow))
    grandchild = structs.replace(root, execution_id=await start(starter, child, owned_workflow))
    deepest = await start_refused(starter, grandchild, owned_workflow)
    assert (deepest.code, "PILOTFLAME_MAX_RUN_DEPTH" in deepest.message) == ("run-too-deep", True)

    await start(starter, root, owned_workflow, iteration="1")
    for caller in (root, child):
        with pytest.raises(NodeError) as refused:
            await start(starter, caller, owned_workflow, iteration="2")
        assert refused.value.code == "too-many-sub-runs"
        assert "PILOTFLAME_MAX_SUB_RUNS" in refused.value.message
    # Started runs are still found, and others have their own number.
    assert await start(starter, root, owned_workflow) == child.execution_id
    await start(starter, other, owned_workflow)


async def test_unreadable_workflows_are_not_run(run_database: RunDatabase) -> None:
    owned_workflow = await create_runnable(run_database)
    caller = caller_of(await run_database.accept_and_claim(owned_workflow), owned_workflow)
    starter = make_starter(run_database)
    theirs, elsewhere = (
        await create_runnable(run_database, owned_workflow),
        await create_runnable(run_database),
    )
    for workflow in (theirs, elsewhere, replace(owned_workflow, workflow_id="wf_absent")):
        assert (await start_refused(starter, caller, workflow)).code == "workflow-not-found"

    share = "INSERT INTO workflow_share (workflow_id, user_id, shared_at) VALUES (:workflow, :user, 0)"
    await run_database.query(share, workflow=theirs.workflow_id, user=owned_workflow.user_id)
    await start(starter, caller, theirs)
    public = await create_runnable(run_database, owned_workflow, is_public=True)
    await start(starter, caller, public, iteration="1")

    # An admin may read everything of the organization, and nothing of others.
    await run_database.query("DELETE FROM workflow_share")
    await run_database.database.transaction(
        lambda connection: connection.execute(
            update(User).where(col(User.id) == owned_workflow.user_id).values(role="admin")
        )
    )
    await start(starter, caller, theirs, iteration="2")
    assert (await start_refused(starter, caller, elsewhere)).code == "workflow-not-found"


async def test_a_refusal_to_start_a_sub_workflow_gives_its_reason(run_database: RunDatabase) -> None:
    owned_workflow = await create_runnable(run_database)
    caller = caller_of(await run_database.accept_and_claim(owned_workflow), owned_workflow)
    starter = make_starter(run_database)
    for status in ("paused", "archived"):
        workflow = await create_runnable(run_database, owned_workflow, status=status, is_public=True)
        assert (await start_refused(starter, caller, workflow)).code == f"workflow-{status}"
    broken = await create_runnable(run_database, owned_workflow, is_public=True)
    await run_database.query("UPDATE workflow_graph SET connections = '[]', nodes = '[]'")
    refused = await start_refused(starter, caller, broken)
    assert refused.code == "invalid-definition"
    assert "no nodes" in refused.message
    full = await create_runnable(
        run_database,
        owned_workflow,
        is_public=True,
        settings={"concurrency": {"limit": 1, "onLimit": "reject"}},
    )
    await start(starter, caller, full)
    with pytest.raises(NodeError) as rejected:
        await start(starter, caller, full, iteration="1")
    assert (rejected.value.code, rejected.value.retryable) == ("concurrency-limit", True)


# ── the end of the parent ─────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(("end", "status"), [("cancel", "cancelled"), ("stop", "stopped")])
async def test_an_awaited_child_does_not_outlive_its_parent(
    run_database: RunDatabase, end: str, status: str
) -> None:
    owned_workflow = await create_runnable(run_database)
    parent = await run_database.accept_and_claim(owned_workflow)
    caller = caller_of(parent, owned_workflow)
    starter = make_starter(run_database)
    child = await start(starter, caller, owned_workflow)
    running = await start(starter, caller, owned_workflow, iteration="1")
    grandchild = await start(starter, structs.replace(caller, execution_id=child), owned_workflow)
    alone = await start(starter, caller, owned_workflow, iteration="2", awaited=False)
    await run_database.query("UPDATE execution SET target = 'elsewhere' WHERE id <> :id", id=running)
    (claimed,) = await run_database.claim()
    assert claimed.execution_id == running
    assert await children.request_abandoned_ends(run_database.database, run_database.store) == []

    await run_database.expire(parent)
    await run_database.store.request_end(key_of(parent), end)
    ended = await children.request_abandoned_ends(run_database.database, run_database.store)
    assert {(one.execution_id, one.request) for one in ended[:2]} == {(child, end), (running, end)}
    assert [one.execution_id for one in ended[2:]] == [grandchild]
    found = {one: (await run_database.row(one))["status"] for one in (child, grandchild, running, alone)}
    assert found == {child: status, grandchild: status, running: "running", alone: "pending"}
    assert (await run_database.row(running))["request"] == end
    (told,) = [one.requested for one in ended if one.execution_id == running]
    assert told.lease_owner == "worker"
    assert await children.request_abandoned_ends(run_database.database, run_database.store) == []


async def test_a_failing_parent_stops_its_awaited_children(run_database: RunDatabase) -> None:
    owned_workflow = await create_runnable(run_database)
    parent = await run_database.accept_and_claim(owned_workflow)
    child = await start(make_starter(run_database), caller_of(parent, owned_workflow), owned_workflow)
    await run_database.store.record([write(parent, end=RunStatus.FAILED)])
    (ended,) = await children.request_abandoned_ends(run_database.database, run_database.store)
    assert (ended.execution_id, (await run_database.row(child))["status"]) == (child, "stopped")
