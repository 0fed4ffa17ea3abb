"""Fields of forms: from a JSON Schema, and from the inputs that a workflow reads."""

from __future__ import annotations

from typing import Any

import msgspec

from gateway.dashboard.form_fields import list_fields, list_inputs
from gateway.dashboard.source_form import LABELS, build_form
from models.data_source_types import DATA_SOURCE_TYPES, DataSourceType


def node(name: str, kind: str, **config: Any) -> dict[str, Any]:  # noqa: ANN401 - any JSON value
    return {"id": name, "label": name.title(), "type": kind, "config": config, "inputMappings": {}}


def test_inputs_are_the_paths_of_the_body_that_nodes_read() -> None:
    nodes = [
        node("start", "manual"),
        node("parse", "csv-parse", text="{{ data.body.csv }}"),
        node(
            "note", "set", values={"a": ["{{ trigger.body.by ?? 'x' }}", {"b": "{{ nodes.start.body.csv }}"}]}
        ),
        {**node("map", "set"), "inputMappings": {"x": "trigger.body.by"}},
    ]
    assert [(field.name, field.hint) for field in list_inputs(nodes)] == [
        ("csv", "used by “Parse”, “Note”"),
        ("by", "used by “Note”, “Map”"),
    ]
    assert list_inputs([node("start", "queue-trigger"), nodes[1]]) == ()
    assert list(list_inputs(nodes[:1])) == []


def test_a_schema_has_a_field_for_each_property() -> None:
    schema = {
        "properties": {
            "n": {"type": "integer", "title": "Number"},
            "k": {"enum": ["a", "b"]},
            "mixed": {"enum": [1, "b"]},
            "any": True,
        },
        "required": ["k"],
    }
    fields = list_fields(schema)
    assert [(field.label, field.kind, field.is_required) for field in fields] == [
        ("Number", "integer", False),
        ("k", "choice", True),
        ("mixed", "json", False),
        ("any", "json", False),
    ]
    assert list_fields(None) == []


def test_each_type_of_data_source_has_a_form_with_its_required_fields() -> None:
    assert {*LABELS} == {*DATA_SOURCE_TYPES} - {DataSourceType.MCP_SERVER}, (
        "tool servers have a route of their own"
    )
    for kind in LABELS:
        form = build_form(kind)
        assert form is not None
        for part in ("settings", "secrets"):
            known = msgspec.structs.fields(getattr(DATA_SOURCE_TYPES[kind], part))
            shown = {field.name: field.is_required for field in getattr(form, part)}
            assert shown == {field.encode_name: field.required for field in known}
    assert build_form("mcp-server") is None
