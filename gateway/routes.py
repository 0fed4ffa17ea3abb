"""Table of routes: method, path, required access and handler. Fixed paths precede `{id}`."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

from gateway import health
from gateway.access import access, audit, signing
from gateway.data_sources import data_sources
from gateway.data_sources.data_source_shapes import CreateDataSource, DataSourceShape, UpdateDataSource
from gateway.deployments import deployments, discover, lifecycle, trigger
from gateway.deployments.lifecycle_shapes import LifecyclePolicy, PolicyPreviewRequest
from gateway.documentation import site
from gateway.executions import bulk, execute, executions, inputs, node_tests
from gateway.executions.execution_shapes import ExecutionShape, ProgressShape
from gateway.http.endpoint import AccessRule, Handler, PathEndpoint, PathOperation
from gateway.http.parameters import LIMIT, OFFSET, QueryParameter
from gateway.http.sender import TOKEN
from gateway.ingest import (
    dead_letters,
    deliveries,
    email_trigger,
    enqueue,
    enqueue_batch,
    event_tokens,
    events,
    hooks,
    intake_samples,
    mail_addresses,
    schedule,
    trigger_tokens,
)
from gateway.openapi import document
from gateway.workflows import catalog, copies, graph, nodes, sharing, validation, versions, workflows
from gateway.workflows.graph_shapes import ConnectionInput, NodeInput
from gateway.workflows.node_edits import NodeChanges
from gateway.workflows.workflow_builder import BuildWorkflow
from gateway.workflows.workflow_documents import ImportWorkflow, WorkflowDocument
from gateway.workflows.workflow_shapes import CreateWorkflow, NewWorkflow, UpdateWorkflow, WorkflowShape
from models.access import KeyScope


@dataclass(frozen=True, slots=True)
class Route:
    """One operation of the API, also the source of its OpenAPI document. `access` has no default, on purpose."""

    method: str
    path: str
    access: KeyScope | AccessRule
    handler: Handler
    body: type | None = None
    """Wire type of the request body; None when the operation takes no body."""
    answer: object = None
    """Type of the response body; None when the response has no body."""
    status: int = 200
    query: Collection[QueryParameter[Any]] = ()
    """Query parameters that the handler can read; all others are refused."""
    also_by: Collection[str] = ()
    """Other methods with the same effect."""


READ = KeyScope.WORKFLOWS_READ
WRITE = KeyScope.WORKFLOWS_WRITE
EXECUTE = KeyScope.WORKFLOWS_EXECUTE
KEYS = KeyScope.KEYS_WRITE
READ_SOURCES = KeyScope.DATASOURCES_READ
WRITE_SOURCES = KeyScope.DATASOURCES_WRITE

TRIGGER = "/api/v1/workflows/{id}/trigger"

SERVER: Sequence[Route] = (
    Route("GET", "/healthz", AccessRule.PUBLIC, health.alive, answer=health.HealthStatus),
    Route("GET", "/readyz", AccessRule.PUBLIC, health.ready, answer=health.HealthStatus),
    Route("GET", "/openapi.json", AccessRule.PUBLIC, document.openapi, answer=dict[str, Any]),
)
"""Routes for health and documentation of the server."""

ACCESS: Sequence[Route] = (
    Route("GET", "/api/v1/auth/whoami", AccessRule.ANY_KEY, access.whoami, answer=access.WhoAmI),
    Route("GET", "/api/v1/auth/keys", KEYS, access.list_keys, query=(LIMIT, OFFSET), answer=access.KeyList),
    Route(
        "POST",
        "/api/v1/auth/keys",
        KEYS,
        access.create_key,
        body=access.CreateKey,
        answer=access.KeyShape,
        status=201,
    ),
    Route("DELETE", "/api/v1/auth/keys/{id}", KEYS, access.revoke_key, status=204),
    Route("GET", "/api/v1/auth/signing-secret", KEYS, signing.show, answer=signing.SigningSecretShape),
    Route(
        "POST",
        "/api/v1/auth/signing-secret",
        KEYS,
        signing.replace,
        answer=signing.NewSigningSecret,
        status=201,
    ),
    Route(
        "GET",
        "/api/v1/auth/event-tokens",
        KEYS,
        event_tokens.index,
        query=event_tokens.LISTED,
        answer=event_tokens.EventTokenList,
    ),
    Route(
        "POST",
        "/api/v1/auth/event-tokens",
        KEYS,
        event_tokens.create,
        body=event_tokens.CreateEventToken,
        answer=event_tokens.NewEventToken,
        status=201,
    ),
    Route("DELETE", "/api/v1/auth/event-tokens/{id}", KEYS, event_tokens.revoke, status=204),
    Route(
        "GET",
        "/api/v1/auth/users",
        AccessRule.ADMIN,
        access.list_users,
        query=(LIMIT, OFFSET),
        answer=access.UserList,
    ),
    Route(
        "POST",
        "/api/v1/auth/users",
        AccessRule.ADMIN,
        access.create_user,
        body=access.CreateUser,
        answer=access.UserShape,
        status=201,
    ),
    Route(
        "GET", "/api/v1/audit", AccessRule.ADMIN, audit.index, query=audit.LISTED, answer=audit.AuditEntryList
    ),
)
"""Routes for keys, users, signing secrets, event tokens and the audit trail."""

WORKFLOWS: Sequence[Route] = (
    Route(
        "GET",
        "/api/v1/workflows",
        READ,
        workflows.index,
        query=workflows.LISTED,
        answer=workflows.WorkflowList,
    ),
    Route(
        "POST",
        "/api/v1/workflows",
        WRITE,
        workflows.create,
        body=CreateWorkflow,
        answer=NewWorkflow,
        status=201,
    ),
    Route("GET", "/api/v1/workflows/stats", READ, workflows.stats, answer=workflows.WorkflowStats),
    Route(
        "GET",
        "/api/v1/workflows/discover",
        READ,
        discover.index,
        answer=list[discover.DiscoveredWorkflow],
        query=(discover.APP_ID,),
    ),
    Route(
        "GET",
        "/api/v1/workflows/templates",
        READ,
        copies.templates,
        query=(LIMIT, OFFSET),
        answer=copies.TemplateList,
    ),
    Route(
        "POST",
        "/api/v1/workflows/from-template",
        WRITE,
        copies.use_template,
        body=copies.UseTemplate,
        answer=copies.CopyResult,
        status=201,
    ),
    Route(
        "POST",
        "/api/v1/workflows/import",
        WRITE,
        copies.import_workflow,
        body=ImportWorkflow,
        answer=copies.ImportAnswer,
        status=201,
    ),
    Route(
        "POST",
        "/api/v1/workflows/{id}/duplicate",
        WRITE,
        copies.duplicate,
        answer=copies.CopyResult,
        status=201,
    ),
    Route(
        "POST",
        "/api/v1/workflows/{id}/save-as-template",
        WRITE,
        copies.save_as_template,
        body=copies.SaveAsTemplate,
        answer=copies.CopyResult,
        status=201,
    ),
    Route("GET", "/api/v1/workflows/{id}/export", READ, copies.export_workflow, answer=WorkflowDocument),
    Route("GET", "/api/v1/workflows/{id}", READ, workflows.show, answer=WorkflowShape),
    Route(
        "PUT", "/api/v1/workflows/{id}", WRITE, workflows.update, body=UpdateWorkflow, answer=WorkflowShape
    ),
    Route("DELETE", "/api/v1/workflows/{id}", WRITE, workflows.delete, query=(workflows.FORCE,), status=204),
    Route(
        "PUT",
        "/api/v1/workflows/{id}/status",
        WRITE,
        workflows.set_status,
        body=workflows.SetStatus,
        answer=WorkflowShape,
    ),
    Route(
        "GET",
        "/api/v1/workflows/{id}/versions",
        READ,
        versions.index,
        query=versions.LISTED,
        answer=versions.VersionList,
    ),
    Route(
        "POST",
        "/api/v1/workflows/{id}/versions",
        WRITE,
        versions.create,
        body=versions.CreateVersion,
        answer=versions.CreatedVersion,
        status=201,
    ),
    Route(
        "GET",
        "/api/v1/workflows/{id}/versions/{version}",
        READ,
        versions.show,
        answer=versions.WorkflowVersionShape,
    ),
    Route(
        "POST",
        "/api/v1/workflows/{id}/versions/{version}/restore",
        WRITE,
        versions.restore,
        answer=WorkflowShape,
    ),
    Route(
        "GET",
        "/api/v1/workflows/{id}/versions/{version}/diff/{other}",
        READ,
        versions.compare,
        answer=versions.VersionDifference,
    ),
    Route("GET", "/api/v1/workflows/{id}/share", READ, sharing.index, answer=sharing.WorkflowGuests),
    Route(
        "POST",
        "/api/v1/workflows/{id}/share",
        WRITE,
        sharing.add,
        body=sharing.ShareWith,
        answer=sharing.ShareResult,
    ),
    Route("DELETE", "/api/v1/workflows/{id}/share/{subId}", WRITE, sharing.remove, status=204),
    Route(
        "PUT",
        "/api/v1/workflows/{id}/visibility",
        WRITE,
        sharing.set_visibility,
        body=sharing.SetVisibility,
        answer=WorkflowShape,
    ),
)
"""Routes for whole workflows."""

GRAPHS: Sequence[Route] = (
    Route(
        "POST",
        "/api/v1/workflows/build",
        WRITE,
        graph.build,
        body=BuildWorkflow,
        answer=graph.BuiltWorkflow,
        status=201,
        query=(graph.DRY_RUN,),
    ),
    Route(
        "POST",
        "/api/v1/workflows/{id}/validate",
        READ,
        validation.check,
        answer=validation.ValidationShape,
    ),
    Route("POST", "/api/v1/workflows/{id}/layout", WRITE, graph.layout, answer=graph.LayoutResult),
    Route(
        "POST",
        "/api/v1/workflows/{id}/compute-scopes",
        WRITE,
        validation.compute_scopes,
        answer=validation.WorkflowScopes,
    ),
    Route(
        "GET",
        "/api/v1/workflow-nodes",
        READ,
        catalog.index,
        query=catalog.LISTED,
        answer=catalog.NodeTypeList,
    ),
    Route(
        "GET",
        "/api/v1/workflow-nodes/{type}/schema",
        READ,
        catalog.schema,
        answer=catalog.NodeTypeSchema,
    ),
    Route("GET", "/api/v1/workflows/{id}/nodes", READ, nodes.index, answer=nodes.NodeList),
    Route(
        "POST",
        "/api/v1/workflows/{id}/nodes",
        WRITE,
        nodes.add,
        body=NodeInput,
        answer=nodes.NodeAnswer,
        status=201,
    ),
    Route(
        "PUT",
        "/api/v1/workflows/{id}/nodes/{sub}",
        WRITE,
        nodes.configure,
        body=NodeChanges,
        answer=nodes.NodeAnswer,
    ),
    Route("DELETE", "/api/v1/workflows/{id}/nodes/{sub}", WRITE, nodes.remove, answer=nodes.NodeRemoval),
    Route(
        "POST",
        "/api/v1/workflows/{id}/nodes/{sub}/test",
        EXECUTE,
        node_tests.run_node,
        body=node_tests.NodeTestRequest,
        answer=node_tests.NodeTestResult,
    ),
    Route(
        "PUT",
        "/api/v1/workflows/{id}/nodes/{sub}/input-mappings",
        WRITE,
        nodes.set_mappings,
        body=nodes.SetMappings,
        answer=nodes.MappingsAnswer,
    ),
    Route(
        "PUT",
        "/api/v1/workflows/{id}/nodes/{sub}/passthrough-values",
        WRITE,
        nodes.set_pass_through,
        body=nodes.SetPassThrough,
        answer=nodes.PassThroughAnswer,
    ),
    Route(
        "POST",
        "/api/v1/workflows/{id}/connections",
        WRITE,
        nodes.connect,
        body=ConnectionInput,
        answer=nodes.ConnectionAnswer,
        status=201,
    ),
    Route(
        "DELETE",
        "/api/v1/workflows/{id}/connections/{sub}",
        WRITE,
        nodes.disconnect,
        answer=nodes.ConnectionRemoval,
    ),
)
"""Routes for the graph of a workflow and its validation."""

DEPLOYMENTS: Sequence[Route] = (
    Route(
        "POST", "/api/v1/workflows/{id}/deploy", WRITE, deployments.deploy, answer=deployments.DeployResult
    ),
    Route(
        "POST",
        "/api/v1/workflows/{id}/deploy-version",
        WRITE,
        deployments.deploy_version,
        body=deployments.DeployVersion,
        answer=deployments.DeployResult,
    ),
    Route(
        "POST",
        "/api/v1/workflows/{id}/undeploy",
        WRITE,
        deployments.undeploy,
        answer=deployments.UndeployResult,
    ),
    Route("POST", "/api/v1/workflows/{id}/stop", WRITE, deployments.stop, answer=deployments.StopResult),
    Route(
        "POST",
        "/api/v1/workflows/{id}/start",
        WRITE,
        deployments.start,
        body=deployments.StartDeployment,
        answer=deployments.StartResult,
    ),
    Route("GET", "/api/v1/workflows/{id}/status", READ, deployments.show, answer=deployments.DeploymentShape),
    Route(
        "GET",
        "/api/v1/workflows/{id}/logs",
        READ,
        deployments.logs,
        query=(deployments.LINES,),
        answer=deployments.PodLog,
    ),
    Route(
        "GET",
        "/api/v1/workflows/{id}/lifecycle",
        READ,
        lifecycle.show,
        answer=lifecycle.LifecycleShape,
    ),
    Route(
        "PUT",
        "/api/v1/workflows/{id}/lifecycle",
        WRITE,
        lifecycle.update,
        body=LifecyclePolicy,
        answer=lifecycle.PolicyUpdateResult,
    ),
    Route(
        "GET",
        "/api/v1/workflows/{id}/lifecycle/history",
        READ,
        lifecycle.history,
        query=lifecycle.LISTED,
        answer=lifecycle.DecisionList,
    ),
    Route(
        "POST",
        "/api/v1/workflows/{id}/lifecycle/preview",
        READ,
        lifecycle.preview,
        body=PolicyPreviewRequest,
        answer=lifecycle.PolicyPreview,
    ),
    Route("POST", TRIGGER, EXECUTE, trigger.start, body=trigger.TriggerRequest, answer=trigger.TriggerResult),
)
"""Routes for deployed workflows, their pods and lifecycle policies."""

DATA_SOURCES: Sequence[Route] = (
    Route(
        "GET",
        "/api/v1/datasources",
        READ_SOURCES,
        data_sources.index,
        query=data_sources.LISTED,
        answer=data_sources.DataSourceList,
    ),
    Route(
        "POST",
        "/api/v1/datasources",
        WRITE_SOURCES,
        data_sources.create,
        body=CreateDataSource,
        answer=data_sources.NewDataSource,
        status=201,
    ),
    Route("GET", "/api/v1/datasources/{id}", READ_SOURCES, data_sources.show, answer=DataSourceShape),
    Route(
        "PUT",
        "/api/v1/datasources/{id}",
        WRITE_SOURCES,
        data_sources.update,
        body=UpdateDataSource,
        answer=DataSourceShape,
    ),
    Route(
        "DELETE",
        "/api/v1/datasources/{id}",
        WRITE_SOURCES,
        data_sources.delete,
        query=(data_sources.FORCE,),
        status=204,
    ),
    Route(
        "POST",
        "/api/v1/datasources/{id}/test",
        READ_SOURCES,
        data_sources.test,
        answer=data_sources.DataSourceTest,
    ),
    Route(
        "GET",
        "/api/v1/datasources/{id}/share",
        READ_SOURCES,
        data_sources.list_shares,
        answer=data_sources.DataSourceGuests,
    ),
    Route(
        "POST",
        "/api/v1/datasources/{id}/share",
        WRITE_SOURCES,
        data_sources.share,
        body=data_sources.ShareDataSource,
        answer=data_sources.DataSourceShareResult,
    ),
    Route(
        "DELETE",
        "/api/v1/datasources/{id}/share/{subId}",
        WRITE_SOURCES,
        data_sources.unshare,
        status=204,
    ),
    Route(
        "PUT",
        "/api/v1/datasources/{id}/visibility",
        WRITE_SOURCES,
        data_sources.set_visibility,
        body=data_sources.SetDataSourceVisibility,
        answer=DataSourceShape,
    ),
)
"""Routes for data sources."""

INTAKE: Sequence[Route] = (
    Route("GET", "/api/v1/workflows/{id}/schedule", READ, schedule.show, answer=schedule.WorkflowSchedule),
    Route(
        "POST",
        "/api/v1/workflows/{id}/enqueue",
        AccessRule.SENDER,
        enqueue.enqueue,
        body=enqueue.EnqueueRequest,
        answer=enqueue.EnqueueResult,
        status=201,
        query=(TOKEN,),
    ),
    Route(
        "POST",
        "/api/v1/workflows/{id}/enqueue-batch",
        AccessRule.SENDER,
        enqueue_batch.enqueue,
        body=enqueue_batch.EnqueueBatch,
        answer=enqueue_batch.EnqueueBatchResult,
        status=201,
        query=(TOKEN,),
    ),
    Route(
        "POST",
        "/api/v1/workflows/{id}/email-trigger",
        AccessRule.SENDER,
        email_trigger.receive,
        body=email_trigger.ParsedMailRequest,
        answer=email_trigger.MailReceipt,
        status=201,
        query=(TOKEN,),
    ),
    Route(
        "GET",
        "/api/v1/workflows/{id}/inbound-address",
        READ,
        trigger_tokens.show,
        answer=trigger_tokens.InboundAddress,
    ),
    Route(
        "POST",
        "/api/v1/workflows/{id}/trigger-token",
        WRITE,
        trigger_tokens.replace,
        body=trigger_tokens.TokenReplacement,
        answer=trigger_tokens.NewTriggerToken,
        status=201,
    ),
    Route("DELETE", "/api/v1/workflows/{id}/trigger-token", WRITE, trigger_tokens.revoke, status=204),
    Route(
        "GET",
        "/api/v1/workflows/{id}/deliveries",
        READ,
        deliveries.index,
        answer=deliveries.DeliveryList,
        query=deliveries.LISTED,
    ),
    Route(
        "POST",
        "/api/v1/workflows/{id}/deliveries/redrive",
        EXECUTE,
        deliveries.redrive_many,
        body=deliveries.RedriveDeliveries,
        answer=deliveries.DeliveryRedriveResults,
    ),
    Route(
        "GET",
        "/api/v1/intake-samples",
        AccessRule.ADMIN,
        intake_samples.index,
        answer=intake_samples.SampleList,
        query=intake_samples.LISTED,
    ),
    Route("GET", "/api/v1/deliveries/{id}", READ, deliveries.show, answer=deliveries.DeliveryShape),
    Route(
        "POST",
        "/api/v1/deliveries/{id}/redrive",
        EXECUTE,
        deliveries.redrive,
        answer=deliveries.DeliveryRedriveResult,
        status=201,
    ),
    Route(
        "GET",
        "/api/v1/workflows/{id}/dead-letters",
        READ,
        dead_letters.index,
        answer=dead_letters.DeadLetterList,
        query=dead_letters.LISTED,
    ),
    Route(
        "POST",
        "/api/v1/workflows/{id}/dead-letters/redrive",
        EXECUTE,
        dead_letters.redrive,
        body=dead_letters.ChooseDeadLetters,
        answer=deliveries.DeliveryRedriveResults,
    ),
    Route(
        "POST",
        "/api/v1/workflows/{id}/dead-letters/purge",
        EXECUTE,
        dead_letters.purge,
        body=dead_letters.ChooseDeadLetters,
        answer=dead_letters.PurgeResult,
    ),
    Route(
        "POST",
        "/api/v1/workflows/events",
        AccessRule.SENDER,
        events.emit,
        body=events.EmitEventRequest,
        answer=events.EmitEventResult,
        query=(TOKEN,),
    ),
    Route(
        "GET",
        "/api/v1/events",
        READ,
        events.index,
        query=events.LISTED,
        answer=events.EventList,
    ),
    Route("GET", "/api/v1/events/{id}", READ, events.show, answer=events.EventShape),
    Route(
        "POST",
        "/api/v1/events/{id}/replay",
        EXECUTE,
        events.replay,
        body=events.ReplayEvent,
        answer=events.EventReplayResult,
        status=201,
    ),
    Route("OPTIONS", "/api/v1/workflows/events", AccessRule.PUBLIC, events.handshake, status=204),
    Route(
        "POST",
        "/hooks/{id}",
        AccessRule.PUBLIC,
        hooks.receive,
        answer=hooks.WebhookReceipt,
        status=202,
        also_by=tuple(method for method in hooks.METHODS if method != "POST"),
    ),
    Route("GET", "/mail/{id}", AccessRule.PUBLIC, mail_addresses.show, answer=mail_addresses.MailAddress),
    Route(
        "POST",
        "/mail/{id}",
        AccessRule.PUBLIC,
        mail_addresses.receive,
        body=email_trigger.ParsedMailRequest,
        answer=email_trigger.MailReceipt,
        status=201,
    ),
)
"""Routes for inbound requests and their deliveries."""

EXECUTIONS: Sequence[Route] = (
    Route(
        "POST",
        "/api/v1/workflows/{id}/execute",
        EXECUTE,
        execute.start,
        body=execute.ExecuteRequest,
        answer=execute.ExecuteResult,
        status=201,
    ),
    Route(
        "GET",
        "/api/v1/executions",
        READ,
        executions.index,
        query=executions.LISTED,
        answer=executions.ExecutionList,
    ),
    Route(
        "POST",
        "/api/v1/executions/bulk-cancel",
        EXECUTE,
        bulk.cancel,
        body=bulk.BulkRequest,
        answer=bulk.BulkResult,
    ),
    Route(
        "POST",
        "/api/v1/executions/bulk-retry",
        EXECUTE,
        bulk.retry,
        body=bulk.BulkRequest,
        answer=bulk.BulkRetryResult,
    ),
    Route(
        "POST",
        "/api/v1/executions/bulk-delete",
        WRITE,
        bulk.delete,
        body=bulk.BulkRequest,
        answer=bulk.BulkResult,
    ),
    Route(
        "GET",
        "/api/v1/executions/{id}",
        READ,
        executions.show,
        query=(executions.EXPAND,),
        answer=ExecutionShape,
    ),
    Route(
        "GET",
        "/api/v1/executions/{id}/progress",
        READ,
        executions.progress,
        query=(executions.WAIT,),
        answer=ProgressShape,
    ),
    Route(
        "GET",
        "/api/v1/executions/{id}/spans",
        READ,
        executions.spans,
        query=executions.SPANS,
        answer=executions.SpanList,
    ),
    Route(
        "GET",
        "/api/v1/executions/{id}/logs",
        READ,
        executions.logs,
        query=executions.LOGS,
        answer=executions.LogList,
    ),
    Route("GET", "/api/v1/executions/{id}/blobs/{sha256}", READ, executions.blob, answer=str),
    Route("GET", "/api/v1/executions/{id}/events", READ, executions.events, answer=executions.StreamedEvent),
    Route(
        "GET",
        "/api/v1/executions/{id}/pending-inputs",
        READ,
        inputs.index,
        answer=inputs.PendingInputs,
    ),
    Route(
        "POST",
        "/api/v1/executions/{id}/input",
        EXECUTE,
        inputs.answer,
        body=inputs.InputAnswer,
        answer=inputs.InputAnswerResult,
    ),
    Route(
        "POST", "/api/v1/executions/{id}/stop", EXECUTE, executions.stop, answer=executions.EndRequestResult
    ),
    Route(
        "POST",
        "/api/v1/executions/{id}/cancel",
        EXECUTE,
        executions.cancel,
        answer=executions.EndRequestResult,
    ),
    Route(
        "POST",
        "/api/v1/executions/{id}/resume",
        EXECUTE,
        executions.resume,
        answer=executions.ResumeResult,
        status=201,
    ),
)
"""Routes that start, follow, answer and end runs."""

TABLE: Sequence[Route] = (
    *SERVER,
    *ACCESS,
    *WORKFLOWS,
    *GRAPHS,
    *DEPLOYMENTS,
    *DATA_SOURCES,
    *INTAKE,
    *EXECUTIONS,
)

FOR_BROWSERS: Sequence[Route] = (
    Route("GET", "/", AccessRule.PUBLIC, site.redirect, status=302),
    Route("GET", "/docs", AccessRule.PUBLIC, site.redirect, status=302),
    Route("GET", "/docs/*", AccessRule.PUBLIC, site.show, answer=bytes),
    Route("GET", "/favicon.svg", AccessRule.PUBLIC, document.icon, answer=bytes),
    Route("GET", "/favicon.ico", AccessRule.PUBLIC, document.icon, answer=bytes),
    Route("OPTIONS", "/hooks/{id}", AccessRule.PUBLIC, hooks.options, status=204),
)
"""Routes that browsers request by themselves; not part of the API or its OpenAPI document."""


def endpoints(table: Sequence[Route]) -> dict[str, PathEndpoint]:
    """Return the endpoint of each path, with all of its methods."""
    paths: dict[str, dict[str, PathOperation]] = {}
    for line in table:
        operations = paths.setdefault(line.path, {})
        for method in (line.method, *line.also_by):
            operations[method] = PathOperation(line.access, line.handler, line.query)
        if line.method == "GET":
            operations["HEAD"] = operations["GET"]
    return {path: PathEndpoint(operations) for path, operations in paths.items()}
