"""State of runs: values that nodes publish, read while the run goes on and after its end."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx2
import pytest

from engine.run_errors import NodeError
from engine.services import RunCaller
from execution.state_publisher import StatePublisher
from tests.integration.gateway_harness import GatewayHarness, OrganizationUsers, UserClient, assert_refused
from tests.integration.test_signals import send_accepted, wait_for_wait
from tests.integration.test_waiting_runs import EXECUTIONS, execute_workflow, serve_worker, wait_until_ended

pytestmark = pytest.mark.timeout(60)


def publish_node(node_id: str, key: str, value: Any) -> dict[str, Any]:  # noqa: ANN401 - any JSON value
    return {"id": node_id, "nodeId": "publish", "config": {"key": key, "value": value}}


PROGRESS: dict[str, Any] = {
    "nodes": [
        {"id": "start", "nodeId": "manual"},
        publish_node("first", "progress", {"done": 1, "of": "{{ data.body.of }}"}),
        {"id": "wait", "nodeId": "wait-for-signal", "config": {"name": "next"}},
        publish_node("second", "progress", {"done": 2}),
        publish_node("also", "note", "at work"),
        {"id": "last", "nodeId": "wait-for-signal", "config": {"name": "end"}},
    ],
    "connections": [
        {"source": "start", "target": "first"},
        {"source": "first", "target": "wait"},
        {"source": "wait", "target": "second"},
        {"source": "second", "target": "also"},
        {"source": "also", "target": "last"},
    ],
}


async def read_state(
    person: UserClient, run: str, *, known: str | None = None, wait: int = 0
) -> httpx2.Response:
    """Read the state of a run; `known` is the tag that the client has."""
    headers = {} if known is None else {"If-None-Match": known}
    return await person.api.get(f"{EXECUTIONS}/{run}/state?wait={wait}", headers=headers)


async def read_until(person: UserClient, run: str, values: dict[str, Any]) -> httpx2.Response:
    """Follow the state by long polls until it has these values; return the last answer."""
    known: str | None = None
    while True:
        found = await read_state(person, run, known=known, wait=30)
        if found.status_code != 304:
            assert found.status_code == 200, found.text
            if found.json()["values"] == values:
                return found
        known = found.headers["ETag"]


async def test_clients_follow_the_values_that_a_run_publishes(
    harness: GatewayHarness, people: OrganizationUsers
) -> None:
    run = await execute_workflow(people.owner, await people.owner.create(**PROGRESS), of=9)
    before = await read_state(people.owner, run)
    assert (before.json()["revision"], before.json()["values"], before.json()["updatedAt"]) == (0, {}, None)
    async with serve_worker(harness):
        first = await read_until(people.owner, run, {"progress": {"done": 1, "of": 9}})
        assert first.json()["revision"] == 1
        await wait_for_wait(people.owner, run)
        unchanged = await read_state(people.owner, run, known=first.headers["ETag"])
        assert (unchanged.status_code, unchanged.content) == (304, b"")
        # A proxy that compresses answers marks the tag as weak.
        weak = await read_state(people.owner, run, known=f'"0", W/{first.headers["ETag"]}')
        assert weak.status_code == 304
        poll = asyncio.create_task(
            read_until(people.owner, run, {"progress": {"done": 2}, "note": "at work"})
        )
        await send_accepted(people.owner, run, "next")
        second = await poll
        assert second.json()["revision"] == 3
        await wait_for_wait(people.owner, run)
        end = asyncio.create_task(read_state(people.owner, run, known=second.headers["ETag"], wait=30))
        await send_accepted(people.owner, run, "end")
        ended = await end
        assert (await wait_until_ended(people.owner, run))["status"] == "completed"
    assert (ended.json()["status"], ended.json()["values"]) == ("completed", second.json()["values"])
    assert ended.headers["ETag"] != second.headers["ETag"]
    again = await read_state(people.owner, run, known=ended.headers["ETag"], wait=30)
    assert again.status_code == 304
    assert_refused(await read_state(people.stranger, run), 404, "not-found")


@pytest.mark.every_database
async def test_a_repeated_publication_changes_nothing_and_a_state_has_a_size(
    harness: GatewayHarness, people: OrganizationUsers
) -> None:
    run = await execute_workflow(people.owner, await people.owner.create(**PROGRESS))
    user = people.owner.user
    caller = RunCaller(user.organization_id, user.id, "wf", run, run)
    publisher = StatePublisher(harness.gateway.database)
    for value in (b'"a"', b'"a"', b'"b"', b'"b"'):
        await publisher.publish(caller, "step", value)
    assert (await read_state(people.owner, run)).json()["revision"] == 2
    await publisher.publish(caller, "half", b'"%s"' % (b"x" * 32_000))
    with pytest.raises(NodeError, match="64,000 bytes") as refused:
        await publisher.publish(caller, "more", b'"%s"' % (b"x" * 32_000))
    assert refused.value.code == "state-too-large"
    await publisher.publish(caller, "half", b"1")
    other = RunCaller(people.stranger.user.organization_id, user.id, "wf", run, run)
    await publisher.publish(other, "foreign", b"1")
    await people.owner.api.post(f"{EXECUTIONS}/{run}/cancel")
    async with serve_worker(harness):
        await wait_until_ended(people.owner, run)
    await publisher.publish(caller, "late", b"1")
    assert (await read_state(people.owner, run)).json()["values"] == {"half": 1, "step": "b"}
