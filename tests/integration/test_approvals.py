"""Approvals: assignees, several approvals, links without an account, and their page."""

from __future__ import annotations

import asyncio
import json
import re
from dataclasses import dataclass
from datetime import timedelta
from typing import Any
from urllib.parse import quote

import httpx2
import pytest
from sqlalchemy import insert, select, update
from sqlmodel import col

from gateway.executions import input_checks
from gateway.http import failed_attempts, limits
from gateway.http.keyset import KeysetBounds, PageCursor
from journal.store import ExecutionKey
from journal.waits import approvals, node_answers
from models import access_store
from models.access import Organization, UserRole
from models.approval import ApprovalLink, ApprovalRequest
from models.execution import Execution, SpanRow
from tests import smtp_server
from tests.http_receiver import run_receiver
from tests.integration import input_waits
from tests.integration.gateway_harness import (
    GRAPH,
    GatewayHarness,
    OrganizationUsers,
    UserClient,
    assert_refused,
)
from tests.integration.test_waiting_runs import (
    EXECUTIONS,
    execute_workflow,
    get_json,
    serve_worker,
    wait_for_question,
    wait_until_ended,
)
from tests.smtp_server import FakeMailServer, ReceivedMail

pytestmark = pytest.mark.timeout(60)
SCHEMA = {
    "type": "object",
    "properties": {"max": {"type": "number"}, "why": {"type": "string"}},
    "required": ["max"],
}


def question(**config: Any) -> dict[str, Any]:  # noqa: ANN401 - any JSON value
    asks = {"title": "Set 12 prices?", "choices": [{"port": "yes", "label": "Set"}, {"port": "no"}], **config}
    return {
        "nodes": [
            {"id": "start", "nodeId": "manual"},
            {"id": "ask", "nodeId": "human-input", "config": asks},
            {"id": "after", "nodeId": "set", "config": {"values": {"got": "{{ data }}"}}},
        ],
        "connections": [
            {"source": "start", "target": "ask"},
            {"source": "ask", "sourcePort": "yes", "target": "after"},
        ],
        "isPublic": True,
    }


async def say(
    person: UserClient,
    execution_id: str,
    choice: str,
    key: str = "",
    **body: Any,  # noqa: ANN401 - any JSON value
) -> httpx2.Response:
    return await person.api.post(
        f"{EXECUTIONS}/{execution_id}/input",
        json={"nodeId": "ask", "choice": choice, **body},
        headers={"Idempotency-Key": key} if key else {},
    )


async def pending(person: UserClient) -> list[str]:
    answer = await person.api.get("/api/v1/pending-inputs")
    assert answer.status_code == 200, answer.text
    return [one["executionId"] for one in answer.json()["inputs"]]


async def make_public(person: UserClient, workflow_id: str) -> None:
    answer = await person.api.put(f"/api/v1/workflows/{workflow_id}/visibility", json={"isPublic": True})
    assert answer.status_code == 200, answer.text


async def ask(people: OrganizationUsers, **config: Any) -> str:  # noqa: ANN401 - any JSON value
    """Start a run that asks, by the owner of the workflow; returns its id once it waits."""
    execution_id = await start_question(people, **config)
    await wait_for_question(people.owner, execution_id)
    return execution_id


async def start_question(people: OrganizationUsers, **config: Any) -> str:  # noqa: ANN401 - any JSON value
    """Start a run that will ask, by the owner of the workflow; returns its id."""
    graph = question(**config)
    graph.pop("isPublic")
    workflow_id = await people.owner.create(**graph)
    await make_public(people.owner, workflow_id)
    return await execute_workflow(people.owner, workflow_id)


async def test_only_assignees_answer_and_see_the_question_among_theirs(
    harness: GatewayHarness, people: OrganizationUsers
) -> None:
    async with serve_worker(harness):
        run = await ask(people, assignees=[people.colleague.user.id, "role:admin"])
        assert run in await pending(people.colleague)
        assert run in await pending(people.admin)
        assert run not in await pending(people.owner)
        assert run not in await pending(people.stranger)
        assert_refused(await say(people.owner, run, "yes"), 403, "not-assigned")
        assert (await say(people.colleague, run, "yes")).json()["status"] == "accepted"
        await wait_until_ended(people.owner, run)
        assert run not in await pending(people.colleague)
    trail = (await people.admin.api.get("/api/v1/audit?action=input.answered")).json()["entries"]
    assert [(one["userId"], one["keyId"][:4]) for one in trail] == [(people.colleague.user.id, "key_")]


async def test_questions_of_others_hide_no_older_one(
    harness: GatewayHarness, people: OrganizationUsers, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(node_answers, "QUESTIONS_PAGE", 1)
    async with serve_worker(harness):
        oldest = await ask(people, assignees=[people.colleague.user.id])
        newer = [await ask(people, assignees=["role:admin"]) for _ in range(2)]
        assert [run for run in await pending(people.colleague) if run == oldest] == [oldest]
        assert [run for run in await pending(people.admin) if run in newer] == newer[::-1]


async def test_the_user_of_a_run_cannot_approve_it(
    harness: GatewayHarness, people: OrganizationUsers
) -> None:
    async with serve_worker(harness):
        run = await ask(people, assignees=[people.owner.user.email, people.colleague.user.id])
        assert run not in await pending(people.owner)
        assert_refused(await say(people.owner, run, "yes"), 403, "self-approval")
        run = await ask(people, assignees=[people.owner.user.email], allowSelf=True)
        assert (await say(people.owner, run, "yes")).status_code == 200
        run = await ask(people)
        assert (await say(people.owner, run, "yes")).status_code == 200


async def test_a_run_continues_when_enough_people_agree(
    harness: GatewayHarness, people: OrganizationUsers
) -> None:
    async with serve_worker(harness):
        run = await ask(people, approvals=2)
        answers = await asyncio.gather(*(say(people.owner, run, "yes", "once") for _ in range(3)))
        results = [(one.json()["status"], one.json()["missingApprovals"]) for one in answers]
        assert results == [("counted", 1)] * 3
        assert_refused(await say(people.owner, run, "yes"), 409, "already-answered")
        assert (await say(people.colleague, run, "no")).json()["status"] == "counted"
        assert (await say(people.admin, run, "yes", "last")).json()["status"] == "accepted"
        await wait_until_ended(people.owner, run)
        for person, key, status in ((people.owner, "once", "counted"), (people.admin, "last", "accepted")):
            repeated = await say(person, run, "yes", key)
            assert (repeated.json()["status"], repeated.headers["Idempotent-Replayed"]) == (status, "true")
        span = (await get_json(people.owner, f"/{run}/spans?node_id=ask"))["spans"][0]
    assert span["port"] == "yes"
    assert [(one["by"], one["choice"]) for one in span["outputData"]["approvals"]] == [
        (people.owner.user.id, "yes"),
        (people.colleague.user.id, "no"),
        (people.admin.user.id, "yes"),
    ]


async def inbox(person: UserClient, run: str, query: str = "?others=true") -> dict[str, Any]:
    """Return the question of a run in a person's inbox."""
    answer = await person.api.get(f"/api/v1/pending-inputs{query}")
    (found,) = [one for one in answer.json()["inputs"] if one["executionId"] == run]
    shown: dict[str, Any] = found
    return shown


async def test_an_inbox_shows_the_assignment_and_the_votes_of_each_question(
    harness: GatewayHarness, people: OrganizationUsers
) -> None:
    colleague, admin = people.colleague, people.admin
    async with serve_worker(harness):
        assignees = [colleague.user.email.upper(), "role:admin"]
        run = await ask(people, assignees=assignees, approvals=2, expiresInSeconds=3_600, onExpiry="continue")
        assigned = [(await inbox(one, run))["assignment"] for one in (colleague, admin, people.owner)]
        assert assigned == ["caller", "role", "others"]
        shown = await inbox(people.owner, run)
        assert (shown["mayAnswer"], shown["refusal"], shown["onExpiry"]) == (
            False,
            "not-assigned",
            "continue",
        )
        assert (shown["startedBy"], shown["allowsSelf"]) == (people.owner.user.id, False)
        assert run not in await pending(people.owner)
        hidden = (await people.stranger.api.get("/api/v1/pending-inputs?others=true")).json()
        assert run not in [one["executionId"] for one in hidden["inputs"]]

        assert (await say(colleague, run, "yes")).json()["status"] == "counted"
        shown = await inbox(colleague, run)
        assert (shown["mayAnswer"], shown["refusal"]) == (False, "already-answered")
        assert [(one["by"], one["choice"]) for one in shown["votes"]] == [(colleague.user.id, "yes")]
        assert run not in await pending(colleague)
        open_to_all = await ask(people)
        assert (await inbox(admin, open_to_all, ""))["assignment"] == "anyone"


async def test_pages_of_an_inbox_have_each_question_once_and_find_own_ones_behind_those_of_others(
    harness: GatewayHarness, people: OrganizationUsers, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "QUESTIONS_OF_PAGE", 2)
    workflow_id = await people.owner.create(**{**GRAPH, "name": "Asked often", "status": "active"})
    await make_public(people.owner, workflow_id)
    asked = []
    for assignees in (
        [people.colleague.user.email.upper()],
        ["role:admin"],
        ["role:admin"],
        [],
        ["role:admin"],
    ):
        asked.append(await execute_workflow(people.owner, workflow_id))
        request = {**input_waits.REQUEST, "assignees": assignees}
        await input_waits.wait_for_input(harness.gateway.database, asked[-1], request=request)
    for person, query, expected in (
        (people.admin, "others=true", asked[::-1]),
        (people.colleague, "others=true", asked[::-1]),
        (people.colleague, "", [asked[3], asked[0]]),
        (people.colleague, "others=true&assignment=role,anyone", [asked[3]]),
        (people.stranger, "others=true", []),
    ):
        assert await _walk_inbox(person, query, limit=1) == expected, query
    mine = "/api/v1/pending-inputs?after=start&assignment=caller"
    page = (await people.colleague.api.get(mine)).json()
    assert [one["executionId"] for one in page["inputs"]] == [asked[0]], (
        "only those that name a person are examined"
    )
    assert (page["count"], page["countIsLowerBound"], page["next"]) == (1, False, None)
    first = (await people.admin.api.get("/api/v1/pending-inputs?after=start&limit=1")).json()
    assert (first["count"], first["countIsLowerBound"]) == (2, True)
    assert first["assignments"] == {"caller": 0, "role": 1, "anyone": 1, "others": 0}
    foreign = KeysetBounds(1, is_descending=True, cursor=PageCursor()).cursor_behind(
        harness.gateway.clock(), asked[0]
    )
    for query in ("after=nonsense", f"after={foreign}", "limit=-1", "limit=0", "assignment=nobody"):
        refused = await people.admin.api.get(f"/api/v1/pending-inputs?{query}")
        assert_refused(refused, 400, "invalid-query")
    # Without a cursor, a limit or an assignment begins the pages.
    first = (await people.admin.api.get("/api/v1/pending-inputs?limit=1")).json()
    assert ([one["executionId"] for one in first["inputs"]], first["next"] is None) == ([asked[4]], False)
    found = (await people.colleague.api.get("/api/v1/pending-inputs?assignment=caller")).json()
    assert [one["executionId"] for one in found["inputs"]] == [asked[0]]


async def test_pages_of_an_inbox_tell_nothing_of_another_organization_in_the_same_shard(
    harness: GatewayHarness, people: OrganizationUsers, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "QUESTIONS_OF_PAGE", 2)
    asked = []
    for person in (people.owner, people.stranger):
        workflow_id = await person.create(**{**GRAPH, "status": "active"})
        asked.append(await execute_workflow(person, workflow_id))
        await input_waits.wait_for_input(harness.gateway.database, asked[-1])
    same_shard = select(col(Execution.shard)).where(col(Execution.id) == asked[0]).scalar_subquery()
    moved = update(SpanRow).where(col(SpanRow.execution_id) == asked[1]).values(shard=same_shard)
    await harness.gateway.database.transaction(lambda connection: connection.execute(moved))
    page = (await people.owner.api.get("/api/v1/pending-inputs?after=start&others=true")).json()
    assert [one["executionId"] for one in page["inputs"]] == asked[:1]
    assert (page["next"], page["countIsLowerBound"]) == (None, False)


async def _walk_inbox(person: UserClient, query: str, *, limit: int) -> list[str]:
    """Return the runs of the questions on all pages of an inbox."""
    found: list[str] = []
    cursor: str | None = "start"
    while cursor is not None:
        answer = await person.api.get(f"/api/v1/pending-inputs?{query}&after={cursor}&limit={limit}")
        assert answer.status_code == 200, answer.text
        found += [one["executionId"] for one in answer.json()["inputs"]]
        assert len(answer.json()["inputs"]) <= limit
        cursor = answer.json()["next"]
    return found


async def test_answers_are_listed_with_their_people_the_newest_first(
    harness: GatewayHarness, people: OrganizationUsers
) -> None:
    nobody = await harness.client()
    async with serve_worker(harness):
        first = await ask(people, assignees=[people.colleague.user.id])
        await say(people.colleague, first, "yes")
        second = await ask(people, title="More prices?", assignees=["mira@example.com"])
        link = await make_link(harness, second, "mira@example.com")
        assert (await nobody.post(link.path, data={"choice": "no"})).status_code == 200
        await wait_until_ended(people.owner, first)
    newest = (await people.owner.api.get("/api/v1/answered-inputs?limit=1")).json()
    (answer,) = newest["answers"]
    assert (answer["executionId"], answer["title"], answer["choice"]) == (second, "More prices?", "no")
    assert (answer["by"], answer["byName"]) == ("mira@example.com", "mira@example.com")
    older = (await people.owner.api.get(f"/api/v1/answered-inputs?after={newest['next']}")).json()
    assert [(one["executionId"], one["by"]) for one in older["answers"]] == [
        (first, people.colleague.user.id)
    ]
    assert older["next"] is None
    assert (await people.stranger.api.get("/api/v1/answered-inputs")).json()["answers"] == []


# ── assignees ───────────────────────────────────────────────────────────────────────────────────────────────


async def find_organization(harness: GatewayHarness, person: UserClient) -> Organization:
    async with harness.gateway.database.read() as connection:
        found = await access_store.find_organization(connection, person.user.organization_id)
    assert found is not None
    return found


async def assign(person: UserClient, execution_id: str, *assignees: str) -> httpx2.Response:
    body = {"nodeId": "ask", "assignees": [*assignees]}
    return await person.api.post(f"{EXECUTIONS}/{execution_id}/reassign-input", json=body)


async def test_a_question_is_passed_on_by_its_assignees_and_by_admins(
    harness: GatewayHarness, people: OrganizationUsers
) -> None:
    nobody = await harness.client()
    owner, colleague, admin = people.owner, people.colleague, people.admin
    async with serve_worker(harness):
        run = await ask(people, assignees=[colleague.user.id, "mira@example.com"])
        link = await make_link(harness, run, "mira@example.com")
        assert_refused(await assign(owner, run, admin.user.id), 403, "not-assigned")
        assert_refused(await assign(people.stranger, run, admin.user.id), 404, "not-found")
        passed = await assign(colleague, run, admin.user.email.upper())
        assert passed.json()["assignees"] == [admin.user.id], passed.text
        assert_refused(await say(colleague, run, "yes"), 403, "not-assigned")
        assert_refused(await assign(colleague, run, colleague.user.id), 403, "not-assigned")
        assert (await nobody.post(link.path, data={"choice": "yes"})).status_code == 403
        assert "certain people" in (await nobody.get(link.path)).text

        back = await assign(admin, run, colleague.user.id)
        assert back.status_code == 200, back.text
        assert (await inbox(colleague, run, ""))["assignment"] == "caller"
        assert (await say(colleague, run, "yes")).json()["status"] == "accepted"
        assert_refused(await assign(admin, run, admin.user.id), 409, "already-answered")
        await wait_until_ended(owner, run)
    trail = (await admin.api.get("/api/v1/audit?action=input.reassigned")).json()["entries"]
    assert [one["userId"] for one in trail] == [admin.user.id, colleague.user.id]
    assert trail[0]["beforeHash"] == trail[1]["afterHash"]


async def test_an_answer_is_refused_if_the_question_is_passed_on_meanwhile(
    harness: GatewayHarness, people: OrganizationUsers, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The question is passed on between the check of its people and the answer."""
    nobody, admin, check = await harness.client(), people.admin, input_checks.require_valid_inputs
    next_assignees = ["mira@example.com", admin.user.id]

    async def pass_on(*arguments: Any) -> None:  # noqa: ANN401 - those of the check
        await check(*arguments)
        if next_assignees:
            passed = await assign(admin, run, next_assignees.pop(0))
            assert passed.status_code == 200, passed.text

    monkeypatch.setattr(input_checks, "require_valid_inputs", pass_on)
    async with serve_worker(harness):
        run = await ask(people, assignees=[people.colleague.user.id, "mira@example.com"])
        link = await make_link(harness, run, "mira@example.com")
        assert_refused(await say(people.colleague, run, "yes"), 403, "not-assigned")
        page = await nobody.post(link.path, data={"choice": "yes"})
        assert (page.status_code, "assigned to other people meanwhile" in page.text) == (403, True)
        assert (await say(admin, run, "no")).json()["status"] == "accepted"
        await wait_until_ended(people.owner, run)


async def test_a_question_that_is_passed_on_keeps_its_rule_about_the_starter_and_its_end(
    harness: GatewayHarness, people: OrganizationUsers
) -> None:
    owner, admin, database = people.owner, people.admin, harness.gateway.database
    graph = question()
    graph.pop("isPublic")
    workflow_id = await owner.create(**graph)
    await make_public(owner, workflow_id)
    asked = {"title": "Prices?", "assignees": [admin.user.id], "choices": [{"port": "yes"}]}
    run, late = [await execute_workflow(owner, workflow_id) for _ in range(2)]
    await input_waits.wait_for_input(database, run, "ask", request=asked)
    refused = await assign(admin, run, owner.user.id)
    assert [one["code"] for one in refused.json()["error"]["details"]] == ["too-few"], refused.text
    assert (await assign(admin, run, owner.user.id, people.colleague.user.id)).status_code == 200
    assert_refused(await say(owner, run, "yes"), 403, "self-approval")
    await input_waits.wait_for_input(database, late, "ask", request=asked, expires_in=-timedelta(hours=1))
    assert_refused(await assign(admin, late, people.colleague.user.id), 409, "input-expired")


async def test_a_question_is_passed_on_only_to_people_who_can_answer_it(
    harness: GatewayHarness, people: OrganizationUsers
) -> None:
    owner, colleague, admin = people.owner, people.colleague, people.admin
    async with serve_worker(harness):
        run = await ask(people, approvals=2)
        viewer = await harness.person(await find_organization(harness, owner), UserRole.VIEWER)
        foreign = (people.stranger.user.id, people.stranger.user.email, viewer.user.id, "eve@example.com")
        unknown = await assign(admin, run, *foreign, "role:admin")
        assert_refused(unknown, 422, "validation-failed")
        named = [one["path"] for one in unknown.json()["error"]["details"]]
        assert named == [f"assignees.{number}" for number, _ in enumerate(foreign)]
        assert_refused(await assign(viewer, run, owner.user.id), 403, "scope-required")
        assert_refused(await assign(admin, run, admin.user.id), 422, "validation-failed")
        for hostile in ("a\0b", "\u202eeve@example.com", "<script>@x", "x" * 10_000, "", "role:viewer"):
            assert (await assign(admin, run, hostile)).status_code in {400, 422}, hostile
        # A question without assignees lets the user answer who started the run, and so does the one passed on.
        assert (await assign(owner, run, owner.user.id, admin.user.id)).status_code == 200
        assert (await say(owner, run, "yes")).json()["status"] == "counted"
        assert (await assign(admin, run, colleague.user.id)).status_code == 200
        assert (await say(colleague, run, "yes")).json()["status"] == "accepted"
        await wait_until_ended(owner, run)

        graph = question()
        graph.pop("isPublic")
        private = await execute_workflow(owner, await owner.create(**graph))
        await wait_for_question(owner, private)
        refused = await assign(owner, private, colleague.user.id)
        assert [one["code"] for one in refused.json()["error"]["details"]] == ["no-access"], refused.text
        assert (await assign(owner, private, "role:admin")).status_code == 200
        assert_refused(await say(owner, private, "yes"), 403, "not-assigned")
        assert_refused(await assign(colleague, private, colleague.user.id), 404, "not-found")
        assert (await say(admin, private, "yes")).json()["status"] == "accepted"
        for person, may_see in ((owner, True), (admin, True), (colleague, False), (viewer, False)):
            answers = (await person.api.get("/api/v1/answered-inputs")).json()["answers"]
            assert (private in [one["executionId"] for one in answers]) is may_see


# ── links ───────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class LinkUnderTest:
    path: str
    token: str


async def make_link(harness: GatewayHarness, execution_id: str, assignee: str) -> LinkUnderTest:
    database = harness.gateway.database
    async with database.read() as connection:
        statement = select(
            col(Execution.shard), col(Execution.organization_id), col(Execution.created_at)
        ).where(col(Execution.id) == execution_id)
        row = (await connection.execute(statement)).one()
    key = ExecutionKey(execution_id, row.shard)
    token = approvals.derive_token(b"a secret", key, "ask", "", assignee)
    link = ApprovalLink(
        hash=approvals.hash_token(token),
        execution_id=execution_id,
        node_id="ask",
        shard=row.shard,
        organization_id=row.organization_id,
        assignee=assignee,
        created_at=row.created_at,
    )
    await database.transaction(
        lambda connection: connection.execute(insert(ApprovalLink).values(link.model_dump()))
    )
    return LinkUnderTest(f"/approve/{token}", token)


async def test_a_link_shows_its_question_and_takes_one_answer(
    harness: GatewayHarness, people: OrganizationUsers, capsys: pytest.CaptureFixture[str]
) -> None:
    nobody = await harness.client()
    async with serve_worker(harness):
        run = await ask(
            people, description="<b>Highest: 1,890 €</b>", schema=SCHEMA, assignees=["mira@example.com"]
        )
        link = await make_link(harness, run, "mira@example.com")
        for _ in range(2):
            page = await nobody.get(link.path)
            assert page.status_code == 200
        assert (await nobody.head(link.path)).status_code in {200, 405}
        assert "Set 12 prices?" in page.text
        assert "&lt;b&gt;Highest" in page.text
        assert "<script" not in page.text
        assert 'name="viewport"' in page.text
        assert re.search(r"(src|href)=", page.text) is None
        policy = page.headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "form-action 'self'" in policy
        assert (page.headers["referrer-policy"], page.headers["cache-control"]) == ("no-referrer", "no-store")
        wrong = await nobody.post(link.path, data={"choice": "yes", "field.max": "many"})
        assert (wrong.status_code, "max must be a number" in wrong.text) == (422, True)
        missing = await nobody.post(link.path, data={"choice": "maybe", "field.max": "15"})
        assert missing.status_code == 422
        done = await nobody.post(link.path, data={"choice": "yes", "field.max": "15", "field.why": "fine"})
        assert (done.status_code, "Thank you" in done.text) == (200, True)
        again = await nobody.post(link.path, data={"choice": "no", "field.max": "1"})
        assert again.status_code == 409
        await wait_until_ended(people.owner, run)
        span = (await get_json(people.owner, f"/{run}/spans?node_id=ask"))["spans"][0]
        assert "used" in (await nobody.get(link.path)).text
    answer = span["outputData"]
    assert (answer["by"], answer["choice"], answer["data"]) == (
        "mira@example.com", "yes", {"max": 15, "why": "fine"},
    )  # fmt: skip
    trail = (await people.admin.api.get("/api/v1/audit?action=input.answered")).json()["entries"]
    assert [(one["userId"], one["keyId"]) for one in trail] == [("mira@example.com", "approval-link")]
    written = capsys.readouterr()
    assert link.token not in written.out + written.err
    everything = (await people.owner.api.get(f"{EXECUTIONS}/{run}/spans")).text
    assert link.token not in everything


async def test_a_link_ends_with_its_question_its_run_and_its_starter(
    harness: GatewayHarness, people: OrganizationUsers
) -> None:
    nobody = await harness.client()
    async with serve_worker(harness):
        run = await ask(people, assignees=[people.owner.user.id, "b@example.com", "c@example.com"])
        own, other, third = [
            await make_link(harness, run, name)
            for name in (people.owner.user.id, "b@example.com", "c@example.com")
        ]
        refused = await nobody.post(own.path, data={"choice": "yes"})
        assert "may not answer" in refused.text
        assert (await nobody.post(other.path, data={"choice": "yes", "note": "ok"})).status_code == 200
        closed = await nobody.post(third.path, data={"choice": "no"})
        assert (closed.status_code, "Closed" in closed.text) == (409, True)
        await wait_until_ended(people.owner, run)
    assert (await nobody.get("/approve/ap-unknown")).status_code == 404
    assert (await nobody.post("/approve/ap-unknown", data={})).status_code == 404
    hostile = await nobody.post(third.path, content=b"choice=%00&x=\xff")
    assert hostile.status_code < 500


async def test_a_link_ends_when_its_question_expires(
    harness: GatewayHarness, people: OrganizationUsers
) -> None:
    nobody = await harness.client()
    async with serve_worker(harness):
        # A busy machine may show the question only after it has expired.
        config = {"assignees": ["mira@example.com"], "expiresInSeconds": 1, "onExpiry": "continue"}
        run = await start_question(people, **config)
        link = await make_link(harness, run, "mira@example.com")
        await wait_until_ended(people.owner, run)
        shown = await nobody.get(link.path)
        assert (shown.status_code, "Closed" in shown.text, "<form" in shown.text) == (200, True, False)
        late = await nobody.post(link.path, data={"choice": "yes"})
        assert (late.status_code, "Closed" in late.text) == (409, True)
        span = (await get_json(people.owner, f"/{run}/spans?node_id=ask"))["spans"][0]
    assert span["port"] == "expired"
    assert (await people.admin.api.get("/api/v1/audit?action=input.answered")).json()["entries"] == []


async def test_a_client_that_guesses_tokens_is_refused_while_links_still_work(
    harness: GatewayHarness, people: OrganizationUsers, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(failed_attempts, "MAX_FAILURES", 3)
    client = await harness.client()
    async with serve_worker(harness):
        run = await ask(people, assignees=["mira@example.com"])
        link = await make_link(harness, run, "mira@example.com")
        # Other tests of this gateway have failed from the same address.
        statuses = [(await client.get(f"/approve/ap-guess{number}")).status_code for number in range(4)]
        assert statuses == sorted(statuses)
        assert {*statuses} <= {404, 429}
        refused = await client.post("/approve/ap-guess", data={})
        assert (refused.status_code, "Too many attempts" in refused.text) == (429, True)
        assert 0 < int(refused.headers["retry-after"]) <= 60
        assert (await client.get(link.path)).status_code == 200
        assert (await client.post(link.path, data={"choice": "yes"})).status_code == 200
        await wait_until_ended(people.owner, run)


async def test_a_workflow_sends_a_link_that_nothing_records(
    harness: GatewayHarness, people: OrganizationUsers, capsys: pytest.CaptureFixture[str]
) -> None:
    nobody = await harness.client()
    async with run_receiver() as receiver:
        receiver.echoes = True
        graph = question()
        graph.pop("isPublic")
        asks_chat = {
            "method": "POST",
            "url": receiver.url("/chat?text={{ approval.ask.url }}"),
            "body": {"text": "Set? {{ approval.ask.url }}"},
            "headers": {"X-Link": "{{ approval.ask.url }}"},
        }
        graph["nodes"] += [
            {"id": "tell", "nodeId": "http-request", "config": asks_chat},
            {
                "id": "hold",
                "nodeId": "human-input",
                "config": {"title": "First", "choices": [{"port": "go"}]},
            },
        ]
        graph["connections"] = [
            {"source": "start", "target": "tell"},
            {"source": "tell", "target": "hold"},
            {"source": "hold", "sourcePort": "go", "target": "ask"},
            {"source": "ask", "sourcePort": "yes", "target": "after"},
        ]
        worker = {"public_url": "https://flows.example", "outbound_allowed_networks": ("127.0.0.1/32",)}
        async with serve_worker(harness, **worker):
            workflow_id = await people.owner.create(**graph)
            run = await execute_workflow(people.owner, workflow_id)
            await wait_for_question(people.owner, run)
            [sent] = receiver.received
            text = json.loads(sent.body)["text"]
            link = text.removeprefix("Set? ")
            assert link.startswith("https://flows.example/approve/ap-")
            assert sent.headers["x-link"] == link
            assert quote(link, safe="") in sent.path or link in sent.path
            path = link.removeprefix("https://flows.example")
            early = await nobody.get(path)
            assert (early.status_code, "Not asked yet" in early.text) == (200, True)
            assert (await nobody.post(path, data={"choice": "yes"})).status_code == 409
            go = {"nodeId": "hold", "choice": "go"}
            assert (await people.owner.api.post(f"{EXECUTIONS}/{run}/input", json=go)).status_code == 200
            while "Set 12 prices?" not in (await nobody.get(path)).text:  # noqa: ASYNC110 - pages send no events
                await asyncio.sleep(0.02)
            assert (await nobody.post(path, data={"choice": "yes"})).status_code == 200
            await wait_until_ended(people.owner, run)
    token = link.rpartition("/")[2]
    shown = await get_json(people.owner, f"/{run}/spans")
    by_node = {one["nodeId"]: one for one in shown["spans"]}
    assert by_node["ask"]["outputData"]["by"] == "approval-link"
    tell = await get_json(people.owner, f"/{run}/spans/tell")
    assert "https://approval.invalid/ask" in json.dumps(tell)
    for table in ("span", "execution", "execution_data", "log_line", "approval_link", "attempt_span"):
        async with harness.gateway.database.read() as connection:
            rows = (await connection.exec_driver_sql(f"SELECT * FROM {table}")).all()
        assert token not in repr(rows), table
    written = capsys.readouterr()
    assert token not in written.out + written.err


async def test_a_link_for_anyone_answers_no_question_for_certain_people(
    harness: GatewayHarness, people: OrganizationUsers
) -> None:
    nobody = await harness.client()
    async with serve_worker(harness):
        for config in ({"assignees": ["mira@example.com"]}, {"allowSelf": False}):
            run = await ask(people, **config)
            link = await make_link(harness, run, approvals.ANYONE)
            assert "certain people" in (await nobody.get(link.path)).text
            refused = await nobody.post(link.path, data={"choice": "yes"})
            assert refused.status_code == 403
            assert len((await get_json(people.owner, f"/{run}/pending-inputs"))["inputs"]) == 1


# ── mails ───────────────────────────────────────────────────────────────────────────────────────────────────


async def wait_for_mails(server: FakeMailServer, number: int) -> list[ReceivedMail]:
    while len(server.received) < number:  # noqa: ASYNC110 - the server sends no events
        await asyncio.sleep(0.02)
    return server.received


def link_in(mail: ReceivedMail) -> str:
    found = re.search(rb"https://flows\.example(/approve/ap-[\w-]+)", mail.content)
    assert found is not None, mail.content
    return found[1].decode()


async def request_row(harness: GatewayHarness, execution_id: str) -> ApprovalRequest:
    async with harness.gateway.database.read() as connection:
        statement = select(ApprovalRequest).where(col(ApprovalRequest.execution_id) == execution_id)
        return ApprovalRequest(**(await connection.execute(statement)).mappings().one())


async def make_due(harness: GatewayHarness, execution_id: str) -> None:
    statement = (
        update(ApprovalRequest)
        .where(col(ApprovalRequest.execution_id) == execution_id)
        .values(due_at=col(ApprovalRequest.created_at))
    )
    await harness.gateway.database.transaction(lambda connection: connection.execute(statement))


async def test_each_assignee_gets_a_link_of_their_own_and_is_reminded_until_the_answer(
    harness: GatewayHarness, people: OrganizationUsers
) -> None:
    nobody = await harness.client()
    async with smtp_server.serve_smtp(tls="none") as server:
        server.answers["late@example.com"] = "451 later"
        source = {
            "name": "Mail", "type": "smtp", "settings": {"host": "127.0.0.1", "port": server.port, "tls": "none"},
        }  # fmt: skip
        made = await people.owner.api.post("/api/v1/datasources", json=source)
        assert made.status_code == 201, made.text
        notify = {"dataSource": made.json()["dataSourceId"], "from": "flows@example.com", "subject": "Prices"}
        worker = {"public_url": "https://flows.example", "outbound_allowed_networks": ("127.0.0.1/32",)}
        async with serve_worker(harness, **worker):
            run = await ask(
                people,
                assignees=[
                    people.owner.user.email,
                    people.colleague.user.id,
                    people.colleague.user.email.upper(),
                    "mira@example.com",
                    "late@example.com",
                ],
                notify=notify,
                remindAfterSeconds=3600,
            )
            # The owner has started the run and gets none; the last assignee gets it after a failure.
            first, second = await wait_for_mails(server, 2)
            assert [first.recipients, second.recipients] == [
                [people.colleague.user.email],
                ["mira@example.com"],
            ]
            while (row := await request_row(harness, run)).attempts == 0:  # noqa: ASYNC110 - rows send no events
                await asyncio.sleep(0.02)
            assert (row.round, "late@example.com" in str(row.error)) == (0, True)
            assert link_in(first) != link_in(second)
            [shown] = (await get_json(people.owner, f"/{run}/pending-inputs"))["inputs"]
            assert (shown["mails"]["rounds"], "451" in shown["mails"]["lastError"]) == (0, True)
            del server.answers["late@example.com"]
            await make_due(harness, run)
            assert (await wait_for_mails(server, 3))[2].recipients == ["late@example.com"]
            while (await request_row(harness, run)).round == 0:  # noqa: ASYNC110 - as above
                await asyncio.sleep(0.02)
            await make_due(harness, run)
            reminders = (await wait_for_mails(server, 6))[3:]
            assert all(b"Subject: Reminder: Prices" in one.content for one in reminders)
            assert link_in(reminders[1]) == link_in(second)
            while (await request_row(harness, run)).round == 1:  # noqa: ASYNC110 - as above
                await asyncio.sleep(0.02)
            passed_on = await assign(people.admin, run, people.admin.user.id, "mira@example.com")
            assert passed_on.status_code == 200, passed_on.text
            subjects = {
                one.recipients[0]: b"Subject: Reminder: Prices" in one.content
                for one in (await wait_for_mails(server, 8))[6:]
            }
            assert subjects == {people.admin.user.email: False, "mira@example.com": True}
            answered = await nobody.post(link_in(second), data={"choice": "yes"})
            assert answered.status_code == 200
            await wait_until_ended(people.owner, run)
            await make_due(harness, run)
            while (await request_row(harness, run)).due_at is not None:  # noqa: ASYNC110 - as above
                await asyncio.sleep(0.02)
            assert len(server.received) == 8
    span = (await get_json(people.owner, f"/{run}/spans?node_id=ask"))["spans"][0]
    assert span["outputData"]["by"] == "mira@example.com"
    assert "ap-" not in (await people.owner.api.get(f"{EXECUTIONS}/{run}/spans")).text
    async with harness.gateway.database.read() as connection:
        hashes = [*await connection.scalars(select(col(ApprovalLink.hash)))]
    assert approvals.hash_token(link_in(second).rpartition("/")[2]) in hashes
