"""Custom node types: documents of an organization, and the catalog that has them beside the library.

A document is content: type, version, ports, schemas and task rules. It never changes, so a run pins it whole.
"""

from __future__ import annotations

import re
from collections import ChainMap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from typing import TYPE_CHECKING, Annotated, Any, Final, cast

import msgspec
from msgspec import Struct
from msgspec.structs import replace

from engine.expressions import ExpressionError, compile_template
from engine.node_api import (
    ERROR,
    EffectRule,
    NodeEffect,
    NodeType,
    OutputDescription,
    TaskRules,
    parse_version,
)
from engine.values import encode_canonical
from json_text import decoding
from nodes import config_problems
from nodes.catalog import NodeCatalog

if TYPE_CHECKING:
    from jsonschema_rs import Draft202012Validator

    from engine.node_api import RunNode
    from engine.values import Json
    from nodes.config_problems import ConfigProblem

PINNED: Final = "nodeTypes"
"""Key of a definition that holds the documents of its custom types, by type and version."""
TYPE_PATTERN: Final = r"^[a-z][a-z0-9-]{1,38}/[a-z][a-z0-9-]{1,62}$"
VERSION_PATTERN: Final = r"^(0|[1-9]\d{0,5})\.(0|[1-9]\d{0,5})\.(0|[1-9]\d{0,5})$"
POOL_PATTERN: Final = r"^[a-z][a-z0-9-]{0,62}$"
PORT_PATTERN: Final = r"^[a-z][a-zA-Z0-9_-]{0,39}$"
RESERVED_NAMESPACES: Final = frozenset({"services", "pilotflame", "schema", "versions"})
RESERVED_NAMES: Final = frozenset({"schema", "versions"})
MAX_SCHEMA_BYTES: Final = 65_536
MAX_EXPANDED_BYTES: Final = 262_144
"""Size of a schema with its local references written out."""
MAX_SCHEMA_DEPTH: Final = 24
KEYWORDS: Final = frozenset(
    {
        *("type", "properties", "required", "additionalProperties", "items", "enum", "const", "default"),
        *("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"),
        *("minLength", "maxLength", "pattern", "format", "minItems", "maxItems", "uniqueItems"),
        *("minProperties", "maxProperties", "anyOf", "oneOf", "allOf"),
        *("title", "description", "examples", "deprecated", "readOnly", "writeOnly"),
    }
)
"""Keywords of JSON Schema that a custom type may use, besides those that begin with `x-`."""
_DEFINITIONS: Final = "#/$defs/"
_ROOT_ONLY: Final = frozenset({"$schema", "$defs"})

Whole = Annotated[int, msgspec.Meta(ge=1, le=10)]
Seconds = Annotated[float, msgspec.Meta(gt=0, le=604_800)]
Port = Annotated[
    str, msgspec.Meta(pattern=PORT_PATTERN, description="a letter, then letters, digits, - and _")
]


class TaskRetryDocument(msgspec.Struct, rename="camel", forbid_unknown_fields=True):
    """Retries of failed attempts."""

    max_attempts: Whole = 1
    backoff: str = "exponential"
    """`exponential`, which doubles the delay with each failure, or `fixed`."""
    delay: Annotated[float, msgspec.Meta(ge=0, le=86_400)] = 1.0
    """Seconds after the first failure."""
    max_delay: Annotated[float, msgspec.Meta(ge=0, le=86_400)] = 60.0


class TaskConcurrencyDocument(msgspec.Struct, rename="camel", forbid_unknown_fields=True):
    """Limit of the tasks that workers perform at the same time."""

    limit: Annotated[int, msgspec.Meta(ge=1, le=10_000)]
    key: Annotated[str, msgspec.Meta(max_length=500)] = ""
    """Template of the key of a task; tasks with equal keys share the limit."""


class TaskDocument(msgspec.Struct, rename="camel", forbid_unknown_fields=True):
    """Rules for the tasks of a type."""

    timeout_seconds: Seconds = 300.0
    lease_seconds: Annotated[float, msgspec.Meta(ge=10, le=300)] = 30.0
    retry: TaskRetryDocument = msgspec.field(default_factory=TaskRetryDocument)
    concurrency: TaskConcurrencyDocument | None = None
    pool: Annotated[
        str, msgspec.Meta(pattern=POOL_PATTERN, description="lower-case letters, digits and hyphens")
    ] = "default"
    start_timeout_seconds: Seconds | None = None


class PortsDocument(msgspec.Struct, rename="camel", forbid_unknown_fields=True):
    """Ports of a type, besides the output `error`."""

    inputs: Annotated[list[Port], msgspec.Meta(min_length=1, max_length=10)] = msgspec.field(
        default_factory=lambda: ["input"]
    )
    outputs: Annotated[list[Port], msgspec.Meta(min_length=1, max_length=20)] = msgspec.field(
        default_factory=lambda: ["output"]
    )


class EffectDocument(msgspec.Struct, rename="camel", forbid_unknown_fields=True):
    """Effect by a field of the config."""

    default: NodeEffect
    field: str | None = None
    cases: dict[str, NodeEffect] = {}


class OutputDocument(msgspec.Struct, rename="camel", forbid_unknown_fields=True):
    """Output of a type."""

    schema: dict[str, Any] = {}
    description: str = ""


class NodeTypeDocument(msgspec.Struct, rename="camel", forbid_unknown_fields=True):
    """Content of one version of a custom node type."""

    type: str
    version: str
    name: str
    category: str
    description: str
    effect: EffectDocument
    ports: PortsDocument
    config: dict[str, Any]
    output: OutputDocument
    task: TaskDocument
    input_description: str = ""
    examples: list[dict[str, Any]] = []


_decode_document = decoding.build_decoder(NodeTypeDocument).decode


class SchemaProblem(Struct, frozen=True):
    """Problem of a document: the field at fault and a message."""

    path: str
    message: str


class InvalidDocument(ValueError):
    """Document that can't be a node type."""

    def __init__(self, problems: Sequence[SchemaProblem]) -> None:
        super().__init__(problems[0].message)
        self.problems = problems


def encode_document(document: NodeTypeDocument) -> bytes:
    """Return the canonical JSON of a document: equal contents give equal bytes, whether defaults are written out or
    not.
    """
    return encode_canonical(cast("Json", msgspec.to_builtins(_without_defaults(document))))


def _without_defaults(value: object) -> object:
    """Return a struct as a dict, by wire name, without the optional fields that have their defaults; other values
    unchanged.

    A field that is a struct is treated likewise; structs in lists are left as they are.
    """
    if not isinstance(value, msgspec.Struct):
        return value
    fields: dict[str, object] = {}
    for one in msgspec.structs.fields(value):
        default = one.default if one.default_factory is msgspec.NODEFAULT else one.default_factory()
        given = getattr(value, one.name)
        if given != default or one.required:
            fields[one.encode_name] = _without_defaults(given)
    return fields


def hash_document(text: bytes) -> str:
    """Return the SHA-256 of a text in hexadecimal.

    The text must be canonical JSON already (see `encode_document`): it is hashed unchanged.
    """
    return sha256(text).hexdigest()


def checked_document(document: NodeTypeDocument) -> NodeTypeDocument:
    """Validate the document of a custom type, and return it with the local references of its schemas expanded.

    Raises `InvalidDocument` with all problems of names, ports, task rules and references; if there are none, with the
    first problem of the config's type, of a schema, or of the field that decides on the effect.
    """
    problems = [*_name_problems(document), *_port_and_task_problems(document)]
    schemas: dict[str, dict[str, Any]] = {}
    for path, schema in (("config", document.config), ("output.schema", document.output.schema)):
        try:
            schemas[path] = expand_schema(schema, path)
        except InvalidDocument as error:
            problems += error.problems
    if problems:
        raise InvalidDocument(problems)
    config = {"type": "object", **schemas["config"]}
    if config["type"] != "object":
        raise InvalidDocument([SchemaProblem("config.type", "config.type must be object")])
    output = msgspec.structs.replace(document.output, schema=schemas["output.schema"])
    checked = msgspec.structs.replace(document, config=config, output=output)
    node_type = build_node_type(checked, "")
    for path, schema in (("config", config), ("output.schema", output.schema)):
        try:
            build_strict_validator(schema)
        except ValueError as error:
            raise InvalidDocument(
                [SchemaProblem(path, f"{path} is no usable JSON Schema: {error}")]
            ) from error
    if (wrong := _deciding_field_problem(document, node_type)) is not None:
        raise InvalidDocument([wrong])
    return checked


def _name_problems(document: NodeTypeDocument) -> Iterator[SchemaProblem]:
    namespace, _, name = document.type.partition("/")
    if not re.match(TYPE_PATTERN, document.type):
        message = (
            "type must be a namespace of 2 to 39 characters and a name of 2 to 63, such as acme/resize: lower-case"
            " letters, digits and hyphens, a letter first"
        )
        yield SchemaProblem("type", message)
    elif namespace in RESERVED_NAMESPACES:
        yield SchemaProblem("type", f"type: the namespace {namespace} is reserved")
    elif name in RESERVED_NAMES:
        yield SchemaProblem("type", f"type: the name {name} is reserved")
    if not re.match(VERSION_PATTERN, document.version):
        yield SchemaProblem("version", "version must be three numbers, such as 1.2.0")


def _port_and_task_problems(document: NodeTypeDocument) -> Iterator[SchemaProblem]:
    for side, ports in (("inputs", document.ports.inputs), ("outputs", document.ports.outputs)):
        if len(set(ports)) < len(ports):
            yield SchemaProblem(f"ports.{side}", f"ports.{side} has a name twice")
    if ERROR in document.ports.outputs:
        yield SchemaProblem("ports.outputs", "ports.outputs: every node has the port error by itself")
    if document.task.concurrency is not None:
        try:
            compile_template(document.task.concurrency.key)
        except ExpressionError as error:
            yield SchemaProblem("task.concurrency.key", f"task.concurrency.key: {error}")
    if document.task.retry.backoff not in {"exponential", "fixed"}:
        yield SchemaProblem("task.retry.backoff", "task.retry.backoff must be exponential or fixed")


def _deciding_field_problem(document: NodeTypeDocument, node_type: NodeType) -> SchemaProblem | None:
    deciding = document.effect.field
    if deciding is None or deciding in cast("dict[str, Any]", node_type.config_schema.get("properties", {})):
        return None
    return SchemaProblem("effect.field", f"effect.field: the config has no property {deciding!r}")


def expand_schema(schema: Mapping[str, Any], path: str) -> dict[str, Any]:
    """Return a JSON Schema with its local references (`#/$defs/…`) expanded.

    Raises `InvalidDocument` with the problems, at places that begin with `path`: a schema over 64 KiB, too deep or
    recursive, and keywords that forms, validation and fixes don't understand.
    """
    if len(msgspec.json.encode(schema)) > MAX_SCHEMA_BYTES:
        message = f"{path} is larger than {MAX_SCHEMA_BYTES:,} bytes"
        raise InvalidDocument([SchemaProblem(path, message)])
    expander = _SchemaExpander(schema.get("$defs"))
    expanded = expander.expand(
        {name: value for name, value in schema.items() if name not in _ROOT_ONLY}, path, ()
    )
    if expander.problems:
        raise InvalidDocument(expander.problems)
    return cast("dict[str, Any]", expanded)


class _SchemaExpander:
    """Expansion of one schema, with the problems found on the way."""

    def __init__(self, definitions: object) -> None:
        self._definitions = definitions if isinstance(definitions, dict) else {}
        self.problems: list[SchemaProblem] = []
        self._left = MAX_EXPANDED_BYTES // 8

    def expand(self, schema: object, path: str, inside: tuple[str, ...]) -> object:
        """Return a schema with its local references replaced by the referenced schemas.

        `inside` has the names of the definitions around it, which it must not refer to. Problems are collected with
        their paths; a part with a problem becomes an empty schema.
        """
        self._left -= 1
        if isinstance(schema, bool):
            return schema
        if not isinstance(schema, dict):
            self._add(path, f"{path} must be an object")
            return {}
        if self._left < 0 or path.count(".") > 2 * MAX_SCHEMA_DEPTH:
            self._add(path, f"{path}: the schema is too large or too deep")
            return {}
        if "$ref" in schema:
            return self._resolve(schema, path, inside)
        expanded: dict[str, object] = {}
        for keyword, value in schema.items():
            below = f"{path}.{keyword}"
            if keyword == "properties" and isinstance(value, dict):
                expanded[keyword] = {
                    name: self.expand(each, f"{below}.{name}", inside) for name, each in value.items()
                }
            elif keyword in {"items", "additionalProperties"}:
                expanded[keyword] = self.expand(value, below, inside)
            elif keyword in {"anyOf", "oneOf", "allOf"} and isinstance(value, list):
                expanded[keyword] = [
                    self.expand(each, f"{below}.{index}", inside) for index, each in enumerate(value)
                ]
            elif keyword in KEYWORDS or keyword.startswith("x-"):
                expanded[keyword] = value
            else:
                self._add(below, f"{below}: the keyword {keyword[:64]} is not supported in custom node types")
        return expanded

    def _resolve(self, schema: Mapping[str, object], path: str, inside: tuple[str, ...]) -> object:
        """Return the expanded definition to which `$ref` of a schema refers, with the keywords beside `$ref` added.

        A reference that can't be resolved is a problem, and becomes an empty schema.
        """
        target = schema["$ref"]
        if not isinstance(target, str) or not target.startswith(_DEFINITIONS):
            self._add(path, f"{path}.$ref must lead to {_DEFINITIONS}: a schema has no references outside")
            return {}
        name = target.removeprefix(_DEFINITIONS)
        if name in inside:
            self._add(path, f"{path}.$ref: {name[:64]} contains itself")
            return {}
        if name not in self._definitions:
            self._add(path, f"{path}.$ref: there is no {target[:100]}")
            return {}
        found = self.expand(self._definitions[name], path, (*inside, name))
        beside = {keyword: value for keyword, value in schema.items() if keyword != "$ref"}
        return {**found, **beside} if isinstance(found, dict) else found

    def _add(self, path: str, message: str) -> None:
        if len(self.problems) < config_problems.MAXIMUM_PROBLEMS:
            self.problems.append(SchemaProblem(path, message))


def build_strict_validator(schema: Mapping[str, Json]) -> Draft202012Validator:
    """Return a validator of rendered values, for which a text with `{{` is a plain text; patterns can't backtrack.

    Raises ValueError for an invalid schema, also one that refers to other documents.
    """
    from jsonschema_rs import Draft202012Validator  # noqa: PLC0415 - 4 MB that some processes never need

    return Draft202012Validator(
        dict(schema),
        offline=True,
        validate_formats=True,
        formats=config_problems.format_checks(),
        pattern_options=config_problems.linear_patterns(),
    )


# ── node types ──────────────────────────────────────────────────────────────────────────────────────────────


def decode_node_type(text: bytes | str, content_hash: str, *, is_deprecated: bool = False) -> NodeType:
    """Return the node type of a stored document; raises ValueError for an invalid document.

    `content_hash`, the stored hash of the document, and `is_deprecated` are taken over without a check.
    """
    document = _decode_document(text)
    return build_node_type(document, content_hash, is_deprecated=is_deprecated)


def build_node_type(
    document: NodeTypeDocument, content_hash: str, *, is_deprecated: bool = False
) -> NodeType:
    """Return the node type that a document describes, without validation."""
    effect, task = document.effect, document.task
    return NodeType(
        type=document.type,
        name=document.name,
        version=document.version,
        category=document.category,
        description=document.description,
        effect=EffectRule(effect.default, effect.field, effect.cases),
        config_schema=document.config,
        inputs=tuple(document.ports.inputs),
        outputs=tuple(document.ports.outputs),
        input_description=document.input_description,
        output=OutputDescription(description=document.output.description, schema=document.output.schema),
        examples=tuple(document.examples),
        task=TaskRules(
            timeout_seconds=task.timeout_seconds,
            lease_seconds=task.lease_seconds,
            max_attempts=task.retry.max_attempts,
            first_delay_seconds=task.retry.delay,
            delay_grows=task.retry.backoff == "exponential",
            max_delay_seconds=task.retry.max_delay,
            concurrency_limit=task.concurrency.limit if task.concurrency else None,
            concurrency_key=task.concurrency.key if task.concurrency else "",
            pool=task.pool,
            start_timeout_seconds=task.start_timeout_seconds,
        ),
        content_hash=content_hash,
        is_deprecated=is_deprecated,
    )


def join_versions(versions: Sequence[NodeType]) -> NodeType:
    """Return the newest version of one type, with the others as its earlier versions.

    A deprecated version is the newest only if all are deprecated.
    """
    ordered = sorted(
        versions, key=lambda one: (not one.is_deprecated, parse_version(one.version)), reverse=True
    )
    newest, *others = ordered
    others.sort(key=lambda one: parse_version(one.version), reverse=True)
    return replace(newest, earlier={one.version: one for one in others})


@dataclass(frozen=True)
class OrganizationCatalog(NodeCatalog):
    """Catalog of one organization, or of one definition: the library and custom types."""

    base: NodeCatalog = field(default_factory=lambda: NodeCatalog({}))
    documents: Mapping[tuple[str, str], str] = field(default_factory=dict)
    """Canonical JSON of each custom type, by type and version."""
    _strict_validators: dict[tuple[str, str, str], Draft202012Validator] = field(
        default_factory=dict, init=False, repr=False
    )

    def document(self, node_type: NodeType) -> str | None:
        """Return the canonical JSON of a custom type; None for a type of the library, and for all types in the catalog
        of a stored definition.
        """
        return self.documents.get((node_type.type, node_type.version))

    def implementation_digest(self, node_type: NodeType) -> bytes:
        """Return 16 bytes that identify the behavior of a node type: of a custom type's content hash, or of the
        library's file.
        """
        if node_type.task is None:
            return self.base.implementation_digest(node_type)
        return sha256(node_type.content_hash.encode()).digest()[:16]

    def implementation(self, type: str) -> RunNode:  # noqa: A002 - the field's own word
        """Import the module of a library type and return its function; raises `UnknownNodeType`, also for
        custom types' names.
        """
        return self.base.implementation(type)

    def rendered_config_problems(
        self, node_type: NodeType, config: Mapping[str, Json]
    ) -> Sequence[ConfigProblem]:
        """Return the problems of the rendered config of a custom type; texts with `{{` are plain texts now."""
        checker = self._strict_validator(node_type, "config", node_type.config_schema)
        return config_problems.find_problems(checker, config, node_type.config_schema)

    def output_problems(self, node_type: NodeType, output: Json) -> Sequence[ConfigProblem]:
        """Return the problems of the output of a custom type by its schema, with paths that begin with `output`; none
        without a schema.
        """
        schema = node_type.output.schema
        if not schema:
            return ()
        # The output is nested in a field, so that paths begin with its name.
        whole: dict[str, Json] = {"properties": {"output": dict(schema)}}
        checker = self._strict_validator(node_type, "output", whole)
        return config_problems.find_problems(checker, {"output": output}, whole)

    def config_problems(self, node_type: NodeType, config: Mapping[str, Json]) -> list[ConfigProblem]:
        """Return the problems of a stored config, with its templates, by the schema of its type; for a library type,
        the library's catalog finds them.
        """
        if node_type.task is None:
            return self.base.config_problems(node_type, config)
        return super().config_problems(node_type, config)

    def _strict_validator(
        self, node_type: NodeType, part: str, schema: Mapping[str, Json]
    ) -> Draft202012Validator:
        key = (node_type.type, node_type.version, part)
        if key not in self._strict_validators:
            self._strict_validators[key] = build_strict_validator(schema)
        return self._strict_validators[key]


def build_catalog(
    base: NodeCatalog,
    documents: Mapping[tuple[str, str], str],
    node_types: Sequence[NodeType],
    default_model_id: str | None = None,
) -> OrganizationCatalog:
    """Return the catalog of an organization: the library, and custom types in the versions `node_types`.

    `documents` has the canonical JSON of each by type and version; `default_model_id` is the organization's default
    language model, None without one.
    """
    versions: dict[str, list[NodeType]] = {}
    for one in node_types:
        versions.setdefault(one.type, []).append(one)
    custom = {name: join_versions(of_type) for name, of_type in versions.items()}
    types = cast("Mapping[str, NodeType]", ChainMap(cast("Any", custom), cast("Any", base.node_types)))
    return OrganizationCatalog(types, default_model_id=default_model_id, base=base, documents=documents)


def catalog_of_definition(base: NodeCatalog, definition: Mapping[str, Any]) -> NodeCatalog:
    """Return the catalog for a stored definition, with the custom types that it pins; `base` if it pins none.

    Raises ValueError for an invalid pinned document.
    """
    pinned = definition.get(PINNED)
    if not pinned:
        return base
    found: list[NodeType] = []
    for versions in pinned.values():
        for document in versions.values():
            text = encode_canonical(document)
            found.append(decode_node_type(text, hash_document(text)))
    return build_catalog(base, {}, found)
