"""HTTP answers of workflows: permitted statuses, headers and bodies."""

from __future__ import annotations

import pytest

from engine.run_errors import NodeError
from engine.values import Json
from nodes import catalog, webhook_responses

PLAIN: dict[str, Json] = {"status": 200, "headers": {}, "bodyType": "json"}


@pytest.mark.parametrize(
    ("config", "headers", "body"),
    [
        ({"body": {"a": 1}}, {"content-type": "application/json"}, b'{"a":1}'),
        ({"body": None}, {"content-type": "application/json"}, b"null"),
        ({}, {}, b""),
        ({"body": "é", "bodyType": "text"}, {"content-type": "text/plain; charset=utf-8"}, "é".encode()),
        ({"body": "AAE=", "bodyType": "base64"}, {"content-type": "application/octet-stream"}, b"\0\1"),
        (
            {"body": "<a/>", "bodyType": "text", "headers": {"Content-Type": "text/xml", "X-Count": 7}},
            {"content-type": "text/xml", "x-count": "7"},
            b"<a/>",
        ),
        ({"status": 204, "body": "x", "headers": {"Retry-After": None}}, {}, b""),
    ],
)
def test_an_answer_follows_the_config(config: Json, headers: Json, body: bytes) -> None:
    assert isinstance(config, dict)
    answer = webhook_responses.build_response({**PLAIN, **config})
    assert (answer.status, answer.headers, answer.body) == (config.get("status", 200), headers, body)


@pytest.mark.parametrize(
    "name",
    [
        "Set-Cookie",
        "Connection",
        "Transfer-Encoding",
        "Content-Length",
        "Content-Encoding",
        "Content-Security-Policy",
        "Cache-Control",
        "Access-Control-Allow-Origin",
        "Clear-Site-Data",
        "X-Content-Type-Options",
        "X-Frame-Options",
        "X-Accel-Redirect",
        "X-Sendfile",
        "X-Request-Id",
        "x-a\r\nSet-Cookie",
        "",
    ],
)
def test_workflows_cannot_set_response_headers_that_control_handling(name: str) -> None:
    with pytest.raises(NodeError, match="other names that begin with x-"):
        webhook_responses.build_response({**PLAIN, "headers": {name: "1"}})


@pytest.mark.parametrize(
    "config",
    [
        {"status": 101},
        {"status": 600},
        {"status": 200.5},
        {"headers": {"X-A": "1\r\nSet-Cookie: a=b"}},
        {"headers": {"X-A": "☂"}},
        {"headers": {"X-A": "1", "x-a": "2"}},
        {"headers": {"X-A": "1" * 2_001}},
        {"headers": {f"X-{number}": 1 for number in range(51)}},
        {"body": "x" * 1_000_001, "bodyType": "text"},
        {"body": "no base64", "bodyType": "base64"},
        {"body": 7, "bodyType": "base64"},
    ],
    ids=lambda config: str(config)[:40],  # each process of a run sends the names of all tests
)
def test_a_malformed_answer_is_refused(config: dict[str, Json]) -> None:
    with pytest.raises(NodeError) as refused:
        webhook_responses.build_response({**PLAIN, **config})
    assert refused.value.code == "invalid-config"


@pytest.mark.parametrize(
    ("config", "places"),
    [
        ({}, []),
        ({"verification": {"provider": "none"}}, []),
        ({"verification": {"provider": "stripe", "dataSource": ["ds_1", "ds_2"]}}, []),
        ({"verification": {}}, ["verification.provider"]),
        ({"verification": {"provider": "github"}}, ["verification.dataSource"]),
        ({"verification": {"provider": "hmac", "dataSource": "ds_1"}}, ["verification.header"]),
        ({"verification": "{{ data.x }}"}, ["verification"]),
        ({"allowedNetworks": ["10.0.0.0/8", "::1", "10.0.0.1/8"]}, ["allowedNetworks.2"]),
        ({"methods": ["HEAD"]}, ["methods.0"]),
    ],
)
def test_the_config_of_a_hook_is_checked_before_it_takes_anything(
    config: dict[str, Json], places: list[str]
) -> None:
    loaded = catalog.load_catalog()
    problems = loaded.config_problems(loaded.get("webhook"), config)
    assert [problem.path for problem in problems] == places
