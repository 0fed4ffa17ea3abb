"""JSON Schemas of answers as providers enforce them."""

from __future__ import annotations

from typing import Any

import pytest

from nodes.ai import answer_schemas

CITY: dict[str, Any] = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
CLOSED = {**CITY, "additionalProperties": False}


def build(part: object) -> dict[str, Any]:
    """Return the schema of an object with one required field."""
    return {
        "type": "object",
        "properties": {"it": part},
        "required": ["it"],
        "additionalProperties": False,
    }


def test_objects_inside_a_schema_are_closed_too_and_bounds_may_go() -> None:
    schema = build({"type": "array", "items": {"anyOf": [CITY, {"type": "string", "maxLength": 3}]}})
    closed = build({"type": "array", "items": {"anyOf": [CLOSED, {"type": "string", "maxLength": 3}]}})
    assert answer_schemas.close_objects(schema) == closed
    bare = build({"type": "array", "items": {"anyOf": [CLOSED, {"type": "string"}]}})
    assert answer_schemas.close_objects(schema, keeps_bounds=False) == bare
    open_object = build({"type": "object", "additionalProperties": {"type": "string"}})
    assert answer_schemas.close_objects(open_object) == open_object
    named_like_a_keyword = build({"type": "object", "properties": {"pattern": {"type": "string"}}})
    found = answer_schemas.close_objects(named_like_a_keyword, keeps_bounds=False)
    assert found is not None
    assert found["properties"]["it"]["properties"] == {"pattern": {"type": "string"}}


@pytest.mark.parametrize(
    "schema",
    [
        CLOSED,
        build({"type": ["string", "null"], "description": "A name."}),
        build({"enum": ["a", "b"]}),
        {**build({"$ref": "#/$defs/city"}), "$defs": {"city": CLOSED}},
    ],
)
def test_schemas_in_the_common_subset_are_enforced(schema: dict[str, Any]) -> None:
    assert answer_schemas.is_enforced(schema, needs_all_fields=True)


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "string"},
        {"type": "object"},
        CITY,
        build({}),
        build(CITY),
        build({"type": "string", "maxLength": 3}),
        build({"oneOf": [CLOSED]}),
        build({"$ref": "https://other.example/schema"}),
        {**CLOSED, "additionalProperties": {"type": "string"}},
        build({"anyOf": [{"type": "string"}, {"type": "object"}]}),
    ],
)
def test_others_are_not(schema: dict[str, Any]) -> None:
    assert not answer_schemas.is_enforced(schema, needs_all_fields=False)


def test_an_optional_field_is_enforced_by_some_providers_alone() -> None:
    schema = {**CLOSED, "required": []}
    assert answer_schemas.is_enforced(schema, needs_all_fields=False)
    assert not answer_schemas.is_enforced(schema, needs_all_fields=True)


def test_a_schema_without_an_end_is_left_as_it_is() -> None:
    nested: dict[str, Any] = {"type": "string"}
    for _ in range(2_000):
        nested = build(nested)
    assert answer_schemas.close_objects(nested) is None
