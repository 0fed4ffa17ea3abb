"""The table of contents: method, path, who may, what it does. Fixed paths stand before `{id}`."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

from gateway.arrivals.sender import TOKEN
from gateway.data_sources.data_source_shapes import CreateDataSource, DataSourceShape, UpdateDataSource
from gateway.deployments.lifecycle_shapes import LifecyclePolicy, PreviewedPolicy
from gateway.endpoints import (
    access,
    audit,
    bulk,
    catalog,
    copies,
    data_sources,
    dead_letters,
    deliveries,
    deployments,
    discover,
    document,
    email_trigger,
    enqueue,
    enqueue_batch,
    event_tokens,
    events,
    execute,
    executions,
    graph,
    health,
    hooks,
    inputs,
    intake_samples,
    lifecycle,
    mail_addresses,
    nodes,
    schedule,
    sharing,
    signing,
    trigger,
    trigger_tokens,
    trying,
    validation,
    versions,
    workflows,
)
from gateway.executions.execution_shapes import ExecutionShape, ProgressShape
from gateway.http.endpoint import Access, Endpoint, Handler, Operation
from gateway.http.parameters import LIMIT, OFFSET, Parameter
from gateway.workflows.building import BuildWorkflow
from gateway.workflows.copying import Document, ImportWorkflow
from gateway.workflows.graph_shapes import ConnectionInput, NodeInput
from gateway.workflows.node_edits import NodeChanges
from gateway.workflows.workflow_shapes import CreateWorkflow, NewWorkflow, UpdateWorkflow, WorkflowShape
from models.access import KeyScope


@dataclass(frozen=True, slots=True)
class Line:
    """One line of the table, from which the document of the API is made too; who may use it has no default."""

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
    also_by: Collection[str] = ()
    """Other methods that do the same."""


READ = KeyScope.WORKFLOWS_READ
WRITE = KeyScope.WORKFLOWS_WRITE
EXECUTE = KeyScope.WORKFLOWS_EXECUTE
KEYS = KeyScope.KEYS_WRITE
READ_SOURCES = KeyScope.DATASOURCES_READ
WRITE_SOURCES = KeyScope.DATASOURCES_WRITE

TRIGGER = "/api/v1/workflows/{id}/trigger"

SERVER: Sequence[Line] = (
    Line("GET", "/healthz", Access.PUBLIC, health.alive, answer=health.Health),
    Line("GET", "/readyz", Access.PUBLIC, health.ready, answer=health.Health),
    Line("GET", "/openapi.json", Access.PUBLIC, document.openapi, answer=dict[str, Any]),
    Line("GET", "/docs", Access.PUBLIC, document.page, answer=str),
)
"""What is asked of the server itself."""

ACCESS: Sequence[Line] = (
    Line("GET", "/api/v1/auth/whoami", Access.ANY_KEY, access.whoami, answer=access.WhoAmI),
    Line("GET", "/api/v1/auth/keys", KEYS, access.list_keys, query=(LIMIT, OFFSET), answer=access.KeyList),
    Line(
        "POST",
        "/api/v1/auth/keys",
        KEYS,
        access.create_key,
        body=access.CreateKey,
        answer=access.KeyShape,
        status=201,
    ),
    Line("DELETE", "/api/v1/auth/keys/{id}", KEYS, access.revoke_key, status=204),
    Line("GET", "/api/v1/auth/signing-secret", KEYS, signing.show, answer=signing.ShownSecret),
    Line("POST", "/api/v1/auth/signing-secret", KEYS, signing.replace, answer=signing.NewSecret, status=201),
    Line(
        "GET",
        "/api/v1/auth/event-tokens",
        KEYS,
        event_tokens.index,
        query=event_tokens.LISTED,
        answer=event_tokens.EventTokenList,
    ),
    Line(
        "POST",
        "/api/v1/auth/event-tokens",
        KEYS,
        event_tokens.create,
        body=event_tokens.CreateEventToken,
        answer=event_tokens.NewEventToken,
        status=201,
    ),
    Line("DELETE", "/api/v1/auth/event-tokens/{id}", KEYS, event_tokens.revoke, status=204),
    Line(
        "GET",
        "/api/v1/auth/users",
        Access.ADMIN,
        access.list_users,
        query=(LIMIT, OFFSET),
        answer=access.UserList,
    ),
    Line(
        "POST",
        "/api/v1/auth/users",
        Access.ADMIN,
        access.create_user,
        body=access.CreateUser,
        answer=access.UserShape,
        status=201,
    ),
    Line("GET", "/api/v1/audit", Access.ADMIN, audit.index, query=audit.LISTED, answer=audit.EntryList),
)
"""Who may do what, and who did."""

WORKFLOWS: Sequence[Line] = (
    Line(
        "GET",
        "/api/v1/workflows",
        READ,
        workflows.index,
        query=workflows.LISTED,
        answer=workflows.WorkflowList,
    ),
    Line(
        "POST",
        "/api/v1/workflows",
        WRITE,
        workflows.create,
        body=CreateWorkflow,
        answer=NewWorkflow,
        status=201,
    ),
    Line("GET", "/api/v1/workflows/stats", READ, workflows.stats, answer=workflows.Stats),
    Line(
        "GET",
        "/api/v1/workflows/discover",
        READ,
        discover.index,
        answer=list[discover.Discovered],
        query=(discover.APP_ID,),
    ),
    Line(
        "GET",
        "/api/v1/workflows/templates",
        READ,
        copies.templates,
        query=(LIMIT, OFFSET),
        answer=copies.TemplateList,
    ),
    Line(
        "POST",
        "/api/v1/workflows/from-template",
        WRITE,
        copies.use_template,
        body=copies.UseTemplate,
        answer=copies.Copied,
        status=201,
    ),
    Line(
        "POST",
        "/api/v1/workflows/import",
        WRITE,
        copies.import_workflow,
        body=ImportWorkflow,
        answer=copies.ImportAnswer,
        status=201,
    ),
    Line(
        "POST",
        "/api/v1/workflows/{id}/duplicate",
        WRITE,
        copies.duplicate,
        answer=copies.Copied,
        status=201,
    ),
    Line(
        "POST",
        "/api/v1/workflows/{id}/save-as-template",
        WRITE,
        copies.save_as_template,
        body=copies.SaveAsTemplate,
        answer=copies.Copied,
        status=201,
    ),
    Line("GET", "/api/v1/workflows/{id}/export", READ, copies.export_workflow, answer=Document),
    Line("GET", "/api/v1/workflows/{id}", READ, workflows.show, answer=WorkflowShape),
    Line("PUT", "/api/v1/workflows/{id}", WRITE, workflows.update, body=UpdateWorkflow, answer=WorkflowShape),
    Line("DELETE", "/api/v1/workflows/{id}", WRITE, workflows.delete, query=(workflows.FORCE,), status=204),
    Line(
        "PUT",
        "/api/v1/workflows/{id}/status",
        WRITE,
        workflows.set_status,
        body=workflows.SetStatus,
        answer=WorkflowShape,
    ),
    Line(
        "GET",
        "/api/v1/workflows/{id}/versions",
        READ,
        versions.index,
        query=versions.LISTED,
        answer=versions.VersionList,
    ),
    Line(
        "POST",
        "/api/v1/workflows/{id}/versions",
        WRITE,
        versions.create,
        body=versions.CreateVersion,
        answer=versions.CreatedVersion,
        status=201,
    ),
    Line("GET", "/api/v1/workflows/{id}/versions/{version}", READ, versions.show, answer=versions.Version),
    Line(
        "POST",
        "/api/v1/workflows/{id}/versions/{version}/restore",
        WRITE,
        versions.restore,
        answer=WorkflowShape,
    ),
    Line(
        "GET",
        "/api/v1/workflows/{id}/versions/{version}/diff/{other}",
        READ,
        versions.compare,
        answer=versions.VersionDifference,
    ),
    Line("GET", "/api/v1/workflows/{id}/share", READ, sharing.index, answer=sharing.ShareList),
    Line(
        "POST",
        "/api/v1/workflows/{id}/share",
        WRITE,
        sharing.add,
        body=sharing.ShareWith,
        answer=sharing.Shared,
    ),
    Line("DELETE", "/api/v1/workflows/{id}/share/{subId}", WRITE, sharing.remove, status=204),
    Line(
        "PUT",
        "/api/v1/workflows/{id}/visibility",
        WRITE,
        sharing.set_visibility,
        body=sharing.SetVisibility,
        answer=WorkflowShape,
    ),
)
"""Workflows as a whole."""

GRAPHS: Sequence[Line] = (
    Line(
        "POST",
        "/api/v1/workflows/build",
        WRITE,
        graph.build,
        body=BuildWorkflow,
        answer=graph.BuiltWorkflow,
        status=201,
        query=(graph.DRY_RUN,),
    ),
    Line(
        "POST",
        "/api/v1/workflows/{id}/validate",
        READ,
        validation.check,
        answer=validation.ValidationShape,
    ),
    Line("POST", "/api/v1/workflows/{id}/layout", WRITE, graph.layout, answer=graph.LaidOut),
    Line(
        "POST",
        "/api/v1/workflows/{id}/compute-scopes",
        WRITE,
        validation.compute_scopes,
        answer=validation.ComputedScopes,
    ),
    Line(
        "GET",
        "/api/v1/workflow-nodes",
        READ,
        catalog.index,
        query=catalog.LISTED,
        answer=catalog.NodeTypeList,
    ),
    Line(
        "GET",
        "/api/v1/workflow-nodes/{type}/schema",
        READ,
        catalog.schema,
        answer=catalog.NodeTypeSchema,
    ),
    Line("GET", "/api/v1/workflows/{id}/nodes", READ, nodes.index, answer=nodes.NodeList),
    Line(
        "POST",
        "/api/v1/workflows/{id}/nodes",
        WRITE,
        nodes.add,
        body=NodeInput,
        answer=nodes.NodeAnswer,
        status=201,
    ),
    Line(
        "PUT",
        "/api/v1/workflows/{id}/nodes/{sub}",
        WRITE,
        nodes.configure,
        body=NodeChanges,
        answer=nodes.NodeAnswer,
    ),
    Line("DELETE", "/api/v1/workflows/{id}/nodes/{sub}", WRITE, nodes.remove, answer=nodes.NodeRemoved),
    Line(
        "POST",
        "/api/v1/workflows/{id}/nodes/{sub}/test",
        EXECUTE,
        trying.run_node,
        body=trying.TryNode,
        answer=trying.TriedNode,
    ),
    Line(
        "PUT",
        "/api/v1/workflows/{id}/nodes/{sub}/input-mappings",
        WRITE,
        nodes.set_mappings,
        body=nodes.SetMappings,
        answer=nodes.MappingsAnswer,
    ),
    Line(
        "PUT",
        "/api/v1/workflows/{id}/nodes/{sub}/passthrough-values",
        WRITE,
        nodes.set_pass_through,
        body=nodes.SetPassThrough,
        answer=nodes.PassThroughAnswer,
    ),
    Line(
        "POST",
        "/api/v1/workflows/{id}/connections",
        WRITE,
        nodes.connect,
        body=ConnectionInput,
        answer=nodes.ConnectionAnswer,
        status=201,
    ),
    Line(
        "DELETE",
        "/api/v1/workflows/{id}/connections/{sub}",
        WRITE,
        nodes.disconnect,
        answer=nodes.ConnectionRemoved,
    ),
)
"""What stands in a workflow, and whether it would run."""

DEPLOYMENTS: Sequence[Line] = (
    Line("POST", "/api/v1/workflows/{id}/deploy", WRITE, deployments.deploy, answer=deployments.Deployed),
    Line(
        "POST",
        "/api/v1/workflows/{id}/deploy-version",
        WRITE,
        deployments.deploy_version,
        body=deployments.DeployVersion,
        answer=deployments.Deployed,
    ),
    Line(
        "POST", "/api/v1/workflows/{id}/undeploy", WRITE, deployments.undeploy, answer=deployments.Undeployed
    ),
    Line("POST", "/api/v1/workflows/{id}/stop", WRITE, deployments.stop, answer=deployments.Stopped),
    Line(
        "POST",
        "/api/v1/workflows/{id}/start",
        WRITE,
        deployments.start,
        body=deployments.StartDeployment,
        answer=deployments.Running,
    ),
    Line("GET", "/api/v1/workflows/{id}/status", READ, deployments.show, answer=deployments.DeploymentShape),
    Line(
        "GET",
        "/api/v1/workflows/{id}/logs",
        READ,
        deployments.logs,
        query=(deployments.LINES,),
        answer=deployments.PodLog,
    ),
    Line(
        "GET",
        "/api/v1/workflows/{id}/lifecycle",
        READ,
        lifecycle.show,
        answer=lifecycle.LifecycleShape,
    ),
    Line(
        "PUT",
        "/api/v1/workflows/{id}/lifecycle",
        WRITE,
        lifecycle.update,
        body=LifecyclePolicy,
        answer=lifecycle.PolicySet,
    ),
    Line(
        "GET",
        "/api/v1/workflows/{id}/lifecycle/history",
        READ,
        lifecycle.history,
        query=lifecycle.LISTED,
        answer=lifecycle.DecisionList,
    ),
    Line(
        "POST",
        "/api/v1/workflows/{id}/lifecycle/preview",
        READ,
        lifecycle.preview,
        body=PreviewedPolicy,
        answer=lifecycle.Preview,
    ),
    Line("POST", TRIGGER, EXECUTE, trigger.start, body=trigger.Trigger, answer=trigger.Triggered),
)
"""Workflows that have pods, and when those are there."""

DATA_SOURCES: Sequence[Line] = (
    Line(
        "GET",
        "/api/v1/datasources",
        READ_SOURCES,
        data_sources.index,
        query=data_sources.LISTED,
        answer=data_sources.DataSourceList,
    ),
    Line(
        "POST",
        "/api/v1/datasources",
        WRITE_SOURCES,
        data_sources.create,
        body=CreateDataSource,
        answer=data_sources.NewDataSource,
        status=201,
    ),
    Line("GET", "/api/v1/datasources/{id}", READ_SOURCES, data_sources.show, answer=DataSourceShape),
    Line(
        "PUT",
        "/api/v1/datasources/{id}",
        WRITE_SOURCES,
        data_sources.update,
        body=UpdateDataSource,
        answer=DataSourceShape,
    ),
    Line(
        "DELETE",
        "/api/v1/datasources/{id}",
        WRITE_SOURCES,
        data_sources.delete,
        query=(data_sources.FORCE,),
        status=204,
    ),
    Line(
        "POST",
        "/api/v1/datasources/{id}/test",
        READ_SOURCES,
        data_sources.test,
        answer=data_sources.DataSourceTest,
    ),
    Line(
        "GET",
        "/api/v1/datasources/{id}/share",
        READ_SOURCES,
        data_sources.list_shares,
        answer=data_sources.DataSourceGuests,
    ),
    Line(
        "POST",
        "/api/v1/datasources/{id}/share",
        WRITE_SOURCES,
        data_sources.share,
        body=data_sources.ShareDataSource,
        answer=data_sources.SharedDataSource,
    ),
    Line(
        "DELETE",
        "/api/v1/datasources/{id}/share/{subId}",
        WRITE_SOURCES,
        data_sources.unshare,
        status=204,
    ),
    Line(
        "PUT",
        "/api/v1/datasources/{id}/visibility",
        WRITE_SOURCES,
        data_sources.set_visibility,
        body=data_sources.SetDataSourceVisibility,
        answer=DataSourceShape,
    ),
)
"""What workflows reach databases, buckets and services with."""

INTAKE: Sequence[Line] = (
    Line("GET", "/api/v1/workflows/{id}/schedule", READ, schedule.show, answer=schedule.WorkflowSchedule),
    Line(
        "POST",
        "/api/v1/workflows/{id}/enqueue",
        Access.SENDER,
        enqueue.enqueue,
        body=enqueue.Enqueue,
        answer=enqueue.Enqueued,
        status=201,
        query=(TOKEN,),
    ),
    Line(
        "POST",
        "/api/v1/workflows/{id}/enqueue-batch",
        Access.SENDER,
        enqueue_batch.enqueue,
        body=enqueue_batch.EnqueueBatch,
        answer=enqueue_batch.EnqueuedBatch,
        status=201,
        query=(TOKEN,),
    ),
    Line(
        "POST",
        "/api/v1/workflows/{id}/email-trigger",
        Access.SENDER,
        email_trigger.receive,
        body=email_trigger.EmailTrigger,
        answer=email_trigger.MailTakenIn,
        status=201,
        query=(TOKEN,),
    ),
    Line(
        "GET",
        "/api/v1/workflows/{id}/inbound-address",
        READ,
        trigger_tokens.show,
        answer=trigger_tokens.InboundAddress,
    ),
    Line(
        "POST",
        "/api/v1/workflows/{id}/trigger-token",
        WRITE,
        trigger_tokens.replace,
        body=trigger_tokens.ReplaceToken,
        answer=trigger_tokens.NewToken,
        status=201,
    ),
    Line("DELETE", "/api/v1/workflows/{id}/trigger-token", WRITE, trigger_tokens.revoke, status=204),
    Line(
        "GET",
        "/api/v1/workflows/{id}/deliveries",
        READ,
        deliveries.index,
        answer=deliveries.DeliveryList,
        query=deliveries.LISTED,
    ),
    Line(
        "POST",
        "/api/v1/workflows/{id}/deliveries/redrive",
        EXECUTE,
        deliveries.redrive_many,
        body=deliveries.RedriveDeliveries,
        answer=deliveries.RedrivenMany,
    ),
    Line(
        "GET",
        "/api/v1/intake-samples",
        Access.ADMIN,
        intake_samples.index,
        answer=intake_samples.SampleList,
        query=intake_samples.LISTED,
    ),
    Line("GET", "/api/v1/deliveries/{id}", READ, deliveries.show, answer=deliveries.DeliveryShape),
    Line(
        "POST",
        "/api/v1/deliveries/{id}/redrive",
        EXECUTE,
        deliveries.redrive,
        answer=deliveries.Redriven,
        status=201,
    ),
    Line(
        "GET",
        "/api/v1/workflows/{id}/dead-letters",
        READ,
        dead_letters.index,
        answer=dead_letters.DeadLetterList,
        query=dead_letters.LISTED,
    ),
    Line(
        "POST",
        "/api/v1/workflows/{id}/dead-letters/redrive",
        EXECUTE,
        dead_letters.redrive,
        body=dead_letters.ChooseDeadLetters,
        answer=deliveries.RedrivenMany,
    ),
    Line(
        "POST",
        "/api/v1/workflows/{id}/dead-letters/purge",
        EXECUTE,
        dead_letters.purge,
        body=dead_letters.ChooseDeadLetters,
        answer=dead_letters.Purged,
    ),
    Line(
        "POST",
        "/api/v1/workflows/events",
        Access.SENDER,
        events.emit,
        body=events.Emit,
        answer=events.Emitted,
        query=(TOKEN,),
    ),
    Line(
        "GET",
        "/api/v1/events",
        READ,
        events.index,
        query=events.LISTED,
        answer=events.EventList,
    ),
    Line("GET", "/api/v1/events/{id}", READ, events.show, answer=events.EventShape),
    Line(
        "POST",
        "/api/v1/events/{id}/replay",
        EXECUTE,
        events.replay,
        body=events.ReplayEvent,
        answer=events.Replayed,
        status=201,
    ),
    Line("OPTIONS", "/api/v1/workflows/events", Access.PUBLIC, events.handshake, status=204),
    Line(
        "POST",
        "/hooks/{id}",
        Access.PUBLIC,
        hooks.receive,
        answer=hooks.HookTaken,
        status=202,
        also_by=tuple(method for method in hooks.METHODS if method != "POST"),
    ),
    Line("GET", "/mail/{id}", Access.PUBLIC, mail_addresses.show, answer=mail_addresses.MailAddress),
    Line(
        "POST",
        "/mail/{id}",
        Access.PUBLIC,
        mail_addresses.receive,
        body=email_trigger.EmailTrigger,
        answer=email_trigger.MailTakenIn,
        status=201,
    ),
)
"""What senders send, and what became of it."""

EXECUTIONS: Sequence[Line] = (
    Line(
        "POST",
        "/api/v1/workflows/{id}/execute",
        EXECUTE,
        execute.start,
        body=execute.Execute,
        answer=execute.Started,
        status=201,
    ),
    Line(
        "GET",
        "/api/v1/executions",
        READ,
        executions.index,
        query=executions.LISTED,
        answer=executions.ExecutionList,
    ),
    Line(
        "POST",
        "/api/v1/executions/bulk-cancel",
        EXECUTE,
        bulk.cancel,
        body=bulk.Bulk,
        answer=bulk.BulkDone,
    ),
    Line(
        "POST",
        "/api/v1/executions/bulk-retry",
        EXECUTE,
        bulk.retry,
        body=bulk.Bulk,
        answer=bulk.BulkRetried,
    ),
    Line(
        "POST",
        "/api/v1/executions/bulk-delete",
        WRITE,
        bulk.delete,
        body=bulk.Bulk,
        answer=bulk.BulkDone,
    ),
    Line(
        "GET",
        "/api/v1/executions/{id}",
        READ,
        executions.show,
        query=(executions.EXPAND,),
        answer=ExecutionShape,
    ),
    Line(
        "GET",
        "/api/v1/executions/{id}/progress",
        READ,
        executions.progress,
        query=(executions.WAIT,),
        answer=ProgressShape,
    ),
    Line(
        "GET",
        "/api/v1/executions/{id}/spans",
        READ,
        executions.spans,
        query=executions.SPANS,
        answer=executions.SpanList,
    ),
    Line(
        "GET",
        "/api/v1/executions/{id}/logs",
        READ,
        executions.logs,
        query=executions.LOGS,
        answer=executions.LogList,
    ),
    Line("GET", "/api/v1/executions/{id}/blobs/{sha256}", READ, executions.blob, answer=str),
    Line("GET", "/api/v1/executions/{id}/events", READ, executions.events, answer=executions.StreamedEvent),
    Line(
        "GET",
        "/api/v1/executions/{id}/pending-inputs",
        READ,
        inputs.index,
        answer=inputs.PendingInputs,
    ),
    Line(
        "POST",
        "/api/v1/executions/{id}/input",
        EXECUTE,
        inputs.answer,
        body=inputs.Answer,
        answer=inputs.AnswerTaken,
    ),
    Line("POST", "/api/v1/executions/{id}/stop", EXECUTE, executions.stop, answer=executions.AskedToEnd),
    Line("POST", "/api/v1/executions/{id}/cancel", EXECUTE, executions.cancel, answer=executions.AskedToEnd),
    Line(
        "POST",
        "/api/v1/executions/{id}/resume",
        EXECUTE,
        executions.resume,
        answer=executions.Resumed,
        status=201,
    ),
)
"""Runs: begun, followed, answered and ended."""

TABLE: Sequence[Line] = (
    *SERVER,
    *ACCESS,
    *WORKFLOWS,
    *GRAPHS,
    *DEPLOYMENTS,
    *DATA_SOURCES,
    *INTAKE,
    *EXECUTIONS,
)

FOR_BROWSERS: Sequence[Line] = (
    Line("GET", "/", Access.PUBLIC, document.home, status=302),
    Line("GET", "/favicon.svg", Access.PUBLIC, document.icon, answer=bytes),
    Line("GET", "/favicon.ico", Access.PUBLIC, document.icon, answer=bytes),
    Line("OPTIONS", "/hooks/{id}", Access.PUBLIC, hooks.options, status=204),
)
"""What browsers ask for by themselves: no part of the API, nor of its document."""


def endpoints(table: Sequence[Line]) -> dict[str, Endpoint]:
    """Return what serves each path: one endpoint, with all of its methods."""
    paths: dict[str, dict[str, Operation]] = {}
    for line in table:
        operations = paths.setdefault(line.path, {})
        for method in (line.method, *line.also_by):
            operations[method] = Operation(line.access, line.handler, line.query)
        if line.method == "GET":
            operations["HEAD"] = operations["GET"]
    return {path: Endpoint(operations) for path, operations in paths.items()}
