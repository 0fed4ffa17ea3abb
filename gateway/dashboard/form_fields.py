"""Fields of forms: from a JSON Schema, or from the paths that the expressions of a workflow read."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

from msgspec import Struct

from gateway.dashboard.formats import show_whole_json

KINDS: Final = {"string": "text", "integer": "integer", "number": "number", "boolean": "boolean"}
"""Kinds of form fields by the type of a JSON Schema; any other type is written as JSON."""
BODY_TRIGGERS: Final = frozenset({"manual", "rest-api", "webhook"})
"""Types of triggers whose output has the inputs of a run as `body`."""
MAX_FIELDS: Final = 30
NAME: Final = r"([A-Za-z_][A-Za-z0-9_]*)"
READ_INPUT: Final = re.compile(rf"\b(?:trigger|data|nodes\.[A-Za-z0-9_-]+)\.body\.{NAME}")


class FormField(Struct, frozen=True):
    """Field of a form: `kind` is `text`, `date`, `integer`, `number`, `boolean`, `choice`, `json` or `any`."""

    name: str
    label: str
    kind: str
    is_required: bool
    hint: str
    choices: Sequence[str] = ()
    default: str = ""
    """Value before a person enters one; empty without one, `true` for a checked box."""


def list_fields(schema: Mapping[str, Any] | None) -> Sequence[FormField]:
    """Return a form field for each property of an object's JSON Schema, in its order; empty for None.

    A property with text choices is a `choice`, a text of the format `date` a `date`; other types than text, integer,
    number and boolean become `json`.
    """
    properties = (schema or {}).get("properties", {})
    required = (schema or {}).get("required", [])
    return [_build_field(name, given, is_required=name in required) for name, given in properties.items()]


def _build_field(name: str, schema: Any, *, is_required: bool) -> FormField:  # noqa: ANN401 - any JSON Schema
    """Return the form field of one property: name, title, kind, description and choices.

    Anything that is no simple type is a `json` field.
    """
    given = schema if isinstance(schema, dict) else {}
    choices = given.get("enum", [])
    is_choice = bool(choices) and all(isinstance(choice, str) for choice in choices)
    kind = "choice" if is_choice else KINDS.get(str(given.get("type")), "json")
    if kind == "text" and given.get("format") == "date":
        kind = "date"
    default = given.get("default")
    return FormField(
        name,
        str(given.get("title") or name),
        kind,
        is_required,
        str(given.get("description", "")),
        choices if is_choice else (),
        "" if default is None else default if isinstance(default, str) else show_whole_json(default),
    )


def list_inputs(nodes: Iterable[Mapping[str, Any]]) -> Sequence[FormField]:
    """Return a field for each input of a run that the expressions and templates of these nodes read, at most 30.

    Its hint names up to three nodes that read it. Empty if no trigger takes a body (`manual`, `rest-api`, `webhook`).
    """
    found: dict[str, list[str]] = {}
    has_body = False
    for node in nodes:
        has_body = has_body or node["type"] in BODY_TRIGGERS
        for text in _iterate_texts([node["config"], node["inputMappings"]]):
            for name in READ_INPUT.findall(text):
                readers = found.setdefault(name, [])
                if node["label"] not in readers:
                    readers.append(node["label"])
    if not has_body:
        return ()
    return [
        FormField(
            name,
            name,
            "any",
            is_required=False,
            hint=f"used by {', '.join(f'“{reader}”' for reader in readers[:3])}",
        )
        for name, readers in [*found.items()][:MAX_FIELDS]
    ]


def _iterate_texts(values: Iterable[Any]) -> Iterable[str]:
    """Yield all texts within JSON values, in their order, also those in lists and objects; keys are left out."""
    left = [*values]
    while left:
        value = left.pop()
        if isinstance(value, str):
            yield value
        elif isinstance(value, dict):
            left += reversed(value.values())
        elif isinstance(value, list):
            left += reversed(value)
