"""The table of contents: method, path, who may, what it does. Fixed paths stand before `{id}`."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

from gateway.building import BuildWorkflow
from gateway.copying import Document, ImportWorkflow
from gateway.endpoint import Access, Endpoint, Handler, Operation
from gateway.endpoints import (
    access,
    audit,
    catalog,
    copies,
    document,
    execute,
    executions,
    graph,
    health,
    nodes,
    sharing,
    validation,
    versions,
    workflows,
)
from gateway.execution_shapes import ExecutionShape, ProgressShape
from gateway.graph_shapes import ConnectionInput, NodeInput
from gateway.node_edits import NodeChanges
from gateway.parameters import LIMIT, OFFSET, Parameter
from gateway.workflow_shapes import CreateWorkflow, NewWorkflow, UpdateWorkflow, WorkflowShape
from models.access import KeyScope


@dataclass(frozen=True, slots=True)
class Line:
    """One line of the table: what is served, and what the document of the API is made from."""

    method: str
    path: str
    access: KeyScope | Access
    handler: Handler
    body: type | None = None
    """The wire type of the request's body; None: it takes none."""
    answer: object = None
    """The type of the answer's body; None: it has none."""
    status: int = 200
    query: Collection[Parameter[Any]] = ()
    """The parameters of the query: the handler can read these, and no others."""


def route(
    method: str,
    path: str,
    access: KeyScope | Access,
    handler: Handler,
    *,
    body: type | None = None,
    answer: object = None,
    status: int = 200,
    query: Collection[Parameter[Any]] = (),
) -> Line:
    """Return one line of the table; who may use it has no default."""
    return Line(method, path, access, handler, body, answer, status, query)


READ = KeyScope.WORKFLOWS_READ
WRITE = KeyScope.WORKFLOWS_WRITE
EXECUTE = KeyScope.WORKFLOWS_EXECUTE
KEYS = KeyScope.KEYS_WRITE

TABLE: Sequence[Line] = (
    route("GET", "/healthz", Access.PUBLIC, health.alive, answer=health.Health),
    route("GET", "/readyz", Access.PUBLIC, health.ready, answer=health.Health),
    route("GET", "/openapi.json", Access.PUBLIC, document.openapi, answer=dict[str, Any]),
    route("GET", "/docs", Access.PUBLIC, document.page, answer=str),
    route("GET", "/api/v1/auth/whoami", Access.ANY_KEY, access.whoami, answer=access.WhoAmI),
    route("GET", "/api/v1/auth/keys", KEYS, access.list_keys, query=(LIMIT, OFFSET), answer=access.KeyList),
    route(
        "POST",
        "/api/v1/auth/keys",
        KEYS,
        access.create_key,
        body=access.CreateKey,
        answer=access.KeyShape,
        status=201,
    ),
    route("DELETE", "/api/v1/auth/keys/{id}", KEYS, access.revoke_key, status=204),
    route(
        "GET",
        "/api/v1/auth/users",
        Access.ADMIN,
        access.list_users,
        query=(LIMIT, OFFSET),
        answer=access.UserList,
    ),
    route(
        "POST",
        "/api/v1/auth/users",
        Access.ADMIN,
        access.create_user,
        body=access.CreateUser,
        answer=access.UserShape,
        status=201,
    ),
    route(
        "GET",
        "/api/v1/workflows",
        READ,
        workflows.index,
        query=workflows.LISTED,
        answer=workflows.WorkflowList,
    ),
    route(
        "POST",
        "/api/v1/workflows",
        WRITE,
        workflows.create,
        body=CreateWorkflow,
        answer=NewWorkflow,
        status=201,
    ),
    route("GET", "/api/v1/workflows/stats", READ, workflows.stats, answer=workflows.Stats),
    route(
        "POST",
        "/api/v1/workflows/build",
        WRITE,
        graph.build,
        body=BuildWorkflow,
        answer=graph.BuiltWorkflow,
        status=201,
        query=(graph.DRY_RUN,),
    ),
    route(
        "GET",
        "/api/v1/workflows/templates",
        READ,
        copies.templates,
        query=(LIMIT, OFFSET),
        answer=copies.TemplateList,
    ),
    route(
        "POST",
        "/api/v1/workflows/from-template",
        WRITE,
        copies.use_template,
        body=copies.UseTemplate,
        answer=copies.Copied,
        status=201,
    ),
    route(
        "POST",
        "/api/v1/workflows/import",
        WRITE,
        copies.import_workflow,
        body=ImportWorkflow,
        answer=copies.ImportAnswer,
        status=201,
    ),
    route(
        "POST",
        "/api/v1/workflows/{id}/duplicate",
        WRITE,
        copies.duplicate,
        answer=copies.Copied,
        status=201,
    ),
    route(
        "POST",
        "/api/v1/workflows/{id}/save-as-template",
        WRITE,
        copies.save_as_template,
        body=copies.SaveAsTemplate,
        answer=copies.Copied,
        status=201,
    ),
    route("GET", "/api/v1/workflows/{id}/export", READ, copies.export_workflow, answer=Document),
    route("GET", "/api/v1/workflows/{id}", READ, workflows.show, answer=WorkflowShape),
    route(
        "PUT", "/api/v1/workflows/{id}", WRITE, workflows.update, body=UpdateWorkflow, answer=WorkflowShape
    ),
    route("DELETE", "/api/v1/workflows/{id}", WRITE, workflows.delete, query=(workflows.FORCE,), status=204),
    route(
        "PUT",
        "/api/v1/workflows/{id}/status",
        WRITE,
        workflows.set_status,
        body=workflows.SetStatus,
        answer=WorkflowShape,
    ),
    route(
        "POST",
        "/api/v1/workflows/{id}/validate",
        READ,
        validation.check,
        answer=validation.ValidationShape,
    ),
    route("POST", "/api/v1/workflows/{id}/layout", WRITE, graph.layout, answer=graph.LaidOut),
    route(
        "POST",
        "/api/v1/workflows/{id}/compute-scopes",
        WRITE,
        validation.compute_scopes,
        answer=validation.ScopesShape,
    ),
    route(
        "GET",
        "/api/v1/workflow-nodes",
        READ,
        catalog.index,
        query=catalog.LISTED,
        answer=catalog.NodeTypeList,
    ),
    route(
        "GET",
        "/api/v1/workflow-nodes/{type}/schema",
        READ,
        catalog.schema,
        answer=catalog.NodeTypeSchema,
    ),
    route("GET", "/api/v1/workflows/{id}/nodes", READ, nodes.index, answer=nodes.NodeList),
    route(
        "POST",
        "/api/v1/workflows/{id}/nodes",
        WRITE,
        nodes.add,
        body=NodeInput,
        answer=nodes.NodeAnswer,
        status=201,
    ),
    route(
        "PUT",
        "/api/v1/workflows/{id}/nodes/{sub}",
        WRITE,
        nodes.configure,
        body=NodeChanges,
        answer=nodes.NodeAnswer,
    ),
    route("DELETE", "/api/v1/workflows/{id}/nodes/{sub}", WRITE, nodes.remove, answer=nodes.NodeRemoved),
    route(
        "PUT",
        "/api/v1/workflows/{id}/nodes/{sub}/input-mappings",
        WRITE,
        nodes.set_mappings,
        body=nodes.SetMappings,
        answer=nodes.MappingsAnswer,
    ),
    route(
        "PUT",
        "/api/v1/workflows/{id}/nodes/{sub}/passthrough-values",
        WRITE,
        nodes.set_pass_through,
        body=nodes.SetPassThrough,
        answer=nodes.PassThroughAnswer,
    ),
    route(
        "POST",
        "/api/v1/workflows/{id}/connections",
        WRITE,
        nodes.connect,
        body=ConnectionInput,
        answer=nodes.ConnectionAnswer,
        status=201,
    ),
    route(
        "DELETE",
        "/api/v1/workflows/{id}/connections/{sub}",
        WRITE,
        nodes.disconnect,
        answer=nodes.ConnectionRemoved,
    ),
    route(
        "GET",
        "/api/v1/workflows/{id}/versions",
        READ,
        versions.index,
        query=versions.LISTED,
        answer=versions.VersionList,
    ),
    route(
        "POST",
        "/api/v1/workflows/{id}/versions",
        WRITE,
        versions.create,
        body=versions.CreateVersion,
        answer=versions.CreatedVersion,
        status=201,
    ),
    route("GET", "/api/v1/workflows/{id}/versions/{version}", READ, versions.show, answer=versions.Version),
    route(
        "POST",
        "/api/v1/workflows/{id}/versions/{version}/restore",
        WRITE,
        versions.restore,
        answer=WorkflowShape,
    ),
    route(
        "GET",
        "/api/v1/workflows/{id}/versions/{version}/diff/{other}",
        READ,
        versions.compare,
        answer=versions.VersionDifference,
    ),
    route("GET", "/api/v1/workflows/{id}/share", READ, sharing.index, answer=sharing.ShareList),
    route(
        "POST",
        "/api/v1/workflows/{id}/share",
        WRITE,
        sharing.add,
        body=sharing.ShareWith,
        answer=sharing.Shared,
    ),
    route("DELETE", "/api/v1/workflows/{id}/share/{subId}", WRITE, sharing.remove, status=204),
    route(
        "PUT",
        "/api/v1/workflows/{id}/visibility",
        WRITE,
        sharing.set_visibility,
        body=sharing.SetVisibility,
        answer=WorkflowShape,
    ),
    route("GET", "/api/v1/audit", Access.ADMIN, audit.index, query=audit.LISTED, answer=audit.EntryList),
    route(
        "POST",
        "/api/v1/workflows/{id}/execute",
        EXECUTE,
        execute.start,
        body=execute.Execute,
        answer=execute.Started,
        status=201,
    ),
    route(
        "GET",
        "/api/v1/executions",
        READ,
        executions.index,
        query=executions.LISTED,
        answer=executions.ExecutionList,
    ),
    route("GET", "/api/v1/executions/{id}", READ, executions.show, answer=ExecutionShape),
    route(
        "GET",
        "/api/v1/executions/{id}/progress",
        READ,
        executions.progress,
        query=(executions.WAIT,),
        answer=ProgressShape,
    ),
    route(
        "GET",
        "/api/v1/executions/{id}/spans",
        READ,
        executions.spans,
        query=executions.SPANS,
        answer=executions.SpanList,
    ),
    route(
        "GET",
        "/api/v1/executions/{id}/logs",
        READ,
        executions.logs,
        query=executions.LOGS,
        answer=executions.LogList,
    ),
    route("GET", "/api/v1/executions/{id}/events", READ, executions.events, answer=executions.StreamedEvent),
    route("POST", "/api/v1/executions/{id}/stop", EXECUTE, executions.stop, answer=executions.AskedToEnd),
    route("POST", "/api/v1/executions/{id}/cancel", EXECUTE, executions.cancel, answer=executions.AskedToEnd),
    route(
        "POST",
        "/api/v1/executions/{id}/resume",
        EXECUTE,
        executions.resume,
        answer=executions.Resumed,
        status=201,
    ),
)


def endpoints(table: Sequence[Line]) -> dict[str, Endpoint]:
    """Return what serves each path: one endpoint, with all of its methods."""
    paths: dict[str, dict[str, Operation]] = {}
    for line in table:
        operations = paths.setdefault(line.path, {})
        operations[line.method] = Operation(line.access, line.handler, line.query)
        if line.method == "GET":
            operations["HEAD"] = operations["GET"]
    return {path: Endpoint(operations) for path, operations in paths.items()}
