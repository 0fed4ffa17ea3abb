"""Hostile texts in every field that the API takes are shown as text by every page of the dashboard, in a browser."""

from __future__ import annotations

import copy
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import pytest

from tests.api_document import read_document
from tests.integration import input_waits
from tests.integration.browser import BrowserPage, needs_chromium, open_page, serve_gateway
from tests.integration.gateway_harness import GatewayHarness, UserClient, create_gateway
from tests.integration.test_dashboard import fail_with
from tests.integration.test_waiting_runs import serve_worker, wait_until_ended
from tests.services import PostgresServer

pytestmark = needs_chromium

HOSTILE = "\"'><img src=x onerror=alert(1)>"
"""Leaves an attribute, a text and a comment, wherever it is not escaped; short enough for tags."""
MARKUP = "document.querySelectorAll('img[src=x], [onerror], main script, main img').length"
PARSE = (
    "(path => new Promise(resolve => { const request = new XMLHttpRequest(); request.responseType = 'document';"
    " const look = document => [document.querySelector('h1') !== null, " + MARKUP + "];"
    " request.onload = () => resolve(look(request.response));"
    " request.open('GET', path); request.send() }))"
)
"""Script that parses the page of a path, without a visit; returns whether it has a heading, and its `MARKUP`."""

CONFLICT = 409
"""A repeated name: the same body was accepted before, with the hostile text."""

FieldPath: TypeAlias = tuple[str, ...]
"""Names of a field in a body; `[]` is an item of a list, and `*` a value of an object with any names."""

NODES: list[dict[str, Any]] = [
    {"id": "start", "nodeId": "queue-trigger", "label": HOSTILE, "config": {}},
    {
        "id": "step",
        "nodeId": "set",
        "label": HOSTILE,
        "config": {"values": {HOSTILE: HOSTILE}},
        "passThroughValues": {"kept": "order"},
    },
    {"id": "note", "nodeId": "log", "label": HOSTILE, "config": {"message": HOSTILE}},
    {
        "id": "text",
        "nodeId": "template",
        "label": HOSTILE,
        "config": {"text": "{{ data.missing }} " + HOSTILE},
    },
]
EDGES = [
    {"id": "e1", "source": "start", "target": "step", "sourcePort": "output", "targetPort": "input"},
    {"source": "step", "target": "note"},
    {"source": "note", "target": "text"},
]
WORKFLOW: dict[str, Any] = {
    "name": HOSTILE,
    "description": HOSTILE,
    "status": "active",
    "nodes": NODES,
    "connections": EDGES,
    "tags": [HOSTILE],
}
TYPE: dict[str, Any] = {
    "type": "acme/resize",
    "version": "1.3.0",
    "name": HOSTILE,
    "effect": "write",
    "category": "custom",
    "description": HOSTILE,
    "inputDescription": HOSTILE,
    "output": {"description": HOSTILE},
    "ports": {"outputs": ["output"]},
    "config": {"type": "object", "properties": {"image": {"type": "string", "description": HOSTILE}}},
    "task": {"timeoutSeconds": 120},
}
MESSAGE: dict[str, Any] = {"message": {HOSTILE: HOSTILE}, "source": HOSTILE, "deduplicationId": HOSTILE}
MAIL = dict.fromkeys(("subject", "body_text", "body_html", "cc", "reply_to"), HOSTILE)
MAIL |= {"from": f"{HOSTILE} <a@example.com>", "to": "orders@example.com"}
BODIES: Mapping[str, dict[str, Any]] = {
    "POST /api/v1/workflows": WORKFLOW,
    "POST /api/v1/workflows/{id}/save-as-template": {
        "name": HOSTILE,
        "description": HOSTILE,
        "tags": [HOSTILE],
    },
    "POST /api/v1/workflows/{id}/versions": {"versionTag": "v1", "description": HOSTILE},
    "PUT /api/v1/workflows/{id}/nodes/{sub}": {"label": HOSTILE},
    "POST /api/v1/workflow-nodes": TYPE,
    "POST /api/v1/datasources": {
        "name": HOSTILE,
        "type": "http-basic",
        "settings": {"username": HOSTILE},
        "secrets": {"password": "p"},
    },
    "POST /api/v1/auth/keys": {"name": HOSTILE, "scopes": ["workflows:read"]},
    "POST /api/v1/auth/users": {"email": "new@example.com", "name": HOSTILE, "role": "viewer"},
    "POST /api/v1/auth/invitations": {"email": "other@example.com", "role": "viewer"},
    "POST /api/v1/auth/event-tokens": {"name": HOSTILE},
    "POST /api/v1/workflows/{id}/enqueue": MESSAGE,
    "POST /api/v1/workflows/{id}/enqueue-batch": {
        "messages": [{"message": 1, "tags": [HOSTILE], "metadata": {"a": HOSTILE}}]
    },
    "POST /api/v1/workflows/{id}/execute": {
        "triggerInputs": {HOSTILE: HOSTILE},
        "tags": [HOSTILE],
        "metadata": {"a": HOSTILE},
    },
    "POST /api/v1/workflows/{mail}/email-trigger": MAIL,
    "POST /api/v1/workflows/events": {
        "event_type": "order.paid",
        "source": HOSTILE,
        "event_data": {HOSTILE: HOSTILE},
    },
}
"""Bodies that create or change objects, by operation; each other field of a text is added to a copy of its own."""
WITHOUT_OBJECTS = {
    "POST /api/v1/dead-letters/bulk-operations": "a selection, which no page shows",
    "POST /api/v1/executions/bulk-operations": "a selection, which no page shows",
    "PUT /api/v1/datasources/{id}": "the texts of a data source",
    "POST /api/v1/ai/models": "a language model, on no page",
    "PUT /api/v1/ai/models/{id}": "a language model, on no page",
    "PUT /api/v1/ai/models/{id}/permissions": "ids of users",
    "POST /api/v1/ai/provider-keys": "the texts of a data source",
    "PUT /api/v1/ai/provider-keys/{id}": "the texts of a data source",
    "POST /api/v1/ai/tool-servers": "the texts of a data source",
    "PUT /api/v1/ai/tool-servers/{id}": "the texts of a data source",
    "POST /api/v1/ai/tool-servers/{id}/accept": "names and hashes of tools",
    "POST /api/v1/workflows/{id}/connections": "the texts of a connection of a workflow",
    "POST /api/v1/dead-letters/groups/{id}/mute": "the reason of a mute, with the runs",
    "POST /api/v1/executions/{id}/reassign-input": "ids and addresses of people of the organization",
    "POST /api/v1/executions/{id}/replay": "ids and the hash of a plan",
    "POST /api/v1/workflows/{id}/trigger": "tags and metadata as in execute, and needs pods",
    "POST /api/v1/workflows/from-template": "the texts of a workflow, by the same checks",
    "POST /api/v1/workflows/import": "the texts of a workflow, by the same checks",
    "POST /api/v1/workflows/build": "the texts of a workflow, by the same checks",
    "PUT /api/v1/workflows/{id}": "the texts of a workflow, by the same checks",
    "POST /api/v1/workflows/{id}/nodes": "the texts of a node of a workflow",
    "PUT /api/v1/workflows/{id}/nodes/{sub}/passthrough-values": "names of fields, as in a workflow",
    "POST /mail/{id}": "the texts of a mail, as in email-trigger",
    "PUT /api/v1/workflows/{id}/lifecycle": "times and a zone",
    "POST /api/v1/workflows/{id}/lifecycle/preview": "times and a zone",
    "POST /api/v1/workflows/{id}/schedule/preview": "times and a zone",
    "POST /api/v1/workflows/{id}/share": "an id",
    "POST /api/v1/datasources/{id}/share": "an id",
    "POST /api/v1/executions/{id}/input": "checked against the question",
    "POST /api/v1/tasks/claim": "worker of a task, on no page",
    "POST /api/v1/tasks/report": "result of a task: output and error of a node, which `fail_with` has",
} | {
    f"POST /api/v1/{path}": "a selection, stored nowhere"
    for path in (
        "workflows/{id}/deliveries/redrive",
        "deliveries/redrive",
        "dead-letters/redrive",
        "dead-letters/replay",
        "dead-letters/purge",
        "workflows/{id}/dead-letters/redrive",
        "workflows/{id}/dead-letters/purge",
        *(f"executions/bulk-{action}" for action in ("cancel", "retry", "replay", "delete")),
    )
}
"""Operations with texts that are not sent here, each with the reason."""


@dataclass(frozen=True)
class HostileVisit:
    """Browser of an admin of an organization with hostile texts everywhere."""

    harness: GatewayHarness
    admin: UserClient
    url: str
    page: BrowserPage
    names: dict[str, str]
    """Ids by their names in paths."""
    answers: dict[tuple[str, FieldPath], int] = field(default_factory=dict)
    """Status of the answer to a hostile text in each field."""
    workflows: list[str] = field(default_factory=list)
    """Ids of all workflows with hostile texts."""


def list_texts(
    schema: Mapping[str, Any], path: FieldPath = (), seen: frozenset[str] = frozenset()
) -> Iterator[FieldPath]:
    """Yield the paths of the strings of a schema that may have any text."""
    if "$ref" in schema:
        name = schema["$ref"].rpartition("/")[2]
        if name not in seen:
            yield from list_texts(read_document()["components"]["schemas"][name], path, seen | {name})
        return
    for choices in ("anyOf", "oneOf", "allOf"):
        for one in schema.get(choices, ()):
            yield from list_texts(one, path, seen)
    if "string" in (schema.get("type") or ()) and not {"enum", "const", "pattern", "format"} & set(schema):
        yield path
    for name, one in schema.get("properties", {}).items():
        yield from list_texts(one, (*path, name), seen)
    if isinstance(schema.get("additionalProperties"), dict):
        yield from list_texts(schema["additionalProperties"], (*path, "*"), seen)
    if "items" in schema:
        yield from list_texts(schema["items"], (*path, "[]"), seen)


def list_operations() -> Iterator[tuple[str, Sequence[FieldPath]]]:
    """Yield the operations with texts in the JSON body, with their paths."""
    for path, operations in read_document()["paths"].items():
        for method, operation in operations.items():
            content = operation.get("requestBody", {}).get("content", {}) if method != "parameters" else {}
            texts = (
                sorted(set(list_texts(content["application/json"]["schema"])))
                if "application/json" in content
                else []
            )
            if texts:
                yield f"{method.upper()} {path}", texts


def put_text(body: Any, path: FieldPath) -> None:  # noqa: ANN401 - any JSON value
    """Set one field of a body to the hostile text; parts on the way that are missing are created."""
    name, rest = path[0], path[1:]
    if name == "[]":
        if not body:
            body.append({} if rest else HOSTILE)
        if rest:
            put_text(body[0], rest)
        else:
            body[0] = HOSTILE
        return
    name = HOSTILE if name == "*" else name
    if not rest:
        body[name] = HOSTILE
        return
    if not isinstance(body.get(name), dict | list):
        body[name] = [] if rest[0] == "[]" else {}
    put_text(body[name], rest)


def operation_of(name: str) -> str:
    """Return an operation of `BODIES` as the document has it."""
    return name.replace("{mail}", "{id}")


def test_every_operation_with_texts_is_sent_or_has_a_reason_why_not() -> None:
    with_texts = {name for name, _ in list_operations()}
    assert with_texts - {*map(operation_of, BODIES)} == {*WITHOUT_OBJECTS}


@pytest.fixture(scope="module")
async def visit(
    postgres: PostgresServer, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[HostileVisit]:
    folder = tmp_path_factory.mktemp("texts")
    async with (
        create_gateway("sqlite", postgres, folder) as harness,
        serve_gateway(harness) as url,
        open_page(folder / "profile") as page,
    ):
        admin = (await harness.people()).admin
        names = {"id": await admin.create(**WORKFLOW), "sub": "step"}
        mail = [{"id": "start", "nodeId": "email-trigger", "label": HOSTILE}, *NODES[1:]]
        names["mail"] = await admin.create(**{**WORKFLOW, "nodes": mail})
        visit = HostileVisit(harness, admin, url, page, names)
        await _send_all(visit)
        await _make_runs(visit)
        yield visit


async def _send_all(visit: HostileVisit) -> None:
    """Send each body as it is, then with the hostile text in each of its fields."""
    texts = dict(list_operations())
    for name, body in BODIES.items():
        method, _, template = name.partition(" ")
        path = template.format(**visit.names)
        answer = await visit.admin.api.request(method, path, json=body)
        assert answer.is_success, (name, answer.text)
        for place in texts.get(operation_of(name), ()):
            changed = copy.deepcopy(body)
            put_text(changed, place)
            answer = await visit.admin.api.request(method, path, json=changed)
            assert answer.status_code < 500, (name, place, answer.text)
            visit.answers[name, place] = answer.status_code
            if name == "POST /api/v1/workflows" and answer.is_success:
                visit.workflows.append(answer.json()["workflowId"])


async def _make_runs(visit: HostileVisit) -> None:
    """Create a run that has ended with an error, one that asks a question, and one that has failed by itself."""
    api, path = visit.admin.api, f"/api/v1/workflows/{visit.names['id']}"

    async def start(name: str) -> None:
        started = await api.post(f"{path}/enqueue", json={"message": {HOSTILE: HOSTILE}})
        visit.names[name] = started.json()["executionId"]

    async with serve_worker(visit.harness):
        await start("ran")
        await wait_until_ended(visit.admin, visit.names["ran"])
    await start("failed")
    await start("asking")
    await fail_with(visit.harness, visit.names["failed"], HOSTILE)
    groups = (await api.get("/api/v1/dead-letters/groups")).json()["groups"]
    muted = await api.post(
        f"/api/v1/dead-letters/groups/{groups[0]['id']}/mute",
        json={"reason": HOSTILE, "expiresInSeconds": 86_400},
    )
    assert muted.is_success, muted.text
    question = {
        "title": HOSTILE,
        "description": HOSTILE,
        "choices": [{"port": "yes", "label": HOSTILE}],
        "schema": {
            "type": "object",
            "properties": {HOSTILE: {"type": "string", "title": HOSTILE, "default": HOSTILE}},
        },
    }
    await input_waits.wait_for_input(visit.harness.gateway.database, visit.names["asking"], request=question)
    stranger = await visit.harness.client()
    await stranger.post(f"/api/v1/workflows/{visit.names['mail']}/email-trigger", json={"subject": HOSTILE})
    await visit.harness.gateway.samples.drain()
    visit.names["delivery"] = (await api.get("/api/v1/deliveries")).json()["deliveries"][0]["id"]


RUN_QUERIES = ("", "?node=step&tab=output", "?view=map", "/replay")
TABS = tuple(f"?node=step&tab={tab}" for tab in ("input", "config", "logs", "diff"))
PATHS = (
    "/dashboard/overview",
    "/dashboard/workflows",
    "/dashboard/runs",
    "/dashboard/approvals",
    "/dashboard/deliveries",
    "/dashboard/deliveries/{delivery}",
    "/dashboard/dead-letters",
    "/dashboard/dead-letters?muted=true",
    "/dashboard/schedule",
    "/dashboard/sources",
    "/dashboard/keys",
    "/dashboard/audit",
    "/dashboard/health",
    *(
        f"/dashboard/workflows/{{id}}{part}"
        for part in ("", "?node=step", "?view=table", "/versions", "/lifecycle", "/trigger")
    ),
    "/dashboard/workflows/{mail}/trigger",
    *(f"/dashboard/runs/{{ran}}{part}" for part in RUN_QUERIES),
    "/dashboard/runs/{failed}",
    "/dashboard/runs/{asking}",
)
"""Pages with all scripts that build parts."""
SIMILAR_PATHS = (
    *(f"/dashboard/runs/{{{run}}}{part}" for run in ("ran", "failed", "asking") for part in TABS),
    *(f"/dashboard/runs/{{{run}}}{part}" for run in ("failed", "asking") for part in RUN_QUERIES[1:]),
)
"""Pages with other texts in their HTML, on which scripts build nothing that they don't build on those of `PATHS`."""
SHOWS_HOSTILE = {
    "/dashboard/workflows",
    "/dashboard/runs",
    "/dashboard/approvals",
    "/dashboard/deliveries",
    "/dashboard/dead-letters?muted=true",
    "/dashboard/sources",
    "/dashboard/keys",
    "/dashboard/workflows/{id}",
    "/dashboard/runs/{failed}",
}
"""Pages that must show the text, so that the others' silence means something."""


async def test_no_page_makes_markup_of_a_text(visit: HostileVisit, *, is_thorough: bool) -> None:
    page = visit.page
    await page.open(f"{visit.url}/sign-in")
    await page.fill("#key", visit.admin.key)
    await page.follow("button[type=submit]")
    await page.wait_for("location.pathname.startsWith('/dashboard')")
    # One change differs from the next in a field that most pages don't show: ordinary runs look at some.
    changed = visit.workflows if is_thorough else visit.workflows[::4]
    others = [f"/dashboard/workflows/{one}?node=step" for one in changed]
    for path in PATHS:
        await page.open(visit.url + path.format(**visit.names), "document.querySelector('h1') !== null")
        assert await page.evaluate(MARKUP) == 0, path
        refusals = [one for one in page.problems if '"source": "network"' in one]
        assert page.problems == refusals, path  # such as a plan of a run that has not ended
        page.problems.clear()
        if path in SHOWS_HOSTILE:
            shown = await page.evaluate(
                "document.querySelector('main').textContent"
                " + [...document.querySelectorAll('input')].map(one => one.value)"
            )
            assert HOSTILE in shown, path
    for path in (*SIMILAR_PATHS, *others):
        assert await page.evaluate(f"{PARSE}({path.format(**visit.names)!r})") == [True, 0], path


async def test_fields_of_texts_take_any_text(visit: HostileVisit) -> None:
    """A text that is refused would test nothing: the fields that people write are not among the refused ones."""
    accepted = {
        (name, ".".join(place))
        for (name, place), status in visit.answers.items()
        if status < 400 or status == CONFLICT
    }
    written = {
        ("POST /api/v1/workflows", "name"),
        ("POST /api/v1/workflows", "description"),
        ("POST /api/v1/workflows", "nodes.[].label"),
        ("POST /api/v1/workflows", "tags.[]"),
        ("POST /api/v1/workflows/{id}/versions", "description"),
        ("POST /api/v1/workflow-nodes", "name"),
        ("POST /api/v1/workflow-nodes", "description"),
        ("POST /api/v1/datasources", "name"),
        ("POST /api/v1/auth/keys", "name"),
        ("POST /api/v1/auth/users", "name"),
        ("POST /api/v1/auth/event-tokens", "name"),
        ("POST /api/v1/workflows/{id}/enqueue", "source"),
        ("POST /api/v1/workflows/{id}/execute", "tags.[]"),
        ("POST /api/v1/workflows/{mail}/email-trigger", "subject"),
        ("POST /api/v1/workflows/events", "source"),
    }
    assert written - accepted == set()
