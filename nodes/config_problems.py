"""Validation of configs by the JSON Schema of their node type, with messages that help a person fix them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias, cast

from msgspec import Struct

from engine import name_suggestions
from engine.node_api import OF_EACH, FieldCompilation
from engine.values import encode_json
from nodes import config_fields
from nodes.config_formats import PATTERN_DESCRIPTIONS, TEXT_FORMATS

if TYPE_CHECKING:
    from jsonschema_rs import Draft202012Validator, RegexOptions, ValidationError

    from engine.node_api import NodeType
    from engine.values import Json

JsonSchema: TypeAlias = "Mapping[str, Json]"
SchemaPath: TypeAlias = "Sequence[str | int]"

MAXIMUM_PROBLEMS = 50
MAXIMUM_EXPLAINED_VALUES = 10_000
"""Largest number of values to explain: a validator reports every wrong value with a copy of it, which could exhaust the
memory.
"""
SHOWN_CHARACTERS = 100
MAX_PATTERN_BYTES = 262_144
"""Memory of one compiled pattern of a custom node type."""

TEMPLATE_SCHEMA: JsonSchema = {"type": "string", "pattern": r"\{\{"}

_TEMPLATE_INSIDE = "template-inside"
_HAS_TEMPLATE: JsonSchema = {"$ref": f"#/$defs/{_TEMPLATE_INSIDE}"}
_TEMPLATE_DEFINITIONS: JsonSchema = {
    _TEMPLATE_INSIDE: {
        "anyOf": [
            dict(TEMPLATE_SCHEMA),
            {"type": "array", "contains": dict(_HAS_TEMPLATE)},
            {"type": "object", "not": {"additionalProperties": {"not": dict(_HAS_TEMPLATE)}}},
        ]
    }
}
"""Definition of a value that is or contains a text with `{{`."""

TYPE_DESCRIPTIONS = {
    "string": "a text",
    "number": "a number",
    "integer": "a whole number",
    "boolean": "true or false",
    "array": "a list",
    "object": "an object",
    "null": "null",
}
LIMIT_MESSAGES = {
    "minimum": "must be at least {limit}",
    "maximum": "must be at most {limit}",
    "exclusiveMinimum": "must be more than {limit}",
    "exclusiveMaximum": "must be less than {limit}",
    "minLength": "must have {limit} or more characters",
    "maxLength": "must have {limit} or fewer characters",
    "minItems": "must have {limit} or more items",
    "maxItems": "must have {limit} or fewer items",
    "minProperties": "must have {limit} or more fields",
    "maxProperties": "must have {limit} or fewer fields",
    "pattern": "must match {pattern}",
}


class ConfigProblem(Struct, frozen=True):
    """Problem in a config: its path (`aggregations.0.function`), a message and the keyword of the schema."""

    path: str
    message: str
    keyword: str
    steps: tuple[str | int, ...] = ()
    """Keys and indexes from the config to the value, or to a missing field."""
    meant: Json = None
    """Name of the field, or value, that was certainly intended; None without a single candidate."""


# ── schemas ─────────────────────────────────────────────────────────────────────────────────────────────────


def build_validator(node_type: NodeType) -> Draft202012Validator:
    """Return the validator for stored configs of a node type: texts with `{{` fit any field, and any object is a
    condition.

    Patterns in schemas of custom types must match in linear time; ValueError for others.
    """
    from jsonschema_rs import Draft202012Validator  # noqa: PLC0415 - 4 MB that some processes never need

    schema = node_type.config_schema
    for place, kind in node_type.compiled.items():
        if kind is FieldCompilation.CONDITION:
            schema = change_schema(schema, place, lambda _said: {"type": "object"})
    limits: dict[str, Any] = {}
    if node_type.task is not None:
        # The schema is that of a user: its patterns must not backtrack.
        limits = {"offline": True, "pattern_options": linear_patterns()}
    accepting = {"$defs": _TEMPLATE_DEFINITIONS, **accept_templates(schema)}
    return Draft202012Validator(accepting, validate_formats=True, formats=format_checks(), **limits)


def format_checks() -> dict[str, Callable[[str], bool]]:
    """Return, by the name of each text format, a function that returns whether a text has it."""
    return {name: form.fits for name, form in TEXT_FORMATS.items()}


def linear_patterns() -> RegexOptions:
    """Return options for a validator that refuses patterns which need backtracking, or over 256 KiB of memory."""
    from jsonschema_rs import RegexOptions  # noqa: PLC0415 - as above

    return RegexOptions(size_limit=MAX_PATTERN_BYTES, dfa_size_limit=MAX_PATTERN_BYTES)


def change_schema(schema: JsonSchema, place: str, change: Callable[[JsonSchema], JsonSchema]) -> JsonSchema:
    """Return `schema` with the schema of one field replaced by `change(schema of the field)`; a missing field is added,
    with the change of an empty schema.

    `place` is a field such as `condition`, or a field of list items such as `cases[].condition`.
    """
    field, of_each, name = place.partition(OF_EACH)
    properties = dict(cast("Mapping[str, Json]", schema.get("properties", {})))
    said = cast("JsonSchema", properties.get(field, {}))
    if of_each:
        of_items = change_schema(cast("JsonSchema", said.get("items", {})), name, change)
        properties[field] = {**said, "items": dict(of_items)}
    else:
        properties[field] = dict(change(said))
    return {**schema, "properties": properties}


def accept_templates(schema: JsonSchema) -> dict[str, Json]:
    """Return a schema that accepts a text with `{{` for any property and item without `x-constant` or `x-language`.

    Also within `anyOf`, `allOf`, `then`, `else` and `oneOf`. A value with an expression may fit several schemas of
    `oneOf`, since only the rendered value shows which is meant; with `oneOf`, the result refers to
    `_TEMPLATE_DEFINITIONS`.

    The schema of each such property or item moves into an `else`, whose errors are reported as if it stood alone.
    """
    changed = dict(schema)
    for keyword, inner in schema.items():
        if keyword == "properties" and isinstance(inner, dict):
            changed[keyword] = {name: _allow_template(each) for name, each in inner.items()}
        elif keyword in {"items", "additionalProperties"}:
            changed[keyword] = _allow_template(inner)
        elif keyword in {"then", "else"} and isinstance(inner, dict):
            changed[keyword] = accept_templates(inner)
        elif keyword in {"allOf", "anyOf"} and isinstance(inner, list):
            changed[keyword] = _accept_in_each(inner)
    if isinstance(alternatives := schema.get("oneOf"), list):
        del changed["oneOf"]
        # The strict alternatives are the unchanged ones: they are for values without an expression.
        choice: dict[str, Json] = {
            "if": dict(_HAS_TEMPLATE),
            "then": {"anyOf": _accept_in_each(alternatives)},
            "else": {"oneOf": alternatives},
        }
        changed["allOf"] = [*cast("list[Json]", changed.get("allOf", [])), choice]
    return changed


def _accept_in_each(schemas: Sequence[Json]) -> list[Json]:
    return [accept_templates(each) if isinstance(each, dict) else each for each in schemas]


def _allow_template(schema: Json) -> Json:
    if not isinstance(schema, dict):
        return schema
    if "x-language" in schema:  # A script is never rendered, even if it contains braces.
        return accept_templates(schema)
    if schema.get("x-constant") is True:
        return accept_templates(schema)
    return {"if": dict(TEMPLATE_SCHEMA), "else": accept_templates(schema)}


# ── problems ────────────────────────────────────────────────────────────────────────────────────────────────


def find_problems(
    checker: Draft202012Validator, config: Mapping[str, Json], schema: JsonSchema
) -> list[ConfigProblem]:
    """Return up to 50 problems of a config, without its values, which may be secrets; an empty list for a valid one.

    `schema` is the schema of `checker`, or if that accepts templates, the original one; it tells which fields are
    known. An invalid config with over 10,000 values has one problem without a location.
    """
    if checker.is_valid(config):
        return []
    if _has_many_values(config):
        return [
            ConfigProblem(
                "config", "it doesn't match the schema, and is too large to locate the error", "config"
            )
        ]
    found = [problem for error in checker.iter_errors(config) for problem in _collect_problems(error, schema)]
    return found[:MAXIMUM_PROBLEMS]


def _has_many_values(config: Mapping[str, Json]) -> bool:
    """Return whether a config has more than 10,000 values, counted at all levels."""
    count = 0
    level: list[Json] = list(config.values())
    while level:
        count += len(level)
        if count > MAXIMUM_EXPLAINED_VALUES:
            return True
        containers = [value for value in level if isinstance(value, dict | list)]
        level = [
            inner for each in containers for inner in (each.values() if isinstance(each, dict) else each)
        ]
    return False


def _collect_problems(error: ValidationError, schema: JsonSchema) -> Iterator[ConfigProblem]:
    """Yield the problems in one error of a validator: one for each unknown field, otherwise a single one."""
    facts: dict[str, Any] = error.kind.as_dict()
    path, keyword = list(error.instance_path), error.kind.name
    match keyword:
        case "required":
            yield _missing_field_problem([[*path, facts["property"]]])
        case "anyOf" | "oneOf" if all(_is_missing_only(form) for form in facts["context"]):
            yield _missing_field_problem(
                [[*path, form[0].kind.as_dict()["property"]] for form in facts["context"]]
            )
        case "additionalProperties":
            known = _field_names(schema, path)
            for name in facts["unexpected"][:MAXIMUM_PROBLEMS]:
                yield _unknown_field_problem([*path, name], known, cast("dict[str, Json]", error.instance))
        case "enum":
            meant = _suggest_option(cast("Json", error.instance), facts["options"])
            yield ConfigProblem(
                _format_path(path), _describe_violation(error, facts), keyword, tuple(path), meant
            )
        case _:
            yield ConfigProblem(_format_path(path), _describe_violation(error, facts), keyword, tuple(path))


def _is_missing_only(form: Sequence[ValidationError]) -> bool:
    """Return whether `form`, the errors of a value by one alternative of a schema, are all missing fields; False
    without errors.
    """
    return bool(form) and all(error.kind.name == "required" for error in form)


def _missing_field_problem(alternatives: Sequence[SchemaPath]) -> ConfigProblem:
    """Return the problem of a missing required field; with several `alternatives`, one of these fields has
    to be given.
    """
    names = [_format_path(path) for path in alternatives]
    message = f"{' or '.join(names)} is required"
    return ConfigProblem(names[0], message, "required", tuple(alternatives[0]))


def _unknown_field_problem(
    path: SchemaPath, known: Sequence[str], beside: Mapping[str, Json]
) -> ConfigProblem:
    """Return the problem of the unknown field at `path`, with similar names in `known`.

    A single similar name is taken as the intended name, unless `beside`, the object around the field, has it already.
    """
    meant = name_suggestions.suggest_names(str(path[-1]), known)
    message = "there is no such field"
    if meant:
        message += f": did you mean {' or '.join(meant)}?"
    elif known:
        message += f": there is {', '.join(known)}"
    is_certain = len(meant) == 1 and meant[0] not in beside
    return ConfigProblem(
        _format_path(path), message, "additionalProperties", tuple(path), meant[0] if is_certain else None
    )


def _suggest_option(given: Json, options: Sequence[Json]) -> Json:
    """Return the only text among `options` that is similar to `given`; None for none or several, or if
    `given` is no text.
    """
    if not isinstance(given, str):
        return None
    meant = name_suggestions.suggest_names(given, [option for option in options if isinstance(option, str)])
    return meant[0] if len(meant) == 1 else None


def _describe_violation(error: ValidationError, facts: Mapping[str, Any]) -> str:
    match error.kind.name:
        case "type":
            wanted = " or ".join(TYPE_DESCRIPTIONS[name] for name in facts["types"])
            return f"must be {wanted}, not {config_fields.describe_type(cast('Json', error.instance))}"
        case "enum":
            return f"must be one of {', '.join(encode_json(option).decode() for option in facts['options'])}"
        case "format" if facts["format"] in TEXT_FORMATS:
            return f"must be {TEXT_FORMATS[facts['format']].wanted}"
        case "not" if facts["schema"] == {"pattern": TEMPLATE_SCHEMA["pattern"]}:
            return "can't hold an expression (`{{`): it must be known before the run"
        case "not" if set(facts["schema"]) == {"required"}:
            return f"takes {' or '.join(facts['schema']['required'])}, not both"
        case "pattern" if "pattern" not in facts:
            return "takes too long to be matched by the pattern"
        case "pattern" if facts["pattern"] in PATTERN_DESCRIPTIONS:
            return f"must be {PATTERN_DESCRIPTIONS[facts['pattern']]}"
        case keyword if keyword in LIMIT_MESSAGES:
            return LIMIT_MESSAGES[keyword].format_map(facts)
        case "oneOf" if not all(facts["context"]):
            return "fits several forms that exclude each other: keep the fields of one"
        case keyword:
            return f"must satisfy `{keyword}` of the schema"


def _field_names(schema: JsonSchema, path: SchemaPath) -> Sequence[str]:
    """Return the names of the fields that the schema defines for the object at `path`; an empty list for
    unknown paths.
    """
    at: Any = schema
    for step in path:
        at = at.get("items", {}) if isinstance(step, int) else at.get("properties", {}).get(step, {})
    return list(at.get("properties", {}))


def _format_path(path: SchemaPath) -> str:
    return ".".join(str(step)[:SHOWN_CHARACTERS] for step in path) or "config"
