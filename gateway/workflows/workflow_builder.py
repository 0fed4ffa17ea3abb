"""Creation of a workflow with its whole graph: invalid fields and validation findings are reported together."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from enum import StrEnum
from itertools import count
from typing import TYPE_CHECKING, Any, Final, TypeAlias

from msgspec import Struct
from msgspec.structs import replace

from engine.findings import FindingType
from engine.validation import validate_graph
from gateway.http import limits
from gateway.http.errors import ApiError
from gateway.http.text_rules import ProblemCollector
from gateway.http.wire import Body, StrictWire, WireStruct, convert
from gateway.workflows import graph_shapes, workflow_shapes
from gateway.workflows.graph_shapes import ConnectionInput, Connections, NodeInput, Nodes
from gateway.workflows.workflow_shapes import (
    CreateWorkflow,
    Description,
    Name,
    Settings,
    Tags,
    UpdateWorkflow,
)
from models.workflow import WorkflowStatus

if TYPE_CHECKING:
    from datetime import datetime

    from engine.findings import GraphFinding
    from engine.values import Json
    from gateway.workflows.stored_workflow import StoredWorkflow
    from models.access import ApiCaller
    from nodes.catalog import NodeCatalog

Problem: TypeAlias = "Mapping[str, Json]"
"""`path, code, message`; a validation finding also has `type`, `suggestion` and its other fields."""

OF_FIELDS: Final = frozenset(
    {FindingType.INVALID_CONFIG, FindingType.MISSING_CONFIG, FindingType.UNRESOLVED_MAPPING}
)
"""Findings that may disappear once a node's fields are valid."""
OF_MISSING_FIELDS: Final = frozenset({FindingType.UNKNOWN_NODE_TYPE, FindingType.BROKEN_CONNECTION})
"""Findings about a node without a type, and a connection without an end."""


class FirstStatus(StrEnum):
    """Initial status of a workflow."""

    DRAFT = "draft"
    ACTIVE = "active"


class BuildWorkflow(StrictWire):
    """Workflow to create with its graph; connections name the nodes by their ids in this body."""

    name: Name
    nodes: Nodes
    connections: Connections | None = None
    description: Description | None = None
    status: FirstStatus | None = None
    tags: Tags | None = None
    settings: Settings | None = None
    config: dict[str, Any] | None = None


class WorkflowPlan(Struct, frozen=True):
    """Workflow to create, with its errors and warnings."""

    stored: StoredWorkflow
    """Its nodes have positions if there are no errors."""
    errors: Sequence[Problem]
    warnings: Sequence[Problem]


def plan_workflow(caller: ApiCaller, value: Json, catalog: NodeCatalog, now: datetime) -> WorkflowPlan:
    """Return the workflow that a body describes, not stored, with its errors and warnings.

    Errors are those of fields and of the graph; those that follow from an invalid field are left out. Nodes and
    connections without ids are numbered, so that equal bodies give equal graphs. Raises a 422 error only for a body
    that is no object.
    """
    body, wrong = _read(value)
    _number(body.nodes, "node")
    _number(body.connections or [], "conn")
    problems = ProblemCollector()
    problems.found.extend(wrong.problems)
    stored = workflow_shapes.draft_workflow(caller, _to_create_request(body), catalog, problems, now)
    errors = [*wrong.problems, *filter(wrong.is_independent, problems.found[len(wrong.problems) :])]
    if problems.is_full or wrong.paths & {"nodes", "connections"}:
        return WorkflowPlan(stored, errors, [])
    is_draft = stored.workflow.status == WorkflowStatus.DRAFT
    validation = validate_graph(graph_shapes.graph_of(stored), catalog, is_draft=is_draft)
    # Validation reports unknown node types too, with a suggestion.
    errors = [problem for problem in errors if problem["code"] != FindingType.UNKNOWN_NODE_TYPE]
    errors = [*errors, *locate_findings(validation.errors, stored, wrong, errors)]
    if not errors:
        stored = replace(stored, nodes=graph_shapes.with_all_positions(stored.nodes, stored.connections))
    return WorkflowPlan(stored, errors, [*locate_findings(validation.warnings, stored, wrong, errors)])


def refusal_error(errors: Sequence[Problem]) -> ApiError:
    """Return the 422 error for the creation of a workflow with errors, at least one; at most 100 are listed."""
    message = str(errors[0]["message"])
    if len(errors) > 1:
        message = f"There are {len(errors):,} errors: see details"
    return ApiError(422, "validation-failed", message, details=errors[: limits.FINDINGS])


def _number(items: Sequence[NodeInput] | Sequence[ConnectionInput], prefix: str) -> None:
    """Give each item without an id the next free id of the form `<prefix>-<number>`, from 1 on; items are
    changed in place.
    """
    taken = {item.id for item in items}
    free = (name for number in count(1) if (name := f"{prefix}-{number}") not in taken)
    for item in items:
        item.id = item.id or next(free)


def _to_create_request(body: BuildWorkflow) -> CreateWorkflow:
    """Return the request that creates the workflow of a body, with the same fields; without a status it becomes a
    draft.
    """
    return CreateWorkflow(
        name=body.name,
        description=body.description,
        status=WorkflowStatus(body.status or FirstStatus.DRAFT),
        nodes=body.nodes,
        connections=body.connections,
        tags=body.tags,
        settings=body.settings,
        config=body.config,
    )


def locate_findings(
    findings: Iterable[GraphFinding],
    stored: StoredWorkflow,
    wrong: InvalidFields | None = None,
    reported: Iterable[Problem] = (),
) -> Iterator[Problem]:
    """Yield the findings with their paths in the body, without those that follow from invalid fields (`wrong`) or from
    problems reported already (`reported`).
    """
    nodes = {str(node["id"]): f"nodes.{number}" for number, node in enumerate(stored.nodes)}
    edges = {str(edge["id"]): f"connections.{number}" for number, edge in enumerate(stored.connections)}
    wrong = wrong or InvalidFields([])
    bare = {_find_item_path(str(problem["path"])) for problem in reported if problem["code"] == "required"}
    for finding in findings:
        node, edge = nodes.get(finding.node_id or ""), edges.get(finding.connection_id or "")
        if finding.type in wrong.uncertain_types or edge in wrong.items:
            continue
        if finding.type in OF_FIELDS and node in wrong.items:
            continue
        if finding.type in OF_MISSING_FIELDS and bare & {node, edge}:
            continue
        yield {"path": edge or node or "nodes", "code": finding.type, **finding.as_json()}


# ── invalid fields ──────────────────────────────────────────────────────────────────────────────────────────


class InvalidFields:
    """Invalid fields; the rest of a body is checked without them."""

    def __init__(self, problems: Sequence[Problem]) -> None:
        self.problems = problems
        self.paths = {str(problem["path"]) for problem in problems}
        self.items = {_find_item_path(path) for path in self.paths}
        """Nodes and connections with such fields, as `nodes.0`."""

    @property
    def uncertain_types(self) -> frozenset[FindingType]:
        """Types of findings that may disappear once the invalid fields are corrected, whatever node they are about."""
        uncertain_types = set()
        if any(item.startswith("connections.") for item in self.items):
            uncertain_types.add(FindingType.DISCONNECTED_NODE)
        if any(
            path in {_find_item_path(path), f"{_find_item_path(path)}.id"}
            for path in self.paths
            if path.startswith("nodes.")
        ):
            uncertain_types.add(FindingType.BROKEN_CONNECTION)
        return frozenset(uncertain_types)

    def is_independent(self, problem: Problem) -> bool:
        """Return whether a problem is an error of its own, and not a result of checking the body without the invalid
        fields.
        """
        path = str(problem["path"])
        item = _find_item_path(path)
        if {path, item, path.partition(".")[0]} & self.paths:
            return False
        return problem["code"] != "required" or item not in self.items


def _find_item_path(path: str) -> str:
    """Return the path of the node or connection that a path is in: its first two segments."""
    return ".".join(path.split(".")[:2])


def _read(value: Json) -> tuple[BuildWorkflow, InvalidFields]:
    """Return a body without its invalid fields, and these fields; raises a 422 error for a body that is no object.

    With more invalid fields than an answer lists, the body is empty.
    """
    try:
        return convert(value, BuildWorkflow), InvalidFields([])
    except ApiError as error:
        if not isinstance(value, dict):
            raise
        # If there are more of them than an answer lists, no further problems are searched for.
        is_full = len(error.details) >= limits.FINDINGS
        return _read_valid_fields({} if is_full else value), InvalidFields(error.details)


def _read_valid_fields(value: Mapping[str, Json]) -> BuildWorkflow:
    """Return a body without its invalid fields; its nodes and connections keep their indexes."""
    status = value.get("status")
    others = {name: field for name, field in value.items() if name not in {"nodes", "connections"}}
    body = _convert_valid_fields(others, UpdateWorkflow)
    return BuildWorkflow(
        name=body.name or "",
        nodes=[_convert_valid_fields(item, NodeInput) for item in _to_items(value.get("nodes"))],
        connections=[
            _convert_valid_fields(item, ConnectionInput) for item in _to_items(value.get("connections"))
        ],
        description=body.description,
        status=FirstStatus.ACTIVE if status == FirstStatus.ACTIVE else None,
        tags=body.tags,
        settings=body.settings,
        config=body.config,
    )


def _to_items(value: Json) -> Sequence[Json]:
    return value if isinstance(value, list) else []


def _convert_valid_fields(value: Json, kind: type[Body]) -> Body:
    """Return a body of a type that has only optional fields, without the invalid ones; an empty one for a value that is
    no object.
    """
    fields = value if isinstance(value, dict) else {}
    return convert(
        {name: field for name, field in fields.items() if _is_convertible({name: field}, kind)}, kind
    )


def _is_convertible(value: Json, kind: type[WireStruct]) -> bool:
    try:
        convert(value, kind)
    except ApiError:
        return False
    return True
