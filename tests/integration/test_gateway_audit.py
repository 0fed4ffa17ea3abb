"""Audit trail: every change leaves one entry, all else leaves none, and entries are immutable."""

import asyncio
from datetime import UTC, datetime, timedelta, timezone
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx2
import pytest
from sqlalchemy import insert, select, update
from sqlalchemy.ext.asyncio import AsyncConnection
from sqlmodel import col

from gateway.access.bootstrap import bootstrap
from gateway.http import errors
from journal import audit_chain
from journal.store import ClaimQuery
from models import ids
from models.access import KeyScope, Organization, UserRole
from models.audit import AuditAction, AuditEntry, SystemDecision
from models.database import Database, parse_url
from models.deployment import LifecycleDecision
from models.execution import Execution
from models.lifecycle_policy import LifecycleAction, LifecycleReason
from pilotflame import accounts
from tests import databases
from tests.integration.gateway_harness import (
    GRAPH,
    STEP,
    TRIGGER,
    GatewayHarness,
    OrganizationUsers,
    UserClient,
    assert_refused,
)
from tests.integration.second_gateway import run_second_gateway

AUDIT = "/api/v1/audit"
KEYS = "/api/v1/auth/keys"
USERS = "/api/v1/auth/users"
WORKFLOWS = "/api/v1/workflows"
FIELDS = {
    *("id", "action", "objectId", "userId", "keyId", "beforeHash", "afterHash", "createdAt"),
    *("requestId", "addressHash", "changes", "sequence", "chainHash"),
    *("kind", "reason", "inputs"),
}


async def read_trail(person: UserClient, **query: str) -> list[dict[str, Any]]:
    """Return the entries that match a query, oldest first."""
    response = await person.api.get(AUDIT, params={"sort": "createdAt:asc", "limit": "100", **query})
    assert response.status_code == 200, response.text
    entries: list[dict[str, Any]] = response.json()["entries"]
    return entries


def list_actions(entries: list[dict[str, Any]]) -> list[str]:
    return [entry["action"] for entry in entries]


def is_chain(entries: list[dict[str, Any]]) -> bool:
    """Return whether each change starts from the state that the previous one left, and changes it."""
    links = [(before["afterHash"], after["beforeHash"]) for before, after in pairwise(entries)]
    steps = [(entry["beforeHash"], entry["afterHash"]) for entry in entries]
    return all(left == right for left, right in links) and all(left != right for left, right in steps)


async def read_key_id(person: UserClient) -> str:
    shown: str = (await person.api.get("/api/v1/auth/whoami")).json()["keyId"]
    return shown


async def change_everything(person: UserClient, workflow_id: str, user_id: str) -> None:
    """Change a workflow in every possible way, and delete it."""
    path = f"{WORKFLOWS}/{workflow_id}"
    for method, below, body in (
        ("PUT", "", {"name": "New", "nodes": [TRIGGER, STEP], "config": {"appId": "app_1"}}),
        ("PUT", "/status", {"status": "paused"}),
        ("POST", "/share", {"userId": user_id}),
        ("DELETE", f"/share/{user_id}", None),
        ("PUT", "/visibility", {"isPublic": True}),
        ("POST", "/versions", {"versionTag": "v2"}),
        ("POST", "/versions/1/restore", None),
        ("PUT", "", {"settings": {"timeout": 1.5}, "config": {"mine": [1.0, True, None, "ü"]}}),
        ("DELETE", "", None),
    ):
        response = await person.api.request(method, path + below, json=body)
        assert response.status_code in {200, 201, 204}, response.text


# ── audited operations ──────────────────────────────────────────────────────────────────────────────────────


async def test_every_change_of_a_workflow_is_an_entry_that_begins_where_the_last_one_ended(
    people: OrganizationUsers,
) -> None:
    workflow_id = await people.owner.create(**GRAPH)
    await change_everything(people.owner, workflow_id, people.colleague.user.id)
    entries = await read_trail(people.admin, objectId=workflow_id)
    assert list_actions(entries) == [
        "workflow.created",
        "workflow.updated",
        "workflow.status-set",
        "share.added",
        "share.removed",
        "workflow.visibility-set",
        "version.created",
        "version.restored",
        "workflow.updated",
        "workflow.deleted",
    ]
    assert is_chain(entries)
    assert (entries[0]["beforeHash"], entries[-1]["afterHash"]) == (None, None)
    owner = (people.owner.user.id, await read_key_id(people.owner))
    assert {(entry["userId"], entry["keyId"]) for entry in entries} == {owner}
    assert all(set(entry) == FIELDS for entry in entries)
    assert all(len(entry["afterHash"]) == 64 for entry in entries[:-1])


@pytest.mark.every_database
async def test_an_entry_names_its_request_the_hash_of_its_address_and_its_place_in_the_chain(
    harness: GatewayHarness, people: OrganizationUsers
) -> None:
    workflow_id = await people.owner.create(**GRAPH)
    path = f"{WORKFLOWS}/{workflow_id}"
    elsewhere = await harness.client(people.owner.key, address="10.0.0.99")
    answers = [
        await person.put(path, json={"name": name})
        for person, name in ((people.owner.api, "One"), (people.owner.api, "Two"), (elsewhere, "Three"))
    ]
    _, first, second, third = await read_trail(people.admin, objectId=workflow_id)
    requests = [answer.headers["X-Request-Id"] for answer in answers]
    assert [entry["requestId"] for entry in (first, second, third)] == requests
    assert first["addressHash"] == second["addressHash"] != third["addressHash"]
    assert "10.0.0" not in str([first, second, third])
    assert first["changes"] == [{"path": "name", "before": '"A workflow"', "after": '"One"'}]
    assert (first["sequence"], first["chainHash"]) == (None, None)
    await audit_chain.chain_entries(harness.gateway.database)
    _, first, second, third = await read_trail(people.admin, objectId=workflow_id)
    assert [second["sequence"], third["sequence"]] == [first["sequence"] + 1, first["sequence"] + 2]
    assert len({entry["chainHash"] for entry in (first, second, third)}) == 3
    async with harness.gateway.database.read() as connection:
        assert not await audit_chain.find_breaks(connection)


async def test_changes_name_paths_and_never_values_that_may_be_secret(people: OrganizationUsers) -> None:
    secret = "sk-live-4eC39HqLyjWDarjtT1zdp7dc"
    workflow_id = await people.owner.create(**GRAPH)
    step = {**STEP, "config": {"values": {"key": secret, "limit": 987_654_321_012}}}
    body = {"name": "n" * 150, "nodes": [TRIGGER, step], "config": {"token": secret}, "tags": ["shop"]}
    answer = await people.owner.api.put(f"{WORKFLOWS}/{workflow_id}", json=body)
    assert answer.status_code == 200, answer.text
    entry = (await read_trail(people.admin, objectId=workflow_id))[-1]
    changes = {change["path"]: (change["before"], change["after"]) for change in entry["changes"]}
    assert changes["tags[0]"] == (None, '"shop"')
    assert changes["name"][1].startswith("sha256:")
    assert changes["config.token"] == (None, "(hidden)")
    paths = [path for path in changes if path.startswith(f"nodes.{STEP['id']}.")]
    assert paths
    assert all("(hidden)" in changes[path] for path in paths)

    source = {"name": "Mail", "type": "smtp", "settings": {"host": "a.example.com", "username": secret}}
    source |= {"secrets": {"password": secret}}
    created = await people.owner.api.post("/api/v1/datasources", json=source)
    source_id = created.json()["dataSourceId"]
    settings = {"host": "b.example.com", "username": f"{secret}-2"}
    edit = {"settings": settings, "secrets": {"password": f"{secret}-2"}}
    assert (await people.owner.api.put(f"/api/v1/datasources/{source_id}", json=edit)).status_code == 200
    edited = (await read_trail(people.admin, objectId=source_id))[-1]
    by_path = {change["path"]: (change["before"], change["after"]) for change in edited["changes"]}
    assert by_path["settings.host"] == ('"a.example.com"', '"b.example.com"')
    assert by_path["settings.username"] == ("(hidden)", "(hidden)")
    assert by_path.keys() == {"settings.host", "settings.username", "secretsSetAt"}

    made = (await people.owner.api.post(KEYS, json={"name": "Job", "scopes": ["workflows:read"]})).json()
    (created_key,) = await read_trail(people.admin, objectId=made["id"])
    assert {"path": "name", "before": None, "after": '"Job"'} in created_key["changes"]
    trail = str(await read_trail(people.admin))
    assert secret not in trail
    assert "987654321012" not in trail, "long enough to be in no hash by chance"
    assert made["key"] not in trail


async def test_refused_requests_and_empty_changes_leave_no_audit_entry(people: OrganizationUsers) -> None:
    workflow_id, guest = await people.owner.create(**GRAPH), people.colleague.user.id
    path = f"{WORKFLOWS}/{workflow_id}"
    await people.owner.api.post(f"{path}/share", json={"userId": guest})
    for person, method, below, body, status in (
        (people.owner, "POST", "/share", {"userId": guest}, 200),
        (people.owner, "PUT", "", {"name": "A workflow"}, 200),
        (people.owner, "PUT", "/visibility", {"isPublic": False}, 200),
        (people.owner, "POST", "/versions/1/restore", None, 200),
        (people.owner, "POST", "/versions", {"versionTag": "v1.0.0"}, 409),
        (people.owner, "DELETE", "/share/user_nobody", None, 404),
        (people.owner, "PUT", "/status", {"status": "on"}, 422),
        (people.colleague, "PUT", "", {"name": "Taken over"}, 403),
        (people.stranger, "DELETE", "", None, 404),
    ):
        response = await person.api.request(method, path + below, json=body)
        assert response.status_code == status, response.text
    assert_refused(
        await people.owner.api.put(path, json={}, headers={"If-Match": '"9"'}), 412, "precondition-failed"
    )
    assert list_actions(await read_trail(people.admin, objectId=workflow_id)) == [
        "workflow.created",
        "share.added",
    ]


async def test_changes_at_the_same_time_form_one_chain(
    harness: GatewayHarness, people: OrganizationUsers
) -> None:
    workflow_id = await people.owner.create()
    async with run_second_gateway(harness) as client, client(people.admin) as other:
        await asyncio.gather(
            *(
                api.put(f"{WORKFLOWS}/{workflow_id}", json={"config": {f"key{n}": n}})
                for n, api in enumerate([people.owner.api, other] * 5)
            )
        )
    entries = await read_trail(people.admin, objectId=workflow_id)
    assert len(entries) == 11
    assert is_chain(entries)


async def test_a_change_is_rolled_back_if_its_audit_entry_cannot_be_written(
    people: OrganizationUsers, monkeypatch: pytest.MonkeyPatch
) -> None:
    workflow_id = await people.owner.create()

    async def fails(*_: object, **__: object) -> None:
        raise errors.not_ready("There is no place for a trace")

    monkeypatch.setattr("gateway.access.audit_log.record_change", fails)
    for method, path, body in (
        ("PUT", f"{WORKFLOWS}/{workflow_id}", {"name": "New"}),
        ("POST", f"{WORKFLOWS}/{workflow_id}/versions", {"versionTag": "v2"}),
        ("POST", KEYS, {"name": "untraced"}),
        ("DELETE", f"{KEYS}/{await read_key_id(people.owner)}", None),
        ("POST", USERS, {"email": "untraced@example.com"}),
    ):
        assert_refused(await people.admin.api.request(method, path, json=body), 503, "not-ready")
    shown = await people.owner.workflow(workflow_id)
    assert (shown["name"], shown["version"]) == ("A workflow", 1)
    keys = (await people.admin.api.get(KEYS)).json()["keys"]
    assert [(key["name"], key["revokedAt"]) for key in keys] == [("test", None)] * 3
    assert (await people.admin.api.get(USERS)).json()["count"] == 3


# ── keys and users ──────────────────────────────────────────────────────────────────────────────────────────


async def test_a_key_leaves_a_trace_when_it_is_made_and_when_it_is_revoked(
    harness: GatewayHarness, people: OrganizationUsers
) -> None:
    later = datetime.now(timezone(timedelta(hours=2))) + timedelta(days=1)
    body = {"name": "laptop", "expiresAt": later.isoformat()}
    made = (await people.owner.api.post(KEYS, json=body)).json()
    assert (await (await harness.client(made["key"])).get(WORKFLOWS)).status_code == 200
    for person in (people.stranger, people.admin, people.owner):
        await person.api.delete(f"{KEYS}/{made['id']}")
    entries = await read_trail(people.admin, objectId=made["id"])
    assert list_actions(entries) == ["key.created", "key.revoked"]
    assert [entry["userId"] for entry in entries] == [people.owner.user.id, people.admin.user.id]
    assert is_chain(entries)
    assert made["key"] not in str(entries)


async def test_a_user_leaves_a_trace_when_it_is_added(people: OrganizationUsers) -> None:
    made = (await people.admin.api.post(USERS, json={"email": "ada@example.com"})).json()
    assert_refused(await people.admin.api.post(USERS, json={"email": "ada@example.com"}), 409, "email-taken")
    (entry,) = await read_trail(people.admin, action="user.created")
    assert (entry["objectId"], entry["userId"]) == (made["id"], people.admin.user.id)
    assert entry["beforeHash"] is None


async def test_changes_at_the_command_line_are_audited_as_the_operator_s(
    harness: GatewayHarness, people: OrganizationUsers
) -> None:
    settings, organization = harness.gateway.settings, people.admin.user.organization_id
    user = await accounts.create_user(settings, organization, "ci@example.com", "CI", UserRole.MEMBER)
    await accounts.create_key(settings, organization, user, "ci", [KeyScope.WORKFLOWS_READ], None)
    (key,) = [key for key in await accounts.list_keys(settings, organization) if key.name == "ci"]
    for _ in range(2):
        await accounts.revoke_key(settings, organization, key.id)
    entries = await read_trail(people.admin, userId="operator")
    assert list_actions(entries) == ["user.created", "key.created", "key.revoked"]
    assert [entry["objectId"] for entry in entries] == [user, key.id, key.id]
    assert {entry["keyId"] for entry in entries} == {"operator"}
    assert is_chain(entries[1:])


async def test_the_first_user_and_key_are_traced_as_the_operator_s(tmp_path: Path) -> None:
    database = Database(parse_url(await databases.create_sqlite_database(tmp_path / "empty.db")))
    await bootstrap(database, "sk-of-the-settings-0123", b"a secret of more than thirty-two characters")
    columns = select(col(AuditEntry.action), col(AuditEntry.key_id)).order_by(col(AuditEntry.id))
    async with database.read() as connection:
        found = [tuple(row) for row in await connection.execute(columns)]
    await database.close()
    assert found == [("user.created", "operator"), ("key.created", "operator")]


# ── read ────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_the_trail_is_filtered_sorted_and_paged(people: OrganizationUsers) -> None:
    first = await people.owner.create()
    second = await people.admin.create()
    await people.admin.api.put(f"{WORKFLOWS}/{first}", json={"name": "New"})
    all_of_them = await read_trail(people.admin)
    assert [entry["objectId"] for entry in all_of_them] == [first, second, first]
    newest = (await people.admin.api.get(f"{AUDIT}?limit=2&offset=1")).json()
    assert (newest["count"], newest["limit"], newest["offset"]) == (3, 2, 1)
    assert newest["entries"] == [all_of_them[1], all_of_them[0]]
    assert await read_trail(people.admin, userId=people.owner.user.id) == all_of_them[:1]
    assert await read_trail(people.admin, action="workflow.updated") == all_of_them[2:]
    assert await read_trail(people.admin, objectId=first, action="workflow.created") == all_of_them[:1]
    assert await read_trail(people.admin, objectId="wf_nobody") == []
    future = (datetime.now(UTC) + timedelta(hours=1)).isoformat()
    assert await read_trail(people.admin, since=all_of_them[0]["createdAt"], until=future) == all_of_them
    assert (
        await read_trail(people.admin, since=future)
        == await read_trail(people.admin, until="2001-01-01")
        == []
    )
    for query in ("action=everything", "since=yesterday", "limit=101", "offset=-1", "sort=action"):
        assert_refused(await people.admin.api.get(f"{AUDIT}?{query}"), 400, "invalid-query")


async def decide(
    harness: GatewayHarness, person: UserClient, workflow_id: str, moments: dict[datetime, LifecycleAction]
) -> list[str]:
    """Store a decision about a workflow for each moment, with its action; return the ids."""
    rows = [
        LifecycleDecision(
            id=ids.new_id("decision"),
            organization_id=person.user.organization_id,
            shard=person.user.shard,
            workflow_id=workflow_id,
            at=at,
            action=action,
            reason=LifecycleReason.BY_HAND if action is LifecycleAction.START else LifecycleReason.IDLE,
            replicas=0,
            user_id=person.user.id if action is LifecycleAction.START else None,
            inputs={"lastActivityAt": "2026-01-01T00:00:00.000Z"},
        ).model_dump()
        for at, action in moments.items()
    ]
    await harness.gateway.database.transaction(
        lambda connection: connection.execute(insert(LifecycleDecision), rows)
    )
    return [row["id"] for row in rows]


async def test_decisions_of_the_system_stand_among_the_changes_in_the_order_of_time(
    harness: GatewayHarness, people: OrganizationUsers
) -> None:
    workflow_id = await people.owner.create(**GRAPH)
    await people.owner.api.put(f"{WORKFLOWS}/{workflow_id}", json={"name": "New"})
    created, updated = await read_trail(people.admin)
    first, last = (datetime.fromisoformat(entry["createdAt"]) for entry in (created, updated))
    # Two of them at the very time of a change, one before and one after both.
    moments = {
        first - timedelta(hours=1): LifecycleAction.START,
        first: LifecycleAction.WAKE,
        last + timedelta(hours=1): LifecycleAction.STOP,
    }
    await decide(harness, people.owner, workflow_id, moments)
    await decide(harness, people.stranger, "wf_of_others", {first: LifecycleAction.STOP})

    assert await read_trail(people.admin) == [created, updated]
    entries = await read_trail(people.admin, kind="all")
    assert sorted(entries, key=lambda entry: entry["createdAt"]) == entries
    assert sorted(list_actions(entries)) == [
        *("deployment.started", "deployment.stopped", "deployment.woken"),
        *("workflow.created", "workflow.updated"),
    ]
    decisions = [entry for entry in entries if entry["kind"] == "decision"]
    assert decisions == await read_trail(people.admin, kind="decision")
    assert [entry["userId"] for entry in decisions] == [people.owner.user.id, "system", "system"]
    assert [entry["reason"] for entry in decisions] == ["by-hand", "idle", "idle"]
    assert {entry["objectId"] for entry in decisions} == {workflow_id}
    assert decisions[0]["inputs"] == {"lastActivityAt": "2026-01-01T00:00:00.000Z"}
    assert all(set(entry) == FIELDS for entry in entries)

    for order, expected in (("asc", entries), ("desc", entries[::-1])):
        walked: list[str] = []
        cursor: str | None = "start"
        while cursor is not None:
            query = {"kind": "all", "sort": f"createdAt:{order}", "limit": "2", "after": cursor}
            page = (await people.admin.api.get(AUDIT, params=query)).json()
            assert (page["count"], page["countIsLowerBound"]) == (5, False)
            walked += [entry["id"] for entry in page["entries"]]
            cursor = page["next"]
        assert sorted(walked) == sorted(entry["id"] for entry in expected)
        times = {entry["id"]: entry["createdAt"] for entry in entries}
        assert [times[one] for one in walked] == [entry["createdAt"] for entry in expected]


@pytest.mark.every_database
async def test_deferred_deliveries_and_deleted_executions_are_decisions_of_the_system(
    harness: GatewayHarness, people: OrganizationUsers
) -> None:
    trigger = {"id": "start", "nodeId": "email-trigger", "config": {}}
    workflow_id = await people.owner.create(status="active", nodes=[trigger, STEP])
    path = f"{WORKFLOWS}/{workflow_id}"
    await people.owner.api.put(f"{path}/status", json={"status": "paused"})
    mail = {"from": "mira@example.org", "subject": "Order"}
    for _ in range(2):
        assert (await people.owner.api.post(f"{path}/email-trigger", json=mail)).is_success
    moment = harness.gateway.clock() + timedelta(hours=1)
    owner = people.owner.user
    rows = [
        SystemDecision(
            id=ids.new_id("pruning"),
            organization_id=organization_id,
            shard=owner.shard,
            workflow_id=workflow_id,
            at=moment,
            action=AuditAction.EXECUTIONS_PRUNED.value,
            reason="retention",
            inputs={"executions": 7},
        )
        for organization_id in (owner.organization_id, people.stranger.user.organization_id)
    ]

    async def store(connection: AsyncConnection) -> None:
        await connection.execute(insert(SystemDecision), [row.model_dump() for row in rows])

    await harness.gateway.database.transaction(store)
    listed = (await people.owner.api.get(f"{path}/deliveries")).json()["deliveries"]
    deferred = [one for one in listed if one["outcome"] == "deferred"]
    assert deferred, listed

    found = await read_trail(people.admin, kind="decision")
    assert list_actions(found) == ["delivery.deferred"] * len(deferred) + ["executions.pruned"]
    assert {one["userId"] for one in found} == {"system"}
    assert {one["objectId"] for one in found} == {workflow_id}
    assert [one["reason"] for one in found] == ["workflow-paused"] * len(deferred) + ["retention"]
    assert {one["inputs"]["deliveryId"] for one in found[:-1]} == {one["id"] for one in deferred}
    assert found[-1]["inputs"] == {"executions": 7}
    assert all(set(entry) == FIELDS for entry in found)
    assert await read_trail(people.admin, kind="decision", userId="system") == found
    assert await read_trail(people.admin, kind="decision", action="executions.pruned") == found[-1:]
    assert await read_trail(people.admin, kind="all", action="delivery.deferred") == found[:-1]
    assert await read_trail(people.admin, kind="decision", objectId="wf_other") == []
    assert await read_trail(people.admin, kind="decision", reason="idle") == []
    assert "delivery.deferred" not in list_actions(await read_trail(people.admin))
    walked: list[str] = []
    cursor: str | None = "start"
    while cursor is not None:
        query = {"kind": "decision", "sort": "createdAt:asc", "limit": "1", "after": cursor}
        page = (await people.admin.api.get(AUDIT, params=query)).json()
        walked += [entry["id"] for entry in page["entries"]]
        cursor = page["next"]
    assert sorted(walked) == sorted(entry["id"] for entry in found)


@pytest.mark.every_database
async def test_executions_that_are_taken_back_from_lost_workers_are_decisions_of_the_system(
    harness: GatewayHarness, people: OrganizationUsers
) -> None:
    store, worker = harness.gateway.store, people.owner.user.id
    workflow_id = await people.owner.create(**GRAPH)
    execution_ids = set()
    for _ in range(3):
        answer = await people.owner.api.post(f"{WORKFLOWS}/{workflow_id}/execute", json={})
        assert answer.status_code == 201, answer.text
        execution_ids.add(answer.json()["executionId"])

    async def claim() -> None:
        """Claim all executions, as a worker that is lost then."""
        claimed: set[str] = set()
        while not execution_ids <= claimed:
            found = await store.claim(ClaimQuery(worker, lease_seconds=600.0, limit=50))
            assert found
            claimed |= {one.execution_id for one in found}

    await claim()
    expired = harness.gateway.clock() - timedelta(hours=1)
    ended = update(Execution).where(col(Execution.id).in_(execution_ids)).values(lease_until=expired)
    await harness.gateway.database.transaction(lambda connection: connection.execute(ended))
    assert (await store.sweep(1_000)).requeued >= 3
    await claim()
    assert await store.reclaim(worker) >= 3

    found = await read_trail(people.admin, kind="decision")
    assert list_actions(found) == ["execution.reclaimed"] * 6
    assert {(one["objectId"], one["userId"], one["reason"]) for one in found} == {
        (workflow_id, "system", "worker-lost")
    }
    assert all(set(entry) == FIELDS for entry in found)
    for part in (found[:3], found[3:]):
        assert {one["inputs"]["executionId"] for one in part} == execution_ids
    lease_ends = [datetime.fromisoformat(one["inputs"]["leaseEndedAt"]) for one in found]
    times = [datetime.fromisoformat(one["createdAt"]) for one in found]
    assert all(abs(one - expired) < timedelta(seconds=1) for one in lease_ends[:3])
    assert all(expired + timedelta(minutes=30) < one for one in (*lease_ends[3:], *times))
    assert await read_trail(people.admin, kind="all", action="execution.reclaimed") == found
    assert await read_trail(people.admin, kind="decision", userId="system", objectId=workflow_id) == found
    assert await read_trail(people.admin, kind="decision", until=found[0]["createdAt"]) == []
    for query in ({"objectId": "wf_other"}, {"reason": "idle"}, {"action": "executions.pruned"}):
        assert await read_trail(people.admin, kind="decision", **query) == []
    assert "execution.reclaimed" not in list_actions(await read_trail(people.admin))
    assert await read_trail(people.stranger, kind="decision") == []
    # All three of one time have a place of their own.
    for order in ("asc", "desc"):
        walked: list[str] = []
        cursor: str | None = "start"
        while cursor is not None:
            query = {"kind": "decision", "sort": f"createdAt:{order}", "limit": "2", "after": cursor}
            page = (await people.admin.api.get(AUDIT, params=query)).json()
            walked += [entry["id"] for entry in page["entries"]]
            cursor = page["next"]
        assert sorted(walked) == sorted({entry["id"] for entry in found})
        assert len(walked) == 6
    skipped = await read_trail(people.admin, kind="decision", limit="2", offset="3")
    assert [one["id"] for one in skipped] == [one["id"] for one in found[3:5]]
    page = await people.admin.api.get("/dashboard/audit?action=execution.reclaimed")
    assert page.status_code == 200, page.text
    assert all(page.text.count(one) >= 2 for one in execution_ids)


@pytest.mark.every_database
async def test_the_trail_is_filtered_by_every_column(
    harness: GatewayHarness, people: OrganizationUsers
) -> None:
    workflow_id = await people.owner.create(**GRAPH)
    answer = await people.admin.api.put(f"{WORKFLOWS}/{workflow_id}", json={"name": "New"})
    later = datetime.now(UTC) + timedelta(hours=1)
    moments = {later: LifecycleAction.START, later + timedelta(hours=1): LifecycleAction.STOP}
    await decide(harness, people.owner, workflow_id, moments)
    created, updated, started, stopped = await read_trail(people.admin, kind="all")
    for query, expected in (
        ({"requestId": answer.headers["X-Request-Id"]}, [updated]),
        ({"keyId": created["keyId"]}, [created]),
        ({"addressHash": created["addressHash"]}, [created, updated]),
        ({"reason": "idle"}, [stopped]),
        ({"action": "deployment.started"}, [started]),
        ({"userId": people.owner.user.id}, [created, started]),
        ({"userId": "system"}, [stopped]),
        ({"objectId": workflow_id, "since": started["createdAt"]}, [started, stopped]),
        ({"requestId": "req_of_others"}, []),
        ({"action": "key.created"}, []),
    ):
        assert await read_trail(people.admin, kind="all", **query) == expected, query
    assert await read_trail(people.admin, kind="change", reason="idle") == []
    for wrong in ("kind=everything", "reason=whim"):
        assert_refused(await people.admin.api.get(f"{AUDIT}?{wrong}"), 400, "invalid-query")


async def test_the_trail_is_for_admins_of_the_organisation_alone(
    harness: GatewayHarness, people: OrganizationUsers
) -> None:
    workflow_id = await people.owner.create()
    user = people.admin.user
    organization = Organization(
        id=user.organization_id, shard=user.shard, name="An organisation", created_at=user.created_at
    )
    limited = await harness.person(organization, UserRole.ADMIN, scopes=[KeyScope.WORKFLOWS_READ])
    for person in (people.owner, people.colleague):
        assert_refused(await person.api.get(AUDIT), 403, "admin-required")
    assert_refused(await limited.api.get(AUDIT), 403, "scope-required")
    assert_refused(await (await harness.client()).get(AUDIT), 401, "unauthorized")
    assert await read_trail(people.stranger) == await read_trail(people.stranger, objectId=workflow_id) == []
    assert list_actions(await read_trail(people.admin, objectId=workflow_id)) == ["workflow.created"]


async def test_the_audit_trail_cannot_be_changed(people: OrganizationUsers) -> None:
    await people.owner.create()
    (entry,) = before = await read_trail(people.admin)
    answers: list[httpx2.Response] = []
    for method in ("POST", "PUT", "PATCH", "DELETE"):
        assert_refused(await people.admin.api.request(method, AUDIT, json=entry), 405, "method-not-allowed")
        answers.append(await people.admin.api.request(method, f"{AUDIT}/{entry['id']}", json=entry))
    for answer in answers:
        assert_refused(answer, 404, "not-found")
    assert await read_trail(people.admin) == before
