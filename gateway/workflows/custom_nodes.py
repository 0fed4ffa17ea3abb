"""Custom node types: added, listed by version, deprecated, and deleted while no workflow has them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Final

from msgspec import Meta, field, to_builtins
from sqlalchemy import Text, delete, func, insert, select, type_coerce, update
from sqlalchemy.exc import IntegrityError
from sqlmodel import col

from concurrency import offload
from engine.node_api import NodeEffect, UnknownNodeType, parse_version
from gateway.access import audit_log
from gateway.http import errors, limits, read_only, text_rules
from gateway.http.parameters import FlagParameter, TextParameter
from gateway.http.request import GatewayRequest
from gateway.http.responses import JsonResponse, NoContent
from gateway.http.text_rules import ProblemCollector
from gateway.http.wire import Instant, StrictWire, WireStruct, body_of, instant, read_json
from gateway.workflows import catalog as catalog_shapes
from journal import definition_snapshot
from models.audit import AuditAction
from models.custom_node_type import CustomNodeType
from models.database_time import PresentTime
from models.workflow import Workflow, WorkflowGraph, is_readable_by
from nodes import custom_types
from nodes.custom_types import (
    EffectDocument,
    InvalidDocument,
    NodeTypeDocument,
    OutputDocument,
    PortsDocument,
    TaskDocument,
)

if TYPE_CHECKING:
    from sqlalchemy import Select
    from sqlalchemy.ext.asyncio import AsyncConnection

    from engine.node_api import NodeType
    from models.access import ApiCaller
    from models.database import Database
    from nodes.catalog import NodeCatalog

VERSION = TextParameter("version", "Only this version.")
VERSIONED: Final = (VERSION,)
ALL = FlagParameter("all", "Delete every version, instead of the one in `version`.")
DELETED: Final = (VERSION, ALL)


class OutputInput(StrictWire):
    """Output of a custom node type."""

    schema: dict[str, Any] = field(default_factory=dict)
    """JSON Schema by which the outputs of workers are checked; empty accepts everything."""
    description: Annotated[str, text_rules.describe_length(limits.DESCRIPTION_LENGTH)] = ""
    keeps_input: bool = False
    dropped_by: dict[str, Any] = field(default_factory=dict)
    fields_of: str | None = None


class AddNodeType(StrictWire):
    """Version of a custom node type; the fields of the catalog's answer are accepted."""

    read_only: ClassVar[Mapping[str, str]] = dict.fromkeys(
        ("resources", "s3Location", "runnable", "isTrigger", "defaults", "evaluated", "hash", "warnings"), ""
    )

    type: Annotated[str, Meta(max_length=limits.NODE_TYPE_LENGTH)]
    """Namespace and name, such as `acme/resize`."""
    version: Annotated[str, Meta(max_length=limits.NODE_TYPE_LENGTH)]
    """Three numbers, such as `1.2.0`. A version never changes."""
    config: dict[str, Any] = field(default_factory=dict)
    """JSON Schema of the config: an object, with references inside of it alone."""
    name: Annotated[str, text_rules.describe_length(limits.LABEL_LENGTH)] = ""
    category: Annotated[str, text_rules.describe_length(limits.NODE_TYPE_LENGTH)] = "custom"
    description: Annotated[str, text_rules.describe_length(limits.DESCRIPTION_LENGTH)] = ""
    effect: NodeEffect | EffectDocument = NodeEffect.WRITE
    ports: PortsDocument = field(default_factory=PortsDocument)
    output: OutputInput = field(default_factory=OutputInput)
    task: TaskDocument = field(default_factory=TaskDocument)
    input_description: Annotated[str, text_rules.describe_length(limits.DESCRIPTION_LENGTH)] = ""
    examples: Annotated[list[dict[str, Any]], Meta(max_length=limits.NODE_TYPE_EXAMPLES)] = field(
        default_factory=list
    )
    deprecated: bool | None = None
    """True hides the version from the list of the catalog; not part of the content, so it may change."""


class NodeTypeVersion(WireStruct):
    """Version of a custom node type."""

    version: str
    hash: str
    """SHA-256 of the content."""
    deprecated: bool
    created_by: str
    created_at: Instant


class NodeTypeVersions(WireStruct):
    """Versions of a custom node type, the newest first."""

    type: str
    count: int
    versions: Sequence[NodeTypeVersion]


async def add(request: GatewayRequest) -> JsonResponse:
    """Add a version of a custom node type, which workers of the organization perform.

    The same content again is answered with 200, and may change `deprecated`; other content for the same version is
    refused. An older version never becomes the newest.
    """
    value = await read_json(request)
    body = body_of(request, value, AddNodeType)
    document = _build_document(body)
    try:
        checked = await offload.run(custom_types.checked_document, document)
    except InvalidDocument as error:
        raise errors.invalid(
            [errors.problem(one.path, "invalid-value", one.message) for one in error.problems]
        ) from error
    text = custom_types.encode_document(checked)
    row = CustomNodeType(
        organization_id=request.caller.organization_id,
        shard=request.caller.shard,
        type=document.type,
        version=document.version,
        hash=custom_types.hash_document(text),
        document=text.decode(),
        is_deprecated=body.deprecated is True,
        created_by=request.caller.user_id,
        created_at=request.gateway.clock(),
    )
    is_new = await _store(request.gateway.database, request.caller, row, deprecated=body.deprecated)
    catalog = await request.catalog()
    shown = catalog_shapes.show_schema(catalog, catalog.get(row.type, row.version))
    read_only.warn_of_new(request, value, AddNodeType, lambda: to_builtins(shown))
    return JsonResponse(shown, status=201 if is_new else 200)


async def show(request: GatewayRequest) -> JsonResponse:
    """Show a custom node type in its newest version, or in another one."""
    catalog = await request.catalog()
    return JsonResponse(catalog_shapes.show_schema(catalog, _find(request, catalog, request.query[VERSION])))


async def versions(request: GatewayRequest) -> JsonResponse:
    """List the versions of a custom node type, deprecated ones too."""
    name = _type_name(request)
    statement = select(CustomNodeType).where(
        col(CustomNodeType.organization_id) == request.caller.organization_id,
        col(CustomNodeType.type) == name,
    )
    async with request.gateway.database.read() as connection:
        rows = (await connection.execute(statement)).all()
    if not rows:
        raise errors.not_found("node type")
    ordered = sorted(rows, key=lambda row: parse_version(row.version), reverse=True)
    shown = [
        NodeTypeVersion(
            version=row.version,
            hash=row.hash,
            deprecated=row.is_deprecated,
            created_by=row.created_by,
            created_at=instant(row.created_at),
        )
        for row in ordered
    ]
    return JsonResponse(NodeTypeVersions(type=name, count=len(shown), versions=shown))


async def remove(request: GatewayRequest) -> NoContent:
    """Delete the version of a custom node type, or every version with `all=true`; runs that have begun keep theirs.

    Refused while workflows have it: `details` lists those that the caller may read.
    """
    name, version, caller = _type_name(request), request.query[VERSION], request.caller
    if request.query[ALL] == (version is not None):
        message = "Give either `version`, to delete one version, or `all=true`, to delete every version"
        raise errors.invalid_query(VERSION.name, "invalid-value" if version else "required", message)

    async def work(connection: AsyncConnection) -> None:
        condition = (
            col(CustomNodeType.organization_id) == caller.organization_id,
            col(CustomNodeType.type) == name,
            *(() if version is None else (col(CustomNodeType.version) == version,)),
        )
        statement = delete(CustomNodeType).where(*condition)
        rows = (
            await connection.execute(
                statement.returning(col(CustomNodeType.version), col(CustomNodeType.hash))
            )
        ).all()
        if not rows:
            raise errors.not_found("node type")
        # After the rows are locked: a workflow that is saved meanwhile locks them too.
        await _require_unused(connection, caller, name, version)
        for row in rows:
            await audit_log.record_change(
                connection,
                caller,
                AuditAction.NODE_TYPE_DELETED,
                f"{name}@{row.version}",
                before=row.hash,
                after=None,
            )

    await request.gateway.database.transaction(work)
    return NoContent()


def _type_name(request: GatewayRequest) -> str:
    return f"{request.path_params['type']}/{request.path_params['name']}"


def _find(request: GatewayRequest, catalog: NodeCatalog, version: str | None) -> NodeType:
    """Return the node type that the path names, in `version` or for None its newest; raises a 404 error."""
    try:
        return catalog.get(_type_name(request), version)
    except UnknownNodeType as error:
        raise errors.not_found("node type") from error


async def schema(request: GatewayRequest) -> JsonResponse:
    """Show a custom node type with the JSON Schema of its config."""
    return await show(request)


def _build_document(body: AddNodeType) -> NodeTypeDocument:
    """Return the document of a node type in a body; raises a 422 error for invalid fields.

    A name that is absent is the part of the type after the slash.
    """
    problems = ProblemCollector()
    if body.output.keeps_input or body.output.dropped_by or body.output.fields_of is not None:
        message = "output: a custom type has only schema and description"
        problems.add("output", "invalid-value", message)
    _, _, short = body.type.partition("/")
    name = text_rules.check_line(body.name or short, "name", problems, max_length=limits.LABEL_LENGTH)
    category = text_rules.check_line(body.category, "category", problems, max_length=limits.NODE_TYPE_LENGTH)
    if problems.found:
        raise errors.invalid(problems.found)
    effect = EffectDocument(body.effect) if isinstance(body.effect, NodeEffect) else body.effect
    return NodeTypeDocument(
        type=body.type,
        version=body.version,
        name=name,
        category=category,
        description=body.description,
        effect=effect,
        ports=body.ports,
        config=body.config,
        output=OutputDocument(schema=body.output.schema, description=body.output.description),
        task=body.task,
        input_description=body.input_description,
        examples=body.examples,
    )


async def _store(
    database: Database, caller: ApiCaller, row: CustomNodeType, *, deprecated: bool | None
) -> bool:
    """Store a version of a node type with an audit entry, in a transaction of its own; return whether it is new.

    For a stored version with the same content only the mark `deprecated` may change, None keeps it. Raises a 409 error
    for a stored version with another content, and for a new version beyond the organization's limit.
    """

    async def work(connection: AsyncConnection) -> bool:
        earlier = (await connection.execute(_same_version(row))).first()
        if earlier is None:
            await _insert(connection, caller, row)
            return True
        if earlier.hash != row.hash:
            message = (
                f"{row.type} {row.version} has another content: a version never changes, so add a new one"
            )
            raise errors.conflict("version-exists", message)
        if deprecated is not None and deprecated != earlier.is_deprecated:
            await _set_deprecated(connection, caller, row, deprecated=deprecated)
        return False

    try:
        return await database.transaction(work, locks=f"{row.organization_id} {row.type}")
    except IntegrityError:
        # Another gateway was faster: now its row is there.
        return await database.transaction(work)


def _same_version(row: CustomNodeType) -> Select[str, bool]:
    """Return the query of hash and `is_deprecated` of the stored row with this type and version; it locks the row."""
    return (
        select(col(CustomNodeType.hash), col(CustomNodeType.is_deprecated))
        .where(
            col(CustomNodeType.organization_id) == row.organization_id,
            col(CustomNodeType.type) == row.type,
            col(CustomNodeType.version) == row.version,
        )
        .with_for_update()
    )


async def _insert(connection: AsyncConnection, caller: ApiCaller, row: CustomNodeType) -> None:
    """Insert a version with an audit entry; raises a 409 error if the organization has the maximum of versions."""
    count = await connection.scalar(
        select(func.count()).where(col(CustomNodeType.organization_id) == row.organization_id)
    )
    if (count or 0) >= limits.NODE_TYPES:
        raise errors.conflict(
            "too-many-node-types",
            f"An organization may have at most {limits.NODE_TYPES:,} node type versions",
        )
    await connection.execute(insert(CustomNodeType).values({**row.model_dump(), "created_at": PresentTime()}))
    await audit_log.record_change(
        connection,
        caller,
        AuditAction.NODE_TYPE_ADDED,
        f"{row.type}@{row.version}",
        before=None,
        after=row.hash,
    )


async def _set_deprecated(
    connection: AsyncConnection, caller: ApiCaller, row: CustomNodeType, *, deprecated: bool
) -> None:
    """Set the mark `is_deprecated` of a stored version, and add an audit entry."""
    await connection.execute(
        update(CustomNodeType)
        .where(
            col(CustomNodeType.organization_id) == row.organization_id,
            col(CustomNodeType.type) == row.type,
            col(CustomNodeType.version) == row.version,
        )
        .values(is_deprecated=deprecated)
    )
    await audit_log.record_change(
        connection,
        caller,
        AuditAction.NODE_TYPE_DEPRECATED,
        f"{row.type}@{row.version}",
        before=f"{row.hash}:{not deprecated}".lower(),
        after=f"{row.hash}:{deprecated}".lower(),
    )


async def _require_unused(
    connection: AsyncConnection, caller: ApiCaller, name: str, version: str | None
) -> None:
    """Raise a 409 error if workflows have the type in their graphs; its details list up to 100 that the
    caller may read.

    With a `version`, only nodes with this version or without one count.
    """
    # The name is made of letters, digits, hyphens and a slash: nothing in it is a wildcard.
    graph = type_coerce(col(WorkflowGraph.nodes), Text)
    statement = (
        select(
            col(Workflow.id),
            col(Workflow.name),
            col(WorkflowGraph.nodes),
            is_readable_by(caller).label("is_readable"),
        )
        .join(WorkflowGraph, col(WorkflowGraph.workflow_id) == col(Workflow.id))
        .where(
            col(Workflow.organization_id) == caller.organization_id,
            col(Workflow.deleted_at).is_(None),
            graph.like(f'%"type":"{name}"%'),
        )
    )
    using = [
        row
        for row in await connection.execute(statement)
        if any(
            use.type == name and (version is None or use.version in {None, version})
            for use in definition_snapshot.list_custom_types(row.nodes)
        )
    ]
    if not using:
        return
    shown = [row for row in using if row.is_readable][: limits.FINDINGS]
    message = (
        f"{'1 workflow has' if len(using) == 1 else f'{len(using)} workflows have'} this node type"
        " (details lists those that you may read): remove it there, or set `deprecated`"
    )
    raise errors.conflict(
        "node-type-in-use",
        message,
        details=[errors.problem(f"workflows.{row.id}", "node-type-in-use", row.name) for row in shown],
    )
