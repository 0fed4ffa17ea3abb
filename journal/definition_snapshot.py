"""Definition snapshot of a run: graph and settings as one JSON text, addressed by its hash."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from hashlib import sha256
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final, Protocol, cast

from msgspec import Struct

from engine.agents import agent_wiring
from engine.config_places import may_name_model
from engine.graph import GraphNode, ParsedGraph, RunSettings
from engine.node_api import TOOL_TYPE, UnknownNodeType
from engine.node_lookup import NodeTypeLookup
from engine.validation import find_errors
from engine.values import encode_canonical, encode_json
from json_text import decoding
from models.workflow import DEFAULT_SETTINGS, WorkflowStatus

if TYPE_CHECKING:
    from sqlalchemy import Row

    from engine.findings import ValidationResult
    from engine.node_api import NodeType
    from engine.values import Json
    from models.access import ApiCaller

MANUAL_KIND: Final = "manual"
EMPTY: Final[Mapping[str, str]] = MappingProxyType({})


class NodeTypeRegistry(NodeTypeLookup, Protocol):
    """Lookup of node types that can list them all."""

    @property
    def node_types(self) -> Mapping[str, NodeType]: ...

    def document(self, node_type: NodeType) -> str | None:
        """Return the definition of a custom type as canonical JSON text; None for a type of the library."""


class CustomTypeUse(Struct, frozen=True):
    """Use of a custom type by a node, or by the target of a tool."""

    node: Mapping[str, Json]
    """Stored node."""
    type: str
    version: str | None
    """None for the newest version."""


class TriggerNode(Struct, frozen=True):
    """Node that starts runs of a workflow."""

    id: str
    kind: str
    """Kind of event that starts a run."""
    config: Mapping[str, Json]


class LoadedWorkflow(Struct, frozen=True):
    """One revision of a workflow with everything that is needed to accept a run."""

    id: str
    organization_id: str
    shard: int
    owner_id: str
    readers: frozenset[str]
    is_public: bool
    is_template: bool
    name: str
    status: WorkflowStatus
    revision: int
    settings: Mapping[str, Json]
    """Effective settings, with defaults."""
    config: str
    """The settings as JSON text: the `config` of an execution."""
    timeout_seconds: float
    definition: str
    """Nodes, connections and settings as one JSON text."""
    definition_hash: str
    """SHA-256 of that text, in hexadecimal."""
    validation: ValidationResult
    trigger: TriggerNode | None
    """None for a graph without a trigger."""
    total_nodes: int
    is_deployed: bool = False
    """Whether it was deployed at the last look-up."""
    names_default_model: bool = False
    """Whether the definition changes with the default language model of the organization, at the same revision."""
    models: Mapping[str, str] = EMPTY
    """Language models that its nodes name: id of the first node that names it, by the model's id."""

    @property
    def trigger_kind(self) -> str | None:
        """Kind of event that starts a run; None without a trigger."""
        return None if self.trigger is None else self.trigger.kind

    def is_readable_by(self, caller: ApiCaller) -> bool:
        """Return whether a caller may read the workflow; False for callers of other organizations.

        Within the organization, everybody may read a public workflow and a template, and otherwise admins, the owner
        and users with whom it is shared. `models.workflow.is_readable_by` is the same rule for the row.
        """
        return self.organization_id == caller.organization_id and (
            caller.is_admin
            or self.is_public
            or self.is_template
            or self.owner_id == caller.user_id
            or caller.user_id in self.readers
        )


def load_workflow(
    row: Row[Any], readers: frozenset[str], catalog: NodeTypeRegistry, *, is_deployed: bool = False
) -> LoadedWorkflow:
    """Build a loaded workflow from its row joined with its graph's row: validate the graph, and hash the definition.

    `readers`, the ids of users it is shared with, and `is_deployed` are kept in the result as they are. An invalid
    graph raises nothing: `validation` has its errors. Takes noticeable time for a large graph.
    """
    text = encode_canonical(build_definition(row.nodes, row.connections, row.settings, catalog))
    settings = effective_settings(row.settings)
    return LoadedWorkflow(
        id=row.id,
        organization_id=row.organization_id,
        shard=row.shard,
        owner_id=row.owner_id,
        readers=readers,
        is_public=row.is_public,
        is_template=row.is_template,
        name=row.name,
        status=WorkflowStatus(row.status),
        revision=row.revision,
        settings=settings,
        config=encode_json(settings).decode(),
        timeout_seconds=RunSettings.from_stored(settings).timeout_seconds,
        definition=text.decode(),
        definition_hash=sha256(text).hexdigest(),
        validation=check_graph(row.nodes, row.connections, catalog),
        trigger=find_trigger(row.nodes, catalog),
        total_nodes=agent_wiring.count_nodes_that_run(row.nodes, row.connections),
        is_deployed=is_deployed,
        names_default_model=names_default_model(row.nodes, catalog),
        models=find_models(row.nodes, row.connections, catalog),
    )


def names_default_model(nodes: Sequence[Mapping[str, Json]], catalog: NodeTypeLookup) -> bool:
    """Return whether stored nodes, or the nodes that tools among them run, name the default language model."""
    if not any(may_name_model(str(node["type"]), catalog) for node in nodes):
        return False
    from engine import model_references  # noqa: PLC0415 - loaded with the first node that calls a model

    return model_references.names_default(nodes, catalog)


def find_models(
    nodes: Sequence[dict[str, Json]], connections: Sequence[dict[str, Json]], catalog: NodeTypeLookup
) -> Mapping[str, str]:
    """Return the language models that a stored graph names: the id of the first node that names a model, by the model's
    id.

    The default model counts with its own id.
    """
    if not any(may_name_model(str(node["type"]), catalog) for node in nodes):
        return EMPTY
    from engine import model_references  # noqa: PLC0415 - loaded with the first node that calls a model

    graph = ParsedGraph.from_stored(build_definition(nodes, connections, {}))
    return model_references.find_model_users(graph, catalog)


def effective_settings(settings: Mapping[str, Json]) -> dict[str, Json]:
    """Return the settings that apply to a run: each stored value, and defaults for the others."""
    return {**DEFAULT_SETTINGS, **settings}


def build_definition(
    nodes: Sequence[dict[str, Json]],
    connections: Sequence[dict[str, Json]],
    settings: Mapping[str, Json],
    catalog: NodeTypeRegistry | None = None,
) -> dict[str, Json]:
    """Return a graph and its settings in the form that a run stores, with defaults for settings that are not given.

    With a `catalog`, `nodeTypes` holds the documents of the custom types that nodes use (it is missing without any),
    and the id of the default model, if there is one, replaces `default`, so that an executor needs no lookup.
    """
    definition: dict[str, Json] = {
        "nodes": list(nodes),
        "connections": list(connections),
        "settings": effective_settings(settings),
    }
    if catalog is None:
        return definition
    if catalog.default_model_id is not None:
        from engine import model_references  # noqa: PLC0415 - loaded in organizations with a default model

        definition["nodes"] = cast("Json", model_references.resolve_default(nodes, catalog))
    if pinned := _pin_custom_types(nodes, catalog):
        definition["nodeTypes"] = pinned
    return definition


def list_custom_types(nodes: Sequence[Mapping[str, Json]]) -> Iterator[CustomTypeUse]:
    """Yield each use of a custom type, whose name has a slash, by stored nodes: as their type, or that
    of the node which a tool runs (its target).
    """
    for node in nodes:
        if "/" in str(node["type"]):
            version = node.get("version")
            yield CustomTypeUse(node, str(node["type"]), None if version is None else str(version))
        elif node["type"] == TOOL_TYPE:
            target = agent_wiring.target_of(GraphNode.from_stored(node))
            if target is not None and "/" in target.type:
                yield CustomTypeUse(node, target.type, target.version)


def hash_definition(
    nodes: Sequence[dict[str, Json]],
    connections: Sequence[dict[str, Json]],
    settings: Mapping[str, Json],
    catalog: NodeTypeRegistry,
) -> str:
    """Return the hash that runs of a graph with these settings have, as long as the catalog does not change.

    Takes noticeable time for a large graph.
    """
    text = encode_canonical(build_definition(nodes, connections, settings, catalog))
    return sha256(text).hexdigest()


def _pin_custom_types(nodes: Sequence[Mapping[str, Json]], catalog: NodeTypeRegistry) -> dict[str, Json]:
    """Return the documents of the custom types that nodes use, by type and then by version; types that the catalog
    lacks are left out.
    """
    pinned: dict[str, Json] = {}
    for use in list_custom_types(nodes):
        try:
            node_type = catalog.get(use.type, use.version)
        except UnknownNodeType:
            continue
        document = catalog.document(node_type)
        if document is not None:
            versions = cast("dict[str, Json]", pinned.setdefault(node_type.type, {}))
            versions[node_type.version] = decoding.decode(document)
    return pinned


def check_graph(
    nodes: Sequence[dict[str, Json]],
    connections: Sequence[dict[str, Json]],
    catalog: NodeTypeLookup,
    *,
    passed: Collection[str] = (),
) -> ValidationResult:
    """Validate a stored graph for the errors that keep it from running; most warnings are not looked for.

    Configs of nodes whose ids are in `passed` count as valid, and are not checked again.
    """
    return find_errors(
        ParsedGraph.from_stored(build_definition(nodes, connections, {})), catalog, passed=passed
    )


def find_trigger(nodes: Sequence[Mapping[str, Json]], catalog: NodeTypeRegistry) -> TriggerNode | None:
    """Return the first node of a graph whose type is a trigger; None for a graph without one."""
    for node in nodes:
        node_type = catalog.node_types.get(str(node["type"]))
        if node_type is not None and node_type.is_trigger:
            config = node.get("config")
            kind = node_type.trigger_kind or MANUAL_KIND
            return TriggerNode(str(node["id"]), kind, config if isinstance(config, dict) else {})
    return None
