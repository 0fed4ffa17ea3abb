"""Arbitrary requests: each gets a clear answer of one shape, and never a 500."""

import gzip
import json
import zlib
from collections.abc import AsyncIterator, Callable

import httpx2
import pytest

from tests.integration.gateway_harness import GRAPH, GatewayHarness, OrganizationUsers, assert_refused

WORKFLOWS = "/api/v1/workflows"
JSON = {"Content-Type": "application/json"}


@pytest.fixture(scope="module")
async def people(harness: GatewayHarness) -> OrganizationUsers:
    return await harness.people()


@pytest.mark.parametrize(
    ("body", "code"),
    [
        (b"{", "malformed-json"),
        (b"\xff\xfe", "malformed-json"),
        (b'\xef\xbb\xbf{"name": "x"}', "malformed-json"),
        (b'{"name": "x"} extra', "malformed-json"),
        (b"{'name': 'x'}", "malformed-json"),
        (b'{"name": "x", "name": "y"}', "duplicate-key"),
        (b'{"name": "x", "settings": {"a": NaN}}', "not-finite"),
        (b'{"name": "x", "settings": {"a": -Infinity}}', "not-finite"),
        (b'{"name": "x", "settings": {"a": 1e999}}', "not-finite"),
        (b'{"name": "\\ud800"}', "lone-surrogate"),
        (b'{"name": "a\\u0000b"}', "nul-character"),
        (b'{"name": "x", "config": {"a": ' + b"9" * 400 + b"}}", "number-too-long"),
        (b'{"name": "x", "config": ' + b'{"a":' * 70 + b"1" + b"}" * 71, "too-deep"),
        (b'{"name": "x", "config": ' + b"[" * 50_000 + b"]" * 50_000 + b"}", "too-deep"),
    ],
)
async def test_a_body_that_is_no_strict_json_is_refused(
    people: OrganizationUsers, body: bytes, code: str
) -> None:
    assert_refused(await people.owner.api.post(WORKFLOWS, content=body, headers=JSON), 400, code)


@pytest.mark.parametrize(
    ("body", "paths"),
    [
        ("[]", [""]),
        ('"text"', [""]),
        ("null", [""]),
        ("{}", ["name"]),
        ('{"name": 3, "tags": "x", "status": "on"}', ["name", "status", "tags"]),
        ('{"name": ""}', ["name"]),
        ('{"name": "  \\t "}', ["name"]),
        ('{"name": "a\\u0007b"}', ["name"]),
        ('{"name": "a\\u2028b"}', ["name"]),
        ('{"name": "%s"}' % ("x" * 201), ["name"]),
        ('{"name": "x", "description": "%s"}' % ("x" * 5001), ["description"]),
        ('{"name": "x", "tags": [1, "ok", null]}', ["tags.0", "tags.2"]),
        ('{"name": "x", "tags": ["%s", ""]}' % ("x" * 65), ["tags.0", "tags.1"]),
        (json.dumps({"name": "x", "tags": [f"tag {number}" for number in range(51)]}), ["tags"]),
        ('{"name": "x", "nodes": {}}', ["nodes"]),
        ('{"name": "x", "nodes": [1]}', ["nodes.0"]),
        ('{"name": "x", "nodes": [{"nodeId": "set", "config": []}]}', ["nodes.0.config"]),
        ('{"name": "x", "nodes": [{"nodeId": "set", "position": {"x": "1", "y": 2}}]}', ["nodes.0.position.x"]),
        ('{"name": "x", "nodes": [{"nodeId": "set", "id": "a b"}, {}]}', ["nodes.0.id", "nodes.1.nodeId"]),
        ('{"name": "x", "nodes": [{"nodeId": "set", "id": "../../etc"}]}', ["nodes.0.id"]),
        ('{"name": "x", "nodes": [{"nodeId": "sett"}]}', ["nodes.0.nodeId"]),
        ('{"name": "x", "nodes": [{"nodeId": "set", "version": "9.9.9"}]}', ["nodes.0.nodeId"]),
        ('{"name": "x", "nodes": [{"nodeId": "%s"}]}' % ("y" * 100_000), ["nodes.0.nodeId"]),
        ('{"name": "x", "nodes": [{"nodeId": "set", "timeout": 0}]}', ["nodes.0.timeout"]),
        ('{"name": "x", "nodes": [{"nodeId": "set", "retry": {"maxAttempts": 99}}]}', ["nodes.0.retry.maxAttempts"]),
        ('{"name": "x", "connections": [{"source": "a"}]}', ["connections.0.targetNodeId"]),
        ('{"name": "x", "connections": [{"source": 1, "target": "b"}]}', ["connections.0.source"]),
        ('{"name": 1, "settings": {"timeout": "1h", "maxRetries": 1.5}}', ["name"]),
        ('{"name": "x", "settings": {"timeout": "1h"}}', ["settings.timeout"]),
        ('{"name": "", "settings": {"maxRetries": 1.5}}', ["name", "settings.maxRetries"]),
        ('{"name": "", "settings": {"timeout": 1e300}}', ["name", "settings.timeout"]),
        ('{"name": "x", "settings": {"retryOnFailure": 1}}', ["settings.retryOnFailure"]),
        ('{"name": "x", "settings": {"parallelism": 0}}', ["settings.parallelism"]),
        ('{"name": "x", "settings": {"parallelism": 65}}', ["settings.parallelism"]),
        ('{"name": "x", "settings": {"mine": "%s"}}' % ("x" * 20_000), ["settings", "settings.mine"]),
        ('{"name": "x", "config": {"mine": "%s"}}' % ("x" * 20_000), ["config"]),
    ],
)  # fmt: skip
async def test_each_wrong_field_has_its_own_entry(
    people: OrganizationUsers, body: str, paths: list[str]
) -> None:
    response = await people.owner.api.post(WORKFLOWS, content=body, headers=JSON)
    assert_refused(response, 422, "validation-failed")
    details = response.json()["error"]["details"]
    assert sorted(detail["path"] for detail in details) == paths
    assert all(set(detail) == {"path", "code", "message"} for detail in details)


async def test_a_number_without_a_fraction_is_whole_however_it_is_written(people: OrganizationUsers) -> None:
    settings = {"maxRetries": 2.0, "resources": {"cpuMillicores": 250.0}}
    node = '{"nodeId": "set", "id": "a", "retry": {"maxAttempts": 3e0}}'
    body = f'{{"name": "x", "settings": {json.dumps(settings)}, "nodes": [{node}]}}'
    made = await people.owner.api.post(WORKFLOWS, content=body, headers=JSON)
    assert made.status_code == 201, made.text
    path = f"{WORKFLOWS}/{made.json()['workflowId']}"
    text = (await people.owner.api.get(path)).text
    for kept in ('"maxRetries":2,', '"cpuMillicores":250}', '"maxAttempts":3}'):
        assert kept in text
    for minutes in (30.0, 5):
        policy = {"type": "idle-shutdown", "idleTimeoutMinutes": minutes}
        answer = await people.owner.api.put(f"{path}/lifecycle", json=policy)
        assert answer.json()["lifecyclePolicy"] == policy
    for wrong in (30.5, "30", True, 1e300):
        policy = {"type": "idle-shutdown", "idleTimeoutMinutes": wrong}
        answer = await people.owner.api.put(f"{path}/lifecycle", json=policy)
        assert_refused(answer, 422, "validation-failed")
        assert [detail["path"] for detail in answer.json()["error"]["details"]] == ["idleTimeoutMinutes"]


async def test_an_unknown_node_type_is_told_with_the_nearest_names(people: OrganizationUsers) -> None:
    body = {"name": "x", "nodes": [{"nodeId": "csv-parser"}]}
    response = await people.owner.api.post(WORKFLOWS, json=body)
    assert_refused(response, 422, "validation-failed")
    assert "csv-parse" in response.json()["error"]["details"][0]["message"]


async def test_an_answer_lists_a_hundred_wrong_fields_at_most(people: OrganizationUsers) -> None:
    body = {"name": "x", "nodes": [{"nodeId": f"unknown-{number}"} for number in range(2_000)]}
    response = await people.owner.api.post(WORKFLOWS, json=body)
    assert_refused(response, 422, "validation-failed")
    assert len(response.json()["error"]["details"]) == 100


@pytest.mark.parametrize("limit", [("nodes", 10_000), ("connections", 20_000)])
async def test_a_graph_has_a_largest_size(people: OrganizationUsers, limit: tuple[str, int]) -> None:
    field, most = limit
    response = await people.owner.api.post(WORKFLOWS, json={"name": "x", field: [{}] * (most + 1)})
    assert_refused(response, 422, "validation-failed")


@pytest.mark.parametrize(
    ("content_type", "status"),
    [
        (None, 415),
        ("text/plain", 415),
        ("application/x-www-form-urlencoded", 415),
        ("multipart/form-data; boundary=x", 415),
        ("application/jsonp", 415),
        ("application/json; charset=utf-8", 201),
        ("APPLICATION/JSON", 201),
        ("application/vnd.pilotflame+json", 201),
    ],
)
async def test_a_body_must_be_sent_as_json(
    people: OrganizationUsers, content_type: str | None, status: int
) -> None:
    headers = {} if content_type is None else {"Content-Type": content_type}
    response = await people.owner.api.post(WORKFLOWS, content=b'{"name": "x"}', headers=headers)
    if status == 201:
        assert response.status_code == 201
    else:
        assert_refused(response, 415, "unsupported-media-type")


@pytest.mark.parametrize(
    ("encoding", "compress"),
    [
        ("gzip", gzip.compress),
        ("x-gzip", gzip.compress),
        ("deflate", zlib.compress),
        ("deflate", lambda body: zlib.compress(body, wbits=-15)),
        ("identity", bytes),
    ],
    ids=["gzip", "x-gzip", "deflate", "deflate without its wrapper", "identity"],
)
async def test_a_body_may_be_compressed(
    people: OrganizationUsers, encoding: str, compress: Callable[[bytes], bytes]
) -> None:
    headers = {"Content-Type": "application/json", "Content-Encoding": encoding}
    body = compress(b'{"name": "x"}')
    response = await people.owner.api.post(WORKFLOWS, content=body, headers=headers)
    assert response.status_code == 201, response.text

    async def halves() -> AsyncIterator[bytes]:
        yield body[:5]
        yield body[5:]

    response = await people.owner.api.post(WORKFLOWS, content=halves(), headers=headers)
    assert response.status_code == 201, response.text


async def test_a_compressed_body_is_bounded_and_whole(people: OrganizationUsers) -> None:
    headers = {"Content-Type": "application/json", "Content-Encoding": "gzip"}

    async def post(content: bytes) -> httpx2.Response:
        return await people.owner.api.post(WORKFLOWS, content=content, headers=headers)

    bomb = gzip.compress(b'{"name": "' + b"x" * 50_000_000 + b'"}')
    answer = await post(bomb)
    assert_refused(answer, 413, "payload-too-large")
    assert "PILOTFLAME_MAX_BODY_BYTES" in answer.text
    whole = gzip.compress(b'{"name": "x"}')
    for broken in (whole[:-4], whole + b"more", b'{"name": "x"}'):
        assert_refused(await post(broken), 400, "malformed-body")
    headers["Content-Encoding"] = "br"
    answer = await post(whole)
    assert_refused(answer, 415, "unsupported-media-type")
    assert answer.headers["Accept-Encoding"] == "gzip, deflate"


@pytest.mark.parametrize(
    "query",
    [
        "limit=0",
        "limit=101",
        "limit=-1",
        "limit=ten",
        "limit=1.5",
        "limit=99999999999999999999",
        "limit=%D9%A1",
        "offset=-1",
        "offset=1000001",
        "sort=name:up",
        "sort=password",
        "sort=name;DROP TABLE workflow",
        "status=on",
        "search=%00",
        "tag=%00",
        "search=" + "x" * 201,
        "&".join(f"p{number}=1" for number in range(60)),
    ],
)
async def test_a_query_out_of_range_is_refused(people: OrganizationUsers, query: str) -> None:
    assert_refused(await people.owner.api.get(f"{WORKFLOWS}?{query}"), 400, "invalid-query")


@pytest.mark.parametrize(
    "query",
    [
        "",
        "limit=&offset=&sort=&status=",
        "sort=name",
        "sort=updatedAt:asc",
        "search=%FF",
        "limit=0&limit=2",
    ],
)
async def test_a_query_that_says_little_or_nothing_is_served(people: OrganizationUsers, query: str) -> None:
    response = await people.owner.api.get(f"{WORKFLOWS}?{query}")
    assert response.status_code == 200, response.text


@pytest.mark.parametrize(
    "path",
    [
        "/api",
        "/api/v1",
        "/api/v1/nothing",
        "/api/v1/workflows/",
        "/api/v1//workflows",
        "/API/v1/workflows",
        "/api/v1/workflows/a/b/c",
        "/api/v1/workflows/..%2f..%2fhealthz",
        "/api/v1/workflows/x%00y",
        "/api/v1/workflows/wf_%27%20OR%201=1",
        "/api/v1/workflows/" + "x" * 65,
        "/api/v1/workflows/%E2%80%AE",
        "/api/v1/workflows/wf_nobody",
    ],
)
async def test_missing_objects_are_not_found(people: OrganizationUsers, path: str) -> None:
    assert_refused(await people.owner.api.get(path), 404, "not-found")


@pytest.mark.parametrize("method", ["PATCH", "TRACE", "PROPFIND", "DELETE"])
async def test_a_method_that_a_path_lacks_names_those_that_it_has(
    people: OrganizationUsers, method: str
) -> None:
    response = await people.owner.api.request(method, WORKFLOWS)
    assert_refused(response, 405, "method-not-allowed")
    assert response.headers["Allow"] == "GET, HEAD, OPTIONS, POST"


async def test_a_head_request_is_a_get_without_its_body(people: OrganizationUsers) -> None:
    assert (await people.owner.api.head(WORKFLOWS)).status_code == 200
    assert (await people.owner.api.head(f"{WORKFLOWS}/wf_nobody")).status_code == 404


@pytest.mark.parametrize("method", ["POST", "PUT"])
async def test_a_body_over_the_limit_is_refused_with_any_declared_length(
    people: OrganizationUsers, method: str
) -> None:
    path = WORKFLOWS if method == "POST" else f"{WORKFLOWS}/{await people.owner.create()}"
    too_large = b'{"name": "%s"}' % (b"x" * 1_000_000)

    async def chunks() -> AsyncIterator[bytes]:
        for start in range(0, len(too_large), 100_000):
            yield too_large[start : start + 100_000]

    told = await people.owner.api.request(method, path, content=too_large, headers=JSON)
    assert_refused(told, 413, "payload-too-large")
    untold = await people.owner.api.request(method, path, content=chunks(), headers=JSON)
    assert_refused(untold, 413, "payload-too-large")
    lied = await people.owner.api.request(
        method, path, content=b"{}", headers=JSON | {"Content-Length": "9" * 30}
    )
    assert_refused(lied, 413, "payload-too-large")


async def test_a_body_in_many_pieces_is_put_together(people: OrganizationUsers) -> None:
    async def chunks() -> AsyncIterator[bytes]:
        for piece in (b'{"na', b'me": ', b'"In pieces"', b"}"):
            yield piece

    response = await people.owner.api.post(WORKFLOWS, content=chunks(), headers=JSON)
    assert response.status_code == 201


async def test_a_body_is_read_after_the_key_is_checked(harness: GatewayHarness) -> None:
    nobody = await harness.client("sk-00nobody", address="10.9.9.9")
    assert_refused(await nobody.post(WORKFLOWS, content=b"{", headers=JSON), 401, "unauthorized")


@pytest.mark.parametrize(
    ("given", "is_kept"),
    [("abc-DEF_123", True), ("x" * 64, True), ("x" * 65, False), ("a b", False), ("é", False), ("", False)],
)
async def test_a_request_id_is_taken_over_where_it_is_one(
    people: OrganizationUsers, given: str, *, is_kept: bool
) -> None:
    headers = {b"X-Request-Id": given.encode("latin-1")}
    response = await people.owner.api.get("/api/v1/nothing", headers=headers)
    assert_refused(response, 404, "not-found")
    shown = response.json()["requestId"]
    assert (shown == given) if is_kept else shown.startswith("req_")


async def test_read_only_fields_stay_unchanged(people: OrganizationUsers) -> None:
    of_other_routes = {"sharedWith": [people.colleague.user.id], "isPublic": True, "isTemplate": True}
    forbidden = {
        "id": "wf_mine",
        "version": 99,
        "organizationId": people.stranger.user.organization_id,
        "ownerId": people.admin.user.id,
        "revision": 77,
        "scopes": ["datasources:read:all"],
        "createdAt": "2001-01-01T00:00:00Z",
    }
    for name, value in of_other_routes.items():
        response = await people.owner.api.post(WORKFLOWS, json={"name": "New", name: value})
        assert_refused(response, 422, "validation-failed")
    workflow_id = await people.owner.create(**forbidden, **GRAPH)
    shown = await people.owner.workflow(workflow_id)
    assert shown["id"] == workflow_id != "wf_mine"
    assert shown["version"] == 1
    assert shown["organizationId"] == people.owner.user.organization_id
    assert shown["ownerId"] == people.owner.user.id
    assert (shown["sharedWith"], shown["isPublic"], shown["isTemplate"]) == ([], False, False)
    assert shown["scopes"] == []
    assert shown["createdAt"] > "2026"
    for name, value in {**forbidden, **of_other_routes, "status": "active"}.items():
        if name != "revision":
            body = {name: value, "name": "New"}
            response = await people.owner.api.put(f"{WORKFLOWS}/{workflow_id}", json=body)
            assert_refused(response, 422, "validation-failed")
    assert await people.owner.workflow(workflow_id) == shown
