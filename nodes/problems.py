"""What is wrong in a config, by the JSON Schema of its node type, in words that a person can mend it with."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias, cast

from engine import name_suggestions
from engine.node_api import OF_EACH, FieldCompilation
from engine.values import encode_json
from nodes import fields
from nodes.formats import FORMATS

if TYPE_CHECKING:
    from jsonschema_rs import Draft202012Validator, ValidationError

    from engine.node_api import NodeType
    from engine.values import Json

Schema: TypeAlias = "Mapping[str, Json]"
Path: TypeAlias = "Sequence[str | int]"

MAXIMUM_PROBLEMS = 50
MAXIMUM_EXPLAINED_VALUES = 10_000
"""A validator reports every wrong value with a copy of it: from more than these, its report could fill the memory."""
SHOWN_CHARACTERS = 100

TEMPLATE: Schema = {"type": "string", "pattern": r"\{\{"}

TYPES = {
    "string": "a text",
    "number": "a number",
    "integer": "a whole number",
    "boolean": "true or false",
    "array": "a list",
    "object": "an object",
    "null": "null",
}
LIMITS = {
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


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing wrong with a config: where (`aggregations.0.function`), what, and by which keyword."""

    path: str
    message: str
    keyword: str
    steps: tuple[str | int, ...] = ()
    """The way from the config to the value, or to where a field is missing."""
    meant: Json = None
    """The name of a field, or the value, that is certain to be meant; None: none is."""


# ── schemas ─────────────────────────────────────────────────────────────────────────────────────────────────


def validator(node_type: NodeType) -> Draft202012Validator:
    """Return what checks the configs of a type; of a condition it asks only that it be an object."""
    from jsonschema_rs import Draft202012Validator  # noqa: PLC0415 - 4 MB that some processes never need

    schema = node_type.config_schema
    for place, kind in node_type.compiled.items():
        if kind is FieldCompilation.CONDITION:
            schema = changed_at(schema, place, lambda _said: {"type": "object"})
    fits = {name: form.fits for name, form in FORMATS.items()}
    return Draft202012Validator(accepting_templates(schema), validate_formats=True, formats=fits)


def changed_at(schema: Schema, place: str, change: Callable[[Schema], Schema]) -> Schema:
    """Return `schema` with what it says of one field changed: of `condition`, or of `cases[].condition`."""
    field, of_each, name = place.partition(OF_EACH)
    properties = dict(cast("Mapping[str, Json]", schema.get("properties", {})))
    said = cast("Schema", properties.get(field, {}))
    if of_each:
        of_items = changed_at(cast("Schema", said.get("items", {})), name, change)
        properties[field] = {**said, "items": dict(of_items)}
    else:
        properties[field] = dict(change(said))
    return {**schema, "properties": properties}


def accepting_templates(schema: Schema) -> dict[str, Json]:
    """Return `schema` with a text that holds `{{` accepted in place of any property and item that isn't `x-constant`.

    What is asked of them moves into an `else`, whose errors are reported as if it stood alone.
    """
    changed = dict(schema)
    for keyword, inner in schema.items():
        if keyword == "properties" and isinstance(inner, dict):
            changed[keyword] = {name: _or_template(each) for name, each in inner.items()}
        elif keyword in {"items", "additionalProperties"}:
            changed[keyword] = _or_template(inner)
    return changed


def _or_template(schema: Json) -> Json:
    if not isinstance(schema, dict):
        return schema
    if "x-language" in schema:  # a script is never rendered, whatever braces it has
        return accepting_templates(schema)
    if schema.get("x-constant") is True:
        return accepting_templates(schema)
    return {"if": dict(TEMPLATE), "else": accepting_templates(schema)}


# ── problems ────────────────────────────────────────────────────────────────────────────────────────────────


def find(checker: Draft202012Validator, config: Mapping[str, Json], schema: Schema) -> list[Problem]:
    """Return what is wrong with a config, without its values, which may be secrets."""
    if checker.is_valid(config):
        return []
    if _has_many_values(config):
        return [Problem("config", "it doesn't fit the schema, and is too large to say where", "config")]
    found = [problem for error in checker.iter_errors(config) for problem in _problems(error, schema)]
    return found[:MAXIMUM_PROBLEMS]


def _has_many_values(config: Mapping[str, Json]) -> bool:
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


def _problems(error: ValidationError, schema: Schema) -> Iterator[Problem]:
    facts: dict[str, Any] = error.kind.as_dict()
    path, keyword = list(error.instance_path), error.kind.name
    match keyword:
        case "required":
            yield _missing([[*path, facts["property"]]])
        case "anyOf" if all(_only_misses(form) for form in facts["context"]):
            yield _missing([[*path, form[0].kind.as_dict()["property"]] for form in facts["context"]])
        case "additionalProperties":
            known = _names_at(schema, path)
            for name in facts["unexpected"][:MAXIMUM_PROBLEMS]:
                yield _unknown([*path, name], known, cast("dict[str, Json]", error.instance))
        case "enum":
            meant = _option_meant(cast("Json", error.instance), facts["options"])
            yield Problem(_dotted(path), _message(error, facts), keyword, tuple(path), meant)
        case _:
            yield Problem(_dotted(path), _message(error, facts), keyword, tuple(path))


def _only_misses(form: Sequence[ValidationError]) -> bool:
    return all(error.kind.name == "required" for error in form)


def _missing(alternatives: Sequence[Path]) -> Problem:
    names = [_dotted(path) for path in alternatives]
    message = f"{' or '.join(names)} is required"
    return Problem(names[0], message, "required", tuple(alternatives[0]))


def _unknown(path: Path, known: Sequence[str], beside: Mapping[str, Json]) -> Problem:
    meant = name_suggestions.suggest_names(str(path[-1]), known)
    message = "there is no such field"
    if meant:
        message += f": did you mean {' or '.join(meant)}?"
    elif known:
        message += f": there is {', '.join(known)}"
    is_certain = len(meant) == 1 and meant[0] not in beside
    return Problem(
        _dotted(path), message, "additionalProperties", tuple(path), meant[0] if is_certain else None
    )


def _option_meant(given: Json, options: Sequence[Json]) -> Json:
    """Return the one option that a text comes near to; None where none does, or two."""
    if not isinstance(given, str):
        return None
    meant = name_suggestions.suggest_names(given, [option for option in options if isinstance(option, str)])
    return meant[0] if len(meant) == 1 else None


def _message(error: ValidationError, facts: Mapping[str, Any]) -> str:
    match error.kind.name:
        case "type":
            wanted = " or ".join(TYPES[name] for name in facts["types"])
            return f"must be {wanted}, not {fields.kind_of(cast('Json', error.instance))}"
        case "enum":
            return f"must be one of {', '.join(encode_json(option).decode() for option in facts['options'])}"
        case "format" if facts["format"] in FORMATS:
            return f"must be {FORMATS[facts['format']].wanted}"
        case "not" if facts["schema"] == {"pattern": TEMPLATE["pattern"]}:
            return "can't hold an expression (`{{`): it must be known before the run"
        case "not" if set(facts["schema"]) == {"required"}:
            return f"takes {' or '.join(facts['schema']['required'])}, not both"
        case "pattern" if "pattern" not in facts:
            return "takes too long to be matched by the pattern"
        case keyword if keyword in LIMITS:
            return LIMITS[keyword].format_map(facts)
        case keyword:
            return f"must satisfy `{keyword}` of the schema"


def _names_at(schema: Schema, path: Path) -> Sequence[str]:
    """Return the names of the fields that `schema` knows at `path`."""
    at: Any = schema
    for step in path:
        at = at.get("items", {}) if isinstance(step, int) else at.get("properties", {}).get(step, {})
    return list(at.get("properties", {}))


def _dotted(path: Path) -> str:
    return ".".join(str(step)[:SHOWN_CHARACTERS] for step in path) or "config"
