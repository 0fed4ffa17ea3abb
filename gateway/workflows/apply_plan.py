"""Plan of an `apply` request: the change of each workflow, or the reason why it must not be changed."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from enum import StrEnum
from hashlib import sha256
from itertools import count
from typing import TYPE_CHECKING, Any, Final, cast

import msgspec
from msgspec import Struct
from msgspec.structs import replace

from engine.config_places import RESOURCE_KEYWORD
from engine.node_api import UnknownNodeType
from gateway.http import errors, limits
from gateway.workflows import graph_difference, graph_shapes, workflow_builder
from gateway.workflows.graph_difference import ItemsDifference
from journal import definition_snapshot
from models.workflow import WorkflowStatus

if TYPE_CHECKING:
    from datetime import datetime

    from engine.findings import GraphFinding
    from engine.values import Json
    from gateway.workflows.stored_workflow import StoredConnection, StoredWorkflow
    from models.access import ApiCaller
    from models.applied_workflow import AppliedWorkflow
    from nodes.catalog import NodeCatalog

SOURCE_MARK: Final = "@"
"""Begin of a data source's name in place of its id."""
DOCUMENT_FIELDS: Final = frozenset({"format", "formatVersion", "references", "removedSecrets"})
"""Fields of an exported document that describe the file and not the workflow."""
_EDGE: Final = ("source", "sourcePort", "target", "targetPort")
_encode_sorted = msgspec.json.Encoder(order="sorted").encode


class ApplyAction(StrEnum):
    """Planned change of one workflow."""

    CREATE = "create"
    UPDATE = "update"
    UNCHANGED = "unchanged"
    ARCHIVE = "archive"
    DELETE = "delete"
    CONFLICT = "conflict"


class ConflictReason(StrEnum):
    """Reason why a workflow is not changed without `force`."""

    EDITED = "edited-since-apply"
    NOT_APPLIED = "not-applied-before"
    OTHER_SET = "other-set"


CONFLICT_TEXTS: Final[Mapping[ConflictReason, str]] = {
    ConflictReason.EDITED: "was edited since it was applied",
    ConflictReason.NOT_APPLIED: "exists with another content, and was never applied",
    ConflictReason.OTHER_SET: "belongs to the set",
}


class WantedWorkflow(Struct, frozen=True):
    """Workflow that a request describes."""

    place: int
    """Position in the request."""
    stored: StoredWorkflow
    """As it would be created; the database has none with its id."""
    status: WorkflowStatus | None
    """Status that the request demands."""
    given: Mapping[str, Any]
    """Fields as sent."""

    @property
    def name(self) -> str:
        return self.stored.workflow.name


class PlannedChange(Struct, frozen=True):
    """Change of one workflow. `before` and `after` are the same for an unchanged one."""

    action: ApplyAction
    name: str
    place: int | None
    """Position in the request; None for a workflow that only the set has."""
    before: StoredWorkflow | None
    after: StoredWorkflow | None
    status: WorkflowStatus | None = None
    conflict: ConflictReason | None = None
    set_name: str = ""
    """Set to which the workflow belongs now."""
    warnings: Sequence[GraphFinding] = ()


# ── reading ─────────────────────────────────────────────────────────────────────────────────────────────────


def read_workflows(
    caller: ApiCaller,
    given: Sequence[Mapping[str, Json]],
    sources: Mapping[str, Sequence[str]],
    catalog: NodeCatalog,
    now: datetime,
) -> Sequence[WantedWorkflow]:
    """Parse the workflows of a request, in its order; raises one 422 error with the problems of all of them, and for a
    name that two of them have.

    `sources` holds ids of data sources by name, which replace `@name` in configs.
    """
    problems: list[Mapping[str, Json]] = []
    wanted: list[WantedWorkflow] = []
    for place, value in enumerate(given):
        fields = {name: one for name, one in value.items() if name not in DOCUMENT_FIELDS}
        own: list[Mapping[str, Json]] = []
        status = _read_status(fields.pop("status", None), own)
        fields["nodes"] = _with_sources(fields.get("nodes") or [], sources, catalog, own)
        checked = WorkflowStatus.ACTIVE if status is WorkflowStatus.ACTIVE else WorkflowStatus.DRAFT
        plan = workflow_builder.plan_workflow(caller, {**fields, "status": checked}, catalog, now)
        problems += [locate_problem(found, place, value.get("name")) for found in [*own, *plan.errors]]
        stored = plan.stored.with_columns(status=status or WorkflowStatus.DRAFT)
        wanted.append(WantedWorkflow(place, stored, status, fields))
    problems += _repeated_names(wanted)
    if problems:
        raise errors.invalid(problems)
    return wanted


def locate_problem(problem: Mapping[str, Json], place: int, name: Json) -> dict[str, Json]:
    """Return a problem of one workflow with its path in the request, and the name of the workflow in its message."""
    path, message = f"workflows.{place}.{problem['path']}", problem["message"]
    return {**problem, "path": path, "message": f"Workflow {name!r}: {message}" if name else message}


def _read_status(value: Json, problems: list[Mapping[str, Json]]) -> WorkflowStatus | None:
    """Return the status that a workflow names, None without one; an unknown one is added to `problems`."""
    if value is None:
        return None
    if isinstance(value, str) and value in {*WorkflowStatus}:
        return WorkflowStatus(value)
    message = f"status must be one of {', '.join(WorkflowStatus)}"
    problems.append(errors.problem("status", "invalid-value", message))
    return None


def _repeated_names(wanted: Sequence[WantedWorkflow]) -> Iterator[Mapping[str, Json]]:
    seen: dict[str, int] = {}
    for one in wanted:
        first = seen.setdefault(one.name, one.place)
        if first != one.place:
            path = f"workflows.{one.place}.name"
            yield errors.problem(path, "duplicate-name", f"{path} is the name of workflows.{first} too")


def source_names(given: Sequence[Mapping[str, Json]]) -> Collection[str]:
    """Return the texts after `@` in the configs of all nodes, which may be names of data sources."""
    found: set[str] = set()
    for value in given:
        nodes = value.get("nodes")
        for node in nodes if isinstance(nodes, list) else ():
            config = node.get("config") if isinstance(node, dict) else None
            found.update(_marked_texts(config))
    return found


def _marked_texts(value: Json) -> Iterator[str]:
    """Yield each string value that begins with `@`, at any depth and without the mark, unless it is too long for a
    name.
    """
    if isinstance(value, str):
        if value.startswith(SOURCE_MARK) and len(value) <= limits.WORKFLOW_NAME_LENGTH:
            yield value.removeprefix(SOURCE_MARK)
    elif isinstance(value, list):
        for item in value:
            yield from _marked_texts(item)
    elif isinstance(value, dict):
        for item in value.values():
            yield from _marked_texts(item)


def _with_sources(
    nodes: Json,
    sources: Mapping[str, Sequence[str]],
    catalog: NodeCatalog,
    problems: list[Mapping[str, Json]],
) -> Json:
    """Return nodes with the ids of data sources in place of `@name` in their configs.

    Unknown and ambiguous names stay and are added to `problems`.
    """
    if not isinstance(nodes, list):
        return nodes
    replaced: list[Json] = []
    for index, node in enumerate(nodes):
        if isinstance(node, dict) and isinstance(node.get("config"), dict):
            path = f"nodes.{index}.config"
            schema = _config_schema(node, catalog)
            config = _with_ids(node["config"], schema, sources, path, problems)
            replaced.append({**node, "config": config})
        else:
            replaced.append(node)
    return replaced


def _config_schema(node: Mapping[str, Json], catalog: NodeCatalog) -> Json:
    name = node.get("nodeId") or node.get("type") or node.get("nodeType")
    version = node.get("version") or node.get("nodeVersion")
    try:
        return dict(catalog.get(str(name), version if isinstance(version, str) else None).config_schema)
    except UnknownNodeType:
        return {}


def _with_ids(
    value: Json,
    schema: Json,
    sources: Mapping[str, Sequence[str]],
    path: str,
    problems: list[Mapping[str, Json]],
) -> Json:
    """Return a config with names of data sources (`@name`) replaced by their ids, in fields with a schema that expects
    one.

    Unknown and ambiguous names stay and are added to `problems`.
    """
    if not isinstance(schema, dict):
        return value
    if isinstance(value, str):
        is_source = str(schema.get(RESOURCE_KEYWORD, "")).startswith("datasources")
        if not (is_source and value.startswith(SOURCE_MARK)):
            return value
        found = sources.get(value.removeprefix(SOURCE_MARK), ())
        if len(found) == 1:
            return found[0]
        message = (
            f"{path} names {len(found) or 'no'} data source{'s' if len(found) > 1 else ''} {value[:200]!r}"
        )
        problems.append(errors.problem(path, "data-source-not-found", f"{message} that the key may use"))
        return value
    if isinstance(value, list):
        items = schema.get("items")
        return [
            _with_ids(one, items, sources, f"{path}.{place}", problems) for place, one in enumerate(value)
        ]
    if isinstance(value, dict):
        properties = cast("Mapping[str, Json]", schema.get("properties") or {})
        return {
            name: _with_ids(one, properties.get(name), sources, f"{path}.{name}", problems)
            for name, one in value.items()
        }
    return value


# ── planning ────────────────────────────────────────────────────────────────────────────────────────────────


def plan_change(
    wanted: WantedWorkflow,
    before: StoredWorkflow | None,
    applied: AppliedWorkflow | None,
    set_name: str,
    *,
    is_forced: bool,
) -> PlannedChange:
    """Return the change of one workflow: create, update, unchanged, or a conflict unless `is_forced`.

    `before` is None for a new one, `applied` the record of its last `apply`, None if it was never applied; `set_name`
    is empty without a set. A forced update has the reason of the conflict, too.
    """
    if before is None:
        return PlannedChange(
            ApplyAction.CREATE,
            wanted.name,
            wanted.place,
            None,
            wanted.stored,
            wanted.status,
            set_name=set_name,
        )
    after = _merged(wanted, before)
    is_same = _is_same(before, after)
    reason = _conflict(before, applied, set_name, is_same=is_same)
    action = ApplyAction.UNCHANGED if is_same else ApplyAction.UPDATE
    if reason is not None and not is_forced:
        action = ApplyAction.CONFLICT
    owner = applied.set_name if applied is not None else ""
    shown_set = owner if action is ApplyAction.CONFLICT else set_name or owner
    return PlannedChange(
        action,
        wanted.name,
        wanted.place,
        before,
        before if is_same else after,
        wanted.status,
        reason,
        shown_set,
    )


def plan_removal(
    before: StoredWorkflow, applied: AppliedWorkflow, *, is_deleted: bool, is_forced: bool
) -> PlannedChange:
    """Return the change of a member of a set that the request does not have: archive, or delete if `is_deleted`.

    A member that was edited since it was applied is a conflict unless `is_forced`. Without `is_deleted`, an archived
    member is unchanged.
    """
    action, after = ApplyAction.DELETE, before
    if not is_deleted:
        is_archived = before.workflow.status == WorkflowStatus.ARCHIVED
        action = ApplyAction.UNCHANGED if is_archived else ApplyAction.ARCHIVE
        after = before if is_archived else before.with_columns(status=WorkflowStatus.ARCHIVED)
    reason = None
    if action is not ApplyAction.UNCHANGED and hash_content(before) != applied.content_hash:
        reason = ConflictReason.EDITED
        action = action if is_forced else ApplyAction.CONFLICT
    name = before.workflow.name
    return PlannedChange(action, name, None, before, after, None, reason, applied.set_name)


def _conflict(
    before: StoredWorkflow, applied: AppliedWorkflow | None, set_name: str, *, is_same: bool
) -> ConflictReason | None:
    """Return why a workflow is not changed without force: of another set, never applied, or edited since; None
    otherwise.

    A change of the status counts as an edit if the last request named a status. An equal workflow (`is_same`) is a
    conflict only if it belongs to another set than the one that the request names.
    """
    if (
        applied is not None
        and applied.set_name
        and applied.set_name != set_name
        and (set_name or not is_same)
    ):
        return ConflictReason.OTHER_SET
    if is_same:
        return None
    if applied is None:
        return ConflictReason.NOT_APPLIED
    is_moved = applied.status is not None and applied.status != before.workflow.status
    return ConflictReason.EDITED if is_moved or hash_content(before) != applied.content_hash else None


def _merged(wanted: WantedWorkflow, before: StoredWorkflow) -> StoredWorkflow:
    """Return a workflow as the request describes it; id, owner and shares stay, and positions that it doesn't give.

    Without a status it keeps its own, and an archived one becomes a draft. An absent `strictMappings` stays
    as it was.
    """
    new = wanted.stored.workflow
    settings = dict(new.settings)
    given = wanted.given.get("settings")
    if not (isinstance(given, dict) and "strictMappings" in given):
        # The default of new workflows does not change the behavior of an older one.
        settings.pop("strictMappings", None)
        if "strictMappings" in before.workflow.settings:
            settings["strictMappings"] = before.workflow.settings["strictMappings"]
    status = wanted.status
    if status is None:
        # A file that is there again takes its workflow out of the archive.
        is_archived = before.workflow.status == WorkflowStatus.ARCHIVED
        status = WorkflowStatus.DRAFT if is_archived else WorkflowStatus(before.workflow.status)
    connections = _with_known_ids(wanted, before)
    nodes = _with_positions(wanted, before, connections)
    changed = before.with_columns(
        description=new.description, tags=new.tags, settings=settings, config=new.config, status=status
    )
    return replace(changed, nodes=nodes, connections=connections)


def _with_positions(
    wanted: WantedWorkflow, before: StoredWorkflow, connections: Sequence[StoredConnection]
) -> Sequence[dict[str, Json]]:
    """Return the nodes of a request, each with a canvas position: its own, else the stored one, else a free one."""
    given = wanted.given.get("nodes")
    sent = given if isinstance(given, list) else []
    nodes = [
        node if isinstance(raw, dict) and raw.get("position") else _without(node, "position")
        for node, raw in zip(wanted.stored.nodes, sent, strict=False)
    ]
    return graph_shapes.with_all_positions(nodes, connections, before.nodes)


def _with_known_ids(wanted: WantedWorkflow, before: StoredWorkflow) -> Sequence[StoredConnection]:
    """Return the connections of a request; those without an id keep that of the same connection before, or
    get a free one.
    """
    given = wanted.given.get("connections")
    sent = given if isinstance(given, list) else []
    known = {tuple(edge[name] for name in _EDGE): edge["id"] for edge in before.connections}
    named = [bool(isinstance(raw, dict) and raw.get("id")) for raw in sent]
    taken = {edge["id"] for edge, has_id in zip(wanted.stored.connections, named, strict=False) if has_id}
    connections: list[StoredConnection] = []
    free = (name for number in count(1) if (name := f"conn-{number}") not in {*taken, *known.values()})
    for edge, has_id in zip(wanted.stored.connections, named, strict=False):
        same = known.get(tuple(edge[name] for name in _EDGE))
        edge_id = edge["id"] if has_id else same if same is not None and same not in taken else next(free)
        taken.add(edge_id)
        connections.append({**edge, "id": edge_id})
    return connections


def _without(item: Mapping[str, Json], name: str) -> dict[str, Json]:
    return {key: value for key, value in item.items() if key != name}


def _is_same(before: StoredWorkflow, after: StoredWorkflow) -> bool:
    is_same_status = before.workflow.status == after.workflow.status
    return is_same_status and hash_content(before) == hash_content(after)


def hash_content(stored: StoredWorkflow) -> str:
    """Return the SHA-256 of the content that files describe, as hexadecimal.

    Moved nodes, renumbered connections, defaults of settings, and the status don't count.
    """
    workflow = stored.workflow
    content = [
        workflow.name,
        workflow.description,
        workflow.tags,
        definition_snapshot.effective_settings(workflow.settings),
        workflow.config,
        [_without(node, "position") for node in stored.nodes],
        sorted(_encode_sorted(_without(edge, "id")).decode() for edge in stored.connections),
    ]
    return sha256(_encode_sorted(content)).hexdigest()


# ── differences ─────────────────────────────────────────────────────────────────────────────────────────────


def compare(before: StoredWorkflow, after: StoredWorkflow) -> dict[str, Any]:
    """Return the differences between two states of a workflow, as the fields of a `WorkflowDiff`; positions of nodes
    don't count.
    """
    old, new = (_fields(one) for one in (before, after))
    nodes = _compare_items(before.nodes, after.nodes)
    edges = _compare_items(before.connections, after.connections)
    return {"fields": graph_difference.compare_fields(old, new), "nodes": nodes, "connections": edges}


def _compare_items(before: Sequence[dict[str, Json]], after: Sequence[dict[str, Json]]) -> ItemsDifference:
    return graph_difference.compare_items(
        [_without(one, "position") for one in before], [_without(one, "position") for one in after]
    )


def _fields(stored: StoredWorkflow) -> dict[str, Json]:
    workflow = stored.workflow
    return {
        "name": workflow.name,
        "description": workflow.description,
        "status": workflow.status,
        "tags": list(workflow.tags),
        "settings": definition_snapshot.effective_settings(workflow.settings),
        "config": workflow.config,
    }
