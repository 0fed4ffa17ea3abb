"""Tags and metadata of executions: given by callers, settings and nodes, shown, and found again."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any
from urllib.parse import urlsplit

import pytest
from sqlalchemy import BigInteger, literal

from messages.broker_connection import connect_broker
from models.timestamps import to_microseconds
from nodes import catalog
from scheduler.schedules import ScheduleRunner
from tests.integration.gateway_harness import (
    EDGE,
    GRAPH,
    STEP,
    GatewayHarness,
    OrganizationUsers,
    UserClient,
    assert_refused,
)
from tests.integration.test_waiting_runs import get_json, serve_worker, wait_until_ended

WORKFLOWS = "/api/v1/workflows"
EXECUTIONS = "/api/v1/executions"
LABELS: dict[str, Any] = {
    "tags": ["nightly", "audited"],
    "metadata": {"order": 7, "paid": True, "region": "EU"},
}
SHOWN = {"tags": ["audited", "nightly"], "metadata": {"order": "7", "paid": "true", "region": "EU"}}


def trigger_graph(kind: str, **config: Any) -> dict[str, Any]:  # noqa: ANN401 - any JSON value
    trigger = {"id": "start", "nodeId": kind, "config": config}
    return {"nodes": [trigger, STEP], "connections": [EDGE], "status": "active"}


def labels_of(execution: dict[str, Any]) -> dict[str, Any]:
    return {name: execution[name] for name in ("tags", "metadata")}


async def execute(person: UserClient, workflow_id: str, **body: Any) -> str:  # noqa: ANN401 - any JSON value
    answer = await person.api.post(f"{WORKFLOWS}/{workflow_id}/execute", json=body)
    assert answer.status_code == 201, answer.text
    execution_id: str = answer.json()["executionId"]
    return execution_id


async def found_by(person: UserClient, query: str) -> list[str]:
    """Return the ids of the listed executions, which must be the same by offset and by cursor."""
    listed = [one["id"] for one in (await get_json(person, f"?{query}"))["executions"]]
    paged = [one["id"] for one in (await get_json(person, f"?{query}&after=start"))["executions"]]
    assert listed == paged
    return listed


async def test_one_finds_the_run_of_order_7(people: OrganizationUsers) -> None:
    workflow_id = await people.owner.create(**GRAPH)
    run = await execute(people.owner, workflow_id, **LABELS)
    other = await execute(people.owner, workflow_id, metadata={"order": 8, "region": "EU"})
    await execute(people.owner, workflow_id)
    assert labels_of(await get_json(people.owner, f"/{run}")) == SHOWN
    assert [labels_of(one) for one in (await get_json(people.owner, "?metadata.order=7"))["executions"]] == [
        SHOWN
    ]
    assert await found_by(people.owner, "metadata.order=7") == [run]
    assert await found_by(people.owner, "metadata.region=EU") == [other, run]
    assert await found_by(people.owner, "metadata.region=EU&metadata.order=8") == [other]
    assert await found_by(people.owner, "tag=nightly&metadata.paid=true") == [run]
    assert await found_by(people.owner, "metadata.order=70") == []
    assert await found_by(people.stranger, "metadata.order=7") == []


@pytest.mark.parametrize(
    ("body", "path", "code"),
    [
        ({"metadata": {"Order": 7}}, "metadata", "invalid-key"),
        ({"metadata": {"order": "x" * 257}}, "metadata.order", "invalid-value"),
        ({"metadata": {"order": [7]}}, "metadata", "invalid-type"),
        ({"metadata": {f"k{number}": 1 for number in range(21)}}, "metadata", None),
        ({"tags": ["a"] * 21}, "tags", None),
        ({"tags": [""]}, "tags", "required"),
    ],
)
async def test_labels_that_break_a_rule_are_refused(
    people: OrganizationUsers, body: dict[str, Any], path: str, code: str | None
) -> None:
    workflow_id = await people.owner.create(**GRAPH)
    answer = await people.owner.api.post(f"{WORKFLOWS}/{workflow_id}/execute", json=body)
    assert_refused(answer, 422, "validation-failed")
    [detail] = answer.json()["error"]["details"]
    assert detail["path"].startswith(path)
    assert code is None or detail["code"] == code or code == "invalid-type"


async def test_the_settings_of_a_workflow_give_its_messages_metadata(people: OrganizationUsers) -> None:
    settings = {"metadata": {"order": "{{ trigger.message.id }}", "absent": "{{ trigger.message.none }}"}}
    workflow_id = await people.owner.create(settings=settings, **trigger_graph("queue-trigger"))
    one = await people.owner.api.post(f"{WORKFLOWS}/{workflow_id}/enqueue", json={"message": {"id": 7}})
    several = [
        {"message": {"id": 8}},
        {"message": {"id": 9}, "tags": ["batch"], "metadata": {"order": "nine"}},
    ]
    batch = await people.owner.api.post(
        f"{WORKFLOWS}/{workflow_id}/enqueue-batch", json={"messages": several}
    )
    runs = [one.json()["executionId"], *(result["executionId"] for result in batch.json()["results"])]
    shown = [labels_of(await get_json(people.owner, f"/{run}")) for run in runs]
    assert shown == [
        {"tags": [], "metadata": {"order": "7"}},
        {"tags": [], "metadata": {"order": "8"}},
        {"tags": ["batch"], "metadata": {"order": "nine"}},
    ]
    wrong = [{"message": 1, "metadata": {"X": 1}}]
    answer = await people.owner.api.post(f"{WORKFLOWS}/{workflow_id}/enqueue-batch", json={"messages": wrong})
    assert_refused(answer, 422, "validation-failed")


async def test_events_and_webhooks_get_the_metadata_of_the_settings(people: OrganizationUsers) -> None:
    event = await people.owner.create(
        settings={"metadata": {"order": "{{ trigger.event_data.id }}"}},
        **trigger_graph("event-trigger", event_type="order.created"),
    )
    emitted = await people.owner.api.post(
        "/api/v1/workflows/events", json={"event_type": "order.created", "event_data": {"id": 7}}
    )
    assert emitted.status_code == 200, emitted.text
    assert len(await found_by(people.owner, f"metadata.order=7&workflow_id={event}")) == 1
    hook = await people.owner.create(
        settings={"metadata": {"order": "{{ trigger.body.id }}"}},
        **trigger_graph("webhook", verification={"provider": "none"}),
    )
    urls = (await people.owner.api.post(f"{WORKFLOWS}/{hook}/trigger-token")).json()["urls"]
    sent = await people.owner.api.post(urlsplit(urls["webhook"]).path, json={"id": 7})
    assert sent.status_code in {200, 201, 202}, sent.text
    assert len(await found_by(people.owner, f"metadata.order=7&workflow_id={hook}")) == 1


@pytest.mark.parametrize(
    ("metadata", "code"),
    [({"Order": "{{ trigger.id }}"}, "invalid-key"), ({"order": "{{ data.body.id }}"}, "invalid-expression")],
)
async def test_settings_with_invalid_metadata_are_refused(
    people: OrganizationUsers, metadata: dict[str, str], code: str
) -> None:
    body = {"name": "Wrong", "settings": {"metadata": metadata}, **GRAPH}
    answer = await people.owner.api.post(WORKFLOWS, json=body)
    assert_refused(answer, 422, "validation-failed")
    assert answer.json()["error"]["details"][0]["code"] == code


@pytest.mark.every_database
async def test_a_node_sets_metadata_and_a_resumed_run_keeps_all_labels(
    harness: GatewayHarness, people: OrganizationUsers
) -> None:
    nodes = [
        {"id": "start", "nodeId": "manual"},
        {
            "id": "mark",
            "nodeId": "set-metadata",
            "config": {"metadata": {"order": "{{ data.body.id }}", "step": 2}},
        },
        {"id": "halt", "nodeId": "stop-with-error", "config": {"message": "No"}},
    ]
    edges = [{"source": "start", "target": "mark"}, {"source": "mark", "target": "halt"}]
    workflow_id = await people.owner.create(nodes=nodes, connections=edges)
    async with serve_worker(harness):
        run = await execute(
            people.owner, workflow_id, triggerInputs={"id": "a-7"}, metadata={"order": "old"}, tags=["x"]
        )
        error = (await wait_until_ended(people.owner, run))["error"]
        assert error["nodeId"] == "halt", error
        expected = {"tags": ["x"], "metadata": {"order": "a-7", "step": "2"}}
        assert labels_of(await get_json(people.owner, f"/{run}")) == expected
        assert await found_by(people.owner, "metadata.order=old") == []
        resumed = (await people.owner.api.post(f"{EXECUTIONS}/{run}/resume")).json()["executionId"]
        assert labels_of(await get_json(people.owner, f"/{resumed}")) == expected
        assert await found_by(people.owner, "metadata.order=a-7&tag=x") == [resumed, run]


@pytest.mark.every_database
async def test_a_bulk_action_takes_the_runs_with_a_label(people: OrganizationUsers) -> None:
    workflow_id = await people.owner.create(**GRAPH)
    run = await execute(people.owner, workflow_id, **LABELS)
    await execute(people.owner, workflow_id, tags=["nightly"])
    chosen = {"filter": {"tag": "nightly", "metadata": {"order": "7"}}, "dryRun": False}
    answer = await people.owner.api.post(f"{EXECUTIONS}/bulk-cancel", json=chosen)
    assert answer.json()["executionIds"] == [run]
    gone = {"filter": {"metadata": {"order": "7"}}, "dryRun": False}
    assert (await people.owner.api.post(f"{EXECUTIONS}/bulk-delete", json=gone)).json()["affected"] == 1
    assert await found_by(people.owner, "metadata.order=7") == []


@pytest.mark.every_database
async def test_a_scheduled_run_and_a_parsed_mail_get_the_metadata_of_the_settings(
    harness: GatewayHarness, people: OrganizationUsers
) -> None:
    settings = {"metadata": {"zone": "{{ trigger.timezone }}", "subject": "{{ trigger.subject }}"}}
    clock = await people.owner.create(
        settings=settings, **trigger_graph("schedule-trigger", cron="0 * * * *")
    )
    mail = await people.owner.create(settings=settings, **trigger_graph("email-trigger"))
    database = harness.gateway.database
    soon = literal(to_microseconds(datetime.now(UTC) + timedelta(hours=2)), BigInteger)
    broker = await connect_broker(None)
    await ScheduleRunner(database, broker, catalog.load_catalog(), soon).start_due()
    await broker.close()
    [run] = await found_by(people.owner, f"workflow_id={clock}")
    assert labels_of(await get_json(people.owner, f"/{run}"))["metadata"] == {"zone": "UTC"}
    raw = b"From: a@example.com\r\nTo: b@example.com\r\nSubject: Order 7\r\n\r\nHello"
    sent = await people.owner.api.post(
        f"{WORKFLOWS}/{mail}/email-trigger", content=raw, headers={"content-type": "message/rfc822"}
    )
    assert sent.status_code == 201, sent.text
    run = sent.json()["executionId"]
    async with serve_worker(harness):
        await wait_until_ended(people.owner, run)
    assert labels_of(await get_json(people.owner, f"/{run}"))["metadata"] == {"subject": "Order 7"}
    assert await found_by(people.owner, "metadata.subject=Order%207") == [run]
