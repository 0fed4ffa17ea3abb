"""Names of the SDK's methods, by the operation ids of the OpenAPI document."""

from __future__ import annotations

import re
from typing import Final

from pilotflame_sdk.python_code import snake_case

OMITTED: Final = frozenset(
    {
        "callbacksReceive",
        "documentOpenapi",
        "documentOrganizationOpenapi",
        "eventsHandshake",
        "executionsEvents",
        "executionsLive",
        "hooksReceive",
        "hooksReceiveDelete",
        "hooksReceiveGet",
        "hooksReceivePatch",
        "hooksReceivePut",
        "mail_addressesReceive",
        "mail_addressesShow",
        "task_protocolClaim",
        "task_protocolReport",
        "task_protocolShowInput",
        "task_protocolStop",
        "task_protocolStoreOutput",
    }
)
"""Operations of senders, browsers and workers, and streams of events, whose methods are written by hand."""

METHODS: Final = {
    "accessCreateKey": "keys.create",
    "accessCreateUser": "users.create",
    "accessListKeys": "keys.list",
    "accessListUsers": "users.list",
    "accessRevokeKey": "keys.revoke",
    "accessWhoami": "server.whoami",
    "applyApply": "workflows.apply_all",
    "auditIndex": "audit.list",
    "bulkCancel": "executions.bulk_cancel",
    "bulkDelete": "executions.bulk_delete",
    "bulkRetry": "executions.bulk_retry",
    "bulk_operationsBeginForDeadLetters": "bulk_operations.begin_for_dead_letters",
    "bulk_operationsBeginForExecutions": "bulk_operations.begin_for_executions",
    "bulk_replayReplay": "executions.bulk_replay",
    "catalogIndex": "node_types.list",
    "catalogSchema": "node_types.schema",
    "copiesDuplicate": "workflows.duplicate",
    "copiesExportWorkflow": "workflows.export",
    "copiesImportWorkflow": "workflows.import_document",
    "copiesSaveAsTemplate": "workflows.save_as_template",
    "copiesTemplates": "workflows.templates",
    "copiesUseTemplate": "workflows.from_template",
    "custom_nodesAdd": "node_types.add",
    "custom_nodesRemove": "node_types.delete",
    "custom_nodesSchema": "node_types.custom_schema",
    "custom_nodesShow": "node_types.get",
    "custom_nodesVersions": "node_types.versions",
    "data_sourcesCreate": "datasources.create",
    "data_sourcesDelete": "datasources.delete",
    "data_sourcesIndex": "datasources.list",
    "data_sourcesListShares": "datasources.shares",
    "data_sourcesSetVisibility": "datasources.set_visibility",
    "data_sourcesShare": "datasources.share",
    "data_sourcesShow": "datasources.get",
    "data_sourcesTest": "datasources.test",
    "data_sourcesUnshare": "datasources.unshare",
    "data_sourcesUpdate": "datasources.update",
    "dead_letter_groupsIndex": "queue.dead_letter_groups",
    "dead_letter_groupsMute": "queue.mute_dead_letter_group",
    "dead_letter_groupsUnmute": "queue.unmute_dead_letter_group",
    "dead_lettersIndex": "queue.dead_letters",
    "dead_lettersPurge": "queue.purge_dead_letters",
    "dead_lettersRedrive": "queue.redrive_dead_letters",
    "deliveriesIndex": "deliveries.list",
    "deliveriesIndexAll": "deliveries.list_all",
    "deliveriesRedrive": "deliveries.redrive",
    "deliveriesRedriveAll": "deliveries.redrive_all",
    "deliveriesRedriveMany": "deliveries.redrive_many",
    "deliveriesShow": "deliveries.get",
    "deployment_listIndex": "deployments.list",
    "deployment_listShow_summary": "deployments.summary",
    "deploymentsDeploy": "deployments.deploy",
    "deploymentsDeployVersion": "deployments.deploy_version",
    "deploymentsLogs": "deployments.logs",
    "deploymentsShow": "deployments.status",
    "deploymentsStart": "deployments.start",
    "deploymentsStop": "deployments.stop",
    "deploymentsUndeploy": "deployments.undeploy",
    "discoverIndex": "deployments.discover",
    "driftShow": "server.drift",
    "server_healthShow": "server.health_details",
    "email_triggerReceive": "triggers.send_mail",
    "enqueueEnqueue": "queue.send",
    "enqueue_batchEnqueue": "queue.send_batch",
    "event_tokensCreate": "event_tokens.create",
    "event_tokensIndex": "event_tokens.list",
    "event_tokensRevoke": "event_tokens.revoke",
    "eventsEmit": "events.send",
    "eventsIndex": "events.list",
    "eventsReplay": "events.replay",
    "eventsShow": "events.get",
    "executeStart": "executions.start",
    "executionsBlob": "executions.blob",
    "executionsCancel": "executions.cancel",
    "executionsIndex": "executions.list",
    "executionsLogs": "executions.logs",
    "executionsProgress": "executions.progress",
    "executionsResume": "executions.resume",
    "executionsShow": "executions.get",
    "executionsSpan": "executions.span",
    "executionsSpans": "executions.spans",
    "executionsSteps": "executions.steps",
    "executionsStop": "executions.stop",
    "failure_groupsShow": "executions.failures",
    "graphBuild": "workflows.build",
    "graphLayout": "workflows.layout",
    "healthAlive": "server.health",
    "healthReady": "server.ready",
    "input_assigneesAssign": "approvals.reassign",
    "inputsAnswer": "approvals.answer",
    "inputsIndex": "executions.pending_inputs",
    "inputsIndexAnswered": "approvals.answered",
    "inputsIndexAssigned": "approvals.list",
    "intake_samplesIndex": "deliveries.samples",
    "intake_samplesOfWorkflow": "deliveries.workflow_samples",
    "lifecycleHistory": "deployments.lifecycle_history",
    "lifecycle_holdEnd": "deployments.end_hold",
    "lifecycle_holdKeep": "deployments.keep_awake",
    "lifecyclePreview": "deployments.preview_lifecycle",
    "lifecycleShow": "deployments.lifecycle",
    "lifecycleUpdate": "deployments.set_lifecycle",
    "model_metricsShow": "ai_models.metrics",
    "model_permissionsShow": "ai_models.permissions",
    "model_permissionsUpdate": "ai_models.set_permissions",
    "model_statusShow": "ai_models.status",
    "node_statisticsShow": "workflows.statistics",
    "node_testsRunNode": "workflows.test_node",
    "nodesAdd": "workflows.add_node",
    "nodesConfigure": "workflows.update_node",
    "nodesConnect": "workflows.connect",
    "nodesDisconnect": "workflows.disconnect",
    "nodesIndex": "workflows.nodes",
    "nodesRemove": "workflows.remove_node",
    "nodesSetMappings": "workflows.set_input_mappings",
    "nodesSetPassThrough": "workflows.set_passthrough_values",
    "organization_dead_lettersIndex": "queue.all_dead_letters",
    "organization_dead_lettersPurge": "queue.purge_all_dead_letters",
    "organization_dead_lettersReplay": "queue.replay_all_dead_letters",
    "organization_dead_lettersRedrive": "queue.redrive_all_dead_letters",
    "organization_explanationsShow": "server.why",
    "published_stateShow": "executions.state",
    "replayReplay": "executions.replay",
    "run_explanationsShow": "executions.why",
    "run_graphsShow": "executions.graph",
    "run_statisticsShow": "executions.statistics",
    "scheduleIndex": "schedules.list",
    "scheduleShow": "schedules.get",
    "schedule_timelineTimeline": "schedules.timeline",
    "sessionsEnd": "sessions.end",
    "sessionsIndex": "sessions.list",
    "sessionsShow": "sessions.get",
    "sharingAdd": "workflows.share",
    "sharingIndex": "workflows.shares",
    "sharingRemove": "workflows.unshare",
    "sharingSetVisibility": "workflows.set_visibility",
    "signingReplace": "signing_secret.replace",
    "signingShow": "signing_secret.get",
    "signalsIndex": "executions.signals",
    "signalsSend": "executions.signal",
    "span_comparisonCompare": "executions.compare_span",
    "task_decisionsCancel": "tasks.cancel",
    "task_decisionsRetry": "tasks.retry",
    "task_listsDrain": "workers.drain",
    "task_listsIndex": "tasks.list",
    "task_listsShow": "tasks.get",
    "task_listsWorkers": "workers.list",
    "triggerStart": "deployments.trigger",
    "trigger_token_listIndex": "triggers.list_tokens",
    "trigger_tokensReplace": "triggers.replace_token",
    "trigger_tokensRevoke": "triggers.revoke_token",
    "trigger_tokensShow": "triggers.address",
    "usable_modelsIndex": "ai_models.usable",
    "validationCheck": "workflows.validate",
    "validationCheckVersion": "workflows.validate_version",
    "validationComputeScopes": "workflows.compute_scopes",
    "versionsCompare": "workflows.compare_versions",
    "versionsCreate": "workflows.create_version",
    "versionsIndex": "workflows.versions",
    "versionsRestore": "workflows.restore",
    "versionsShow": "workflows.version",
    "workflow_activityIndex": "workflows.activity",
    "workflow_explanationsShow": "workflows.why",
    "workflow_logsShow": "workflows.log_level",
    "workflow_logsUpdate": "workflows.set_log_level",
    "workflowsCreate": "workflows.create",
    "workflowsDelete": "workflows.delete",
    "workflowsIndex": "workflows.list",
    "workflowsSetStatus": "workflows.set_status",
    "workflowsShow": "workflows.get",
    "workflowsStats": "workflows.stats",
    "workflowsUpdate": "workflows.update",
}
"""Resource and method of an operation; others are named after their module and handler."""

OLD_NAMES: Final = {
    "events.send": "emit",
    "triggers.address": "inbound_address",
    "workflows.from_template": "create_from_template",
    "workflows.restore": "restore_version",
}
"""Deprecated names of methods; those of the command line are the names."""

_SINGULAR: Final = {"deliveries": "delivery", "workflow-nodes": "node_type"}
_AFTER_SLASH: Final = {"subId": "user_id", "type": "node_type"}


def method_name(operation_id: str) -> tuple[str, str]:
    """Return the resource and the method name of an operation in the SDK, such as `keys` and `create`."""
    if named := METHODS.get(operation_id):
        resource, _, method = named.partition(".")
        return resource, method
    module, handler = _split(operation_id)
    return module, {"index": "list", "show": "get"}.get(handler, handler)


def _split(operation_id: str) -> tuple[str, str]:
    """Return the module and the handler of an operation id such as `node_testsRunNode`."""
    first = re.search(r"[A-Z]", operation_id)
    start = first.start() if first else len(operation_id)
    return operation_id[:start], snake_case(operation_id[start:]) or "call"


def path_parameter(path: str, name: str) -> str:
    """Return the Python name of a path parameter; `id` and `sub` are named after the segment before: `workflow_id`."""
    if name in _AFTER_SLASH:
        return _AFTER_SLASH[name]
    if name not in {"id", "sub"}:
        return snake_case(name)
    segments = path.split("/")
    before = segments[segments.index(f"{{{name}}}") - 1]
    return f"{_SINGULAR.get(before, snake_case(before.removesuffix('s')))}_id"
