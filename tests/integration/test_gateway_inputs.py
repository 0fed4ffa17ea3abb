"""Human inputs: requests of executions, and the accepted answers."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import httpx2
import pytest
from sqlalchemy import select, update
from sqlmodel import col

from engine.values import Json
from journal.store import ExecutionKey
from journal.waits import node_answers
from models.execution import Execution, WaitAnswer
from nodes.sandbox import form_checks
from tests.integration import input_waits
from tests.integration.gateway_harness import (
    GRAPH,
    GatewayHarness,
    OrganizationUsers,
    UserClient,
    assert_refused,
)

EXECUTIONS = "/api/v1/executions"
YES: dict[str, Json] = {"nodeId": "approval", "choice": "approve", "data": {"comment": "Right"}}


async def start_waiting_run(person: UserClient) -> str:
    workflow_id = await person.create(**GRAPH)
    response = await person.api.post(f"/api/v1/workflows/{workflow_id}/execute", json={})
    assert response.status_code == 201, response.text
    execution_id: str = response.json()["executionId"]
    return execution_id


@pytest.fixture
async def waiting_execution_id(harness: GatewayHarness, people: OrganizationUsers) -> str:
    """Return the id of an execution of the owner's in which one node waits for approval."""
    execution_id = await start_waiting_run(people.owner)
    await input_waits.wait_for_input(harness.gateway.database, execution_id)
    return execution_id


async def answer(person: UserClient, execution_id: str, body: Json = YES, key: str = "") -> httpx2.Response:
    headers = {"Idempotency-Key": key} if key else {}
    return await person.api.post(f"{EXECUTIONS}/{execution_id}/input", json=body, headers=headers)


async def get_pending(person: UserClient, execution_id: str) -> list[dict[str, Any]]:
    response = await person.api.get(f"{EXECUTIONS}/{execution_id}/pending-inputs")
    assert response.status_code == 200, response.text
    shown: dict[str, Any] = response.json()
    assert shown["count"] == len(shown["inputs"])
    inputs: list[dict[str, Any]] = shown["inputs"]
    return inputs


def error_paths(response: httpx2.Response) -> list[str]:
    assert_refused(response, 422, "validation-failed")
    return [detail["path"] for detail in response.json()["error"]["details"]]


async def test_a_question_about_a_tool_call_shows_its_exact_arguments(
    harness: GatewayHarness, people: OrganizationUsers
) -> None:
    execution_id = await start_waiting_run(people.owner)
    asked, place = input_waits.TOOL_CALL, input_waits.CALL_PLACE
    request = {**input_waits.REQUEST, "toolCall": asked}
    await input_waits.wait_for_input(harness.gateway.database, execution_id, *place, request=request)
    (shown,) = await get_pending(people.owner, execution_id)
    assert shown["toolCall"] == asked
    body: dict[str, Json] = {**YES, "nodeId": place[0], "iteration": "3-1111111111111111"}
    assert_refused(await answer(people.owner, execution_id, body), 409, "no-input-pending")
    # Another call may wait at the same node by now: nobody approves one that they haven't seen.
    unnamed = await answer(people.owner, execution_id, {**YES, "nodeId": place[0]})
    assert error_paths(unnamed) == ["iteration"]
    answered = await answer(people.owner, execution_id, {**body, "iteration": place[1]})
    assert answered.status_code == 200, answered.text


async def read_answer(harness: GatewayHarness, execution_id: str) -> dict[str, Any]:
    """Return the stored answer of an execution as the output of its node."""
    async with harness.gateway.database.read() as connection:
        statement = select(col(WaitAnswer.payload)).where(col(WaitAnswer.execution_id) == execution_id)
        stored = (await connection.execute(statement)).scalar_one()
    output: dict[str, Any] = json.loads(stored)["output"]
    return output


async def test_an_approver_changes_the_arguments_of_a_tool_call_within_its_parameters(
    harness: GatewayHarness, people: OrganizationUsers
) -> None:
    execution_id = await start_waiting_run(people.owner)
    request = {**input_waits.REQUEST, "toolCall": input_waits.TOOL_CALL}
    await input_waits.wait_for_input(
        harness.gateway.database, execution_id, *input_waits.CALL_PLACE, request=request
    )
    asked: dict[str, Json] = {
        **YES,
        "nodeId": input_waits.CALL_PLACE[0],
        "iteration": input_waits.CALL_PLACE[1],
    }

    async def edit(arguments: Json, **fields: Json) -> httpx2.Response:
        return await answer(people.owner, execution_id, {**asked, **fields, "arguments": arguments})

    assert error_paths(await edit({"to": 7})) == ["arguments.to"]
    assert error_paths(await edit({"to": "c@d.example", "url": "https://x.example"})) == ["arguments.url"]
    assert error_paths(await edit({"to": "c@d.example"}, choice="reject")) == ["arguments"]
    assert error_paths(await edit({"to": "x" * 20_000})) == ["arguments"]
    (shown,) = await get_pending(people.owner, execution_id)
    assert shown["toolCall"] == input_waits.TOOL_CALL, "the question stays open as it is"
    edited = await edit({"to": "c@d.example"})
    assert edited.status_code == 200, edited.text
    kept = await read_answer(harness, execution_id)
    assert (kept["arguments"], kept["originalHash"]) == ({"to": "c@d.example"}, input_waits.TOOL_CALL["hash"])
    assert kept["by"] == people.owner.user.id
    assert_refused(await edit({"to": "e@f.example"}), 409, "already-answered")


async def test_equal_arguments_change_nothing_and_several_approvers_change_none(
    harness: GatewayHarness, people: OrganizationUsers
) -> None:
    asked: dict[str, Json] = {
        **YES,
        "nodeId": input_waits.CALL_PLACE[0],
        "iteration": input_waits.CALL_PLACE[1],
    }
    request = {**input_waits.REQUEST, "toolCall": input_waits.TOOL_CALL}
    execution_id = await start_waiting_run(people.owner)
    await input_waits.wait_for_input(
        harness.gateway.database, execution_id, *input_waits.CALL_PLACE, request=request
    )
    same = {**asked, "choice": "reject", "arguments": input_waits.TOOL_CALL["arguments"]}
    assert (await answer(people.owner, execution_id, same)).status_code == 200
    assert "arguments" not in await read_answer(harness, execution_id)
    # Each of several people would approve another call.
    execution_id = await start_waiting_run(people.owner)
    await input_waits.wait_for_input(
        harness.gateway.database, execution_id, *input_waits.CALL_PLACE, request={**request, "approvals": 2}
    )
    (shown,) = await get_pending(people.owner, execution_id)
    assert shown["toolCall"]["parameters"] is None
    edited = await answer(people.owner, execution_id, {**asked, "arguments": {"to": "c@d.example"}})
    assert error_paths(edited) == ["arguments"]
    execution_id = await start_waiting_run(people.owner)
    await input_waits.wait_for_input(harness.gateway.database, execution_id)
    assert error_paths(await answer(people.owner, execution_id, {**YES, "arguments": {}})) == ["arguments"]


async def test_a_question_is_shown_answered_once_and_passed_to_the_run(
    harness: GatewayHarness, people: OrganizationUsers, waiting_execution_id: str
) -> None:
    (shown,) = await get_pending(people.owner, waiting_execution_id)
    assert shown.pop("requestedAt") < shown.pop("expiresAt")
    assert shown == {
        "nodeId": "approval",
        "iteration": "",
        "nodeLabel": "Approval",
        "title": "Write 120 rows?",
        "description": "They replace those of yesterday.",
        "schema": input_waits.REQUEST["schema"],
        "choices": input_waits.REQUEST["choices"],
        "assignees": [],
        "approvals": 1,
        "toolCall": None,
        "mails": None,
    }
    response = await answer(people.owner, waiting_execution_id)
    assert (response.status_code, response.json()) == (
        200,
        {
            "executionId": waiting_execution_id,
            "nodeId": "approval",
            "status": "accepted",
            "missingApprovals": 0,
        },
    )
    assert await get_pending(people.owner, waiting_execution_id) == []
    database = harness.gateway.database
    async with database.read() as connection:
        execution = (
            await connection.execute(select(Execution).where(col(Execution.id) == waiting_execution_id))
        ).one()
        user_id = await connection.scalar(
            select(col(WaitAnswer.user_id)).where(col(WaitAnswer.execution_id) == waiting_execution_id)
        )
    assert (execution.status, execution.wait_answer_count, user_id) == ("pending", 1, people.owner.user.id)
    found = await node_answers.read_answers(database, [ExecutionKey(waiting_execution_id, execution.shard)])
    payload = found[waiting_execution_id]["approval", ""].decode()
    assert payload.startswith('{"output":{"data":{"comment":"Right"},"choice":"approve","by":"user_')
    assert payload.endswith('"},"port":"approve"}')

    assert_refused(await answer(people.owner, waiting_execution_id), 409, "already-answered")
    assert_refused(
        await answer(people.owner, waiting_execution_id, {**YES, "nodeId": "step"}), 409, "no-input-pending"
    )


async def test_one_of_several_simultaneous_answers_is_accepted(
    people: OrganizationUsers, waiting_execution_id: str
) -> None:
    answers = await asyncio.gather(
        *(
            answer(person, waiting_execution_id, {**YES, "choice": choice})
            for person in (people.owner, people.admin)
            for choice in ("approve", "reject")
        )
    )
    assert sorted(one.status_code for one in answers) == [200, 409, 409, 409]


async def test_an_answer_that_is_sent_again_with_its_key_is_answered_the_same(
    harness: GatewayHarness,
    people: OrganizationUsers,
    waiting_execution_id: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    notified: list[str] = []

    async def notify_pods(workflow_ids: Sequence[str]) -> None:
        notified.extend(workflow_ids)

    monkeypatch.setattr(harness.gateway.pod_services.poll_hub, "notify_pods", notify_pods)
    deployed = update(Execution).where(col(Execution.id) == waiting_execution_id)
    await harness.gateway.database.transaction(
        lambda connection: connection.execute(deployed.values(assigned_deployment_id="wf_deployed"))
    )
    first = await answer(people.owner, waiting_execution_id, key="once")
    assert notified == ["wf_deployed"]
    again = await answer(people.owner, waiting_execution_id, key="once")
    assert (first.status_code, again.status_code, first.json()) == (200, 200, again.json())
    assert (first.headers.get("Idempotent-Replayed"), again.headers["Idempotent-Replayed"]) == (None, "true")
    assert_refused(
        await answer(people.owner, waiting_execution_id, {**YES, "choice": "reject"}, "once"),
        422,
        "idempotency-mismatch",
    )
    assert_refused(await answer(people.admin, waiting_execution_id, key="once"), 409, "already-answered")


async def test_requests_with_one_key_that_come_at_once_are_answered_alike(
    people: OrganizationUsers, waiting_execution_id: str
) -> None:
    answers = await asyncio.gather(
        *(answer(people.owner, waiting_execution_id, key="once") for _ in range(4))
    )
    assert [one.status_code for one in answers] == [200] * 4
    assert sum("Idempotent-Replayed" in one.headers for one in answers) == 3


async def test_a_refused_answer_binds_no_key(harness: GatewayHarness, people: OrganizationUsers) -> None:
    execution_id = await start_waiting_run(people.owner)
    assert_refused(await answer(people.owner, execution_id, key="early"), 409, "no-input-pending")
    await input_waits.wait_for_input(harness.gateway.database, execution_id)
    assert (await answer(people.owner, execution_id, key="early")).status_code == 200


async def test_extra_data_of_an_answer_is_refused_with_its_paths(
    people: OrganizationUsers, waiting_execution_id: str
) -> None:
    assert error_paths(await answer(people.owner, waiting_execution_id, {"nodeId": "approval"})) == [
        "choice",
        "data",
    ]
    assert error_paths(await answer(people.owner, waiting_execution_id, {**YES, "choice": "maybe"})) == [
        "choice"
    ]
    too_long: dict[str, Json] = {**YES, "data": {"comment": "x" * 21}}
    assert error_paths(await answer(people.owner, waiting_execution_id, too_long)) == ["data.comment"]
    assert error_paths(await answer(people.owner, waiting_execution_id, {"choice": "approve"})) == ["nodeId"]
    assert_refused(
        await answer(people.owner, waiting_execution_id, {**YES, "data": "x" * 1_000_000}),
        413,
        "payload-too-large",
    )
    assert len(await get_pending(people.owner, waiting_execution_id)) == 1


@pytest.mark.parametrize(
    ("schema", "data", "wrong"),
    [
        ({"$ref": "http://127.0.0.1:1/schema.json"}, {}, ["data"]),
        ({"type": "no such type"}, {}, ["data"]),
        (
            {"$defs": {"name": {"type": "string"}}, "properties": {"n": {"$ref": "#/$defs/name"}}},
            {"n": 1},
            ["data.n"],
        ),
        ({"type": "array", "items": {"type": "integer"}, "maxItems": 2}, [1, "2", 3], ["data", "data.1"]),
        ({"pattern": "^(a+)+$"}, "a" * 40 + "!", ["data"]),
    ],
)
async def test_any_schema_is_applied_without_fetching_references(
    harness: GatewayHarness,
    people: OrganizationUsers,
    schema: dict[str, Any],
    data: Json,
    wrong: list[str],
) -> None:
    execution_id = await start_waiting_run(people.owner)
    await input_waits.wait_for_input(harness.gateway.database, execution_id, request={"schema": schema})
    response = await answer(people.owner, execution_id, {"nodeId": "approval", "data": data})
    assert sorted(error_paths(response)) == wrong


async def test_a_schema_that_takes_too_long_to_check_refuses_the_answer(
    harness: GatewayHarness, people: OrganizationUsers, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(form_checks, "CHECK_SECONDS", 0.2)
    execution_id = await start_waiting_run(people.owner)
    # Each of 2^40 ways through the schema is tried.
    steps = {f"d{depth}": {"anyOf": [{"$ref": f"#/$defs/d{depth + 1}"}] * 2} for depth in range(40)}
    schema = {"$defs": {**steps, "d40": {"type": "string"}}, "$ref": "#/$defs/d0"}
    await input_waits.wait_for_input(harness.gateway.database, execution_id, request={"schema": schema})
    response = await answer(people.owner, execution_id, {"nodeId": "approval", "data": 1})
    assert error_paths(response) == ["data"]
    assert "it takes more than 3 s to check" in response.text


async def test_without_choices_there_is_none_and_without_a_schema_anything_goes(
    harness: GatewayHarness, people: OrganizationUsers
) -> None:
    execution_id = await start_waiting_run(people.owner)
    await input_waits.wait_for_input(
        harness.gateway.database, execution_id, request={"title": "Well?"}, expires_in=None
    )
    (shown,) = await get_pending(people.owner, execution_id)
    assert (shown["schema"], shown["choices"], shown["expiresAt"]) == (None, [], None)
    assert error_paths(await answer(people.owner, execution_id, YES)) == ["choice"]
    assert (await answer(people.owner, execution_id, {"nodeId": "approval", "data": [1]})).status_code == 200


async def test_turns_of_a_loop_are_told_apart(harness: GatewayHarness, people: OrganizationUsers) -> None:
    execution_id = await start_waiting_run(people.owner)
    for iteration in ("0", "1"):
        await input_waits.wait_for_input(harness.gateway.database, execution_id, iteration=iteration)
    assert [one["iteration"] for one in await get_pending(people.owner, execution_id)] == ["0", "1"]
    unclear = await answer(people.owner, execution_id)
    assert error_paths(unclear) == ["iteration"]
    assert "0, 1" in unclear.json()["error"]["message"]
    assert (await answer(people.owner, execution_id, {**YES, "iteration": "1"})).status_code == 200
    assert_refused(
        await answer(people.owner, execution_id, {**YES, "iteration": "1"}), 409, "already-answered"
    )
    assert (await answer(people.owner, execution_id)).status_code == 200


async def test_late_and_unsolicited_answers_are_refused_with_a_reason(
    harness: GatewayHarness, people: OrganizationUsers
) -> None:
    execution_id = await start_waiting_run(people.owner)
    assert_refused(await answer(people.owner, execution_id), 409, "no-input-pending")
    await input_waits.wait_for_input(harness.gateway.database, execution_id, expires_in=-timedelta(seconds=1))
    assert_refused(await answer(people.owner, execution_id), 409, "input-expired")
    await input_waits.wait_for_input(harness.gateway.database, execution_id, "sub", kind="run")
    assert_refused(await answer(people.owner, execution_id, {"nodeId": "sub"}), 409, "no-input-pending")
    assert (await people.owner.api.post(f"{EXECUTIONS}/{execution_id}/cancel")).status_code == 200
    assert await get_pending(people.owner, execution_id) == []
    assert_refused(await answer(people.owner, execution_id), 409, "no-input-pending")


async def test_a_list_of_executions_may_be_that_of_one_parent(
    harness: GatewayHarness, people: OrganizationUsers
) -> None:
    parent, child, other = [await start_waiting_run(people.owner) for _ in range(3)]
    links = {"parent_id": parent, "root_id": parent, "depth": 1}
    await harness.gateway.database.transaction(
        lambda connection: connection.execute(
            update(Execution).where(col(Execution.id) == child).values(links)
        )
    )
    response = await people.owner.api.get(EXECUTIONS, params={"parent_id": parent})
    assert response.json()["count"] == 1
    (shown,) = response.json()["executions"]
    assert (shown["id"], shown["parentId"], shown["rootId"]) == (child, parent, parent)
    shown = (await people.owner.api.get(f"{EXECUTIONS}/{other}")).json()
    assert (shown["parentId"], shown["rootId"]) == (None, None)
    assert (await people.stranger.api.get(EXECUTIONS, params={"parent_id": parent})).json()["count"] == 0
