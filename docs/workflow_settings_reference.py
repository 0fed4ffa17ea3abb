"""Generator of the tables of workflow settings and node retries, from their wire types."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Final

from engine.graph import RetryPolicy
from gateway.openapi import schemas
from gateway.workflows.graph_shapes import RetryShape
from gateway.workflows.run_settings import KnownSettings

_HEAD: Final = ("| setting | type | default | meaning |", "| --- | --- | --- | --- |")
RETRY_DEFAULTS: Final[Mapping[str, float]] = {
    "maxAttempts": RetryPolicy().max_attempts,
    "backoff": int(RetryPolicy().backoff_seconds),
    "maxDelay": int(RetryPolicy().max_delay_seconds),
    "jitter": RetryPolicy().jitter,
}
RETRY_FAILURES: Final = 5
"""Number of failed attempts whose delays the example shows."""


def build_settings_table() -> str:
    """Return a table with a row for each workflow setting, followed by the fields of settings that are objects."""
    _, named = schemas.build_schemas([KnownSettings])
    return "\n".join([*_HEAD, *_setting_rows(named["KnownSettings"], named)])


def build_retry_table() -> str:
    """Return a table with a row for each field of a node's `retry`."""
    _, named = schemas.build_schemas([RetryShape])
    (schema,) = named.values()
    for name, field in _schema_properties(schema):
        field["default"] = RETRY_DEFAULTS[name]
    return "\n".join([*_HEAD, *_setting_rows(schema, named)])


def build_delays_table() -> str:
    """Return a table of the delays after each failed attempt, for the default policy and for a low maximum delay."""
    shown = (
        RetryPolicy(max_attempts=6),
        RetryPolicy(max_attempts=6, backoff_seconds=2.0, max_delay_seconds=10.0),
    )
    rows = ["| retry | " + " | ".join(f"after attempt {n}" for n in range(1, RETRY_FAILURES + 1)) + " |"]
    rows.append("| --- |" + " --- |" * RETRY_FAILURES)
    for retry in shown:
        given = {"maxAttempts": retry.max_attempts}
        if retry != shown[0]:
            given |= {"backoff": int(retry.backoff_seconds), "maxDelay": int(retry.max_delay_seconds)}
        delays = (retry.delay_seconds(attempt, chance=0) for attempt in range(1, RETRY_FAILURES + 1))
        rows.append(f"| `{json.dumps(given)}` | {' | '.join(f'{delay:g} s' for delay in delays)} |")
    return "\n".join(rows)


def _schema_properties(schema: Mapping[str, Any]) -> Iterable[tuple[str, dict[str, Any]]]:
    fields: dict[str, dict[str, Any]] = schema["properties"]
    return fields.items()


def _setting_rows(schema: Mapping[str, Any], named: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """Yield a row for each field of a schema, its name after `prefix`; that of an object is followed by its fields.

    `named` has the schemas that fields refer to, by name.
    """
    for name, field in _schema_properties(schema):
        inner = _referenced_schema(field, named)
        is_object = inner is not None and "properties" in inner
        default = (
            "*required*"
            if name in schema.get("required", [])
            else _format_default(field, is_object=is_object)
        )
        kind = "object" if is_object else _describe_type(inner if inner is not None else field)
        yield f"| `{prefix}{name}` | {kind} | {default} | {field.get('description', '')} |"
        if inner is not None and is_object:
            yield from _setting_rows(inner, named, f"{prefix}{name}.")


def _referenced_schema(field: Mapping[str, Any], named: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """Return the schema that a field refers to, also as one of several choices; None without a reference."""
    for option in (field, *field.get("anyOf", ())):
        if "$ref" in option:
            found: Mapping[str, Any] = named[option["$ref"].removeprefix(schemas.REF)]
            return found
    return None


def _describe_type(field: Mapping[str, Any]) -> str:
    if "enum" in field:
        return ", ".join(f"`{option}`" for option in field["enum"])
    kinds = field["type"] if isinstance(field["type"], list) else [field["type"]]
    kind = " or ".join(kind for kind in kinds if kind != "null")
    least, most = field.get("minimum", field.get("exclusiveMinimum")), field.get("maximum")
    if most is None:
        return kind
    above = "above " if "exclusiveMinimum" in field else ""
    return f"{kind}, {above}{least:,} to {most:,}"


def _format_default(field: Mapping[str, Any], *, is_object: bool) -> str:
    if is_object or field.get("default") is None:
        return ""
    return f"`{json.dumps(field['default'])}`"
