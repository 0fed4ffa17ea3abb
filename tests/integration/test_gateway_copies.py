"""Duplicates, templates, exports and imports: included parts, excluded parts, and permissions."""

import json
from collections.abc import Awaitable, Callable
from typing import Any

import httpx2
import pytest
from sqlalchemy import select, update
from sqlalchemy.ext.asyncio import AsyncConnection
from sqlmodel import col

from gateway.workflows import shipped_templates
from models.audit import AuditEntry
from models.workflow import Workflow, WorkflowVersion
from tests.integration.gateway_harness import (
    EDGE,
    GRAPH,
    STEP,
    TRIGGER,
    GatewayHarness,
    OrganizationUsers,
    UserClient,
    assert_refused,
)

WORKFLOWS = "/api/v1/workflows"
SHIPPED = len(shipped_templates.load_templates())
"""Templates available to all organizations."""
CANARY = "canary-5f2b9c"
"""Marker that must not appear in an answer or in a row of a copy."""
SOURCE = {
    "id": "source",
    "nodeId": "mysql-source",
    "version": "1.2.0",
    "config": {"dataSource": "ds_001", "query": "SELECT 1", "parameters": ["{{ data.id }}"]},
    "inputMappings": {"id": "trigger.body.id"},
    "passThroughValues": {"token": "tokenId"},
    "retry": {"maxAttempts": 3, "backoff": 0.5},
    "timeout": 30,
}
OTHER_SOURCE = {
    "id": "other",
    "nodeId": "mysql-source",
    "config": {"dataSource": "ds_002", "query": "SELECT 2"},
}
THIRD_SOURCE = {
    "id": "third",
    "nodeId": "mysql-source",
    "config": {"dataSource": "ds_001", "query": "SELECT 3"},
}
MODEL = {"id": "model", "nodeId": "llm", "config": {"model": "model_001"}}
TOOL = {"id": "tool", "nodeId": "tool", "config": {"name": "t", "description": "Says it."}}
CALL = {
    "id": "call",
    "nodeId": "http-request",
    "label": f"Call with Bearer {CANARY}-0123456789",
    "config": {
        "url": f"https://user:{CANARY}@example.com/",
        "headers": {"Authorization": f"Bearer {CANARY}", "accept": "text/html", "x-user": "{{ data.token }}"},
        "body": {"items": [{"password": CANARY, "id": 1}]},
    },
    "inputMappings": {"apiKey": {"value": CANARY}, "token": "trigger.body.token"},
}
SECRETIVE: dict[str, Any] = {
    "nodes": [TRIGGER, CALL],
    "connections": [{"id": "edge", "sourceNodeId": "start", "targetNodeId": "call"}],
    "description": f"Calls a shop\nwith sk-{CANARY}-0123456789",
    "config": {"appId": "app_1", "clientSecret": CANARY, "webhookToken": CANARY},
    "settings": {"timeout": 60},
}
REMOVED = [
    {"nodeId": None, "path": "description"},
    {"nodeId": None, "path": "config.clientSecret"},
    {"nodeId": None, "path": "config.webhookToken"},
    {"nodeId": "call", "path": "label"},
    {"nodeId": "call", "path": "config.url"},
    {"nodeId": "call", "path": "config.headers.Authorization"},
    {"nodeId": "call", "path": "config.body.items.0.password"},
    {"nodeId": "call", "path": "inputMappings.apiKey.value"},
]
WHOLE: dict[str, Any] = {
    "name": "Orders, every day",
    "description": "Two\nlines",
    "tags": ["etl", "Å"],
    "nodes": [TRIGGER, SOURCE, OTHER_SOURCE, THIRD_SOURCE, MODEL, STEP],
    "connections": [
        {"id": f"edge-{target}", "sourceNodeId": "start", "targetNodeId": target}
        for target in ("source", "other", "third", "step")
    ],
    "config": {"appId": "app_1", "nested": {"b": 1, "a": [1, 2.5, None]}},
    "settings": {"timeout": 60, "maxRetries": 5},
}

EMPTY: dict[str, Any] = {"format": "pilotflame/workflow", "formatVersion": 1, "name": "Given"}


@pytest.fixture(scope="module")
async def residents(harness: GatewayHarness) -> OrganizationUsers:
    """Return users shared by all tests that only look at one answer."""
    return await harness.people()


async def post(person: UserClient, path: str, body: Any = None, **headers: str) -> httpx2.Response:  # noqa: ANN401 - JSON
    return await person.api.post(f"{WORKFLOWS}{path}", json=body, headers=headers)


async def copy_workflow(person: UserClient, path: str, body: Any = None) -> dict[str, Any]:  # noqa: ANN401 - any JSON value
    """Copy a workflow, and return the answer."""
    response = await post(person, path, body)
    assert response.status_code == 201, response.text
    answer: dict[str, Any] = response.json()
    return answer


async def create_template(people: OrganizationUsers, **fields: Any) -> str:  # noqa: ANN401 - any JSON value
    """Create a template from a workflow of the owner, and return its id."""
    workflow_id = await people.owner.create(**fields)
    answer = await copy_workflow(people.admin, f"/{workflow_id}/save-as-template", {})
    template_id: str = answer["workflowId"]
    return template_id


async def export_workflow(person: UserClient, workflow_id: str) -> dict[str, Any]:
    response = await person.api.get(f"{WORKFLOWS}/{workflow_id}/export")
    assert response.status_code == 200, response.text
    document: dict[str, Any] = response.json()
    return document


async def set_columns(harness: GatewayHarness, workflow_id: str, **values: Any) -> None:  # noqa: ANN401 - columns of any type
    async def work(connection: AsyncConnection) -> None:
        await connection.execute(update(Workflow).where(col(Workflow.id) == workflow_id).values(**values))

    await harness.gateway.database.transaction(work)


async def read_version_and_action(harness: GatewayHarness, workflow_id: str) -> tuple[WorkflowVersion, str]:
    """Return the only version of a workflow, and its first action in the audit trail."""
    versions = select(WorkflowVersion).where(col(WorkflowVersion.workflow_id) == workflow_id)
    entries = select(AuditEntry).where(col(AuditEntry.object_id) == workflow_id)
    async with harness.gateway.database.read() as connection:
        version = (await connection.execute(versions)).mappings().one()
        entry = (await connection.execute(entries)).mappings().one()
    assert entry["before_hash"] is None
    assert entry["after_hash"]
    return WorkflowVersion(**version), entry["action"]


# ── duplicates ──────────────────────────────────────────────────────────────────────────────────────────────


async def test_a_duplicate_is_a_draft_of_the_caller_s_with_the_same_content(
    harness: GatewayHarness, people: OrganizationUsers
) -> None:
    source_id = await people.owner.create(status="active", **GRAPH, tags=["a"], config={"appId": "app_1"})
    await set_columns(
        harness, source_id, is_public=True, is_template=True, version=7, scopes=["models:invoke:m"]
    )
    answer = await copy_workflow(people.colleague, f"/{source_id}/duplicate")
    assert answer["removedSecrets"] == []
    source = await people.owner.workflow(source_id)
    copy = await people.colleague.workflow(answer["workflowId"])
    alike = {"description", "tags", "nodes", "connections", "settings", "config", "scopes", "organizationId"}
    assert {field: copy[field] for field in alike} == {field: source[field] for field in alike}
    assert copy["id"] != source_id
    assert (copy["name"], copy["status"], copy["version"]) == ("A workflow (copy)", "draft", 1)
    assert (copy["ownerId"], copy["sharedWith"]) == (people.colleague.user.id, [])
    assert (copy["isPublic"], copy["isTemplate"]) == (False, False)
    version, action = await read_version_and_action(harness, copy["id"])
    assert (version.version, version.version_tag, version.created_by) == (
        1,
        "v1.0.0",
        people.colleague.user.id,
    )
    assert version.snapshot["name"] == "A workflow (copy)"
    assert action == "workflow.duplicated"


async def test_the_name_of_a_duplicate_is_never_too_long(residents: OrganizationUsers) -> None:
    source_id = await residents.owner.create(name="x" * 192 + " yz 1234")
    copy = await residents.owner.workflow(
        (await copy_workflow(residents.owner, f"/{source_id}/duplicate"))["workflowId"]
    )
    assert copy["name"] == "x" * 192 + " (copy)"


async def test_an_idempotency_key_makes_one_duplicate_of_each_workflow(people: OrganizationUsers) -> None:
    first_id, second_id = await people.owner.create(**SECRETIVE), await people.owner.create()
    key = {"Idempotency-Key": "once"}
    first, again = [await post(people.owner, f"/{first_id}/duplicate", **key) for _ in range(2)]
    other = await post(people.owner, f"/{second_id}/duplicate", **key)
    assert [answer.status_code for answer in (first, again, other)] == [201, 201, 201]
    assert first.json() == again.json()
    assert first.json()["removedSecrets"] == REMOVED
    assert again.headers["Idempotent-Replayed"] == "true"
    assert other.json()["workflowId"] != first.json()["workflowId"]


# ── excluded parts ──────────────────────────────────────────────────────────────────────────────────────────


async def test_credentials_never_come_along(harness: GatewayHarness, people: OrganizationUsers) -> None:
    source_id = await people.owner.create(**SECRETIVE)
    ways: dict[str, Callable[[], Awaitable[dict[str, Any]]]] = {
        "workflow.duplicated": lambda: copy_workflow(people.owner, f"/{source_id}/duplicate"),
        "template.saved": lambda: copy_workflow(people.admin, f"/{source_id}/save-as-template", {}),
        "template.used": lambda: copy_workflow(people.owner, "/from-template", {"templateId": source_id}),
    }
    for way, make in ways.items():
        if way == "template.used":
            await set_columns(harness, source_id, is_template=True)
        answer = await make()
        assert answer["removedSecrets"] == REMOVED, way
        copy = await people.admin.workflow(answer["workflowId"])
        version, action = await read_version_and_action(harness, answer["workflowId"])
        assert action == way
        assert CANARY not in json.dumps([copy, version.snapshot]), way
        assert (copy["description"], copy["nodes"][1]["label"]) == ("Calls a shop\nwith ", "")
        assert copy["config"] == {"appId": "app_1"}
        assert copy["nodes"][1]["config"] == {
            "headers": {"accept": "text/html", "x-user": "{{ data.token }}"},
            "body": {"items": [{"id": 1}]},
        }
        assert copy["nodes"][1]["inputMappings"] == {"apiKey": {}, "token": "trigger.body.token"}
    listed = await people.colleague.api.get(f"{WORKFLOWS}/templates")
    assert source_id in [one["id"] for one in listed.json()["templates"]]
    export = await people.owner.api.get(f"{WORKFLOWS}/{source_id}/export")
    assert export.json()["removedSecrets"] == REMOVED
    assert CANARY not in listed.text + export.text
    assert CANARY in json.dumps(await people.owner.workflow(source_id))


# ── templates ───────────────────────────────────────────────────────────────────────────────────────────────


async def test_templates_are_listed_for_everybody_in_the_organisation(people: OrganizationUsers) -> None:
    first_id = await create_template(
        people, name="First", description="Where to begin", tags=["starter"], **GRAPH
    )
    second_id = await create_template(people, name="Second")
    await people.owner.create(name="No template")
    body = (await people.colleague.api.get(f"{WORKFLOWS}/templates")).json()
    assert body["count"] == 2 + SHIPPED
    assert [one["id"] for one in body["templates"][:2]] == [second_id, first_id]
    first = body["templates"][1]
    whole = await people.colleague.workflow(first_id)
    fields = ("id", "name", "description", "tags", "nodes", "connections", "createdAt")
    assert first == {field: whole[field] for field in fields}
    assert (first["name"], first["description"], first["tags"]) == ("First", "Where to begin", ["starter"])
    part = (await people.colleague.api.get(f"{WORKFLOWS}/templates?limit=1&offset=1")).json()
    assert (part["count"], part["limit"], part["offset"]) == (2 + SHIPPED, 1, 1)
    assert [one["id"] for one in part["templates"]] == [first_id]
    assert (await people.stranger.api.get(f"{WORKFLOWS}/templates")).json()["count"] == SHIPPED
    assert_refused(await people.colleague.api.get(f"{WORKFLOWS}/templates?limit=0"), 400, "invalid-query")


async def test_a_deleted_template_is_gone(people: OrganizationUsers) -> None:
    template_id = await create_template(people, name="Gone")
    assert (await people.admin.api.delete(f"{WORKFLOWS}/{template_id}")).status_code == 204
    assert (await people.colleague.api.get(f"{WORKFLOWS}/templates")).json()["count"] == SHIPPED
    assert_refused(
        await post(people.colleague, "/from-template", {"templateId": template_id}), 404, "not-found"
    )


async def test_a_template_is_described_as_the_admin_says(people: OrganizationUsers) -> None:
    source_id = await people.owner.create(name="Mine", description="Private words", tags=["x"], **GRAPH)
    body = {"name": "For all", "description": "", "tags": ["starter"]}
    answer = await copy_workflow(people.admin, f"/{source_id}/save-as-template", body)
    shown = await people.colleague.workflow(answer["workflowId"])
    assert (shown["name"], shown["description"], shown["tags"]) == ("For all", "", ["starter"])
    assert (shown["isTemplate"], shown["status"], shown["ownerId"]) == (True, "draft", people.admin.user.id)
    assert (await people.owner.workflow(source_id))["isTemplate"] is False
    wrong = await post(people.admin, f"/{source_id}/save-as-template", {"name": "", "tags": ["", 1]})
    assert_refused(wrong, 422, "validation-failed")


async def test_only_admins_make_templates(residents: OrganizationUsers) -> None:
    source_id = await residents.owner.create(**GRAPH)
    assert_refused(await post(residents.owner, f"/{source_id}/save-as-template", {}), 403, "admin-required")
    for person in (residents.colleague, residents.stranger):
        assert_refused(await post(person, f"/{source_id}/save-as-template", {}), 404, "not-found")


async def test_everybody_begins_with_a_template(people: OrganizationUsers) -> None:
    template_id = await create_template(people, name="Start here", tags=["starter"], **GRAPH)
    plain = await copy_workflow(people.colleague, "/from-template", {"templateId": template_id})
    named = await copy_workflow(
        people.colleague, "/from-template", {"templateId": template_id, "name": "My own"}
    )
    whole = await people.colleague.workflow(plain["workflowId"])
    assert (whole["name"], whole["ownerId"]) == ("Start here", people.colleague.user.id)
    assert (whole["status"], whole["isTemplate"], whole["tags"]) == ("draft", False, ["starter"])
    assert whole["nodes"] == (await people.admin.workflow(template_id))["nodes"]
    assert (await people.colleague.workflow(named["workflowId"]))["name"] == "My own"


async def test_only_templates_of_the_organization_can_be_used(
    residents: OrganizationUsers,
) -> None:
    template_id, workflow_id = await create_template(residents), await residents.owner.create()
    for person, wanted in (
        (residents.stranger, template_id),
        (residents.owner, workflow_id),
        (residents.owner, "x y"),
    ):
        assert_refused(await post(person, "/from-template", {"templateId": wanted}), 404, "not-found")
    assert_refused(await post(residents.owner, "/from-template", {}), 422, "validation-failed")
    wrong = await post(residents.owner, "/from-template", {"templateId": template_id, "name": "x" * 201})
    assert_refused(wrong, 422, "validation-failed")


async def test_a_template_is_read_and_run_by_everybody_and_changed_by_its_owner(
    people: OrganizationUsers,
) -> None:
    template_id = await create_template(people, **GRAPH)
    run = await post(people.colleague, f"/{template_id}/execute", {})
    assert run.status_code == 201
    change = await people.colleague.api.put(f"{WORKFLOWS}/{template_id}", json={"name": "Mine"})
    assert_refused(change, 403, "not-owner")
    assert_refused(await people.stranger.api.get(f"{WORKFLOWS}/{template_id}"), 404, "not-found")
    assert_refused(await post(people.stranger, f"/{template_id}/execute", {}), 404, "not-found")


# ── exports ─────────────────────────────────────────────────────────────────────────────────────────────────


async def test_an_export_holds_the_content_and_nothing_of_the_organisation(people: OrganizationUsers) -> None:
    workflow_id = await people.owner.create(**WHOLE)
    response = await people.owner.api.get(f"{WORKFLOWS}/{workflow_id}/export")
    again = await people.owner.api.get(f"{WORKFLOWS}/{workflow_id}/export")
    assert response.content == again.content
    assert response.headers["Content-Disposition"] == 'attachment; filename="workflow-orders-every-day.json"'
    assert response.headers["ETag"] == '"1"'
    document, whole = response.json(), await people.owner.workflow(workflow_id)
    content = ("name", "description", "tags", "settings", "config", "nodes", "connections")
    assert document == {
        "format": "pilotflame/workflow",
        "formatVersion": 1,
        **{field: whole[field] for field in content},
        "references": [
            {
                "kind": "datasources",
                "id": "ds_001",
                "usedBy": [
                    {"nodeId": "source", "path": "dataSource"},
                    {"nodeId": "third", "path": "dataSource"},
                ],
            },
            {"kind": "datasources", "id": "ds_002", "usedBy": [{"nodeId": "other", "path": "dataSource"}]},
            {"kind": "models", "id": "model_001", "usedBy": [{"nodeId": "model", "path": "model"}]},
        ],
        "removedSecrets": [],
    }
    for private in (workflow_id, people.owner.user.id, people.owner.user.organization_id):
        assert private not in response.text


@pytest.mark.parametrize(
    ("name", "file_name"),
    [
        ('"; filename="evil.exe', "workflow-filename-evil-exe.json"),
        ("../../etc/passwd", "workflow-etc-passwd.json"),
        ("日本", "workflow.json"),
        ("x" * 200, f"workflow-{'x' * 60}.json"),
    ],
)
async def test_a_file_name_is_safe_for_any_workflow_name(
    residents: OrganizationUsers, name: str, file_name: str
) -> None:
    workflow_id = await residents.owner.create(name=name)
    response = await residents.owner.api.get(f"{WORKFLOWS}/{workflow_id}/export")
    assert response.headers["Content-Disposition"] == f'attachment; filename="{file_name}"'


@pytest.mark.parametrize("operation", ["GET export", "POST duplicate"])
async def test_unreadable_workflows_cannot_be_copied(residents: OrganizationUsers, operation: str) -> None:
    method, name = operation.split()
    workflow_id = await residents.owner.create(**GRAPH)
    for person in (residents.colleague, residents.stranger):
        assert_refused(
            await person.api.request(method, f"{WORKFLOWS}/{workflow_id}/{name}"), 404, "not-found"
        )


# ── imports ─────────────────────────────────────────────────────────────────────────────────────────────────


async def test_an_import_first_lists_references_to_resolve(people: OrganizationUsers) -> None:
    whole = {**WHOLE, "nodes": [*WHOLE["nodes"], TOOL]}
    document = await export_workflow(people.owner, await people.owner.create(**whole))
    before = (await people.stranger.api.get(WORKFLOWS)).json()["count"]
    response = await post(people.stranger, "/import", {"document": document})
    assert response.status_code == 200
    plan = response.json()
    assert (plan["created"], plan["name"]) == (False, "Orders, every day")
    assert (plan["nodeCount"], plan["connectionCount"]) == (7, 4)
    assert plan["references"] == document["references"]
    assert plan["findings"]["errors"] == []
    warnings = {(finding["type"], finding["nodeId"]) for finding in plan["findings"]["warnings"]}
    assert ("not-runnable", "tool") in warnings
    assert "workflowId" not in plan
    assert (await people.stranger.api.get(WORKFLOWS)).json()["count"] == before


async def test_an_import_then_creates_a_draft_with_resolved_references(
    harness: GatewayHarness, people: OrganizationUsers
) -> None:
    document = await export_workflow(people.owner, await people.owner.create(**WHOLE))
    references = {"ds_001": "ds_9", "ds_002": None, "model_001": "model_9"}
    body = {"document": document, "references": references, "name": "From elsewhere"}
    answer = await copy_workflow(people.stranger, "/import", body)
    assert answer["created"] is True
    whole = await people.stranger.workflow(answer["workflowId"])
    assert (whole["name"], whole["status"], whole["version"]) == ("From elsewhere", "draft", 1)
    assert (whole["ownerId"], whole["isPublic"]) == (people.stranger.user.id, False)
    configs = {node["id"]: node["config"] for node in whole["nodes"]}
    assert configs["source"] == {"dataSource": "ds_9", "query": "SELECT 1", "parameters": ["{{ data.id }}"]}
    assert configs["other"] == {"query": "SELECT 2"}
    assert configs["third"]["dataSource"] == "ds_9"
    assert configs["model"] == {"model": "model_9"}
    missing = [one["nodeId"] for one in answer["findings"]["warnings"] if one["type"] == "missing-config"]
    assert missing == ["other"]
    _, action = await read_version_and_action(harness, answer["workflowId"])
    assert action == "workflow.imported"


@pytest.mark.parametrize(
    "fields",
    [
        WHOLE,
        {"name": "Bare"},
        {"nodes": [STEP], "description": " \t\n", "settings": {"maxRetries": 0, "retryOnFailure": True}},
        {"nodes": [{"nodeId": "set"}, {"nodeId": "set", "position": {"x": 1.5, "y": -0.0}, "retry": {}}]},
    ],
    ids=["whole", "bare", "broken draft", "defaults"],
)
async def test_an_imported_document_is_exported_unchanged(
    residents: OrganizationUsers, fields: dict[str, Any]
) -> None:
    document = await export_workflow(residents.owner, await residents.owner.create(**fields))
    references = {reference["id"]: reference["id"] for reference in document["references"]}
    answer = await copy_workflow(
        residents.stranger, "/import", {"document": document, "references": references}
    )
    again = await export_workflow(residents.stranger, answer["workflowId"])
    assert json.dumps(again) == json.dumps(document)


async def test_an_idempotency_key_imports_once(people: OrganizationUsers) -> None:
    document = await export_workflow(people.owner, await people.owner.create(**GRAPH))
    body, key = {"document": document, "references": {}}, {"Idempotency-Key": "once"}
    planned = await post(people.owner, "/import", {"document": document}, **key)
    assert planned.status_code == 200
    first, again = [await post(people.owner, "/import", body, **key) for _ in range(2)]
    assert first.json() == again.json()
    assert again.headers["Idempotent-Replayed"] == "true"
    other = await post(people.owner, "/import", {**body, "name": "Another"}, **key)
    assert_refused(other, 422, "idempotency-mismatch")


async def test_every_reference_has_to_be_resolved(residents: OrganizationUsers) -> None:
    document = await export_workflow(residents.owner, await residents.owner.create(**WHOLE))
    references = {"ds_001": "no id!", "ds_2": "ds_9"}
    response = await post(residents.owner, "/import", {"document": document, "references": references})
    assert_refused(response, 422, "validation-failed")
    assert {(one["path"], one["code"]) for one in response.json()["error"]["details"]} == {
        ("references.ds_001", "invalid-id"),
        ("references.ds_002", "unresolved-reference"),
        ("references.model_001", "unresolved-reference"),
        ("references.ds_2", "unknown-reference"),
    }


async def test_credentials_in_a_document_are_kept_and_warned_of(residents: OrganizationUsers) -> None:
    # A finding calls a node by its label.
    document = {**EMPTY, **SECRETIVE, "nodes": [TRIGGER, {**CALL, "label": "Call"}]}
    answer = await copy_workflow(residents.owner, "/import", {"document": document, "references": {}})
    warned = [one for one in answer["findings"]["warnings"] if one["type"] == "inline-secret"]
    assert [one.get("nodeId") for one in warned] == ["call", None, None, None]
    assert CANARY not in json.dumps(answer)
    whole = await residents.owner.workflow(answer["workflowId"])
    assert whole["config"]["clientSecret"] == CANARY
    assert whole["nodes"][1]["config"]["headers"]["Authorization"] == f"Bearer {CANARY}"


@pytest.mark.parametrize(
    ("fields", "path", "code", "word"),
    [
        ({"format": "n8n"}, "document.format", "unknown-format", "pilotflame/workflow"),
        ({"format": None}, "document.format", "unknown-format", "pilotflame/workflow"),
        ({"formatVersion": 2}, "document.formatVersion", "unknown-format-version", "must be 1"),
        ({"formatVersion": True}, "document.formatVersion", "unknown-format-version", "must be 1"),
        ({"formatVersion": "1"}, "document.formatVersion", "unknown-format-version", "must be 1"),
    ],
)
async def test_documents_of_another_format_are_refused(
    residents: OrganizationUsers, fields: dict[str, Any], path: str, code: str, word: str
) -> None:
    document = {**EMPTY, "nodes": 7, **fields}
    response = await post(residents.owner, "/import", {"document": document})
    assert_refused(response, 422, "validation-failed")
    assert [(one["path"], one["code"]) for one in response.json()["error"]["details"]] == [(path, code)]
    assert word in response.json()["error"]["message"]


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        (
            {
                "nodes": [TRIGGER, {**STEP, "id": "start"}, {**STEP, "nodeId": "nothing"}],
                "connections": [EDGE] * 2,
            },
            {"document.nodes.1.id": "duplicate-node-id", "document.nodes.2.nodeId": "unknown-node-type"},
        ),
        (
            {
                "nodes": [TRIGGER],
                "connections": [
                    {"id": "a", "sourceNodeId": "start", "targetNodeId": "nobody"},
                    {"id": "a", "source": "nobody", "target": "start"},
                    {"sourceNodeId": "start"},
                ],
            },
            {
                "document.connections.0.targetNodeId": "broken-connection",
                "document.connections.1.id": "broken-connection",
                "document.connections.1.sourceNodeId": "broken-connection",
                "document.connections.2.targetNodeId": "required",
            },
        ),
        (
            {
                "organizationId": "org_1",
                "ownerId": "user_1",
                "id": "wf_1",
                "isPublic": True,
                "nodes": [{"id": 7}],
            },
            {
                "document.organizationId": "unknown-field",
                "document.ownerId": "unknown-field",
                "document.id": "unknown-field",
                "document.isPublic": "unknown-field",
                "document.nodes.0.id": "invalid-type",
            },
        ),
        (
            {"name": "", "tags": ["x" * 65], "settings": {"timeout": -1}, "config": {"x": "y" * 20_001}},
            {
                "document.name": "required",
                "document.tags.0": "too-long",
                "document.settings.timeout": "invalid-value",
                "document.config": "too-large",
            },
        ),
        ({"nodes": [{"nodeId": "set"}] * 10_001}, {"document.nodes": "invalid-value"}),
        ({"nodes": {}, "config": []}, {"document.nodes": "invalid-type", "document.config": "invalid-type"}),
    ],
    ids=["nodes", "connections", "ids of others", "fields", "too many", "types"],
)
async def test_all_that_is_wrong_with_a_document_is_told_at_once(
    residents: OrganizationUsers, fields: dict[str, Any], expected: dict[str, str]
) -> None:
    document = {**EMPTY, **fields}
    response = await post(residents.owner, "/import", {"document": document, "references": {}})
    assert_refused(response, 422, "validation-failed")
    assert {one["path"]: one["code"] for one in response.json()["error"]["details"]} == expected


@pytest.mark.parametrize(
    "body",
    [
        {},
        [],
        {"document": []},
        {"document": None},
        {"document": EMPTY, "references": []},
        {"document": EMPTY, "references": {"a": 1}},
        {"document": EMPTY, "references": "ds_1"},
    ],
)
async def test_a_malformed_import_is_refused(residents: OrganizationUsers, body: Any) -> None:  # noqa: ANN401 - any JSON value
    assert_refused(await post(residents.owner, "/import", body), 422, "validation-failed")


async def test_a_document_may_be_as_large_as_any_body(residents: OrganizationUsers) -> None:
    huge = {"document": {**EMPTY, "description": "x" * 1_000_001}}
    assert_refused(await post(residents.owner, "/import", huge), 413, "payload-too-large")


async def test_copies_are_strict_unless_the_original_says_otherwise(people: OrganizationUsers) -> None:
    async def strictness(path: str, body: Any = None) -> Any:  # noqa: ANN401 - any JSON value
        workflow = await people.owner.workflow((await copy_workflow(people.owner, path, body))["workflowId"])
        return workflow["settings"].get("strictMappings")

    source_id = await people.owner.create()
    for stored, copied in ((None, True), (False, False)):
        await people.owner.api.put(f"{WORKFLOWS}/{source_id}", json={"settings": {"strictMappings": stored}})
        document = (await people.owner.api.get(f"{WORKFLOWS}/{source_id}/export")).json()
        template_id = (await copy_workflow(people.admin, f"/{source_id}/save-as-template", {}))["workflowId"]
        assert await strictness("/import", {"document": document, "references": {}}) is copied
        assert await strictness(f"/{source_id}/duplicate") is copied
        assert await strictness("/from-template", {"templateId": template_id}) is copied
    assert await strictness("/from-template", {"templateId": "wf_tmpl_csv-report"}) is True
