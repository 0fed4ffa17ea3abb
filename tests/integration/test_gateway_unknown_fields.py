"""Unknown fields, unknown parameters and read-only fields: refused, listed in warnings, or ignored if
unchanged.
"""

from typing import Any

import httpx2
import pytest
from sqlalchemy import select, update
from sqlalchemy.ext.asyncio import AsyncConnection
from sqlmodel import col

from gateway import routes
from gateway.http.limits import SETTINGS_BYTES
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
SOURCE = {
    "name": "Store",
    "type": "postgresql",
    "settings": {"host": "db.example.com", "database": "d", "user": "u"},
    "secrets": {"password": "p"},
}
MODELS = "/api/v1/ai/models"
AI_SETTINGS = "/api/v1/ai/settings"
PROVIDER = {"name": "Models", "type": "ai-provider", "settings": {"baseUrl": "https://api.example.com/v1"}}
MODEL = {"name": "Small", "vendorModelId": "small-1", "price": {"input": "0.25", "output": "2"}}
SCHEDULE: dict[str, Any] = {
    "timezone": "Europe/Berlin",
    "windows": [{"days": [1], "startTime": "09:00", "endTime": "17:00"}],
}


def unknown_field_errors(response: httpx2.Response) -> list[dict[str, str]]:
    """Return the entries of a refusal."""
    assert_refused(response, 422, "validation-failed")
    found: list[dict[str, str]] = response.json()["error"]["details"]
    return found


@pytest.mark.parametrize(
    ("method", "path", "body", "wrong", "meant"),
    [
        ("POST", "/execute", {"triggerInput": {}}, "triggerInput", "triggerInputs"),
        ("POST", "/trigger", {"triggertype": "x"}, "triggertype", "trigger_type"),
        ("POST", "/enqueue", {"message": {}, "priorty": 1}, "priorty", "priority"),
        ("PUT", "", {"nodes": [TRIGGER, {**STEP, "retries": 3}]}, "nodes.1.retries", "retry"),
        ("PUT", "", {"settings": {"retries": 3}}, "settings.retries", "maxRetries"),
        ("PUT", "", {"settings": {"color": "red"}}, "settings.color", "timeout"),
        (
            "PUT",
            "",
            {"settings": {"concurrency": {"limit": 1, "onlimit": "queue"}}},
            "settings.concurrency.onlimit",
            "onLimit",
        ),
        ("POST", "/nodes", {"nodeId": "set", "inputMapping": {}}, "inputMapping", "inputMappings"),
        (
            "PUT",
            "/nodes/step",
            {"config": {}, "retry": {"max_attempts": 3}},
            "retry.max_attempts",
            "maxAttempts",
        ),
        ("POST", "/connections", {**EDGE, "sourcePrt": "output"}, "sourcePrt", "sourcePort"),
        (
            "POST",
            "/execute",
            {"definition": {"nodes": [], "connection": []}},
            "definition.connection",
            "connections",
        ),
        ("POST", "/nodes/step/test", {"inputs": {}}, "inputs", "input"),
        ("POST", "/nodes/step/test", {"color": "red"}, "color", "input"),
        ("POST", "/versions", {"versionTag": "v1", "descripton": "d"}, "descripton", "description"),
    ],
)
async def test_a_misspelt_field_is_refused_with_the_one_that_was_meant(
    people: OrganizationUsers,
    method: str,
    path: str,
    body: Any,  # noqa: ANN401 - any JSON value
    wrong: str,
    meant: str,
) -> None:
    workflow_id = await people.owner.create(**GRAPH)
    before = await people.owner.workflow(workflow_id)
    response = await people.owner.api.request(method, f"{WORKFLOWS}/{workflow_id}{path}", json=body)
    (one,) = unknown_field_errors(response)
    assert (one["path"], one["code"]) == (wrong, "unknown-field")
    assert meant in one["message"]
    assert await people.owner.workflow(workflow_id) == before


async def test_other_unknown_fields_of_the_contract_are_told_of_once_each(people: OrganizationUsers) -> None:
    nodes = [{**TRIGGER, "selected": True}, {**STEP, "selected": False}]
    body = {"name": "Drawn", "canvasZoom": 2, **GRAPH, "nodes": nodes}
    response = await people.owner.api.post(WORKFLOWS, json=body, headers={"Idempotency-Key": "drawn"})
    assert response.status_code == 201
    assert {(one["path"], one["code"]) for one in response.json()["warnings"]} == {
        ("canvasZoom", "unknown-field"),
        ("nodes.0.selected", "unknown-field"),
    }
    assert int(response.headers["content-length"]) == len(response.content)
    again = await people.owner.api.post(WORKFLOWS, json=body, headers={"Idempotency-Key": "drawn"})
    assert again.json() == response.json()
    many = {"name": "Many", **{f"q{number}": 1 for number in range(5_000)}}
    error = unknown_field_errors(await people.owner.api.post(WORKFLOWS, json=many))
    assert len(error) == 100


async def test_bodies_that_the_contract_leaves_to_senders_take_any_field(people: OrganizationUsers) -> None:
    start = {**TRIGGER, "nodeId": "queue-trigger"}
    workflow_id = await people.owner.create(nodes=[start, STEP], connections=[EDGE])
    path = f"{WORKFLOWS}/{workflow_id}"
    assert (await people.owner.api.put(f"{path}/status", json={"status": "active"})).status_code == 200
    for sent in ({"mesage": {"a": 1}, "priorty": 2}, {"title": "x"}):
        response = await people.owner.api.post(f"{path}/enqueue", json=sent)
        assert response.status_code == 201
        assert "warnings" not in response.json()
    configured = await people.owner.api.put(f"{path}/nodes/step", json={"values": {"colour": "red"}})
    assert configured.json()["node"]["config"]["values"]["colour"] == "red"
    kept = await people.owner.api.put(path, json={"config": {"anything": {"goes": 1}}})
    assert kept.json()["config"]["anything"] == {"goes": 1}


async def test_inputs_have_two_names_of_which_one_is_given(people: OrganizationUsers) -> None:
    workflow_id = await people.owner.create(**GRAPH)
    path = f"{WORKFLOWS}/{workflow_id}/execute"
    assert (await people.owner.api.post(path, json={"inputs": {"a": 1}})).status_code == 201
    both = {"inputs": {"a": 1}, "triggerInputs": {"a": 1}}
    assert unknown_field_errors(await people.owner.api.post(path, json=both))[0]["code"] == "ambiguous"


@pytest.mark.parametrize("query", ["limt=3", "Limit=3", "colour=red", "limt", "limit=3&x="])
async def test_an_unknown_parameter_is_refused(people: OrganizationUsers, query: str) -> None:
    response = await people.owner.api.get(f"{WORKFLOWS}?{query}")
    assert_refused(response, 400, "invalid-query")
    assert response.json()["error"]["details"][0]["code"] == "unknown-parameter"


# ── results of GET, sent back ───────────────────────────────────────────────────────────────────────────────


async def test_a_workflow_is_taken_as_it_is_shown(people: OrganizationUsers) -> None:
    nodes = [TRIGGER, {**STEP, "retry": {"maxAttempts": 2}, "timeout": 5, "atMostOnce": True}]
    workflow_id = await people.owner.create(
        nodes=nodes, connections=[EDGE], tags=["a"], config={"k": 1}, settings={"concurrency": {"limit": 2}}
    )
    await people.owner.api.post(f"{WORKFLOWS}/{workflow_id}/share", json={"userId": people.colleague.user.id})
    shown = await people.owner.workflow(workflow_id)
    path = f"{WORKFLOWS}/{workflow_id}"
    stale = {**shown, "updatedAt": "2020-01-01T00:00:00Z"}
    for body in (shown, stale):
        response = await people.owner.api.put(path, json=body)
        assert (response.status_code, response.json()) == (200, shown)
    for name, value, route in (
        ("status", "active", "PUT /api/v1/workflows/:id/status"),
        ("isPublic", True, "PUT /api/v1/workflows/:id/visibility"),
        ("sharedWith", [], "POST /api/v1/workflows/:id/share"),
        ("ownerId", "user_other", "the server"),
    ):
        response = await people.owner.api.put(path, json={**shown, name: value, "name": "Changed"})
        (problem,) = unknown_field_errors(response)
        assert (problem["path"], problem["code"]) == (name, "read-only")
        assert route in problem["message"]
    assert await people.owner.workflow(workflow_id) == shown


async def test_a_shown_workflow_is_accepted_as_a_new_one(people: OrganizationUsers) -> None:
    shown = await people.owner.workflow(await people.owner.create(**GRAPH))
    response = await people.owner.api.post(WORKFLOWS, json=shown)
    assert response.status_code == 201
    assert {one["code"] for one in response.json()["warnings"]} == {"read-only"}
    copy = await people.owner.workflow(response.json()["workflowId"])
    assert copy["nodes"] == shown["nodes"]
    public = await people.owner.api.post(WORKFLOWS, json={"name": "Public", "isPublic": True})
    assert unknown_field_errors(public)[0]["path"] == "isPublic"


async def test_a_node_is_taken_as_it_is_shown(people: OrganizationUsers) -> None:
    workflow_id = await people.owner.create(
        nodes=[TRIGGER, {**STEP, "inputMappings": {"a": "data.a"}, "retry": {"maxAttempts": 2}}],
        connections=[EDGE],
    )
    before = await people.owner.workflow(workflow_id)
    path = f"{WORKFLOWS}/{workflow_id}/nodes"
    listed = (await people.owner.api.get(path)).json()["nodes"][1]
    whole = (await people.owner.api.put(f"{path}/step", json={"label": "Step"})).json()["node"]
    for body in (listed, whole, before["nodes"][1]):
        response = await people.owner.api.put(f"{path}/step", json=body)
        assert (response.status_code, response.json()["node"]) == (200, whole)
    assert await people.owner.workflow(workflow_id) == before
    other = await people.owner.api.put(f"{path}/step", json={**whole, "inputMappings": {}})
    assert "/input-mappings" in unknown_field_errors(other)[0]["message"]
    again = {**listed, "id": "another"}
    assert (await people.owner.api.post(path, json=again)).status_code == 201


async def test_a_connection_is_taken_as_it_is_shown(people: OrganizationUsers) -> None:
    workflow_id = await people.owner.create(**GRAPH)
    path = f"{WORKFLOWS}/{workflow_id}/connections"
    shown = (await people.owner.workflow(workflow_id))["connections"][0]
    assert (await people.owner.api.delete(f"{path}/{shown['id']}")).status_code == 200
    made = await people.owner.api.post(path, json=shown)
    assert made.status_code == 201
    assert (await people.owner.workflow(workflow_id))["connections"] == [shown]
    assert (await people.owner.api.delete(f"{path}/{shown['id']}")).status_code == 200
    assert (await people.owner.api.post(path, json=made.json()["connection"])).status_code == 201


async def test_a_data_source_is_taken_as_it_is_shown(people: OrganizationUsers) -> None:
    made = await people.owner.api.post("/api/v1/datasources", json=SOURCE)
    path = f"/api/v1/datasources/{made.json()['dataSourceId']}"
    shown = (await people.owner.api.get(path)).json()
    assert (await people.owner.api.put(path, json=shown)).json() == shown
    for name, value in (("type", "mysql"), ("isPublic", True), ("secretNames", [])):
        error = unknown_field_errors(await people.owner.api.put(path, json={**shown, name: value}))
        assert [(one["path"], one["code"]) for one in error] == [(name, "read-only")]
    for name in ("secret", "colour"):
        error = unknown_field_errors(await people.owner.api.put(path, json={name: {}}))
        assert [(one["path"], one["code"]) for one in error] == [(name, "unknown-field")]
    copy = {**shown, "name": "Another", "secrets": SOURCE["secrets"]}
    assert (await people.owner.api.post("/api/v1/datasources", json=copy)).status_code == 201


@pytest.mark.parametrize(
    "policy",
    [
        {"type": "always-on"},
        {"type": "idle-shutdown", "idleTimeoutMinutes": 12},
        {"type": "scheduled-window", "schedule": SCHEDULE},
    ],
)
async def test_a_policy_is_taken_as_it_is_shown(people: OrganizationUsers, policy: dict[str, Any]) -> None:
    path = f"{WORKFLOWS}/{await people.owner.create(**GRAPH)}/lifecycle"
    assert (await people.owner.api.put(path, json=policy)).status_code == 200
    shown = (await people.owner.api.get(path)).json()
    for body in (shown, shown["lifecyclePolicy"]):
        assert (await people.owner.api.put(path, json=body)).status_code == 200
        assert (await people.owner.api.get(path)).json() == shown
    other = await people.owner.api.put(path, json={**shown, "deploymentStatus": "running"})
    assert unknown_field_errors(other)[0]["code"] == "read-only"
    misspelt = {**shown, "lifecyclePolicy": {**policy, "typ": 1}}
    error = unknown_field_errors(await people.owner.api.put(path, json=misspelt))
    assert error[0]["path"] == "lifecyclePolicy.typ"


async def test_a_trigger_may_be_named_by_its_kind(people: OrganizationUsers) -> None:
    workflow_id = await people.owner.create(nodes=[{**TRIGGER, "nodeId": "queue"}, STEP], connections=[EDGE])
    start = (await people.owner.workflow(workflow_id))["nodes"][0]
    assert (start["nodeId"], start["type"]) == ("queue-trigger", "queue-trigger")


async def test_a_version_is_taken_as_another_is_shown(people: OrganizationUsers) -> None:
    path = f"{WORKFLOWS}/{await people.owner.create(**GRAPH)}/versions"
    assert (await people.owner.api.post(path, json={"versionTag": "v2", "description": "d"})).is_success
    shown = (await people.owner.api.get(f"{path}/2")).json()
    response = await people.owner.api.post(path, json={**shown, "versionTag": "v3"})
    assert response.status_code == 201
    assert {one["code"] for one in response.json()["warnings"]} == {"read-only"}
    assert (await people.owner.api.get(f"{path}/3")).json()["description"] == "d"


# ── every resource ──────────────────────────────────────────────────────────────────────────────────────────


async def create_model(person: UserClient) -> str:
    """Create a model with a price, and its provider; return the model's id."""
    provider = await person.api.post("/api/v1/datasources", json=PROVIDER)
    body = {**MODEL, "dataSourceId": provider.json()["dataSourceId"]}
    model_id: str = (await person.api.post(MODELS, json=body)).json()["modelId"]
    return model_id


@pytest.mark.every_database
async def test_every_resource_is_taken_as_it_is_shown(people: OrganizationUsers) -> None:
    api = people.admin.api
    step = {**STEP, "inputMappings": {"a": "data.a"}, "passThroughValues": {"b": "b"}}
    workflow = f"{WORKFLOWS}/{await people.admin.create(nodes=[TRIGGER, step], connections=[EDGE])}"
    node = f"{workflow}/nodes/step"
    made = await api.post("/api/v1/datasources", json={**SOURCE, "name": "Of the walk"})
    source = f"/api/v1/datasources/{made.json()['dataSourceId']}"
    model = f"{MODELS}/{await create_model(people.admin)}"
    provider_key = f"/api/v1/ai/provider-keys/{(await api.get(model)).json()['dataSourceId']}"
    tools = {"name": "Tools", "url": "https://tools.example.com/mcp"}
    made = await api.post("/api/v1/ai/tool-servers", json=tools)
    tool_server = f"/api/v1/ai/tool-servers/{made.json()['dataSourceId']}"
    for path in (workflow, source):
        share = {"userId": people.colleague.user.id}
        assert (await api.post(f"{path}/share", json=share)).is_success
    mappings = await api.put(f"{node}/input-mappings", json={"mappings": {"a": "data.a"}})
    pass_through = await api.put(f"{node}/passthrough-values", json={"values": {"b": "b"}})
    lifecycle = await api.put(f"{workflow}/lifecycle", json={"type": "always-on"})
    log_level = await api.put(f"{workflow}/log-level", json={"level": "debug"})
    await api.put(AI_SETTINGS, json={"monthBudget": {"maxCost": "10", "onLimit": "wait"}})

    async def shown() -> dict[str, list[Any]]:
        """Return the objects that answers show for the PUT of each path, as lists of bodies."""
        whole = (await api.get(workflow)).json()
        data_source = (await api.get(source)).json()
        return {
            workflow: [whole],
            f"{workflow}/status": [(await api.get(f"{workflow}/status")).json()],
            f"{workflow}/visibility": [whole],
            f"{workflow}/lifecycle": [(await api.get(f"{workflow}/lifecycle")).json(), lifecycle.json()],
            f"{workflow}/log-level": [(await api.get(f"{workflow}/log-level")).json(), log_level.json()],
            node: [(await api.get(f"{workflow}/nodes")).json()["nodes"][1], whole["nodes"][1]],
            f"{node}/input-mappings": [mappings.json()],
            f"{node}/passthrough-values": [pass_through.json()],
            source: [data_source],
            f"{source}/visibility": [data_source],
            model: [(await api.get(model)).json()],
            f"{model}/permissions": [(await api.get(f"{model}/permissions")).json()],
            provider_key: [(await api.get(provider_key)).json()],
            tool_server: [(await api.get(tool_server)).json()],
            AI_SETTINGS: [(await api.get(AI_SETTINGS)).json()],
        }

    before = await shown()
    templates = {
        workflow: f"{WORKFLOWS}/{{id}}",
        source: "/api/v1/datasources/{id}",
        model: f"{MODELS}/{{id}}",
        provider_key: "/api/v1/ai/provider-keys/{id}",
        tool_server: "/api/v1/ai/tool-servers/{id}",
        "/nodes/step": "/nodes/{sub}",
    }
    named = set(before)
    for actual, template in templates.items():
        named = {path.replace(actual, template) for path in named}
    # The output of a task has no type, since it is any JSON.
    assert named == {line.path for line in routes.TABLE if line.method == "PUT" and line.body is not None}
    for path, bodies in before.items():
        for body in bodies:
            response = await api.put(path, json=body)
            assert response.is_success, f"{path}: {response.text}"
            assert "unknown-field" not in response.text, path
            assert await shown() == before, path


@pytest.mark.parametrize(
    ("path", "written", "name", "value"),
    [
        ("{workflow}/visibility", {"isPublic": False}, "name", "Another"),
        ("{workflow}/nodes/step/input-mappings", {"mappings": {}}, "nodeId", "another"),
        ("{workflow}/nodes/step/passthrough-values", {"values": {}}, "workflowId", "wf_another"),
        ("{source}/visibility", {"isPublic": False}, "settings", {}),
    ],
)
async def test_read_only_fields_that_differ_are_refused(
    people: OrganizationUsers,
    path: str,
    written: dict[str, Any],
    name: str,
    value: Any,  # noqa: ANN401 - any JSON value
) -> None:
    workflow = f"{WORKFLOWS}/{await people.owner.create(**GRAPH)}"
    made = await people.owner.api.post("/api/v1/datasources", json=SOURCE)
    source = f"/api/v1/datasources/{made.json()['dataSourceId']}"
    response = await people.owner.api.put(
        path.format(workflow=workflow, source=source), json={**written, name: value}
    )
    assert [(one["path"], one["code"]) for one in unknown_field_errors(response)] == [(name, "read-only")]


@pytest.mark.parametrize(
    ("path", "name", "other"),
    [("input-mappings", "mappings", "inputMappings"), ("passthrough-values", "values", "passThroughValues")],
)
async def test_mappings_have_two_names_of_which_one_is_given(
    people: OrganizationUsers, path: str, name: str, other: str
) -> None:
    path = f"{WORKFLOWS}/{await people.owner.create(**GRAPH)}/nodes/step/{path}"
    given = {"a": "data.b"}
    by_other = await people.owner.api.put(path, json={other: given})
    assert by_other.json()[other] == given
    both = await people.owner.api.put(path, json={name: {}, other: given})
    assert [(one["path"], one["code"]) for one in unknown_field_errors(both)] == [(other, "ambiguous")]
    neither = await people.owner.api.put(path, json={})
    assert [(one["path"], one["code"]) for one in unknown_field_errors(neither)] == [(name, "required")]


async def test_keys_users_and_event_tokens_are_made_like_those_that_are_shown(
    people: OrganizationUsers,
) -> None:
    api = people.admin.api
    key = (await api.post("/api/v1/auth/keys", json={"name": "One", "expiresInSeconds": 600})).json()
    another = await api.post("/api/v1/auth/keys", json=key)
    assert another.status_code == 201, another.text
    ignored = {one["path"]: one["code"] for one in another.json()["warnings"]}
    assert ignored == dict.fromkeys(("id", "prefix", "createdAt", "key", "refusals"), "read-only")
    assert another.json()["id"] != key["id"]
    assert another.json()["key"] != key["key"]
    assert another.json()["expiresAt"] == key["expiresAt"]

    user = (await api.get("/api/v1/auth/users", params={"limit": 1})).json()["users"][0]
    email = f"like.{user['email']}"
    like = await api.post("/api/v1/auth/users", json={**user, "email": email})
    assert (like.status_code, like.json()["role"], like.json()["email"]) == (201, user["role"], email)
    assert {one["path"] for one in like.json()["warnings"]} == {"id", "organizationId", "createdAt"}

    token = (await api.post("/api/v1/auth/event-tokens", json={"name": "Senders"})).json()
    made = await api.post("/api/v1/auth/event-tokens", json=token)
    assert made.status_code == 201, made.text
    assert made.json()["token"] != token["token"]
    assert any(text.startswith("hint is read-only") for text in made.json()["warnings"])
    assert made.text.count('"warnings"') == 1


async def test_a_token_is_never_made_without_the_secrets_of_the_one_that_is_shown(
    people: OrganizationUsers,
) -> None:
    api, path = people.admin.api, "/api/v1/auth/event-tokens"
    secrets = {"github": ["a-secret-of-github"]}
    made = await api.post(path, json={"name": "Signed", "secrets": secrets})
    shown = next(one for one in (await api.get(path)).json()["tokens"] if one["id"] == made.json()["id"])
    (problem,) = unknown_field_errors(await api.post(path, json=shown))
    assert (problem["path"], problem["code"]) == ("providers", "read-only")
    assert "secrets" in problem["message"]
    assert (await api.post(path, json={**shown, "secrets": secrets})).status_code == 201


# ── settings that older servers stored ──────────────────────────────────────────────────────────────────────


async def store(
    harness: GatewayHarness, workflow_id: str, settings: dict[str, Any], config: dict[str, Any]
) -> None:
    """Write columns of a workflow as an older server did."""
    statement = update(Workflow).where(col(Workflow.id) == workflow_id)
    await harness.gateway.database.transaction(
        lambda connection: connection.execute(statement.values(settings=settings, config=config))
    )


async def test_foreign_settings_are_shown_in_config_and_moved_there_by_the_first_edit(
    harness: GatewayHarness, people: OrganizationUsers
) -> None:
    workflow_id = await people.owner.create(**GRAPH)
    path = f"{WORKFLOWS}/{workflow_id}"
    await store(harness, workflow_id, {"timeout": 60, "color": {"r": 1}}, {"mine": 1})
    shown = await people.owner.workflow(workflow_id)
    assert shown["config"] == {"mine": 1, "settings": {"color": {"r": 1}}}
    assert "color" not in shown["settings"]
    as_before = {**shown, "settings": {**shown["settings"], "color": {"r": 1}}}
    for body in (shown, as_before, shown):
        response = await people.owner.api.put(path, json=body)
        assert (response.status_code, response.json() | {"updatedAt": ""}) == (200, shown | {"updatedAt": ""})
    for value in ({"r": 2}, {"r": True}, None):
        wrong = await people.owner.api.put(path, json={"settings": {"color": value}})
        assert unknown_field_errors(wrong)[0]["path"] == "settings.color"
    async with harness.gateway.database.read() as connection:
        columns = select(col(Workflow.settings), col(Workflow.config)).where(col(Workflow.id) == workflow_id)
        row = (await connection.execute(columns)).one()
    assert "color" not in row.settings
    assert row.config == shown["config"]
    exported = await people.owner.api.get(f"{path}/export")
    imported = await people.owner.api.post(f"{WORKFLOWS}/import", json={"document": exported.json()})
    assert imported.is_success, imported.text


@pytest.mark.parametrize(
    "config", [{"settings": "text"}, {"settings": {"color": "blue"}}, {"long": "x" * (SETTINGS_BYTES - 20)}]
)
async def test_foreign_settings_stay_where_config_has_no_room_for_them(
    harness: GatewayHarness, people: OrganizationUsers, config: dict[str, Any]
) -> None:
    workflow_id = await people.owner.create(**GRAPH)
    path = f"{WORKFLOWS}/{workflow_id}"
    await store(harness, workflow_id, {"timeout": 60, "color": "red"}, config)
    shown = await people.owner.workflow(workflow_id)
    assert (shown["settings"]["color"], shown["config"]) == ("red", config)
    response = await people.owner.api.put(path, json=shown)
    assert (response.status_code, response.json() | {"updatedAt": ""}) == (200, shown | {"updatedAt": ""})
    taken = await people.owner.api.put(path, json={"settings": {"color": None}})
    assert "color" not in taken.json()["settings"]


async def test_a_version_with_foreign_settings_is_restored_with_them_in_config(
    harness: GatewayHarness, people: OrganizationUsers
) -> None:
    workflow_id = await people.owner.create(**GRAPH)
    path = f"{WORKFLOWS}/{workflow_id}"

    older = {"settings": {"timeout": 60, "color": "red"}, "config": {}}

    async def work(connection: AsyncConnection) -> None:
        condition = col(WorkflowVersion.workflow_id) == workflow_id
        (snapshot,) = await connection.scalars(select(col(WorkflowVersion.snapshot)).where(condition))
        await connection.execute(
            update(WorkflowVersion).where(condition).values(snapshot={**snapshot, **older})
        )

    await harness.gateway.database.transaction(work)
    version = (await people.owner.api.get(f"{path}/versions/1")).json()
    assert version["snapshot"]["config"] == {"settings": {"color": "red"}}
    restored = (await people.owner.api.post(f"{path}/versions/1/restore", json={})).json()
    assert restored["config"] == {"settings": {"color": "red"}}
    assert "color" not in restored["settings"]
