"""Fields of forms: from a JSON Schema, and from the inputs that a workflow reads."""

from __future__ import annotations

from typing import Any

from gateway.dashboard.form_fields import list_fields, list_inputs


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
