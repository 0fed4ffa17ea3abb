"""Plans of partial runs and node tests, with pinned outputs for some nodes; neither is saved."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from datetime import datetime
from hashlib import sha256
from itertools import islice
from typing import TYPE_CHECKING, Final

from msgspec import Struct, field
from msgspec.structs import replace

from engine import name_suggestions, pruning
from engine.agents.agent_wiring import remove_providers
from engine.findings import FindingType, ValidationResult
from engine.graph import ParsedGraph, find_bodies
from engine.node_api import INPUT, OUTPUT
from engine.triggers import trigger_output
from engine.validation import find_errors
from engine.values import InvalidJson, encode_canonical, encode_json
from gateway.executions.acceptance import RunRequest
from gateway.http import errors, limits
from gateway.workflows import graph_shapes, node_edits
from journal import definition_snapshot
from json_text import decoding

if TYPE_CHECKING:
    from engine.findings import GraphFinding
    from engine.values import Json
    from gateway.workflows.stored_workflow import StoredConnection, StoredNode
    from journal.definition_snapshot import LoadedWorkflow
    from nodes.catalog import NodeCatalog

TEST: Final = "test"
"""Trigger type of the run of a single node."""
ABOUT_WHOLE_RUNS: Final = frozenset({"retryOnFailure", "maxRetries", "onFailure", "concurrency"})
"""Settings of a workflow that do not apply to a node test."""
COMPARED_IDS: Final = 1_000
"""Number of node ids that are compared with an unknown one, for a suggestion."""
SHOWN_CHARACTERS: Final = 64
"""Characters of an unknown id in an error message."""


class GraphSelection(Struct, frozen=True):
    """Part of a graph that runs."""

    up_to: str | None = None
    """Node that runs with its predecessors. None: all nodes."""
    pinned: Mapping[str, Json] = field(default_factory=dict)
    """Outputs by node id: these nodes return them without running."""


WHOLE: Final = GraphSelection()


class NodeTestInput(Struct, frozen=True):
    """Input of a node test."""

    input: Json
    trigger: Mapping[str, Json]
    """Inputs of the workflow's trigger."""
    nodes: Mapping[str, Json]
    """Outputs of other nodes, by their ids."""
    config: Mapping[str, Json] | None
    """Config that replaces the node's own."""


def select_graph(workflow: LoadedWorkflow) -> tuple[list[StoredNode], list[StoredConnection]]:
    """Return the nodes and connections of a workflow's stored definition."""
    definition = decoding.decode(workflow.definition)
    return definition["nodes"], definition["connections"]


def plan_partial_run(
    workflow: LoadedWorkflow,
    nodes: Sequence[StoredNode],
    connections: Sequence[StoredConnection],
    piece: GraphSelection,
    inputs: Mapping[str, Json],
    catalog: NodeCatalog,
    now: datetime,
) -> RunRequest:
    """Return the run of a part of a graph, with a definition of its own; an invalid one raises nothing: its validation
    has the errors.

    Nodes with a pinned output return it without running; the part up to a node leaves out all that it does not need.
    Raises a 422 error if the part names unknown nodes, or pinned outputs exceed 1 MB.
    """
    known = {str(node["id"]) for node in nodes}
    asked = {} if piece.up_to is None else {"upTo": piece.up_to}
    _require_known(known, asked | {f"pinned.{node_id}": node_id for node_id in piece.pinned})
    _require_size(piece.pinned, "pinned")
    node = definition_snapshot.find_trigger(nodes, catalog)
    kind = node.kind if node else definition_snapshot.MANUAL_KIND
    trigger = _choose_trigger_output(kind, inputs, nodes, piece.pinned, catalog, now)
    return RunRequest(_with_definition(workflow, nodes, connections, piece, catalog), kind, trigger)


def plan_node_test(
    workflow: LoadedWorkflow, node_id: str, given: NodeTestInput, catalog: NodeCatalog, now: datetime
) -> RunRequest:
    """Return the private run of one node behind a node that returns the given input; a loop runs with its body, a
    trigger alone.

    Outputs of other nodes are as given. An invalid definition raises nothing: its validation has the errors. Raises 404
    for an unknown node, 409 if two nodes share the id, and 422 for unknown nodes, too much data, or a trigger's input
    that is no object.
    """
    nodes, connections = select_graph(workflow)
    tried = node_edits.find_node(nodes, node_id)
    if given.config is not None:
        tried = {**tried, "config": dict(given.config)}
    others = {str(node["id"]): node for node in nodes if node["id"] != node_id}
    _require_known(others, {f"nodes.{other}": other for other in given.nodes})
    _require_size({"input": given.input, **given.nodes}, "input and nodes")
    kind = workflow.trigger_kind or "manual"
    if _is_trigger(tried, catalog):
        if not isinstance(given.input, dict | None):
            raise errors.invalid(
                [errors.problem("input", "invalid-type", "a trigger's input must be an object")]
            )
        started_by = trigger_output(kind, given.input or given.trigger, now)
        return RunRequest(
            _build_test_workflow(workflow, [tried], [], {}, catalog), TEST, started_by, is_private=True
        )
    trigger = _choose_trigger_output(kind, given.trigger, nodes, given.nodes, catalog, now)
    parent, edge = _build_parent(tried, others, catalog)
    body = _find_body(node_id, nodes, connections, catalog)
    inside = [one for one in connections if one["source"] in {node_id, *body} and one["target"] in body]
    taken = [tried, parent, *(others[other] for other in {**given.nodes, **dict.fromkeys(body)})]
    pinned = {**given.nodes, str(parent["id"]): given.input}
    return RunRequest(
        _build_test_workflow(workflow, taken, [edge, *inside], pinned, catalog),
        TEST,
        trigger,
        is_private=True,
    )


# ── definitions ─────────────────────────────────────────────────────────────────────────────────────────────


def _build_test_workflow(
    workflow: LoadedWorkflow,
    nodes: Sequence[StoredNode],
    connections: Sequence[StoredConnection],
    pinned: Mapping[str, Json],
    catalog: NodeCatalog,
) -> LoadedWorkflow:
    settings = {name: value for name, value in workflow.settings.items() if name not in ABOUT_WHOLE_RUNS}
    tested = replace(workflow, settings=settings, config=encode_json(settings).decode())
    return _with_definition(tested, nodes, connections, GraphSelection(pinned=pinned), catalog)


def _with_definition(
    workflow: LoadedWorkflow,
    nodes: Sequence[StoredNode],
    connections: Sequence[StoredConnection],
    piece: GraphSelection,
    catalog: NodeCatalog,
) -> LoadedWorkflow:
    """Return the workflow with a definition of the selected part of a graph, validated, with its pinned outputs.

    Nodes that the part does not need stay in the definition and are not validated or counted.
    """
    definition = definition_snapshot.build_definition(nodes, connections, workflow.settings, catalog)
    if piece.up_to is not None:
        definition["upTo"] = piece.up_to
    text = encode_canonical(definition)
    if piece.pinned:
        definition["pinned"] = dict(piece.pinned)
        # Not canonical: nodes return the fields of an object in their original order, and so must pinned
        # outputs.
        text = b'%b,"pinned":%b}' % (text[:-1], encode_json(definition["pinned"]))
    graph = pruning.prune_graph(ParsedGraph.from_stored(definition), catalog)
    running = {node.id for node in graph.nodes} - piece.pinned.keys()
    return replace(
        workflow,
        definition=text.decode(),
        definition_hash=sha256(text).hexdigest(),
        validation=_filter_findings(find_errors(graph, catalog), piece),
        total_nodes=len(remove_providers(graph).nodes),
        models=definition_snapshot.find_models(
            [node for node in nodes if node["id"] in running], connections, catalog
        ),
    )


def _filter_findings(found: ValidationResult, piece: GraphSelection) -> ValidationResult:
    """Return a validation result without errors about pinned nodes, which don't run.

    With pinned outputs, a missing trigger is no error. Errors about connections and unknown types stay.
    """

    def matters(finding: GraphFinding) -> bool:
        if finding.type is FindingType.MISSING_TRIGGER:
            return not piece.pinned
        if finding.type is FindingType.UNKNOWN_NODE_TYPE or finding.connection_id is not None:
            return True
        return finding.node_id not in piece.pinned

    return replace(found, errors=tuple(filter(matters, found.errors)))


def _choose_trigger_output(
    kind: str,
    inputs: Mapping[str, Json],
    nodes: Sequence[StoredNode],
    pinned: Mapping[str, Json],
    catalog: NodeCatalog,
    now: datetime,
) -> Json:
    """Return the output of the trigger: the pinned one of any trigger node, else the one that the inputs produce."""
    for node in nodes if pinned else ():
        if node["id"] in pinned and _is_trigger(node, catalog):
            return pinned[str(node["id"])]
    return trigger_output(kind, inputs, now)


def _find_body(
    node_id: str, nodes: Sequence[StoredNode], connections: Sequence[StoredConnection], catalog: NodeCatalog
) -> frozenset[str]:
    """Return the ids of the nodes in the body of a loop, also of inner loops; empty for a node that is no loop."""
    types = {str(node["id"]): catalog.node_types.get(str(node["type"])) for node in nodes}
    loops = {each for each, node_type in types.items() if node_type and node_type.loops}
    if node_id not in loops:
        return frozenset()
    bodies = find_bodies(
        ParsedGraph.from_stored(definition_snapshot.build_definition(nodes, connections, {})), loops
    )
    return frozenset(inner for inner in bodies.holders if node_id in bodies.enclosing_loops(inner))


def _is_trigger(node: StoredNode, catalog: NodeCatalog) -> bool:
    node_type = catalog.node_types.get(str(node["type"]))
    return node_type is not None and node_type.is_trigger


def _build_parent(
    node: StoredNode, taken: Collection[str], catalog: NodeCatalog
) -> tuple[StoredNode, StoredConnection]:
    """Return a node that stands for the predecessors of another, and the connection from it; `taken` are ids in use."""
    node_type = catalog.node_types.get(str(node["type"]))
    port = node_type.inputs[0] if node_type and node_type.inputs else INPUT
    is_free = "input" not in {*taken, node["id"]}
    parent_id = "input" if is_free else graph_shapes.new_id("input")
    parent: StoredNode = {
        "id": parent_id,
        "type": "manual",
        "label": "Input",
        "config": {},
        "inputMappings": {},
        "passThroughValues": {},
    }
    edge: StoredConnection = {
        "id": "conn-input",
        "source": parent_id,
        "sourcePort": OUTPUT,
        "target": node["id"],
        "targetPort": port,
    }
    return parent, edge


# ── refusals ────────────────────────────────────────────────────────────────────────────────────────────────


def _require_known(known: Collection[str], asked: Mapping[str, str]) -> None:
    """Raise a 422 error if a field names an unknown node; `asked` has the node ids by the paths of their fields."""
    absent = [
        _describe_absent_node(path, node_id, known) for path, node_id in asked.items() if node_id not in known
    ]
    if absent:
        raise errors.invalid(absent)


def _describe_absent_node(path: str, node_id: str, known: Iterable[str]) -> dict[str, Json]:
    meant = name_suggestions.suggest_names(node_id, [*islice(known, COMPARED_IDS)])
    hint = f": did you mean {' or '.join(meant)}?" if meant else ""
    message = f"There is no node {node_id[:SHOWN_CHARACTERS]}{hint}"
    return errors.problem(path, "unknown-node", message)


def _require_size(given: Mapping[str, Json], path: str) -> None:
    """Raise a 422 error if the values take more than 1 MB as JSON; `path` names the field."""
    try:
        encode_json(dict(given), max_bytes=limits.PINNED_BYTES)
    except InvalidJson as error:
        message = f"{path} may have at most {limits.PINNED_BYTES:,} bytes as JSON in total"
        raise errors.invalid([errors.problem(path, "too-large", message)]) from error
