from datetime import UTC, datetime
from typing import Any, cast

import pytest

from engine.node_api import NodeType
from engine.triggers import trigger_output
from nodes import catalog

HTTP: dict[str, Any] = {"headers": {}, "query": {}}
NOW = datetime(2026, 1, 1, tzinfo=UTC)


@pytest.mark.parametrize("kind", ["webhook", "rest-api"])
@pytest.mark.parametrize(
    ("inputs", "output"),
    [
        ({"city": "Oslo"}, {"body": {"city": "Oslo"}, **HTTP}),
        ({}, {"body": {}, **HTTP}),
        ({"body": {"city": "Oslo"}}, {"body": {"city": "Oslo"}, **HTTP}),
        ({"body": "text", "query": {"page": "2"}}, {"body": "text", "headers": {}, "query": {"page": "2"}}),
        ({"query": {"page": "2"}}, {"body": {"query": {"page": "2"}}, **HTTP}),
        ({"query": "cats"}, {"body": {"query": "cats"}, **HTTP}),
        ({"title": "Lost?", "body": "text"}, {"body": {"title": "Lost?", "body": "text"}, **HTTP}),
        ([1, "a list"], {"body": [1, "a list"], **HTTP}),
    ],
)
def test_inputs_become_the_body_of_http_triggers_unless_they_are_an_output(
    kind: str, inputs: dict[str, Any], output: dict[str, Any]
) -> None:
    assert trigger_output(kind, inputs, NOW) == output


@pytest.mark.parametrize(
    ("inputs", "output"),
    [
        ({"city": "Oslo"}, {"body": {"city": "Oslo"}}),
        ({}, {"body": {}}),
        ({"body": [1]}, {"body": [1]}),
        ({"query": {"page": 2}}, {"body": {"query": {"page": 2}}}),
        ({"title": "Lost?", "body": "text"}, {"body": {"title": "Lost?", "body": "text"}}),
        ({"body": 1, "headers": {}}, {"body": {"body": 1, "headers": {}}}),
    ],
)
def test_a_manual_trigger_knows_only_a_body(inputs: dict[str, Any], output: dict[str, Any]) -> None:
    assert trigger_output("manual", inputs, NOW) == output


MAIL: dict[str, Any] = {
    "from": "",
    "to": "",
    "cc": "",
    "reply_to": "",
    "subject": "",
    "body_text": "",
    "body_html": "",
    "attachments": [],
    "email_headers": {},
    "authentication": {"spf": None, "dkim": None, "dmarc": None},
    "spam": {"score": None, "verdict": None},
    "virus": None,
    "envelope": {"from": "", "to": []},
    "senderIp": None,
}


@pytest.mark.parametrize(
    ("kind", "inputs", "output"),
    [
        ("queue", {"orderId": 7}, {"message": {"orderId": 7}, "priority": 0, "source": "rest_api"}),
        ("queue", {"message": [7], "source": "shop"}, {"message": [7], "priority": 0, "source": "shop"}),
        ("queue", {"source": "x"}, {"message": {"source": "x"}, "priority": 0, "source": "rest_api"}),
        ("event", {"id": 7}, {"event_type": "", "event_data": {"id": 7}, "source": "platform"}),
        (
            "event",
            {"event_type": "user.created"},
            {"event_type": "", "event_data": {"event_type": "user.created"}, "source": "platform"},
        ),
        (
            "event",
            {"event_type": "a.b", "event_data": 1, "attributes": {"id": "1"}},
            {"event_type": "a.b", "event_data": 1, "source": "platform", "attributes": {"id": "1"}},
        ),
        (
            "queue",
            {"message": "Hello", "to": "Ada"},
            {"message": {"message": "Hello", "to": "Ada"}, "priority": 0, "source": "rest_api"},
        ),
        ("queue", [7], {"message": [7], "priority": 0, "source": "rest_api"}),
        (
            "webhook",
            {"body": 1, "method": "PUT", "respond": "when-done"},
            {"body": 1, "method": "PUT", "respond": "when-done", **HTTP},
        ),
        ("event", {"event_data": 1}, {"event_type": "", "event_data": 1, "source": "platform"}),
        ("email", {}, MAIL),
        (
            "email",
            {"subject": "Hello", "to": "a@example.com"},
            {**MAIL, "subject": "Hello", "to": "a@example.com"},
        ),
        ("schedule", {}, {"scheduledAt": "2026-01-01T00:00:00.000Z", "timezone": "UTC"}),
        (
            "schedule",
            {"scheduledAt": "2026-01-01T09:00:00Z"},
            {"scheduledAt": "2026-01-01T09:00:00Z", "timezone": "UTC"},
        ),
    ],
)
def test_inputs_of_other_triggers_become_event_data(
    kind: str, inputs: dict[str, Any], output: dict[str, Any]
) -> None:
    assert trigger_output(kind, inputs, NOW) == output


@pytest.mark.parametrize(
    "node_type", [one for one in catalog.load_catalog().node_types.values() if one.is_trigger]
)
def test_a_trigger_gives_out_the_fields_that_the_catalogue_names(node_type: NodeType) -> None:
    kind, schema = node_type.trigger_kind or "", node_type.output.schema
    empty = trigger_output(kind, {}, NOW)
    assert sorted(empty) == sorted(cast("list[str]", schema["required"]))
    whole: dict[str, Any] = dict.fromkeys(cast("dict[str, Any]", schema["properties"]))
    assert trigger_output(kind, whole, NOW) == whole, "its own output is no payload"
    if kind not in ("email", "schedule"):
        assert trigger_output(kind, whole | {"other": 1}, NOW).keys() == empty.keys()
