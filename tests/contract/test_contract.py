"""Examples of the contract, sent unchanged: each gets its status, and every field of its body."""

import json
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2
import pytest

from gateway import routes
from gateway.http.endpoint import AccessRule
from tests.integration.deployed_workflows import serve_as_pods
from tests.integration.deployers import run_local_deployer
from tests.integration.example_data import replace_example_ids
from tests.integration.gateway_harness import (
    GRAPH,
    GatewayHarness,
    OrganizationUsers,
    UserClient,
    assert_refused,
    create_gateway,
)
from tests.services import PostgresServer

CONTRACT: dict[str, Any] = json.loads((Path(__file__).parent / "endpoints.json").read_text())
WORKFLOW: dict[str, Any] = CONTRACT["workflow_object"]
WORKFLOWS = "/api/v1/workflows"
TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?Z")
ID = re.compile(r"(wf|exec|user|org|node|conn)[_-]\w+")


@dataclass(frozen=True)
class ContractEndpoint:
    """One endpoint as the contract describes it."""

    method: str
    path: str
    scope: str
    status: int
    body: Mapping[str, Any] | None
    response: Any
    notes: list[str]
    summary: str
    query: list[Mapping[str, Any]]
    path_params: list[Mapping[str, Any]]

    @property
    def name(self) -> str:
        return f"{self.method} {self.path}"

    @property
    def request(self) -> Any:  # noqa: ANN401 - any JSON value
        return None if self.body is None else self.body["example"]

    @property
    def answer(self) -> Any:  # noqa: ANN401 - any JSON value
        """Example of the answer. A change of a workflow answers with the changed workflow."""
        if not any("Workflow object" in note for note in self.notes):
            return self.response
        settings = {**WORKFLOW["settings"], **(self.request or {}).get("settings", {})}
        return {**WORKFLOW, **(self.request or {}), "settings": settings}


ENDPOINTS = [ContractEndpoint(**endpoint) for endpoint in CONTRACT["endpoints"]]
REQUIRED_BY_THE_EXAMPLE = {(f"PUT {WORKFLOWS}/:id/lifecycle", "schedule")}
"""Fields that can't be left out because other fields of the example require them."""
OF_ANY_TYPE = {(f"POST {WORKFLOWS}/:id/enqueue", "message")}
"""Fields that accept more types than the example shows."""
FIELDS = [
    (endpoint, one)
    for endpoint in ENDPOINTS
    if endpoint.body
    for one in endpoint.body["fields"]
    if (endpoint.name, one["name"]) not in OF_ANY_TYPE
]


# ── objects of the examples ─────────────────────────────────────────────────────────────────────────────────


@dataclass
class ExampleScene:
    """State in which an example request is sent."""

    ids: dict[str, str]
    """Actual id for each id of the examples. New ids of answers are added."""
    free: frozenset[str] = frozenset()
    """Fields whose values can't equal the example's; their types must."""
    sub: str = ""
    """Second id of the path."""
    query: dict[str, str] = field(default_factory=dict)


Setting = Callable[[OrganizationUsers], Awaitable[ExampleScene]]

SOURCE = {
    "id": "node_1",
    "nodeId": "mysql-source",
    "label": "Extract Orders",
    "position": {"x": 100, "y": 200},
    "config": {"dataSource": "ds_001", "query": "SELECT * FROM orders"},
}
START = {"id": "start", "nodeId": "manual", "label": "Start", "position": {"x": 5, "y": 905}}
STEP = {"id": "node_2", "nodeId": "set", "label": "Keep", "config": {"values": {"a": 1}}}
EDGE = WORKFLOW["connections"][0]


def build_edge(source: str, target: str, **fields: str) -> dict[str, str]:
    return {"sourceNodeId": source, "targetNodeId": target, **fields}


async def build_scene(people: OrganizationUsers, *free: str, sub: str = "", **fields: Any) -> ExampleScene:  # noqa: ANN401 - any JSON value
    """Create a workflow, by default with two nodes."""
    graph = {"nodes": [SOURCE, STEP], "connections": [EDGE]}
    workflow_id = await people.owner.create(**{**graph, **fields})
    return ExampleScene({**example_ids(people), "wf_abc123": workflow_id}, frozenset(free), sub)


def example_ids(people: OrganizationUsers) -> dict[str, str]:
    """Return the actual users for those of the examples, and the ids that clients choose themselves."""
    return {
        "user_456": people.owner.user.id,
        "user_789": people.colleague.user.id,
        "org_xyz": people.owner.user.organization_id,
        "node_1": "node_1",
        "node_2": "node_2",
    }


async def send_successfully(person: UserClient, method: str, path: str, body: Any = None) -> None:  # noqa: ANN401 - any JSON value
    response = await person.api.request(method, f"{WORKFLOWS}/{path}", json=body)
    assert response.is_success, f"{method} {path}: {response.text}"


async def empty_scene(people: OrganizationUsers) -> ExampleScene:
    return ExampleScene(example_ids(people))


async def scene_with_two_nodes(people: OrganizationUsers) -> ExampleScene:
    return await build_scene(people)


async def scene_with_empty_workflow(people: OrganizationUsers) -> ExampleScene:
    return await build_scene(people, nodes=[], connections=[])


async def scene_with_runnable_workflow(people: OrganizationUsers) -> ExampleScene:
    return await build_scene(people, **GRAPH)


async def scene_with_mailbox(people: OrganizationUsers) -> ExampleScene:
    start = {"id": "start", "nodeId": "email-trigger", "label": "Start"}
    here = await build_scene(people, nodes=[start, STEP], connections=[build_edge("start", "node_2")])
    await send_successfully(people.owner, "PUT", f"{here.ids['wf_abc123']}/status", {"status": "active"})
    return here


async def scene_with_queue(people: OrganizationUsers) -> ExampleScene:
    start = {**GRAPH["nodes"][0], "nodeId": "queue-trigger"}
    made = await build_scene(people, nodes=[start, *GRAPH["nodes"][1:]], connections=GRAPH["connections"])
    await send_successfully(people.owner, "PUT", f"{made.ids['wf_abc123']}/status", {"status": "active"})
    return made


async def scene_with_subscription(people: OrganizationUsers) -> ExampleScene:
    config = {"event_type": "user.created"}
    start = {**GRAPH["nodes"][0], "nodeId": "event-trigger", "config": config}
    graph = {"nodes": [start, *GRAPH["nodes"][1:]], "connections": GRAPH["connections"]}
    made = await build_scene(people, "workflows_triggered", name="Send welcome email", **graph)
    await send_successfully(people.owner, "PUT", f"{made.ids['wf_abc123']}/status", {"status": "active"})
    return made


async def scene_of_example(people: OrganizationUsers, *free: str, **fields: Any) -> ExampleScene:  # noqa: ANN401 - any JSON value
    """Create the workflow of the example: shared, in its third version."""
    described = {key: WORKFLOW[key] for key in ("name", "description", "tags", "settings")}
    made = await build_scene(people, *free, **{**described, **fields})
    workflow_id = made.ids["wf_abc123"]
    for version in VERSIONS[1:]:
        await send_successfully(people.owner, "POST", f"{workflow_id}/versions", version)
    await send_successfully(
        people.owner, "POST", f"{workflow_id}/share", {"userId": people.colleague.user.id}
    )
    return made


async def scene_of_runnable_example(people: OrganizationUsers, *free: str) -> ExampleScene:
    start = {**SOURCE, "nodeId": "manual", "config": {}}
    return await scene_of_example(people, "nodes.nodeId", *free, nodes=[start, STEP])


async def scene_with_active_workflow(people: OrganizationUsers) -> ExampleScene:
    made = await scene_of_runnable_example(people, "count")
    await send_successfully(people.owner, "PUT", f"{made.ids['wf_abc123']}/status", {"status": "active"})
    return made


async def scene_with_draft(people: OrganizationUsers) -> ExampleScene:
    return await scene_of_example(people, "status")


async def scene_with_node_to_configure(people: OrganizationUsers) -> ExampleScene:
    made = await build_scene(
        people, sub="node-xyz123", nodes=[{**SOURCE, "id": "node-xyz123"}], connections=[]
    )
    made.ids["node-xyz123"] = "node-xyz123"
    return made


async def scene_with_node_between(people: OrganizationUsers) -> ExampleScene:
    between = {**SOURCE, "id": "node-xyz123", "nodeId": "set", "config": {"values": {"a": 1}}}
    edges = [build_edge("start", "node-xyz123"), build_edge("node-xyz123", "node_2")]
    made = await build_scene(people, sub="node-xyz123", nodes=[START, between, STEP], connections=edges)
    made.ids["node-xyz123"] = "node-xyz123"
    return made


async def scene_with_removable_connection(people: OrganizationUsers) -> ExampleScene:
    made = await build_scene(people, sub="conn-abc123", connections=[{**EDGE, "id": "conn-abc123"}])
    made.ids["conn-abc123"] = "conn-abc123"
    return made


async def scene_without_connections(people: OrganizationUsers) -> ExampleScene:
    return await build_scene(people, connections=[])


async def scene_with_four_nodes(people: OrganizationUsers, *free: str, **fields: Any) -> ExampleScene:  # noqa: ANN401 - any JSON value
    source = {
        "id": "node_1",
        "nodeId": "mysql-source",
        "label": "Extract Orders",
        "position": {"x": 4, "y": 4},
    }
    steps = [{**STEP, "id": name, "position": {"x": 3, "y": 3}} for name in ("node_2", "node_3")]
    edges = [build_edge("start", "node_1"), build_edge("node_1", "node_2"), build_edge("node_2", "node_3")]
    return await build_scene(people, *free, nodes=[START, source, *steps], connections=edges, **fields)


async def scene_with_warning(people: OrganizationUsers) -> ExampleScene:
    return await scene_with_four_nodes(people, "warnings.message")


async def scene_with_resources(people: OrganizationUsers) -> ExampleScene:
    model = {"id": "model", "nodeId": "llm", "label": "Model", "config": {"model": "model_001"}}
    return await build_scene(people, nodes=[SOURCE, STEP, model])


async def scene_without_deployment(people: OrganizationUsers) -> ExampleScene:
    return await build_scene(people, "deploymentStatus")


async def scene_with_deployment(people: OrganizationUsers) -> ExampleScene:
    made = await scene_with_runnable_workflow(people)
    await send_successfully(people.owner, "POST", f"{made.ids['wf_abc123']}/deploy")
    return made


async def scene_of_application(people: OrganizationUsers) -> ExampleScene:
    described = {key: WORKFLOW[key] for key in ("name", "description")}
    start = {"id": "start", "nodeId": "webhook"}
    free = ("endpoints.proxy_url", "deployment.pod_name")
    graph = {**GRAPH, "nodes": [start, *GRAPH["nodes"][1:]], "config": {"appId": "app_001"}}
    made = await build_scene(people, *free, **graph, **described)
    await send_successfully(people.owner, "POST", f"{made.ids['wf_abc123']}/deploy")
    made.query["appId"] = "app_001"
    made.ids["user-workflows"] = "user-workflows"  # looks like the id of a user
    return made


async def scene_with_stopped_deployment(people: OrganizationUsers) -> ExampleScene:
    made = await scene_with_deployment(people)
    await send_successfully(people.owner, "POST", f"{made.ids['wf_abc123']}/stop")
    return made


async def scene_with_share(people: OrganizationUsers) -> ExampleScene:
    made = await build_scene(people, sub=people.colleague.user.id)
    await send_successfully(
        people.owner, "POST", f"{made.ids['wf_abc123']}/share", {"userId": people.colleague.user.id}
    )
    return made


async def scene_with_template(people: OrganizationUsers) -> ExampleScene:
    described: dict[str, Any] = {
        "name": "Basic ETL Pipeline",
        "description": "A starter template for extract-transform-load workflows",
        "tags": ["etl", "starter"],
    }
    made = await build_scene(people, "count", **described)
    await send_successfully(people.admin, "PUT", f"{made.ids['wf_abc123']}/visibility", {"isTemplate": True})
    return ExampleScene({**example_ids(people), "wf_tmpl_001": made.ids["wf_abc123"]}, made.free)


async def scene_with_workflows(people: OrganizationUsers) -> ExampleScene:
    made = await build_scene(people)
    return ExampleScene(made.ids, frozenset({"total", "active", "paused", "draft", "archived"}))


VERSIONS = next(one for one in ENDPOINTS if one.name == f"GET {WORKFLOWS}/:id/versions").response["versions"]

SCENES: Mapping[str, Setting] = {
    f"GET {WORKFLOWS}": scene_with_active_workflow,
    f"POST {WORKFLOWS}": empty_scene,
    f"GET {WORKFLOWS}/:id": scene_with_draft,
    f"PUT {WORKFLOWS}/:id": scene_with_draft,
    f"DELETE {WORKFLOWS}/:id": scene_with_two_nodes,
    f"POST {WORKFLOWS}/:id/duplicate": scene_with_two_nodes,
    f"POST {WORKFLOWS}/:id/execute": scene_with_runnable_workflow,
    f"POST {WORKFLOWS}/:id/enqueue": scene_with_queue,
    f"POST {WORKFLOWS}/:id/email-trigger": scene_with_mailbox,
    f"POST {WORKFLOWS}/events": scene_with_subscription,
    f"PUT {WORKFLOWS}/:id/status": scene_of_runnable_example,
    f"POST {WORKFLOWS}/:id/validate": scene_with_warning,
    f"POST {WORKFLOWS}/:id/layout": scene_with_four_nodes,
    f"POST {WORKFLOWS}/:id/compute-scopes": scene_with_resources,
    f"GET {WORKFLOWS}/:id/versions": scene_of_example,
    f"POST {WORKFLOWS}/:id/versions": scene_of_example,
    f"GET {WORKFLOWS}/:id/share": scene_with_share,
    f"POST {WORKFLOWS}/:id/share": scene_with_two_nodes,
    f"DELETE {WORKFLOWS}/:id/share/:subId": scene_with_share,
    f"GET {WORKFLOWS}/:id/nodes": scene_with_two_nodes,
    f"POST {WORKFLOWS}/:id/nodes": scene_with_empty_workflow,
    f"PUT {WORKFLOWS}/:id/nodes/:sub": scene_with_node_to_configure,
    f"DELETE {WORKFLOWS}/:id/nodes/:sub": scene_with_node_between,
    f"PUT {WORKFLOWS}/:id/nodes/:sub/input-mappings": scene_with_node_to_configure,
    f"PUT {WORKFLOWS}/:id/nodes/:sub/passthrough-values": scene_with_node_to_configure,
    f"POST {WORKFLOWS}/:id/connections": scene_without_connections,
    f"DELETE {WORKFLOWS}/:id/connections/:sub": scene_with_removable_connection,
    f"POST {WORKFLOWS}/:id/deploy": scene_with_runnable_workflow,
    f"POST {WORKFLOWS}/:id/undeploy": scene_with_deployment,
    f"POST {WORKFLOWS}/:id/stop": scene_with_deployment,
    f"POST {WORKFLOWS}/:id/start": scene_with_stopped_deployment,
    f"POST {WORKFLOWS}/:id/trigger": scene_with_deployment,
    f"GET {WORKFLOWS}/discover": scene_of_application,
    f"GET {WORKFLOWS}/:id/lifecycle": scene_without_deployment,
    f"PUT {WORKFLOWS}/:id/lifecycle": scene_with_two_nodes,
    f"GET {WORKFLOWS}/templates": scene_with_template,
    f"GET {WORKFLOWS}/stats": scene_with_workflows,
}


@pytest.fixture(scope="module", params=["sqlite", "postgresql"])
async def harness(
    request: pytest.FixtureRequest, postgres: PostgresServer, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[GatewayHarness]:
    folder: Path = tmp_path_factory.mktemp("contract")
    async with (
        create_gateway(request.param, postgres, folder, settle_seconds=30) as harness,
        run_local_deployer(harness, folder / "pods"),
        serve_as_pods(harness),
    ):
        yield harness


@pytest.fixture(scope="module")
async def people(harness: GatewayHarness) -> OrganizationUsers:
    return await harness.people()


# ── requests and comparison ─────────────────────────────────────────────────────────────────────────────────


async def send_example(
    endpoint: ContractEndpoint,
    scene: ExampleScene,
    people: OrganizationUsers,
    body: Any,  # noqa: ANN401 - any JSON value
) -> httpx2.Response:
    path = endpoint.path.replace(":id", scene.ids.get("wf_abc123", ""))
    path = re.sub(r":sub(Id)?", scene.sub, path)
    return await people.owner.api.request(endpoint.method, path, json=body, params=scene.query)


def find_differences(actual: Any, example: Any, scene: ExampleScene, at: str = "") -> Iterator[str]:  # noqa: ANN401 - any JSON value
    """Say where an answer lacks a field of the example, or has another type or value in it; more fields are welcome."""
    if isinstance(example, dict) and isinstance(actual, dict):
        for key, value in example.items():
            below = f"{at}.{key}".lstrip(".")
            if key in actual:
                yield from find_differences(actual[key], value, scene, below)
            else:
                yield f"{below} is missing"
    elif isinstance(example, list) and isinstance(actual, list):
        for item in example:
            tried = [list(find_differences(one, item, scene, at)) for one in actual]
            yield from min(tried, key=len, default=[f"{at} holds nothing like {item}"])
    elif not is_placeholder_for(actual, example, scene, at):
        yield f"{at} is {actual!r}, which can't stand for {example!r}"


def is_placeholder_for(actual: Any, example: Any, scene: ExampleScene, at: str) -> bool:  # noqa: ANN401 - any JSON value
    if type(actual) is not type(example):
        return False
    if isinstance(example, str) and TIME.fullmatch(example):
        return TIME.fullmatch(actual) is not None
    if isinstance(example, str) and ID.fullmatch(example):
        return is_id(actual, example, scene.ids)
    return at in scene.free or bool(actual == example)


def is_id(actual: str, example: str, ids: dict[str, str]) -> bool:
    """Return whether an id corresponds to the example's; a new id must have its form and be unused."""
    if example not in ids:
        prefix = re.match("[a-z]+[_-]", example)
        assert prefix is not None
        if not re.fullmatch(prefix[0] + "[0-9a-z]{12,}", actual) or actual in ids.values():
            return False
        ids[example] = actual
    return ids[example] == actual


# ── the tests ───────────────────────────────────────────────────────────────────────────────────────────────


def test_every_endpoint_of_the_contract_is_served_as_it_says() -> None:
    lines = {f"{line.method} {re.sub('{.*?}', ':', line.path)}": line for line in routes.TABLE}
    served = {one.name: lines.get(re.sub(r":\w+", ":", one.name)) for one in ENDPOINTS}
    assert set(SCENES) == {one.name for one in ENDPOINTS}
    for endpoint in ENDPOINTS:
        line = served[endpoint.name]
        assert line is not None
        # Senders that can't send a key may have a token instead.
        assert line.access in {endpoint.scope, AccessRule.SENDER}
        assert {one["name"] for one in endpoint.query} <= {parameter.name for parameter in line.query}


@pytest.mark.parametrize("endpoint", ENDPOINTS, ids=lambda endpoint: endpoint.name)
async def test_the_example_gives_its_status_and_every_field_of_its_body(
    people: OrganizationUsers, endpoint: ContractEndpoint
) -> None:
    scene = await SCENES[endpoint.name](people)
    response = await send_example(endpoint, scene, people, replace_example_ids(endpoint.request, scene.ids))
    assert response.status_code == endpoint.status, response.text
    if endpoint.answer is None:
        assert response.content == b""
        return
    assert response.headers["Content-Type"] == "application/json"
    assert list(find_differences(response.json(), endpoint.answer, scene)) == [], response.text


@pytest.mark.parametrize(
    ("endpoint", "part"), FIELDS, ids=[f"{endpoint.name} {part['name']}" for endpoint, part in FIELDS]
)
async def test_a_field_may_be_left_out_unless_it_is_required_and_has_its_type(
    people: OrganizationUsers, endpoint: ContractEndpoint, part: Mapping[str, Any]
) -> None:
    name = part["name"]
    scene = await SCENES[endpoint.name](people)
    example = replace_example_ids(endpoint.request, scene.ids)
    wrong = await send_example(
        endpoint, scene, people, {**example, name: [7] if part["type"] != "array" else {"a": 7}}
    )
    assert_refused(wrong, 422, "validation-failed")
    assert [detail["path"] for detail in wrong.json()["error"]["details"]] == [name]
    without = {key: value for key, value in example.items() if key != name}
    response = await send_example(endpoint, scene, people, without)
    if part["required"] or (endpoint.name, name) in REQUIRED_BY_THE_EXAMPLE:
        assert_refused(response, 422, "validation-failed")
        assert [detail["path"] for detail in response.json()["error"]["details"]] == [name]
    else:
        assert response.status_code == endpoint.status, response.text


@pytest.mark.parametrize(
    "actual",
    [
        {"name": "x", "n": 1, "list": [{"id": "wf_1"}]},
        {"name": "x", "n": 1, "list": [{"id": "wf_1", "at": "2025-01-15"}]},
        {"name": "x", "n": 1, "list": []},
        {"name": "x", "n": 1, "list": {}},
        {"name": "x", "n": True, "list": [{"id": "wf_1", "at": "2025-01-15T10:30:00Z"}]},
        {"name": "x", "n": 1.0, "list": [{"id": "wf_1", "at": "2025-01-15T10:30:00Z"}]},
        {"name": None, "n": 1, "list": [{"id": "wf_1", "at": "2025-01-15T10:30:00Z"}]},
        {"name": "y", "n": 1, "list": [{"id": "wf_1", "at": "2025-01-15T10:30:00Z"}]},
        {"name": "x", "n": 1, "list": [{"id": "wf_2", "at": "2025-01-15T10:30:00Z"}]},
        {"title": "x", "n": 1, "list": [{"id": "wf_1", "at": "2025-01-15T10:30:00Z"}]},
    ],
)
def test_a_field_that_is_missing_renamed_or_retyped_is_noticed(actual: dict[str, Any]) -> None:
    scene = ExampleScene({"wf_abc123": "wf_1"}, frozenset({"n"}))
    example = {"name": "x", "n": 42, "list": [{"id": "wf_abc123", "at": "2025-01-15T10:30:00Z"}]}
    assert len(list(find_differences(actual, example, scene))) == 1
    right = {"name": "x", "n": 1, "list": [{"id": "wf_1", "at": "2025-01-15T10:30:00.123Z", "more": 1}]}
    assert list(find_differences(right, example, scene)) == []
