"""Tools as a tool server lists them: checked, cleaned, and identified by a hash of their unchanged definitions."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

import msgspec

from engine import values
from nodes import custom_types

if TYPE_CHECKING:
    from engine.values import Json

MAX_DESCRIPTION_BYTES: Final = 2_048
MAX_SCHEMA_BYTES: Final = 32_768
MAX_SCHEMA_DEPTH: Final = 24
MAX_TITLE_CHARACTERS: Final = 200
MAX_PROBLEM_CHARACTERS: Final = 300
_NAME: Final = re.compile(r"[A-Za-z0-9_./-]{1,128}")
_HIDDEN_CATEGORIES: Final = frozenset({"Cc", "Cf", "Cn", "Co", "Cs"})
"""Control, format, unassigned, private and surrogate characters: people don't see them, and models read them."""
_LINE_CHARACTERS: Final = frozenset("\n\t")
HINTS: Final = ("readOnlyHint", "destructiveHint", "idempotentHint", "openWorldHint")


class ToolDefinition(msgspec.Struct, frozen=True, rename="camel"):
    """Tool of a tool server."""

    name: str
    hash: str
    """SHA-256 of name, description and schema as the server sent them, in hexadecimal; empty if it has a problem."""
    title: str = ""
    description: str = ""
    """Text without characters that people can't see, of at most 2 kB."""
    input_schema: Mapping[str, Any] = {}
    """JSON Schema of the arguments, its texts cleaned like the description."""
    hints: Mapping[str, bool] = {}
    """Claims of the server about the tool, such as `readOnlyHint`; nothing relies on them."""
    problem: str = ""
    """Reason why the tool can't be used; empty for a usable one."""


def read_definition(listed: Mapping[str, Json]) -> ToolDefinition:
    """Return the definition of a listed tool, cleaned; a tool that can't be used has a `problem` and no hash."""
    name = _read_text(listed.get("name"))
    described = _read_text(listed.get("description"))
    schema = listed.get("inputSchema")
    found = ToolDefinition(
        name=clean_text(name)[:MAX_TITLE_CHARACTERS],
        hash=_hash_definition(name, described, schema),
        title=clean_text(_read_text(listed.get("title")))[:MAX_TITLE_CHARACTERS],
        description=_cut_description(clean_text(described)),
        hints=_read_hints(listed.get("annotations")),
    )
    problem = _find_problem(name, schema)
    if problem or not isinstance(schema, dict):
        return msgspec.structs.replace(found, problem=problem, hash="")
    cleaned = _clean_value(schema)
    # Without its hidden characters, the name of a field may be a keyword, such as one that reads other addresses.
    if cleaned != schema and (problem := _find_problem(name, cleaned)):
        return msgspec.structs.replace(found, problem=problem, hash="")
    return msgspec.structs.replace(found, input_schema=cleaned)


def _hash_definition(name: str, description: str, schema: Json) -> str:
    """Return the SHA-256 of a definition, in hexadecimal; empty for a definition that can't be stored, and so not be
    used.
    """
    try:
        return values.fingerprint([name, description, schema])
    except (values.InvalidJson, RecursionError):
        return ""


def clean_text(text: str) -> str:
    """Return a text without control, format and private characters, except for line ends and tabs."""
    if text.isascii() and text.isprintable():
        return text
    return "".join(
        one for one in text if one in _LINE_CHARACTERS or unicodedata.category(one) not in _HIDDEN_CATEGORIES
    )


def _read_text(value: object) -> str:
    return value if isinstance(value, str) else ""


def _cut_description(text: str) -> str:
    encoded = text.strip().encode()
    return encoded[:MAX_DESCRIPTION_BYTES].decode(errors="ignore")


def _read_hints(annotations: Json) -> Mapping[str, bool]:
    if not isinstance(annotations, dict):
        return {}
    return {name: value for name in HINTS if isinstance(value := annotations.get(name), bool)}


def _find_problem(name: str, schema: Json) -> str:
    """Return the reason why a tool with this name and schema of its arguments can't be used; empty if it can.

    References to other servers and patterns that could take unbounded time are refused by the validator.
    """
    if not _NAME.fullmatch(name):
        return "its name has other characters than letters, digits and `_./-`, or more than 128"
    if not isinstance(schema, dict):
        return "it has no schema of its arguments"
    try:
        values.encode_json(schema, max_bytes=MAX_SCHEMA_BYTES)
        values.decode_json(msgspec.json.encode(schema), max_depth=MAX_SCHEMA_DEPTH)
    except (values.InvalidJson, RecursionError) as error:
        return f"its schema is too large or can't be stored: {error}"[:MAX_PROBLEM_CHARACTERS]
    if schema.get("type") != "object":
        return "its schema doesn't describe an object"
    try:
        custom_types.build_strict_validator(schema)
    except ValueError as error:
        return f"its schema can't be used: {clean_text(str(error))}"[:MAX_PROBLEM_CHARACTERS]
    return ""


def _clean_value(value: Any) -> Any:  # noqa: ANN401 - any JSON value
    """Return a JSON value with cleaned texts and names; values that the schema compares are cleaned too."""
    if isinstance(value, str):
        return clean_text(value)
    if isinstance(value, list):
        return [_clean_value(one) for one in value]
    if isinstance(value, dict):
        return {clean_text(name): _clean_value(one) for name, one in value.items()}
    return value


def find_duplicate(definitions: Sequence[ToolDefinition]) -> str | None:
    """Return a name that two tools have; None if all differ."""
    seen: set[str] = set()
    for one in definitions:
        if one.name in seen:
            return one.name
        seen.add(one.name)
    return None
