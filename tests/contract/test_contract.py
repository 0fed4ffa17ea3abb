"""The contract's own examples, sent as they stand: each gives its status, and every field of its body."""

import json
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2
import pytest

from gateway import routes
from gateway.http.endpoint import Access
from tests.integration.deployed import taking
from tests.integration.deployers import on_this_machine
from tests.integration.example_world import in_place
from tests.integration.gateway_world import GRAPH, People, Person, World, open_world, refused
from tests.services import PostgreSQL

CONTRACT: dict[str, Any] = json.loads((Path(__file__).parent / "endpoints.json").read_text())
WORKFLOW: dict[str, Any] = CONTRACT["workflow_object"]
WORKFLOWS = "/api/v1/workflows"
TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?Z")
ID = re.compile(r"(wf|exec|user|org|node|conn)[_-]\w+")


@dataclass(frozen=True)
class Endpoint:
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
        """The example of the answer; what a change of the whole workflow shows is the workflow, so changed."""
        if not any("Workflow object" in note for note in self.notes):
            return self.response
        settings = {**WORKFLOW["settings"], **(self.request or {}).get("settings", {})}
        return {**WORKFLOW, **(self.request or {}), "settings": settings}


ENDPOINTS = [Endpoint(**endpoint) for endpoint in CONTRACT["endpoints"]]
REQUIRED_BY_THE_EXAMPLE = {(f"PUT {WORKFLOWS}/:id/lifecycle", "schedule")}
"""Fields that can't be left out, since what else stands in the example needs them."""
OF_ANY_TYPE = {(f"POST {WORKFLOWS}/:id/enqueue", "message")}
"""Fields that take more than the example has."""
FIELDS = [
    (endpoint, one)
    for endpoint in ENDPOINTS
    if endpoint.body
    for one in endpoint.body["fields"]
    if (endpoint.name, one["name"]) not in OF_ANY_TYPE
]


# ── what the examples are about ─────────────────────────────────────────────────────────────────────────────


@dataclass
class Scene:
    """What an example request finds."""

    ids: dict[str, str]
    """What stands here for each id of the examples; an answer's ids that are new are added."""
    free: frozenset[str] = frozenset()
    """Fields whose values can't be the example's; their types must be."""
    sub: str = ""
    """What the second id of the path is."""
    query: dict[str, str] = field(default_factory=dict)


Setting = Callable[[People], Awaitable[Scene]]

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


def edge(source: str, target: str, **fields: str) -> dict[str, str]:
    return {"sourceNodeId": source, "targetNodeId": target, **fields}


async def scene(people: People, *free: str, sub: str = "", **fields: Any) -> Scene:  # noqa: ANN401 - any JSON value
    """Make a workflow, by default one of two nodes."""
    graph = {"nodes": [SOURCE, STEP], "connections": [EDGE]}
    workflow_id = await people.owner.create(**{**graph, **fields})
    return Scene({**cast(people), "wf_abc123": workflow_id}, frozenset(free), sub)


def cast(people: People) -> dict[str, str]:
    """Return who stands here for whom, and the ids that the examples' clients choose themselves."""
    return {
        "user_456": people.owner.user.id,
        "user_789": people.colleague.user.id,
        "org_xyz": people.owner.user.organization_id,
        "node_1": "node_1",
        "node_2": "node_2",
    }


async def sent(person: Person, method: str, path: str, body: Any = None) -> None:  # noqa: ANN401 - any JSON value
    response = await person.api.request(method, f"{WORKFLOWS}/{path}", json=body)
    assert response.is_success, f"{method} {path}: {response.text}"


async def nothing(people: People) -> Scene:
    return Scene(cast(people))


async def two_nodes(people: People) -> Scene:
    return await scene(people)


async def empty_workflow(people: People) -> Scene:
    return await scene(people, nodes=[], connections=[])


async def runnable(people: People) -> Scene:
    return await scene(people, **GRAPH)


async def with_a_mailbox(people: People) -> Scene:
    start = {"id": "start", "nodeId": "email-trigger", "label": "Start"}
    here = await scene(people, nodes=[start, STEP], connections=[edge("start", "node_2")])
    await sent(people.owner, "PUT", f"{here.ids['wf_abc123']}/status", {"status": "active"})
    return here


async def with_a_queue(people: People) -> Scene:
    start = {**GRAPH["nodes"][0], "nodeId": "queue-trigger"}
    made = await scene(people, nodes=[start, *GRAPH["nodes"][1:]], connections=GRAPH["connections"])
    await sent(people.owner, "PUT", f"{made.ids['wf_abc123']}/status", {"status": "active"})
    return made


async def subscribed(people: People) -> Scene:
    config = {"event_type": "user.created"}
    start = {**GRAPH["nodes"][0], "nodeId": "event-trigger", "config": config}
    graph = {"nodes": [start, *GRAPH["nodes"][1:]], "connections": GRAPH["connections"]}
    made = await scene(people, "workflows_triggered", name="Send welcome email", **graph)
    await sent(people.owner, "PUT", f"{made.ids['wf_abc123']}/status", {"status": "active"})
    return made


async def whole_workflow(people: People, *free: str, **fields: Any) -> Scene:  # noqa: ANN401 - any JSON value
    """Make the workflow of the example: in its third version, and shared."""
    described = {key: WORKFLOW[key] for key in ("name", "description", "tags", "settings")}
    made = await scene(people, *free, **{**described, **fields})
    workflow_id = made.ids["wf_abc123"]
    for version in VERSIONS[1:]:
        await sent(people.owner, "POST", f"{workflow_id}/versions", version)
    await sent(people.owner, "POST", f"{workflow_id}/share", {"userId": people.colleague.user.id})
    return made


async def runnable_workflow(people: People, *free: str) -> Scene:
    start = {**SOURCE, "nodeId": "manual", "config": {}}
    return await whole_workflow(people, "nodes.nodeId", *free, nodes=[start, STEP])


async def active_workflow(people: People) -> Scene:
    made = await runnable_workflow(people, "count")
    await sent(people.owner, "PUT", f"{made.ids['wf_abc123']}/status", {"status": "active"})
    return made


async def draft_workflow(people: People) -> Scene:
    return await whole_workflow(people, "status")


async def with_a_node_to_configure(people: People) -> Scene:
    made = await scene(people, sub="node-xyz123", nodes=[{**SOURCE, "id": "node-xyz123"}], connections=[])
    made.ids["node-xyz123"] = "node-xyz123"
    return made


async def with_a_node_between_two(people: People) -> Scene:
    between = {**SOURCE, "id": "node-xyz123", "nodeId": "set", "config": {"values": {"a": 1}}}
    edges = [edge("start", "node-xyz123"), edge("node-xyz123", "node_2")]
    made = await scene(people, sub="node-xyz123", nodes=[START, between, STEP], connections=edges)
    made.ids["node-xyz123"] = "node-xyz123"
    return made


async def with_a_connection_to_remove(people: People) -> Scene:
    made = await scene(people, sub="conn-abc123", connections=[{**EDGE, "id": "conn-abc123"}])
    made.ids["conn-abc123"] = "conn-abc123"
    return made


async def unconnected(people: People) -> Scene:
    return await scene(people, connections=[])


async def four_nodes(people: People, *free: str, **fields: Any) -> Scene:  # noqa: ANN401 - any JSON value
    source = {
        "id": "node_1",
        "nodeId": "mysql-source",
        "label": "Extract Orders",
        "position": {"x": 4, "y": 4},
    }
    steps = [{**STEP, "id": name, "position": {"x": 3, "y": 3}} for name in ("node_2", "node_3")]
    edges = [edge("start", "node_1"), edge("node_1", "node_2"), edge("node_2", "node_3")]
    return await scene(people, *free, nodes=[START, source, *steps], connections=edges, **fields)


async def with_a_warning(people: People) -> Scene:
    return await four_nodes(people, "warnings.message")


async def with_a_data_source_and_a_model(people: People) -> Scene:
    model = {"id": "model", "nodeId": "llm", "label": "Model", "config": {"model": "model_001"}}
    return await scene(people, nodes=[SOURCE, STEP, model])


async def not_deployed(people: People) -> Scene:
    return await scene(people, "deploymentStatus")


async def deployed(people: People) -> Scene:
    made = await runnable(people)
    await sent(people.owner, "POST", f"{made.ids['wf_abc123']}/deploy")
    return made


async def of_an_application(people: People) -> Scene:
    described = {key: WORKFLOW[key] for key in ("name", "description")}
    start = {"id": "start", "nodeId": "webhook"}
    free = ("endpoints.proxy_url", "deployment.pod_name")
    graph = {**GRAPH, "nodes": [start, *GRAPH["nodes"][1:]], "config": {"appId": "app_001"}}
    made = await scene(people, *free, **graph, **described)
    await sent(people.owner, "POST", f"{made.ids['wf_abc123']}/deploy")
    made.query["appId"] = "app_001"
    made.ids["user-workflows"] = "user-workflows"  # looks like the id of a user
    return made


async def stopped(people: People) -> Scene:
    made = await deployed(people)
    await sent(people.owner, "POST", f"{made.ids['wf_abc123']}/stop")
    return made


async def shared(people: People) -> Scene:
    made = await scene(people, sub=people.colleague.user.id)
    await sent(people.owner, "POST", f"{made.ids['wf_abc123']}/share", {"userId": people.colleague.user.id})
    return made


async def with_a_template(people: People) -> Scene:
    described: dict[str, Any] = {
        "name": "Basic ETL Pipeline",
        "description": "A starter template for extract-transform-load workflows",
        "tags": ["etl", "starter"],
    }
    made = await scene(people, "count", **described)
    await sent(people.admin, "PUT", f"{made.ids['wf_abc123']}/visibility", {"isTemplate": True})
    return Scene({**cast(people), "wf_tmpl_001": made.ids["wf_abc123"]}, made.free)


async def some_workflows(people: People) -> Scene:
    made = await scene(people)
    return Scene(made.ids, frozenset({"total", "active", "paused", "draft", "archived"}))


VERSIONS = next(one for one in ENDPOINTS if one.name == f"GET {WORKFLOWS}/:id/versions").response["versions"]

SCENES: Mapping[str, Setting] = {
    f"GET {WORKFLOWS}": active_workflow,
    f"POST {WORKFLOWS}": nothing,
    f"GET {WORKFLOWS}/:id": draft_workflow,
    f"PUT {WORKFLOWS}/:id": draft_workflow,
    f"DELETE {WORKFLOWS}/:id": two_nodes,
    f"POST {WORKFLOWS}/:id/duplicate": two_nodes,
    f"POST {WORKFLOWS}/:id/execute": runnable,
    f"POST {WORKFLOWS}/:id/enqueue": with_a_queue,
    f"POST {WORKFLOWS}/:id/email-trigger": with_a_mailbox,
    f"POST {WORKFLOWS}/events": subscribed,
    f"PUT {WORKFLOWS}/:id/status": runnable_workflow,
    f"POST {WORKFLOWS}/:id/validate": with_a_warning,
    f"POST {WORKFLOWS}/:id/layout": four_nodes,
    f"POST {WORKFLOWS}/:id/compute-scopes": with_a_data_source_and_a_model,
    f"GET {WORKFLOWS}/:id/versions": whole_workflow,
    f"POST {WORKFLOWS}/:id/versions": whole_workflow,
    f"GET {WORKFLOWS}/:id/share": shared,
    f"POST {WORKFLOWS}/:id/share": two_nodes,
    f"DELETE {WORKFLOWS}/:id/share/:subId": shared,
    f"GET {WORKFLOWS}/:id/nodes": two_nodes,
    f"POST {WORKFLOWS}/:id/nodes": empty_workflow,
    f"PUT {WORKFLOWS}/:id/nodes/:sub": with_a_node_to_configure,
    f"DELETE {WORKFLOWS}/:id/nodes/:sub": with_a_node_between_two,
    f"PUT {WORKFLOWS}/:id/nodes/:sub/input-mappings": with_a_node_to_configure,
    f"PUT {WORKFLOWS}/:id/nodes/:sub/passthrough-values": with_a_node_to_configure,
    f"POST {WORKFLOWS}/:id/connections": unconnected,
    f"DELETE {WORKFLOWS}/:id/connections/:sub": with_a_connection_to_remove,
    f"POST {WORKFLOWS}/:id/deploy": runnable,
    f"POST {WORKFLOWS}/:id/undeploy": deployed,
    f"POST {WORKFLOWS}/:id/stop": deployed,
    f"POST {WORKFLOWS}/:id/start": stopped,
    f"POST {WORKFLOWS}/:id/trigger": deployed,
    f"GET {WORKFLOWS}/discover": of_an_application,
    f"GET {WORKFLOWS}/:id/lifecycle": not_deployed,
    f"PUT {WORKFLOWS}/:id/lifecycle": two_nodes,
    f"GET {WORKFLOWS}/templates": with_a_template,
    f"GET {WORKFLOWS}/stats": some_workflows,
}


@pytest.fixture(scope="module", params=["sqlite", "postgresql"])
async def world(
    request: pytest.FixtureRequest, postgres: PostgreSQL, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[World]:
    folder: Path = tmp_path_factory.mktemp("contract")
    async with (
        open_world(request.param, postgres, folder, settle_seconds=30) as world,
        on_this_machine(world, folder / "pods"),
        taking(world),
    ):
        yield world


@pytest.fixture(scope="module")
async def people(world: World) -> People:
    return await world.people()


# ── asked and compared ──────────────────────────────────────────────────────────────────────────────────────


async def asked(endpoint: Endpoint, scene: Scene, people: People, body: Any) -> httpx2.Response:  # noqa: ANN401 - any JSON value
    path = endpoint.path.replace(":id", scene.ids.get("wf_abc123", ""))
    path = re.sub(r":sub(Id)?", scene.sub, path)
    return await people.owner.api.request(endpoint.method, path, json=body, params=scene.query)


def differences(actual: Any, example: Any, scene: Scene, at: str = "") -> Iterator[str]:  # noqa: ANN401 - any JSON value
    """Say where an answer lacks a field of the example, or has another type or value in it; more fields are welcome."""
    if isinstance(example, dict) and isinstance(actual, dict):
        for key, value in example.items():
            below = f"{at}.{key}".lstrip(".")
            if key in actual:
                yield from differences(actual[key], value, scene, below)
            else:
                yield f"{below} is missing"
    elif isinstance(example, list) and isinstance(actual, list):
        for item in example:
            tried = [list(differences(one, item, scene, at)) for one in actual]
            yield from min(tried, key=len, default=[f"{at} holds nothing like {item}"])
    elif not stands_for(actual, example, scene, at):
        yield f"{at} is {actual!r}, which can't stand for {example!r}"


def stands_for(actual: Any, example: Any, scene: Scene, at: str) -> bool:  # noqa: ANN401 - any JSON value
    if type(actual) is not type(example):
        return False
    if isinstance(example, str) and TIME.fullmatch(example):
        return TIME.fullmatch(actual) is not None
    if isinstance(example, str) and ID.fullmatch(example):
        return is_id(actual, example, scene.ids)
    return at in scene.free or bool(actual == example)


def is_id(actual: str, example: str, ids: dict[str, str]) -> bool:
    """Tell whether an id is the one that stands for the example's; a new one must look like it, and be no other's."""
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
        # Whoever can't send a key may have a token instead.
        assert line.access in {endpoint.scope, Access.SENDER}
        assert {one["name"] for one in endpoint.query} <= {parameter.name for parameter in line.query}


@pytest.mark.parametrize("endpoint", ENDPOINTS, ids=lambda endpoint: endpoint.name)
async def test_the_example_gives_its_status_and_every_field_of_its_body(
    people: People, endpoint: Endpoint
) -> None:
    scene = await SCENES[endpoint.name](people)
    response = await asked(endpoint, scene, people, in_place(endpoint.request, scene.ids))
    assert response.status_code == endpoint.status, response.text
    if endpoint.answer is None:
        assert response.content == b""
        return
    assert response.headers["Content-Type"] == "application/json"
    assert list(differences(response.json(), endpoint.answer, scene)) == [], response.text


@pytest.mark.parametrize(
    ("endpoint", "part"), FIELDS, ids=[f"{endpoint.name} {part['name']}" for endpoint, part in FIELDS]
)
async def test_a_field_may_be_left_out_unless_it_is_required_and_has_its_type(
    people: People, endpoint: Endpoint, part: Mapping[str, Any]
) -> None:
    name = part["name"]
    scene = await SCENES[endpoint.name](people)
    example = in_place(endpoint.request, scene.ids)
    wrong = await asked(
        endpoint, scene, people, {**example, name: [7] if part["type"] != "array" else {"a": 7}}
    )
    refused(wrong, 422, "validation-failed")
    assert [detail["path"] for detail in wrong.json()["error"]["details"]] == [name]
    without = {key: value for key, value in example.items() if key != name}
    response = await asked(endpoint, scene, people, without)
    if part["required"] or (endpoint.name, name) in REQUIRED_BY_THE_EXAMPLE:
        refused(response, 422, "validation-failed")
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
    scene = Scene({"wf_abc123": "wf_1"}, frozenset({"n"}))
    example = {"name": "x", "n": 42, "list": [{"id": "wf_abc123", "at": "2025-01-15T10:30:00Z"}]}
    assert len(list(differences(actual, example, scene))) == 1
    right = {"name": "x", "n": 1, "list": [{"id": "wf_1", "at": "2025-01-15T10:30:00.123Z", "more": 1}]}
    assert list(differences(right, example, scene)) == []
