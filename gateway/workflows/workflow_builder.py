"""A workflow with its whole graph in one body: wrong fields and what validation finds are told together."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from itertools import count
from typing import TYPE_CHECKING, Any, Final, TypeAlias

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
"""`path, code, message`; where it comes from validation `type, suggestion` too, and what else a finding has."""

OF_FIELDS: Final = frozenset(
    {FindingType.INVALID_CONFIG, FindingType.MISSING_CONFIG, FindingType.UNRESOLVED_MAPPING}
)
"""Findings that may be gone once a node's fields are right."""
OF_WHAT_IS_MISSING: Final = frozenset({FindingType.UNKNOWN_NODE_TYPE, FindingType.BROKEN_CONNECTION})
"""Findings about a node without a type, and a connection that lacks an end."""


class FirstStatus(StrEnum):
    """A status that a workflow can begin in."""

    DRAFT = "draft"
    ACTIVE = "active"


class BuildWorkflow(StrictWire):
    """A workflow that somebody wants as a whole; connections name the nodes by the ids that these have here."""

    name: Name
    nodes: Nodes
    connections: Connections | None = None
    description: Description | None = None
    status: FirstStatus | None = None
    tags: Tags | None = None
    settings: Settings | None = None
    config: dict[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class WorkflowPlan:
    """The workflow that would be created, and everything that is to be said about it."""

    stored: StoredWorkflow
    """Its nodes have positions where there are no errors."""
    errors: Sequence[Problem]
    warnings: Sequence[Problem]


def plan_workflow(caller: ApiCaller, value: Json, catalog: NodeCatalog, now: datetime) -> WorkflowPlan:
    """Return what a body would create, and what is wrong with it; raises 422 only for one that is no object.

    The same body makes the same graph: nodes and connections without ids are numbered.
    """
    body, wrong = _read(value)
    _number(body.nodes, "node")
    _number(body.connections or [], "conn")
    problems = ProblemCollector()
    problems.found.extend(wrong.problems)
    stored = workflow_shapes.draft_workflow(caller, _plain(body), catalog, problems, now)
    errors = [*wrong.problems, *filter(wrong.is_news, problems.found[len(wrong.problems) :])]
    if problems.is_full or wrong.paths & {"nodes", "connections"}:
        return WorkflowPlan(stored, errors, [])
    is_draft = stored.workflow.status == WorkflowStatus.DRAFT
    validation = validate_graph(graph_shapes.graph_of(stored), catalog, is_draft=is_draft)
    # Validation says the same of these, and what to do about it.
    errors = [problem for problem in errors if problem["code"] != FindingType.UNKNOWN_NODE_TYPE]
    errors = [*errors, *_told(validation.errors, stored, wrong, errors)]
    if not errors:
        stored = replace(stored, nodes=graph_shapes.placed(stored.nodes, stored.connections))
    return WorkflowPlan(stored, errors, [*_told(validation.warnings, stored, wrong, errors)])


def refusal_error(errors: Sequence[Problem]) -> ApiError:
    """Return the answer to whoever wants a workflow with errors."""
    message = str(errors[0]["message"])
    if len(errors) > 1:
        message = f"There are {len(errors):,} errors: see details"
    return ApiError(422, "validation-failed", message, details=errors[: limits.FINDINGS])


def _number(items: Sequence[NodeInput] | Sequence[ConnectionInput], prefix: str) -> None:
    """Give ids to those that have none."""
    taken = {item.id for item in items}
    free = (name for number in count(1) if (name := f"{prefix}-{number}") not in taken)
    for item in items:
        item.id = item.id or next(free)


def _plain(body: BuildWorkflow) -> CreateWorkflow:
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


def _told(
    findings: Iterable[GraphFinding], stored: StoredWorkflow, wrong: InvalidFields, told: Iterable[Problem]
) -> Iterator[Problem]:
    """Return the findings, each with its place in the body, but for those that follow from what is told already."""
    nodes = {str(node["id"]): f"nodes.{number}" for number, node in enumerate(stored.nodes)}
    edges = {str(edge["id"]): f"connections.{number}" for number, edge in enumerate(stored.connections)}
    bare = {_item(str(problem["path"])) for problem in told if problem["code"] == "required"}
    for finding in findings:
        node, edge = nodes.get(finding.node_id or ""), edges.get(finding.connection_id or "")
        if finding.type in wrong.unsure or edge in wrong.items:
            continue
        if finding.type in OF_FIELDS and node in wrong.items:
            continue
        if finding.type in OF_WHAT_IS_MISSING and bare & {node, edge}:
            continue
        yield {"path": edge or node or "nodes", "code": finding.type, **finding.as_json()}


# ── bodies with wrong fields ────────────────────────────────────────────────────────────────────────────────


class InvalidFields:
    """Fields that can't be read; the rest of a body is checked without them."""

    def __init__(self, problems: Sequence[Problem]) -> None:
        self.problems = problems
        self.paths = {str(problem["path"]) for problem in problems}
        self.items = {_item(path) for path in self.paths}
        """The nodes and connections that have such fields, as `nodes.0`."""

    @property
    def unsure(self) -> frozenset[FindingType]:
        """Findings that may be gone once these fields are right, whatever they are about."""
        unsure = set()
        if any(item.startswith("connections.") for item in self.items):
            unsure.add(FindingType.DISCONNECTED_NODE)
        if any(
            path in {_item(path), f"{_item(path)}.id"} for path in self.paths if path.startswith("nodes.")
        ):
            unsure.add(FindingType.BROKEN_CONNECTION)
        return frozenset(unsure)

    def is_news(self, problem: Problem) -> bool:
        """Tell whether a problem isn't merely that such a field was left out."""
        path = str(problem["path"])
        item = _item(path)
        if {path, item, path.partition(".")[0]} & self.paths:
            return False
        return problem["code"] != "required" or item not in self.items


def _item(path: str) -> str:
    """Return the path of the node or connection that a path leads into."""
    return ".".join(path.split(".")[:2])


def _read(value: Json) -> tuple[BuildWorkflow, InvalidFields]:
    """Return a body, or what of it can be read, and the fields that can't."""
    try:
        return convert(value, BuildWorkflow), InvalidFields([])
    except ApiError as error:
        if not isinstance(value, dict):
            raise
        # Where there are more of them than an answer lists, nothing else needs to be looked for.
        is_full = len(error.details) >= limits.FINDINGS
        return _readable({} if is_full else value), InvalidFields(error.details)


def _readable(value: Mapping[str, Json]) -> BuildWorkflow:
    """Return a body without the fields that can't be read; its nodes and connections keep their numbers."""
    status = value.get("status")
    others = {name: field for name, field in value.items() if name not in {"nodes", "connections"}}
    body = _fitting(others, UpdateWorkflow)
    return BuildWorkflow(
        name=body.name or "",
        nodes=[_fitting(item, NodeInput) for item in _items(value.get("nodes"))],
        connections=[_fitting(item, ConnectionInput) for item in _items(value.get("connections"))],
        description=body.description,
        status=FirstStatus.ACTIVE if status == FirstStatus.ACTIVE else None,
        tags=body.tags,
        settings=body.settings,
        config=body.config,
    )


def _items(value: Json) -> Sequence[Json]:
    return value if isinstance(value, list) else []


def _fitting(value: Json, kind: type[Body]) -> Body:
    """Return a body, all of whose fields are optional, without those that can't be read."""
    fields = value if isinstance(value, dict) else {}
    return convert({name: field for name, field in fields.items() if _fits({name: field}, kind)}, kind)


def _fits(value: Json, kind: type[WireStruct]) -> bool:
    try:
        convert(value, kind)
    except ApiError:
        return False
    return True
