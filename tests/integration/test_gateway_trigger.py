"""Triggers of deployed workflows: wakes, waits for results, and refusals if no pod starts."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import TYPE_CHECKING, Any

import httpx2
import pytest
from sqlalchemy import func, insert, select, update
from sqlmodel import col

from gateway.http import limits
from gateway.http.byte_budget import ByteHolding
from journal.deployments import activity, wakes
from models import lifecycle_policy
from models.deployment import Deployment, LifecycleDecision, ObservedState
from models.execution import Execution
from models.execution_status import ExecutionStatus
from models.lifecycle_policy import LifecycleAction, LifecycleReason, LifecycleVerdict, StoppedReason
from models.workflow import Definition
from tests.http_receiver import HttpReceiver, run_receiver
from tests.integration.deployed_workflows import deploy_with_pod
from tests.integration.gateway_harness import (
    EDGE,
    GatewayHarness,
    OrganizationUsers,
    UserClient,
    assert_refused,
)
from tests.integration.second_gateway import run_second_gateway
from tests.integration.simulated_cluster import SimulatedCluster, run_simulated_cluster
from tests.integration.test_gateway_enqueue import QUEUE

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncConnection

GREETING = 'Hello, {{ data.body.name ?? "you" }}'
GREET = {"id": "step", "nodeId": "set", "config": {"values": {"greeting": GREETING}}}
GREETS: dict[str, Any] = {"nodes": [{"id": "start", "nodeId": "manual"}, GREET], "connections": [EDGE]}
ASLEEP: dict[str, Any] = {
    "replicas": 0,
    "stopped_reason": StoppedReason.IDLE,
    "observed": ObservedState.STOPPED,
}
BY_HAND: dict[str, Any] = {**ASLEEP, "stopped_reason": StoppedReason.MANUAL}
SYNC = {"inputs": {"name": "Ada"}, "sync": True}
GREETED = {"step": {"body": {"name": "Ada"}, "greeting": "Hello, Ada"}}
LARGE_BYTES = 100_000
"""Of a body that budgets count, and that no other request has."""
PATIENCE_SECONDS = 60.0

pytestmark = pytest.mark.usefixtures("cluster")


@pytest.fixture(scope="module")
async def cluster(harness: GatewayHarness) -> AsyncIterator[SimulatedCluster]:
    async with run_simulated_cluster(harness) as cluster:
        yield cluster


@pytest.fixture
async def receiver() -> AsyncIterator[HttpReceiver]:
    """Yield a receiver that does not answer for now."""
    async with run_receiver() as receiver:
        receiver.may_answer.clear()
        yield receiver


def asking_graph(receiver: HttpReceiver) -> dict[str, Any]:
    """Return a graph for runs that last until they are answered."""
    asking = {"id": "step", "nodeId": "http-request", "config": {"url": receiver.url(), "method": "POST"}}
    return {"nodes": [{"id": "start", "nodeId": "manual"}, asking], "connections": [EDGE]}


async def deploy(
    harness: GatewayHarness,
    person: UserClient,
    graph: dict[str, Any] = GREETS,
    **columns: Any,  # noqa: ANN401 - any column
) -> str:
    """Create a workflow that is active and marked as deployed, and return its id."""
    workflow_id = await person.create(**graph)
    response = await person.api.put(f"/api/v1/workflows/{workflow_id}/status", json={"status": "active"})
    assert response.is_success
    await set_policy(person, workflow_id, {"type": "idle-shutdown"})
    caller = await harness.gateway.authenticator.caller({"headers": [(b"x-api-key", person.key.encode())]})
    loaded = await harness.gateway.workflows.load(workflow_id, caller)
    definition = {
        "organization_id": loaded.organization_id,
        "hash": loaded.definition_hash,
        "shard": loaded.shard,
        "body": loaded.definition,
        "created_at": datetime.now(UTC),
    }
    known = select(col(Definition.hash)).where(
        col(Definition.hash) == loaded.definition_hash,
        col(Definition.organization_id) == loaded.organization_id,
    )

    async def keep(connection: AsyncConnection) -> None:
        if await connection.scalar(known) is None:
            await connection.execute(insert(Definition).values(definition))

    await harness.gateway.database.transaction(keep)
    await deploy_with_pod(harness, person, workflow_id, definition_hash=loaded.definition_hash, **columns)
    return workflow_id


async def set_policy(person: UserClient, workflow_id: str, policy: dict[str, Any]) -> None:
    response = await person.api.put(f"/api/v1/workflows/{workflow_id}/lifecycle", json=policy)
    assert response.is_success, response.text


def closed_policy() -> dict[str, Any]:
    """Return a policy with one window, which opens in three days."""
    day = (datetime.now(UTC) + timedelta(days=3)).isoweekday() % 7
    window = {"days": [day], "startTime": "09:00", "endTime": "10:00"}
    return {"type": "scheduled-window", "schedule": {"timezone": "UTC", "windows": [window]}}


async def trigger(
    person: UserClient, workflow_id: str, body: dict[str, Any] | None = None, **headers: str
) -> httpx2.Response:
    return await person.api.post(
        f"/api/v1/workflows/{workflow_id}/trigger", json=body or {}, headers=headers, timeout=30
    )


async def read_deployment(harness: GatewayHarness, workflow_id: str) -> Deployment:
    async with harness.gateway.database.read() as connection:
        seen = await activity.read_activity(connection, workflow_id)
    assert seen is not None
    return seen.deployment


async def wait_until(condition: Callable[[], Awaitable[bool]]) -> None:
    async with asyncio.timeout(PATIENCE_SECONDS):
        while not await condition():  # noqa: ASYNC110 - rows send no events
            await asyncio.sleep(0.02)


async def wake_for_runs(harness: GatewayHarness, workflow_id: str) -> wakes.WakeOutcome:
    """Return the outcome of a wake for the pending runs of a deployment, once its row is unlocked."""
    async with asyncio.timeout(PATIENCE_SECONDS):
        while True:
            done = await wakes.wake_for_waiting_runs(harness.gateway.database)
            if workflow_id in done:
                return done[workflow_id]
            await asyncio.sleep(0.02)


async def read_status(harness: GatewayHarness, execution_id: str) -> str:
    async with harness.gateway.database.read() as connection:
        found = await connection.scalar(
            select(col(Execution.status)).where(col(Execution.id) == execution_id)
        )
    return str(found)


async def count_runs(harness: GatewayHarness, workflow_id: str) -> int:
    async with harness.gateway.database.read() as connection:
        statement = select(func.count()).where(col(Execution.workflow_id) == workflow_id)
        return int(await connection.scalar(statement) or 0)


async def test_a_synchronous_trigger_answers_with_the_outputs_of_the_leaves(
    harness: GatewayHarness, people: OrganizationUsers, cluster: SimulatedCluster
) -> None:
    workflow_id = await deploy(harness, people.owner, **ASLEEP)
    cold = await trigger(people.owner, workflow_id, SYNC)
    assert cold.status_code == 200, cold.text
    told = cold.json()
    assert (told["status"], told["workflow_id"], told["output"]) == ("completed", workflow_id, GREETED)
    assert cold.headers["Location"].endswith(told["execution_id"])
    assert cold.headers["X-Cold-Start"] == "true"
    warm = await trigger(people.owner, workflow_id, SYNC)
    assert (warm.json()["status"], warm.headers["X-Cold-Start"]) == ("completed", "false")
    parts = [part.partition(";dur=")[0] for part in warm.headers["Server-Timing"].split(", ")]
    assert parts == ["accept", "wake", "run"]
    assert cluster.starts[workflow_id] == 1


async def test_many_callers_of_a_sleeping_workflow_share_one_start(
    harness: GatewayHarness, people: OrganizationUsers, cluster: SimulatedCluster
) -> None:
    workflow_id = await deploy(harness, people.owner, **ASLEEP)
    answers = await asyncio.gather(*(trigger(people.owner, workflow_id, SYNC) for _ in range(200)))
    assert {answer.json()["status"] for answer in answers} == {"completed"}
    assert len({answer.json()["execution_id"] for answer in answers}) == 200
    assert cluster.starts[workflow_id] == 1
    async with harness.gateway.database.read() as connection:
        kept = select(col(LifecycleDecision.action)).where(col(LifecycleDecision.workflow_id) == workflow_id)
        assert list(await connection.scalars(kept)) == [LifecycleAction.WAKE]


async def test_two_gateways_that_wake_at_once_start_it_once(
    harness: GatewayHarness, people: OrganizationUsers, cluster: SimulatedCluster
) -> None:
    workflow_id = await deploy(harness, people.owner, **ASLEEP)
    async with run_second_gateway(harness) as client:
        other = client(people.owner)
        path = f"/api/v1/workflows/{workflow_id}/trigger"
        answers = await asyncio.gather(
            *(api.post(path, json=SYNC, timeout=30) for api in (people.owner.api, other) for _ in range(5))
        )
        assert {answer.json()["status"] for answer in answers} == {"completed"}
    assert cluster.starts[workflow_id] == 1


async def test_an_asynchronous_trigger_answers_when_a_pod_has_taken_the_run(
    harness: GatewayHarness, people: OrganizationUsers, receiver: HttpReceiver
) -> None:
    workflow_id = await deploy(harness, people.owner, asking_graph(receiver), **ASLEEP)
    response = await trigger(people.owner, workflow_id, {"trigger_type": "nightly"})
    told = response.json()
    assert (told["status"], told["output"]) == ("started", {})
    shown = await people.owner.api.get(f"/api/v1/executions/{told['execution_id']}")
    assert shown.json()["triggerType"] == "nightly"
    assert shown.json()["status"] == "running"
    receiver.may_answer.set()
    await wait_until(lambda: has_status(harness, told["execution_id"], "completed"))


async def test_a_run_uses_the_deployed_definition_despite_later_edits(
    harness: GatewayHarness, people: OrganizationUsers
) -> None:
    workflow_id = await deploy(harness, people.owner, **ASLEEP)
    edit = {"config": {"values": {"greeting": "Edited"}}}
    assert (await people.owner.api.put(f"/api/v1/workflows/{workflow_id}/nodes/step", json=edit)).is_success
    assert (await trigger(people.owner, workflow_id, SYNC)).json()["output"] == GREETED


async def test_a_run_that_outlasts_the_wait_goes_on_and_is_named(
    harness: GatewayHarness,
    people: OrganizationUsers,
    receiver: HttpReceiver,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    workflow_id = await deploy(harness, people.owner, asking_graph(receiver), **ASLEEP)
    await trigger(people.owner, workflow_id)
    monkeypatch.setattr(limits, "TRIGGER_SYNC_SECONDS", 0.2)
    told = (await trigger(people.owner, workflow_id, {"sync": True})).json()
    assert told["status"] in {"pending", "running"}  # a pod may still be about to take it
    assert told["output"] == {}
    receiver.may_answer.set()
    await wait_until(lambda: has_status(harness, told["execution_id"], "completed"))


async def test_the_wait_for_a_start_counts_and_the_run_is_taken_later(
    harness: GatewayHarness,
    people: OrganizationUsers,
    cluster: SimulatedCluster,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    workflow_id = await deploy(harness, people.owner, **ASLEEP)
    monkeypatch.setattr(limits, "TRIGGER_SYNC_SECONDS", 0.2)
    monkeypatch.setattr(limits, "TRIGGER_ASYNC_SECONDS", 0.2)
    cluster.is_held.set()
    answers = [await trigger(people.owner, workflow_id, {"sync": sync}) for sync in (True, False)]
    assert [answer.json()["status"] for answer in answers] == ["pending", "pending"]
    cluster.is_held.clear()
    for answer in answers:
        execution_id = answer.json()["execution_id"]
        await wait_until(partial(has_status, harness, execution_id, "completed"))


async def has_status(harness: GatewayHarness, execution_id: str, wanted: str) -> bool:
    await harness.gateway.store.sweep(100)
    return await read_status(harness, execution_id) == wanted


async def test_a_client_that_is_gone_changes_nothing(
    harness: GatewayHarness, people: OrganizationUsers, cluster: SimulatedCluster
) -> None:
    workflow_id = await deploy(harness, people.owner, **ASLEEP)
    path = f"{cluster.gateway_url}/api/v1/workflows/{workflow_id}/trigger"
    cluster.is_held.set()
    async with httpx2.AsyncClient(
        headers={"X-API-Key": people.owner.key}, timeout=PATIENCE_SECONDS
    ) as client:
        asking = asyncio.create_task(client.post(path, json=SYNC))
        await wait_until(lambda: has_runs(harness, workflow_id, 1))
        asking.cancel()
        await asyncio.wait([asking])
    await wait_until(lambda: has_no_waiters(harness))
    cluster.is_held.clear()
    await wait_until(lambda: all_have_ended(harness, workflow_id, 1))


async def test_a_body_is_counted_no_longer_once_its_run_is_accepted(
    harness: GatewayHarness,
    people: OrganizationUsers,
    cluster: SimulatedCluster,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    large: set[ByteHolding] = set()
    add = ByteHolding.add

    def note(holding: ByteHolding, count: int) -> bool:
        has_room = add(holding, count)
        if holding.bytes >= LARGE_BYTES:
            large.add(holding)
        return has_room

    async def is_released() -> bool:
        return len(large) == 1 and all(one.bytes == 0 for one in large)

    monkeypatch.setattr(ByteHolding, "add", note)
    workflow_id = await deploy(harness, people.owner, **ASLEEP)
    path = f"{cluster.gateway_url}/api/v1/workflows/{workflow_id}/trigger"
    body = {"inputs": {"name": "Ada", "letter": "x" * LARGE_BYTES}, "sync": True}
    cluster.is_held.set()
    async with httpx2.AsyncClient(
        headers={"X-API-Key": people.owner.key}, timeout=PATIENCE_SECONDS
    ) as client:
        asking = asyncio.create_task(client.post(path, json=body))
        await wait_until(is_released)
        assert not asking.done()
        cluster.is_held.clear()
        assert (await asking).is_success


@pytest.mark.every_database
async def test_the_same_key_waits_on_the_same_run(harness: GatewayHarness, people: OrganizationUsers) -> None:
    workflow_id = await deploy(harness, people.owner, **ASLEEP)
    answers = await asyncio.gather(
        *(trigger(people.owner, workflow_id, SYNC, **{"Idempotency-Key": "once"}) for _ in range(3))
    )
    answers.append(await trigger(people.owner, workflow_id, SYNC, **{"Idempotency-Key": "once"}))
    assert len({answer.json()["execution_id"] for answer in answers}) == 1
    assert [answer.json()["output"] for answer in answers] == [GREETED] * 4
    assert answers[-1].headers["Idempotent-Replayed"] == "true"
    other = await trigger(people.owner, workflow_id, {"sync": True}, **{"Idempotency-Key": "once"})
    assert_refused(other, 422, "idempotency-mismatch")


# ── refused and failed starts ───────────────────────────────────────────────────────────────────────────────


async def test_undeployed_workflows_cannot_be_triggered(
    harness: GatewayHarness, people: OrganizationUsers
) -> None:
    never = await people.owner.create(**GREETS)
    assert_refused(await trigger(people.owner, never), 409, "not-deployed")
    no_more = await deploy(harness, people.owner, **ASLEEP, is_deployed=False)
    assert_refused(await trigger(people.owner, no_more), 409, "not-deployed")
    assert_refused(await trigger(people.stranger, no_more), 404, "not-found")
    assert await count_runs(harness, never) == await count_runs(harness, no_more) == 0


@pytest.mark.every_database
async def test_a_deployed_definition_runs_only_for_users_of_its_models(
    harness: GatewayHarness, people: OrganizationUsers
) -> None:
    """The deployed definition counts, whatever the workflow has become since."""
    ask = {"id": "step", "nodeId": "llm", "config": {"model": "model_absent", "prompt": "Hi"}}
    graph = {"nodes": [{"id": "start", "nodeId": "manual"}, ask], "connections": [EDGE]}
    workflow_id = await deploy(harness, people.owner, graph, **ASLEEP)
    changed = await people.owner.api.put(
        f"/api/v1/workflows/{workflow_id}/nodes/step", json={"config": {"model": "echo", "prompt": "Hi"}}
    )
    assert changed.status_code == 200, changed.text
    assert_refused(await trigger(people.owner, workflow_id), 403, "model-not-usable")
    assert await count_runs(harness, workflow_id) == 0


async def test_a_closed_window_says_when_it_opens(harness: GatewayHarness, people: OrganizationUsers) -> None:
    workflow_id = await deploy(harness, people.owner, **{**ASLEEP, "stopped_reason": StoppedReason.SCHEDULE})
    await set_policy(people.owner, workflow_id, closed_policy())
    response = await trigger(people.owner, workflow_id, SYNC)
    assert_refused(response, 409, "outside-window")
    opens_at = datetime.fromisoformat(response.json()["error"]["details"][0]["opensAt"])
    assert timedelta(days=1) < opens_at - datetime.now(UTC) < timedelta(days=4)
    assert (await read_deployment(harness, workflow_id)).replicas == 0


async def test_a_manually_stopped_deployment_starts_for_a_trigger_unless_always_on(
    harness: GatewayHarness, people: OrganizationUsers
) -> None:
    workflow_id = await deploy(harness, people.owner, **BY_HAND)
    assert (await trigger(people.owner, workflow_id, SYNC)).json()["status"] == "completed"
    other = await deploy(harness, people.owner, **BY_HAND)
    await set_policy(people.owner, other, {"type": "always-on"})
    assert_refused(await trigger(people.owner, other, SYNC), 409, "stopped-manually")


async def test_inactive_workflows_accept_no_runs_and_finish_their_own(
    harness: GatewayHarness, people: OrganizationUsers, receiver: HttpReceiver
) -> None:
    workflow_id = await deploy(harness, people.owner, asking_graph(receiver), **ASLEEP)
    begun = (await trigger(people.owner, workflow_id)).json()
    assert begun["status"] == "started"
    path = f"/api/v1/workflows/{workflow_id}/status"
    for state, code in (("draft", "workflow-not-active"), ("paused", "workflow-paused")):
        assert (await people.owner.api.put(path, json={"status": state})).is_success
        response = await trigger(people.owner, workflow_id)
        assert_refused(response, 409, code)
        assert "active" in response.json()["error"]["message"]
    receiver.may_answer.set()
    await wait_until(lambda: has_status(harness, begun["execution_id"], "completed"))
    assert (await people.owner.api.put(path, json={"status": "active"})).is_success
    assert (await trigger(people.owner, workflow_id, SYNC)).json()["status"] == "completed"
    await people.owner.api.put(path, json={"status": "archived"})
    assert_refused(await trigger(people.owner, workflow_id), 409, "workflow-archived")


async def test_pods_that_can_t_start_are_told_of_with_their_reason_and_the_run_is_kept(
    harness: GatewayHarness, people: OrganizationUsers, cluster: SimulatedCluster
) -> None:
    workflow_id = await deploy(harness, people.owner, **ASLEEP)
    cluster.broken[workflow_id] = "the image can't be pulled"
    answers = await asyncio.gather(*(trigger(people.owner, workflow_id, SYNC) for _ in range(3)))
    for answer in answers:
        assert_refused(answer, 503, "start-failed")
        assert "the image can't be pulled" in answer.json()["error"]["message"]
        assert answer.headers["X-Cold-Start"] == "true"
    del cluster.broken[workflow_id]
    # The next trigger retries the start for all.
    assert (await trigger(people.owner, workflow_id, SYNC)).json()["output"] == GREETED
    await wait_until(lambda: all_have_ended(harness, workflow_id, 4))


async def all_have_ended(harness: GatewayHarness, workflow_id: str, count: int) -> bool:
    await harness.gateway.store.sweep(100)
    ended = select(func.count()).where(
        col(Execution.workflow_id) == workflow_id, col(Execution.status) == ExecutionStatus.COMPLETED
    )
    async with harness.gateway.database.read() as connection:
        return await connection.scalar(ended) == count


async def test_no_more_wait_for_a_start_than_may(
    harness: GatewayHarness,
    people: OrganizationUsers,
    cluster: SimulatedCluster,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    workflow_id = await deploy(harness, people.owner, **ASLEEP)
    monkeypatch.setattr(limits, "WAKES_WAITING", 2)
    cluster.is_held.set()
    waiting = [asyncio.create_task(trigger(people.owner, workflow_id, SYNC)) for _ in range(2)]
    await wait_until(lambda: has_runs(harness, workflow_id, 2))
    assert_refused(await trigger(people.owner, workflow_id, SYNC), 503, "not-ready")
    cluster.is_held.clear()
    assert {answer.json()["status"] for answer in await asyncio.gather(*waiting)} == {"completed"}


async def has_runs(harness: GatewayHarness, workflow_id: str, count: int) -> bool:
    return await count_runs(harness, workflow_id) == count


async def has_no_waiters(harness: GatewayHarness) -> bool:
    return not harness.gateway.activation.has_waiting_requests


# ── races ───────────────────────────────────────────────────────────────────────────────────────────────────


async def stop(harness: GatewayHarness, workflow_id: str) -> None:
    await activity.decide_and_apply(
        harness.gateway.database,
        workflow_id,
        lambda seen: lifecycle_policy.stop_decision(
            seen.situation, LifecycleReason.BY_HAND, StoppedReason.MANUAL
        ),
    )


async def test_a_stop_between_the_count_and_the_run_is_made_good(
    harness: GatewayHarness,
    people: OrganizationUsers,
    cluster: SimulatedCluster,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    workflow_id = await deploy(harness, people.owner, **ASLEEP)
    await trigger(people.owner, workflow_id, SYNC)
    record_request = harness.gateway.activation.record_request

    async def record_and_be_overtaken(asked: str) -> Deployment:
        found = await record_request(asked)
        await stop(harness, asked)
        await wait_until(lambda: is_seen(harness, asked, ObservedState.STOPPED))
        return found

    monkeypatch.setattr(harness.gateway.activation, "record_request", record_and_be_overtaken)
    response = await trigger(people.owner, workflow_id, SYNC)
    assert response.json()["status"] == "completed"
    assert cluster.starts[workflow_id] == 2


async def is_seen(harness: GatewayHarness, workflow_id: str, observed: ObservedState) -> bool:
    return (await read_deployment(harness, workflow_id)).observed == observed


async def test_a_stop_during_a_wake_only_delays_it(
    harness: GatewayHarness, people: OrganizationUsers, cluster: SimulatedCluster
) -> None:
    workflow_id = await deploy(harness, people.owner, **ASLEEP)
    cluster.is_held.set()
    waiting = asyncio.create_task(trigger(people.owner, workflow_id, SYNC))
    await wait_until(lambda: is_wanted(harness, workflow_id))
    await stop(harness, workflow_id)
    cluster.is_held.clear()
    assert (await waiting).json()["status"] == "completed"


async def is_wanted(harness: GatewayHarness, workflow_id: str) -> bool:
    return (await read_deployment(harness, workflow_id)).replicas > 0


async def test_a_wake_ends_a_drain(
    harness: GatewayHarness, people: OrganizationUsers, cluster: SimulatedCluster, receiver: HttpReceiver
) -> None:
    workflow_id = await deploy(harness, people.owner, asking_graph(receiver), **ASLEEP)
    first = (await trigger(people.owner, workflow_id)).json()["execution_id"]
    cluster.is_held.set()
    await stop(harness, workflow_id)
    assert (await read_deployment(harness, workflow_id)).drain_until is not None
    second = asyncio.create_task(trigger(people.owner, workflow_id, {"sync": True}))
    await wait_until(lambda: is_without_drain(harness, workflow_id))
    cluster.is_held.clear()
    receiver.may_answer.set()
    assert (await second).json()["status"] == "completed"
    await wait_until(lambda: has_status(harness, first, "completed"))


async def is_without_drain(harness: GatewayHarness, workflow_id: str) -> bool:
    return (await read_deployment(harness, workflow_id)).drain_until is None


async def test_a_stop_that_may_not_be_undone_ends_the_wait_and_keeps_the_run(
    harness: GatewayHarness, people: OrganizationUsers, cluster: SimulatedCluster
) -> None:
    workflow_id = await deploy(harness, people.owner, **ASLEEP)
    await set_policy(people.owner, workflow_id, {"type": "always-on"})
    cluster.is_held.set()
    waiting = asyncio.create_task(trigger(people.owner, workflow_id, SYNC))
    await wait_until(lambda: is_wanted(harness, workflow_id))
    await stop(harness, workflow_id)
    told = (await waiting).json()
    assert told["status"] == "pending"
    assert await wake_for_runs(harness, workflow_id) is wakes.WakeOutcome.DEFERRED
    assert await read_status(harness, told["execution_id"]) == "waiting"
    cluster.is_held.clear()
    # Once it may start again, the run continues.
    await set_policy(people.owner, workflow_id, {"type": "idle-shutdown"})
    assert await wake_for_runs(harness, workflow_id) is wakes.WakeOutcome.WOKEN
    await wait_until(lambda: has_status(harness, told["execution_id"], "completed"))


# ── runs without waiting clients ────────────────────────────────────────────────────────────────────────────


async def accept_run(harness: GatewayHarness, person: UserClient, workflow_id: str) -> str:
    """Accept a run for pods, without waking them."""
    response = await person.api.post(f"/api/v1/workflows/{workflow_id}/execute", json={})
    execution_id: str = response.json()["executionId"]
    row = update(Execution).where(col(Execution.id) == execution_id)
    await harness.gateway.database.transaction(
        lambda connection: connection.execute(
            row.values(target=workflow_id, assigned_deployment_id=workflow_id)
        )
    )
    return execution_id


async def test_a_run_that_is_due_wakes_its_deployment(
    harness: GatewayHarness, people: OrganizationUsers, cluster: SimulatedCluster
) -> None:
    workflow_id = await deploy(harness, people.owner, **ASLEEP)
    execution_id = await accept_run(harness, people.owner, workflow_id)
    assert await wake_for_runs(harness, workflow_id) is wakes.WakeOutcome.WOKEN
    await wait_until(lambda: has_status(harness, execution_id, "completed"))
    assert cluster.starts[workflow_id] == 1


async def test_a_run_outside_the_window_is_deferred_to_its_opening_and_let_go_by_a_start(
    harness: GatewayHarness, people: OrganizationUsers
) -> None:
    workflow_id = await deploy(harness, people.owner, **{**ASLEEP, "stopped_reason": StoppedReason.SCHEDULE})
    await set_policy(people.owner, workflow_id, closed_policy())
    execution_id = await accept_run(harness, people.owner, workflow_id)
    assert await wake_for_runs(harness, workflow_id) is wakes.WakeOutcome.DEFERRED
    due = select(col(Execution.due_at)).where(col(Execution.id) == execution_id)
    async with harness.gateway.database.read() as connection:
        due_at = await connection.scalar(due)
    assert due_at is not None
    assert timedelta(days=1) < due_at - datetime.now(UTC) < timedelta(days=4)
    assert workflow_id not in await wakes.wake_for_waiting_runs(harness.gateway.database)
    by_hand = LifecycleVerdict(LifecycleAction.START, LifecycleReason.BY_HAND)
    await activity.decide_and_apply(harness.gateway.database, workflow_id, lambda _: by_hand)
    assert await wake_for_runs(harness, workflow_id) is wakes.WakeOutcome.RELEASED
    await wait_until(lambda: has_status(harness, execution_id, "completed"))


async def test_a_delivery_outside_the_window_names_its_opening_and_one_after_a_stop_by_hand_none(
    harness: GatewayHarness, people: OrganizationUsers
) -> None:
    for stopped, policy, code in (
        (StoppedReason.SCHEDULE, closed_policy(), "outside-window"),
        (StoppedReason.MANUAL, {"type": "always-on"}, "stopped-manually"),
    ):
        workflow_id = await deploy(harness, people.owner, QUEUE, **{**ASLEEP, "stopped_reason": stopped})
        await set_policy(people.owner, workflow_id, policy)
        harness.gateway.workflows.forget(people.owner.user.organization_id, workflow_id)
        path = f"/api/v1/workflows/{workflow_id}"
        assert (await people.owner.api.post(f"{path}/enqueue", json={"message": 1})).status_code == 201
        [found] = (await people.owner.api.get(f"{path}/deliveries")).json()["deliveries"]
        assert (found["outcome"], found["reason"]["code"]) == ("deferred", code)
        assert (found["notBefore"] is not None) == (stopped is StoppedReason.SCHEDULE)
        assert (found["notBefore"] or "9") > found["createdAt"]


async def test_workers_take_runs_of_undeployed_workflows(
    harness: GatewayHarness, people: OrganizationUsers
) -> None:
    workflow_id = await deploy(harness, people.owner, **ASLEEP, is_deployed=False)
    execution_id = await accept_run(harness, people.owner, workflow_id)
    done = await wakes.wake_for_waiting_runs(harness.gateway.database)
    assert done[workflow_id] is wakes.WakeOutcome.LEFT_TO_WORKERS
    async with harness.gateway.database.read() as connection:
        target = select(col(Execution.target)).where(col(Execution.id) == execution_id)
        assert await connection.scalar(target) == "shared"


# ── discover, and calls by a workflow's name ────────────────────────────────────────────────────────────────


@pytest.mark.every_database
async def test_an_application_discovers_its_workflows_and_calls_them_by_name(
    harness: GatewayHarness, people: OrganizationUsers
) -> None:
    app_id = f"app_{people.owner.user.id}"
    mine = await deploy(harness, people.owner, {**GREETS, "config": {"appId": app_id}}, **ASLEEP)
    await deploy(harness, people.owner, {**GREETS, "config": {"appId": app_id}}, is_deployed=False)
    await people.owner.create(**GREETS, config={"appId": app_id})
    found = (await people.owner.api.get("/api/v1/workflows/discover", params={"appId": app_id})).json()
    assert [one["id"] for one in found] == [mine]
    name = "workflow-" + mine.replace("_", "-")
    assert found[0]["endpoints"] == {
        "proxy_url": f"http://{name}.user-workflows.svc.cluster.local/trigger",
        "method": "POST",
    }
    assert found[0]["deployment"] == {"pod_name": name, "namespace": "user-workflows"}
    assert (found[0]["trigger_type"], found[0]["mode"]) == ("manual", "production")
    for person in (people.colleague, people.stranger):
        response = await person.api.get("/api/v1/workflows/discover", params={"appId": app_id})
        assert response.json() == []
    assert_refused(await people.owner.api.get("/api/v1/workflows/discover"), 400, "invalid-query")
    answer = await people.owner.api.post(found[0]["endpoints"]["proxy_url"], json=SYNC, timeout=30)
    assert answer.json()["output"] == GREETED
    assert_refused(
        await (await harness.client()).post(found[0]["endpoints"]["proxy_url"]), 401, "unauthorized"
    )
    assert_refused(await people.stranger.api.post(f"http://{name}/trigger", json={}), 404, "not-found")
    assert_refused(await people.owner.api.get(f"http://{name}:8000/api/v1/workflows"), 404, "not-found")


async def test_a_trigger_that_prefers_to_wait_is_answered_with_all_outputs(
    harness: GatewayHarness, people: OrganizationUsers
) -> None:
    workflow_id = await deploy(harness, people.owner)
    answers = {}
    for sync in (False, True):
        answers[sync] = await people.owner.api.post(
            f"/api/v1/workflows/{workflow_id}/trigger",
            json={"inputs": {"name": "Ada"}, "sync": sync},
            headers={"Prefer": "wait=30"},
        )
        assert answers[sync].status_code == 200, answers[sync].text
    body = answers[False].json()
    assert (body["status"], body["output"], body["error"]) == ("completed", GREETED, None)
    progress = (await people.owner.api.get(f"/api/v1/executions/{body['execution_id']}/progress")).json()
    assert body["outputs"] == progress["outputs"]
    assert answers[False].headers["preference-applied"] == "wait=30"
    # `sync` in the body takes precedence over the header.
    assert "outputs" not in answers[True].json()
    assert "preference-applied" not in answers[True].headers
