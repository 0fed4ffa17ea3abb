"""Catalog: every node type, as its `.toml` in `nodes/library` describes it, and its implementation.

A node is two files, `csv_parse.toml` and `csv_parse.py` for the type `csv-parse`. The first contains:

    type = "csv-parse"              # letters, digits and hyphens; the file has its name, with underscores
    name = "Parse CSV"              # name on the canvas
    version = "1.0.0"
    category = "transform"          # triggers, transform, control, io, …
    description = "…"
    effect = "pure"                 # pure, read or write, or decided by a field of the config:
                                    # { default = "write", field = "method", cases = { GET = "read" } }
    trigger = "webhook"             # only for triggers: the kind of event that starts a run
    joins = true                    # branches meet in it by its config's `mode` and `combine`; see engine/joins.py
    loops = true                    # nodes behind its port `continue` run once for each item; see engine/graph.py
    cpu = "large"                   # long computation: for `large` configs or `always`; see engine.node_api.CpuDemand
    paid = true                     # a call costs money: the journal commits before and after it
    volatile = [{}]                 # the result depends on clock or chance: always, or in these cases
    runnable = true                 # false: the node can be drawn, but has no `.py`
    resources = { cpu = "500m", memory = "256Mi" }  # requests of a pod that runs it; default: 100m and 128Mi
    s3_location = "s3://…"          # address of its package; default: by type and version

    [ports]                         # default: one `input`, one `output`; every node also has `error`
    inputs = ["input"]
    outputs = ["true", "false"]
    outputs_from = "cases[].port"   # path in the config of the names of further outputs

    [compiled]                      # config fields that the node evaluates itself
    condition = "condition"         # a condition, tested by the node
    "cases[].condition" = "condition"  # a condition in each item of a list
    each = "value"                  # a template or `{"$op": …}`, rendered by the node
    source = "literal"              # a text that is never rendered

    [input]                         # description of the input in a sentence
    description = "…"
    [output]
    description = "…"
    schema = {…}                    # JSON Schema, if it has a shape of its own
    keeps_input = true              # the output contains the fields of the input …
    dropped_by = { mode = "replace" }  # … unless the config has this value
    fields_of = "values"            # config field whose keys are fields of the output

    [config]                        # JSON Schema, draft 2020-12, with defaults; that of a condition is added
    type = "object"
    [config.properties.dataSource]
    type = "string"
    x-resource = "datasources:read" # the value is the id of such a resource, with the use that the node makes of it
    x-source-types = ["postgresql"] # types of data sources that the node accepts
    x-constant = true               # no expression: the value must be known before the run
    x-language = "python"           # a script, `literal` in [compiled]: validation parses it

    [[examples]]                    # run by the tests
    config = {…}
    input = {…}
    output = {…}
    port = "true"                   # default: output
    error = "…"                     # instead of an output: the message with which the node fails

    [[earlier]]                     # an earlier version, the newest first: nodes pinned to it keep its behavior
    version = "1.0.0"
    changes = "…"                   # differences from this version, in a sentence
    config = {…}                    # the parts of the schema that differ, such as a default

A text with `{{` is accepted wherever the schema requires something else without `x-constant`: only the run knows its
value.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from functools import cache
from hashlib import sha256
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import msgspec
from msgspec import UNSET, UnsetType
from msgspec.structs import replace

from engine import name_suggestions, node_key
from engine.conditions import CONDITION_SCHEMA
from engine.node_api import (
    INPUT,
    OF_EACH,
    OUTPUT,
    CpuDemand,
    EffectRule,
    FieldCompilation,
    NodeEffect,
    NodeType,
    OutputDescription,
    RunNode,
    UnknownNodeType,
    VolatilityRule,
)
from nodes import config_problems
from nodes.config_problems import ConfigProblem

if TYPE_CHECKING:
    from jsonschema_rs import Draft202012Validator

    from engine.values import Json

__all__ = ["InvalidCatalogEntry", "NodeCatalog", "UnknownNodeType", "load_catalog", "read_catalog"]

LIBRARY_FOLDER = Path(__file__).parent / "library"
PACKAGES_URL = "s3://pilotflame-nodes"
DEFAULT_RESOURCES: Mapping[str, Json] = {"cpu": "100m", "memory": "128Mi"}
TYPE_ALIASES: Mapping[str, str] = {
    kind: f"{kind}-trigger" for kind in ("queue", "email", "event", "schedule")
}
"""Aliases of trigger types."""
SHOWN_CHARACTERS = 100
"""Characters of an unknown name that are compared and shown."""


class InvalidCatalogEntry(ValueError):
    """Invalid `.toml` of the catalog; the message names the file and the place."""


@dataclass(frozen=True)
class NodeCatalog:
    """Every node type, by its name."""

    node_types: Mapping[str, NodeType]
    default_model_id: str | None = field(default=None, kw_only=True)
    """Id of the default language model of an organization; the library has none."""
    _validators: dict[tuple[str, str], Draft202012Validator] = field(
        default_factory=dict, init=False, repr=False
    )
    _digests: dict[str, bytes] = field(default_factory=dict, init=False, repr=False)

    def get(self, type: str, version: str | None = None) -> NodeType:  # noqa: A002 - the field's own word
        """Return a node type in `version`, or if that is None, in its newest version; aliases are unknown here (see
        `canonical_name`).

        Raises `UnknownNodeType` for an unknown type, with the nearest three at most, and for an unknown version, with
        the known versions.
        """
        node_type = self.node_types.get(type)
        if node_type is None:
            name = type[:SHOWN_CHARACTERS]
            nearest = name_suggestions.suggest_names(name, self.node_types) or get_close_matches(
                name, self.node_types, cutoff=0.0
            )
            message = f"There is no node type {name!r}: did you mean {' or '.join(nearest)}?"
            raise UnknownNodeType(message, nearest=nearest)
        if version in (None, node_type.version):
            return node_type
        if version not in node_type.earlier:
            wanted = f"{type} has no version {version[:SHOWN_CHARACTERS]!r}"
            known = " and ".join([node_type.version, *node_type.earlier])
            raise UnknownNodeType(
                f"{wanted}: the catalog has {known}", nearest=[type], version=node_type.version
            )
        return node_type.earlier[version]

    def canonical_name(self, name: str) -> str:
        """Return the node type of an alias, such as `queue-trigger` for `queue`; any other name, or the name of a type
        in the catalog, unchanged.
        """
        alias = TYPE_ALIASES.get(name)
        return name if alias is None or name in self.node_types else alias

    def types(self) -> Sequence[str]:
        """Return the names of all node types, sorted."""
        return sorted(self.node_types)

    def with_defaults(self, node_type: NodeType, config: Mapping[str, Json]) -> dict[str, Json]:
        """Return a copy of `config` with the defaults of the node type's schema filled in, also in nested objects."""
        return _fill_defaults(node_type.config_schema, config)

    def config_problems(self, node_type: NodeType, config: Mapping[str, Json]) -> list[ConfigProblem]:
        """Return the problems of a stored config by its schema, before templates are rendered; empty for a
        valid one.

        Texts with `{{` fit any field. Conditions and expressions are not validated: their compilers report
        more than a schema can.
        """
        return config_problems.find_problems(self._validator(node_type), config, node_type.config_schema)

    def rendered_config_problems(
        self,
        node_type: NodeType,  # noqa: ARG002 - see `OrganizationCatalog`
        config: Mapping[str, Json],  # noqa: ARG002 - the same
    ) -> Sequence[ConfigProblem]:
        """Return no problems: types of the library validate their rendered configs themselves."""
        return ()

    def document(self, node_type: NodeType) -> str | None:  # noqa: ARG002 - see `OrganizationCatalog`
        """Return None: types of the library have no document."""
        return None

    def implementation_digest(self, node_type: NodeType) -> bytes:
        """Return the first 16 bytes of the SHA-256 of the file that implements a node type, without importing
        it; cached.

        For a node type without a file, they are those of empty content.
        """
        found = self._digests.get(node_type.type)
        if found is None:
            path = LIBRARY_FOLDER / f"{_file_stem(node_type.type)}.py"
            content = path.read_bytes() if path.is_file() else b""
            found = self._digests[node_type.type] = sha256(content).digest()[: node_key.PART_BYTES]
        return found

    def implementation(self, type: str) -> RunNode:  # noqa: A002 - the field's own word
        """Import the module of a node type and return its function `run`, which executes a node.

        Only processes that execute nodes need it. Raises `UnknownNodeType`, and `ModuleNotFoundError` for a type that
        is not `runnable`.
        """
        module = import_module(f"nodes.library.{_file_stem(self.get(type).type)}")
        return cast("RunNode", module.run)

    def _validator(self, node_type: NodeType) -> Draft202012Validator:
        """Return the validator for configs of a node type; it is built at first use and kept."""
        key = (node_type.type, node_type.version)
        if key not in self._validators:
            self._validators[key] = config_problems.build_validator(node_type)
        return self._validators[key]


class LazyNodeTypes(Mapping[str, NodeType]):
    """Node types of a folder, each read at its first use: a pod needs those of one workflow."""

    def __init__(self, folder: Path) -> None:
        self._files = {path.stem.replace("_", "-"): path for path in sorted(folder.glob("*.toml"))}
        self._read: dict[str, NodeType] = {}

    def __getitem__(self, name: str) -> NodeType:
        found = self._read.get(name)
        if found is None:
            found = self._read[name] = _read_entry(self._files[name])
        return found

    def __contains__(self, name: object) -> bool:
        return name in self._files

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)


@cache
def load_catalog() -> NodeCatalog:
    """Return the catalog of the node library, the same object each time; node types are read from files at
    their first use.
    """
    return NodeCatalog(LazyNodeTypes(LIBRARY_FOLDER))


def read_catalog(folder: Path) -> NodeCatalog:
    """Return a catalog of every `.toml` file of `folder`, all read at once.

    Raises `InvalidCatalogEntry` for an unknown key or a wrong value.
    """
    node_types = [_read_entry(path) for path in sorted(folder.glob("*.toml"))]
    return NodeCatalog({node_type.type: node_type for node_type in node_types})


class _EffectTable(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    default: NodeEffect
    field: str
    cases: dict[str, NodeEffect]


class _VolatilityTable(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    without: str | None = None
    field: str | None = None
    value: Any = None


class _PortsTable(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    inputs: tuple[str, ...] = (INPUT,)
    outputs: tuple[str, ...] = (OUTPUT,)
    outputs_from: Annotated[str, msgspec.Meta(pattern=rf"^\w+{re.escape(OF_EACH)}\w+$")] | None = None


class _InputTable(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    description: str = ""


class _OutputTable(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    description: str = ""
    schema: dict[str, Any] = {}
    keeps_input: bool = False
    dropped_by: dict[str, Any] = {}
    fields_of: str | None = None


class _ExampleTable(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    output: Any = UNSET
    error: str | UnsetType = UNSET
    input: Any = None
    config: dict[str, Any] = {}
    port: str = OUTPUT

    def __post_init__(self) -> None:
        if (self.output is UNSET) == (self.error is UNSET):
            raise ValueError("an example has either an output or an error")


class _EarlierVersionTable(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    version: str
    changes: str
    config: dict[str, Any]


class _CatalogEntry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Content of a `.toml`."""

    type: str
    name: str
    version: str
    category: str
    description: str
    effect: NodeEffect | _EffectTable
    config: dict[str, Any]
    trigger: str | None = None
    joins: bool = False
    loops: bool = False
    cpu: CpuDemand | None = None
    paid: bool = False
    volatile: list[_VolatilityTable] = []
    runnable: bool = True
    s3_location: str = ""
    resources: dict[str, Any] = {}
    ports: _PortsTable = _PortsTable()
    compiled: dict[
        Annotated[str, msgspec.Meta(pattern=rf"^\w+({re.escape(OF_EACH)}\w+)?$")], FieldCompilation
    ] = {}
    input: _InputTable = _InputTable()
    output: _OutputTable = _OutputTable()
    examples: list[_ExampleTable] = []
    earlier: list[_EarlierVersionTable] = []


def _read_entry(path: Path) -> NodeType:
    """Return the node type that a `.toml` describes, with its earlier versions.

    Raises `InvalidCatalogEntry`, also if the file has not the name of its type.
    """
    try:
        entry = msgspec.convert(tomllib.loads(path.read_text(encoding="utf-8")), _CatalogEntry)
    except (tomllib.TOMLDecodeError, msgspec.ValidationError) as error:
        raise InvalidCatalogEntry(f"{path.name}: {error}") from error
    if path.stem != _file_stem(entry.type):
        raise InvalidCatalogEntry(
            f"{path.name}: it describes {entry.type!r}, so it must be {_file_stem(entry.type)}.toml"
        )
    current = _build_node_type(entry)
    earlier = {
        each.version: replace(
            _build_node_type(
                msgspec.structs.replace(entry, config=_merge_schemas(entry.config, each.config))
            ),
            version=each.version,
            changes=each.changes,
            s3_location=f"{PACKAGES_URL}/{entry.type}/{each.version}",
            examples=(),
        )
        for each in entry.earlier
    }
    return replace(current, earlier=earlier)


def _merge_schemas(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Return a copy of the schema `below` with `above` merged into it at each level; values of `above` win."""
    laid = dict(below)
    for key, value in above.items():
        own = laid.get(key)
        laid[key] = _merge_schemas(own, value) if isinstance(own, dict) and isinstance(value, dict) else value
    return laid


def _build_node_type(entry: _CatalogEntry) -> NodeType:
    return NodeType(
        type=entry.type,
        name=entry.name,
        version=entry.version,
        category=entry.category,
        description=entry.description,
        effect=_build_effect_rule(entry.effect),
        config_schema=_add_condition_schemas(entry.config, entry.compiled),
        inputs=entry.ports.inputs,
        outputs=entry.ports.outputs,
        outputs_from=entry.ports.outputs_from,
        trigger_kind=entry.trigger,
        compiled=entry.compiled,
        joins=entry.joins,
        loops=entry.loops,
        input_description=entry.input.description,
        output=_build_output(entry.output),
        cpu=entry.cpu,
        is_paid=entry.paid,
        volatile=tuple(VolatilityRule(rule.without, rule.field, rule.value) for rule in entry.volatile),
        runnable=entry.runnable,
        resources={**DEFAULT_RESOURCES, **entry.resources},
        s3_location=entry.s3_location or f"{PACKAGES_URL}/{entry.type}/{entry.version}",
        examples=tuple(msgspec.to_builtins(example) for example in entry.examples),
    )


def _build_effect_rule(effect: NodeEffect | _EffectTable) -> EffectRule:
    if isinstance(effect, NodeEffect):
        return EffectRule(effect)
    return EffectRule(effect.default, effect.field, effect.cases)


def _build_output(written: _OutputTable) -> OutputDescription:
    return OutputDescription(
        description=written.description,
        schema=written.schema,
        keeps_input=written.keeps_input,
        dropped_by=next(iter(written.dropped_by.items()), None),
        fields_of=written.fields_of,
    )


def _add_condition_schemas(
    schema: Mapping[str, Json], compiled: Mapping[str, FieldCompilation]
) -> Mapping[str, Json]:
    """Return `schema` with the schema of conditions added to each field that `compiled` marks as a condition; keywords
    that the field has already take precedence.
    """
    schema = {"properties": {}, **schema}
    for place, kind in compiled.items():
        if kind is FieldCompilation.CONDITION:
            schema = config_problems.change_schema(schema, place, lambda said: {**CONDITION_SCHEMA, **said})
    return schema


def _fill_defaults(schema: Mapping[str, Json], config: Mapping[str, Json]) -> dict[str, Json]:
    """Return a config with the defaults of a schema for missing fields, also in the objects that it contains, but not
    in lists.
    """
    filled = dict(config)
    for name, of_field in _schema_properties(schema).items():
        if name not in filled and "default" in of_field:
            filled[name] = of_field["default"]
        value = filled.get(name)
        if isinstance(value, dict):
            filled[name] = _fill_defaults(of_field, value)
    return filled


def _schema_properties(schema: Mapping[str, Json]) -> dict[str, dict[str, Json]]:
    return dict(cast("Mapping[str, dict[str, Json]]", schema.get("properties", {})))


def _file_stem(node_type: str) -> str:
    return node_type.replace("-", "_")
