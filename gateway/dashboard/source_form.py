"""Forms of new data sources: a field for each setting and secret of their type."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, Final

import msgspec
from msgspec import Struct

from gateway.dashboard.form_fields import FormField, list_fields
from models.data_source_types import DATA_SOURCE_TYPES, DataSourceFields, DataSourceType

LABELS: Final = {
    DataSourceType.SQLITE: "SQLite file",
    DataSourceType.POSTGRESQL: "PostgreSQL",
    DataSourceType.MYSQL: "MySQL",
    DataSourceType.HTTP_BEARER: "HTTP, bearer token",
    DataSourceType.HTTP_BASIC: "HTTP, user and password",
    DataSourceType.API_KEY: "HTTP, API key in a header",
    DataSourceType.SMTP: "Mail server (SMTP)",
    DataSourceType.S3: "S3 bucket",
    DataSourceType.AI_PROVIDER: "Provider of language models",
    DataSourceType.WEBHOOK_SECRET: "Secret of a webhook",
}
"""Types that a form creates, with their names; tool servers have their own commands."""
TOO_GENERAL: Final = "a text of one line"
"""Description of a field that says nothing to a person."""
TITLES: Final = {"tls": "TLS", "baseUrl": "Base URL", "accessKeyId": "Access key ID"}
WORD: Final = re.compile(r"(?<=[a-z0-9])(?=[A-Z])")


class SourceForm(Struct, frozen=True):
    """Form of a new data source of one type."""

    type: str
    label: str
    settings: Sequence[FormField]
    secrets: Sequence[FormField]


def build_form(type_: str) -> SourceForm | None:
    """Return the form of a type of data sources; None for a type that no form creates."""
    kind = next((kind for kind in LABELS if kind == type_), None)
    if kind is None:
        return None
    fields = DATA_SOURCE_TYPES[kind]
    return SourceForm(type_, LABELS[kind], _list_fields(fields.settings), _list_fields(fields.secrets))


def _list_fields(shape: type[DataSourceFields]) -> Sequence[FormField]:
    _, components = msgspec.json.schema_components([shape], ref_template="{name}")
    schema = components[shape.__name__]
    described = {
        name: _describe(name, one, components, is_required=name in schema["required"])
        for name, one in schema["properties"].items()
    }
    return list_fields({**schema, "properties": described})


def _describe(
    name: str, schema: Mapping[str, Any], components: Mapping[str, Any], *, is_required: bool
) -> Mapping[str, Any]:
    """Return the schema of one field for its form: with title and hint, and without null, reference or default."""
    chosen = next((one for one in schema.get("anyOf", ()) if one.get("type") != "null"), schema)
    described = {**components[chosen["$ref"]], "description": ""} if "$ref" in chosen else dict(chosen)
    hint = described.get("description", "")
    parts = ["" if hint == TOO_GENERAL else hint]
    if not is_required:
        default = schema.get("default")
        parts.append(f"{default} if it is empty" if default not in {None, "", False} else "optional")
    if described.get("type") == "array":
        parts.insert(0, "separated by commas")
    title = TITLES.get(name) or WORD.sub(" ", name).capitalize()
    return {**described, "title": title, "description": ", ".join(filter(None, parts)), "default": None}
