"""Runs that wait for events: each gets the first matching event, even if a process dies in between."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from typing import Any
from uuid import uuid4

import pytest
from sqlalchemy import BigInteger, func, select, type_coerce
from sqlalchemy.ext.asyncio import AsyncConnection
from sqlmodel import SQLModel, col

from engine.run_records import NodeSpan, SpanStatus
from engine.services import EventWaitRequest, RunCaller
from execution.event_matching import EventMatcher
from journal.store import ClaimedRun, ClaimQuery, RunWrite
from journal.waits import event_waits
from messages.local_broker import LocalBroker
from models.database_time import DatabaseTime
from models.errors import DatabaseUnavailable
from models.event_wait import EventWait
from models.execution import Execution, WaitAnswer
from models.execution_status import TERMINAL_STATUSES
from models.ingest import EventRecord
from tests.integration.gateway_harness import GatewayHarness, OrganizationUsers, UserClient
from tests.integration.lock_holders import hold_transaction_open, open_impatient_database, require_prompt
from workers.main import run_worker
from workers.settings import WorkerSettings

pytestmark = [pytest.mark.every_database, pytest.mark.timeout(30)]

EVENTS = "/api/v1/workflows/events"
SAME_ORDER = {"left": "{{ item.event_data.order }}", "operator": "equals", "right": "{{ data.body.order }}"}


def waiting_graph(**config: Any) -> dict[str, Any]:  # noqa: ANN401 - any JSON value
    """Return a graph that waits for an event and outputs it."""
    given = {"event_type": "order.paid", "filter": SAME_ORDER, **config}
    wait = {name: value for name, value in given.items() if value is not None}
    return {
        "nodes": [
            {"id": "start", "nodeId": "manual"},
            {"id": "wait", "nodeId": "wait-for-event", "config": wait},
            {"id": "paid", "nodeId": "set", "config": {"values": {"total": "{{ data.event_data.total }}"}}},
            {"id": "late", "nodeId": "set", "config": {"values": {"late": True}}},
        ],
        "connections": [
            {"source": "start", "target": "wait"},
            {"source": "wait", "target": "paid"},
            {"source": "wait", "sourcePort": "timeout", "target": "late"},
        ],
    }


@asynccontextmanager
async def serve_worker(harness: GatewayHarness) -> AsyncIterator[None]:
    gateway = harness.gateway
    shared = gateway.settings.model_dump(include={"data_dir", "database_url", "secret_key"})
    settings = WorkerSettings(**shared, lease_seconds=5, sweep_seconds=0.2)
    broker = LocalBroker(channel=uuid4().hex)
    try:
        async with run_worker(settings, gateway.store, broker, gateway.database):
            yield
    finally:
        await broker.close()


async def start_run(person: UserClient, order: int, **config: Any) -> str:  # noqa: ANN401 - any JSON value
    workflow_id = await person.create(**waiting_graph(**config))
    response = await person.api.post(
        f"/api/v1/workflows/{workflow_id}/execute", json={"triggerInputs": {"order": order}}
    )
    execution_id: str = response.json()["executionId"]
    return execution_id


async def send_event(person: UserClient, event_type: str, **data: Any) -> None:  # noqa: ANN401 - any JSON value
    response = await person.api.post(EVENTS, json={"event_type": event_type, "event_data": data})
    assert response.status_code == 200, response.text


async def read_run(harness: GatewayHarness, execution_id: str) -> Any:  # noqa: ANN401 - a row
    async with harness.gateway.database.read() as connection:
        found = await connection.execute(select(Execution).where(col(Execution.id) == execution_id))
        return found.mappings().one()


async def count(harness: GatewayHarness, table: type[SQLModel], **equal: Any) -> int:  # noqa: ANN401 - any column
    conditions = [getattr(table, name) == value for name, value in equal.items()]
    async with harness.gateway.database.read() as connection:
        return await connection.scalar(select(func.count()).select_from(table).where(*conditions)) or 0


async def wait_until_asleep(harness: GatewayHarness, execution_id: str) -> None:
    while (await read_run(harness, execution_id))["status"] != "waiting":  # noqa: ASYNC110 - rows send no events
        await asyncio.sleep(0.05)


async def read_result(harness: GatewayHarness, person: UserClient, execution_id: str) -> tuple[str, Any]:
    """Return by which node a run has ended, and the total of the event that it was given."""
    while (await read_run(harness, execution_id))["status"] not in TERMINAL_STATUSES:  # noqa: ASYNC110 - rows send no events
        await asyncio.sleep(0.05)
    shown = (await person.api.get(f"/api/v1/executions/{execution_id}")).json()
    assert shown["status"] == "completed", shown
    ((name, output),) = [one for one in shown["outputs"].items() if one[0] in {"paid", "late"}]
    return name, output.get("total")


def silence_gateway(harness: GatewayHarness, monkeypatch: pytest.MonkeyPatch) -> None:
    """Silence the gateway as soon as events are committed, as if it had died."""
    telling = harness.gateway.acceptances._events  # noqa: SLF001 - it is nowhere else
    monkeypatch.setattr(telling, "submit", lambda _event_id: None)
    monkeypatch.setattr(event_waits, "UNDELIVERED_SECONDS", 0)


def make_matcher(harness: GatewayHarness) -> EventMatcher:
    return EventMatcher(harness.gateway.database, harness.gateway.broker)


# ── event filters ───────────────────────────────────────────────────────────────────────────────────────────


async def test_a_run_sleeps_until_its_event_comes_and_one_event_may_be_that_of_many(
    harness: GatewayHarness, people: OrganizationUsers
) -> None:
    async with serve_worker(harness):
        mine, alike, other = [await start_run(people.owner, order) for order in (7, 7, 8)]
        anything = await start_run(people.owner, 0, event_type="order.*", filter=None)
        for execution_id in (mine, alike, other, anything):
            await wait_until_asleep(harness, execution_id)
        sleeping = await read_run(harness, mine)
        assert (sleeping["lease_owner"], sleeping["due_at"]) == (None, None)
        await send_event(people.stranger, "order.paid", order=7, total=1)
        await send_event(people.owner, "order.packed", order=7, total=2)
        await send_event(people.owner, "order.paid", total=3)
        await send_event(people.owner, "order.paid", order=7, total=4)
        assert await read_result(harness, people.owner, mine) == ("paid", 4)
        assert await read_result(harness, people.owner, alike) == ("paid", 4)
        assert await read_result(harness, people.owner, anything) == ("paid", 2)
        assert (await read_run(harness, other))["status"] == "waiting"
        assert await count(harness, EventWait, organization_id=people.owner.user.organization_id) == 1
        response = await people.owner.api.post(f"/api/v1/executions/{other}/cancel")
        assert response.status_code == 200
    await make_matcher(harness).delete_finished_waits()
    assert await count(harness, EventWait, organization_id=people.owner.user.organization_id) == 0


async def test_an_event_that_came_before_counts_where_the_node_looks_back(
    harness: GatewayHarness, people: OrganizationUsers, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(event_waits, "BATCH_SCANNED", 2)
    for total, order in enumerate((8, 8, 7, 7)):
        await send_event(people.owner, "order.paid", order=order, total=total)
    await send_event(people.owner, "orders", order=7, total=99)
    monkeypatch.setattr(event_waits, "MAX_CLOCK_SKEW", event_waits.MAX_CLOCK_SKEW * 0)
    async with serve_worker(harness):
        blind = await start_run(people.owner, 7)
        await wait_until_asleep(harness, blind)
        looking = await start_run(people.owner, 7, lookBackSeconds=60)
        by_prefix = await start_run(people.owner, 7, lookBackSeconds=60, event_type="order.*")
        assert await read_result(harness, people.owner, looking) == ("paid", 2)
        assert await read_result(harness, people.owner, by_prefix) == ("paid", 2)
        assert (await read_run(harness, blind))["status"] == "waiting"


async def test_a_run_goes_on_without_where_no_event_comes_in_time(
    harness: GatewayHarness, people: OrganizationUsers
) -> None:
    async with serve_worker(harness):
        execution_id = await start_run(people.owner, 7, timeoutSeconds=1)
        assert await read_result(harness, people.owner, execution_id) == ("late", None)
        await send_event(people.owner, "order.paid", order=7)
    assert await count(harness, WaitAnswer, execution_id=execution_id) == 0


# ── deaths of processes ─────────────────────────────────────────────────────────────────────────────────────


async def test_the_scheduler_sends_notifications_that_a_gateway_did_not_send(
    harness: GatewayHarness, people: OrganizationUsers, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with serve_worker(harness):
        execution_id = await start_run(people.owner, 7)
        await wait_until_asleep(harness, execution_id)
        silence_gateway(harness, monkeypatch)
        await send_event(people.owner, "order.paid", order=7, total=1)
        await asyncio.sleep(0)
        assert (await read_run(harness, execution_id))["status"] == "waiting"
        await age_events(harness)
        await make_matcher(harness).deliver_undelivered()
        assert await read_result(harness, people.owner, execution_id) == ("paid", 1)
    assert await count(harness, EventRecord, delivered_at=None) == 0


async def test_telling_that_breaks_off_is_done_again_and_answers_once(
    harness: GatewayHarness, people: OrganizationUsers, monkeypatch: pytest.MonkeyPatch
) -> None:
    note_told = event_waits.mark_delivered

    async def breaks_off(*_given: object, **_named: object) -> None:
        raise DatabaseUnavailable("gone")

    async with serve_worker(harness):
        execution_id = await start_run(people.owner, 7)
        await wait_until_asleep(harness, execution_id)
        monkeypatch.setattr(event_waits, "mark_delivered", breaks_off)
        await send_event(people.owner, "order.paid", order=7, total=1)
        assert await read_result(harness, people.owner, execution_id) == ("paid", 1)
        await harness.gateway.acceptances._events.drain()  # noqa: SLF001 - it is nowhere else
        monkeypatch.setattr(event_waits, "mark_delivered", note_told)
        monkeypatch.setattr(event_waits, "UNDELIVERED_SECONDS", 0)
        await age_events(harness)
        await make_matcher(harness).deliver_undelivered()
    assert await count(harness, EventRecord, delivered_at=None) == 0
    assert await count(harness, WaitAnswer, execution_id=execution_id) == 1


async def test_a_locked_run_keeps_an_event_from_no_other(
    harness: GatewayHarness, people: OrganizationUsers, monkeypatch: pytest.MonkeyPatch
) -> None:
    silence_gateway(harness, monkeypatch)
    monkeypatch.setattr(event_waits, "UNDELIVERED_SECONDS", 0)
    lock = "SELECT FROM execution WHERE id = $1 FOR UPDATE"
    url = harness.gateway.database.url
    async with serve_worker(harness), open_impatient_database(url, monkeypatch) as database:
        locked, other = [await start_run(people.owner, 7) for _ in range(2)]
        for execution_id in (locked, other):
            await wait_until_asleep(harness, execution_id)
        await send_event(people.owner, "order.paid", order=7, total=1)
        await age_events(harness)
        awaited = EventMatcher(database, harness.gateway.broker)
        async with hold_transaction_open(url, lock, locked):
            await require_prompt(awaited.deliver_undelivered())
            assert await read_result(harness, people.owner, other) == ("paid", 1)
            assert (await read_run(harness, locked))["status"] == "waiting"
        await awaited.deliver_undelivered()
        assert await read_result(harness, people.owner, locked) == ("paid", 1)
    assert await count(harness, EventRecord, delivered_at=None) == 0


async def test_no_event_falls_between_the_wait_and_the_look_back(
    harness: GatewayHarness, people: OrganizationUsers, monkeypatch: pytest.MonkeyPatch
) -> None:
    silence_gateway(harness, monkeypatch)
    come_since, is_first = event_waits.list_events_since, True

    async def come_meanwhile(connection: AsyncConnection, *given: Any) -> Sequence[EventRecord]:  # noqa: ANN401 - as given
        nonlocal is_first
        if is_first:
            is_first = False
            await send_event(people.owner, "order.paid", order=7, total=1)
        return await come_since(connection, *given)

    monkeypatch.setattr(event_waits, "list_events_since", come_meanwhile)
    async with serve_worker(harness):
        execution_id = await start_run(people.owner, 7)
        assert await read_result(harness, people.owner, execution_id) == ("paid", 1)


@pytest.mark.parametrize("dies", ["before it waits", "before it looks back", "before it sleeps"])
async def test_a_run_of_a_dead_worker_gets_answers_that_came_meanwhile(
    harness: GatewayHarness, people: OrganizationUsers, monkeypatch: pytest.MonkeyPatch, dies: str
) -> None:
    execution_id = await start_run(people.owner, 7)
    claimed = await claim_for_dead_worker(harness, execution_id)
    await begin_until_wait(harness, claimed)
    if dies == "before it looks back":
        monkeypatch.setattr(EventMatcher, "_look_back", raise_died)
    if dies != "before it waits":
        caller = RunCaller(
            *(claimed.organization_id, claimed.user_id, claimed.workflow_id, execution_id, execution_id)
        )
        condition = '{"left":"{{ item.event_data.order }}","operator":"equals","right":"{{ data[0] }}"}'
        wanted = EventWaitRequest("order.paid", condition, "[7]")
        try:
            await make_matcher(harness).expect(caller, wanted, node_id="wait", iteration="")
        except ProcessDied:
            monkeypatch.undo()
    await send_event(people.owner, "order.paid", order=7, total=1)
    async with serve_worker(harness):
        assert await read_result(harness, people.owner, execution_id) == ("paid", 1)


class ProcessDied(Exception):
    """A process has."""


async def raise_died(*_given: object) -> None:
    raise ProcessDied


async def age_events(harness: GatewayHarness) -> None:
    """Move events into the past, by the database's clock."""
    first = await read_database_time(harness)
    while await read_database_time(harness) <= first:  # noqa: ASYNC110 - nothing signals the change
        await asyncio.sleep(0.001)


async def read_database_time(harness: GatewayHarness) -> int:
    async with harness.gateway.database.read() as connection:
        return await connection.scalar(select(type_coerce(DatabaseTime(), BigInteger))) or 0


async def claim_for_dead_worker(harness: GatewayHarness, execution_id: str) -> ClaimedRun:
    """Claim a run for a worker that will never be heard of again."""
    for _ in range(3_000):
        for one in await harness.gateway.store.claim(ClaimQuery("dead", 0.05, 100)):
            if one.execution_id == execution_id:
                return one
        await asyncio.sleep(0.05)
    raise AssertionError(f"{execution_id} can't be claimed")


async def begin_until_wait(harness: GatewayHarness, claimed: ClaimedRun) -> None:
    """Run as far as the node that waits."""
    now = datetime.now(UTC)
    given = b'{"body":{"order":7}}'
    start = NodeSpan(
        "start", "start", "manual", SpanStatus.COMPLETED, 1, now, ended_at=now, port="output", output=given
    )
    wait = NodeSpan("wait", "wait", "wait-for-event", SpanStatus.RUNNING, 2, now, input_node="start")
    write = RunWrite(claimed.execution_id, claimed.shard, claimed.token, spans=[start, wait])
    assert await harness.gateway.store.record([write])
