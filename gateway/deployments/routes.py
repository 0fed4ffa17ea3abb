"""Routes that deploy, start and stop workflows, and follow their pods. Fixed paths precede `{id}`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from msgspec.structs import replace

from gateway.deployments import (
    deployment_list,
    deployments,
    discover,
    lifecycle,
    lifecycle_calendar,
    lifecycle_hold,
    trigger,
    workflow_activity,
)
from gateway.deployments.lifecycle_shapes import LifecyclePolicy, PolicyPreviewRequest
from gateway.http.operation_docs import (
    COLD_START,
    EDITS_WORKFLOW,
    PREFER,
    PREFERENCE_APPLIED,
    SERVER_TIMING,
    TAGGED,
    TAKES_IN,
    OperationDoc,
    OtherSuccess,
)
from gateway.http.route import EXECUTE, READ, WRITE, Route

TRIGGER = "/api/v1/workflows/{id}/trigger"

ROUTES: Final[Sequence[Route]] = (
    Route("GET", "/api/v1/deployments", READ, deployment_list.index, answer=deployment_list.DeploymentList),
    Route(
        "GET",
        "/api/v1/deployments/summary",
        READ,
        deployment_list.show_summary,
        answer=deployment_list.DeploymentSummary,
    ),
    Route(
        "GET",
        "/api/v1/deployments/usage",
        READ,
        lifecycle_calendar.show_usage,
        answer=lifecycle_calendar.PodTime,
    ),
    Route(
        "GET",
        "/api/v1/workflows/activity",
        READ,
        workflow_activity.index,
        query=workflow_activity.LISTED,
        answer=workflow_activity.WorkflowActivityList,
    ),
    Route(
        "GET",
        "/api/v1/workflows/discover",
        READ,
        discover.index,
        answer=list[discover.DiscoveredWorkflow],
        query=(discover.APP_ID,),
    ),
    Route(
        "POST",
        "/api/v1/workflows/{id}/deploy",
        WRITE,
        deployments.deploy,
        answer=deployments.DeployResult,
        docs=replace(
            EDITS_WORKFLOW,
            also={
                202: OtherSuccess("The pods are not ready yet, or cannot start.", deployments.DeployResult)
            },
        ),
    ),
    Route(
        "POST",
        "/api/v1/workflows/{id}/deploy-version",
        WRITE,
        deployments.deploy_version,
        body=deployments.DeployVersion,
        answer=deployments.DeployResult,
        docs=replace(
            EDITS_WORKFLOW,
            also={
                202: OtherSuccess("The pods are not ready yet, or cannot start.", deployments.DeployResult)
            },
        ),
    ),
    Route(
        "POST",
        "/api/v1/workflows/{id}/undeploy",
        WRITE,
        deployments.undeploy,
        answer=deployments.UndeployResult,
        docs=replace(
            EDITS_WORKFLOW,
            also={202: OtherSuccess("The pods have not stopped yet.", deployments.UndeployResult)},
        ),
    ),
    Route(
        "POST",
        "/api/v1/workflows/{id}/stop",
        WRITE,
        deployments.stop,
        answer=deployments.StopResult,
        docs=OperationDoc(
            refusals=("not-owner", "not-deployed"),
            also={202: OtherSuccess("The pods have not stopped yet.", deployments.StopResult)},
        ),
    ),
    Route(
        "POST",
        "/api/v1/workflows/{id}/start",
        WRITE,
        deployments.start,
        body=deployments.StartDeployment,
        answer=deployments.StartResult,
        docs=OperationDoc(
            refusals=("not-owner", "not-deployed"),
            also={202: OtherSuccess("The pods are not ready yet, or cannot start.", deployments.StartResult)},
        ),
    ),
    Route(
        "GET",
        "/api/v1/workflows/{id}/status",
        READ,
        deployments.show,
        answer=deployments.DeploymentShape,
        docs=TAGGED,
    ),
    Route(
        "GET",
        "/api/v1/workflows/{id}/logs",
        READ,
        deployments.logs,
        query=(deployments.LINES,),
        answer=deployments.PodLog,
        docs=OperationDoc(refusals=("not-deployed",)),
    ),
    Route(
        "GET",
        "/api/v1/workflows/{id}/lifecycle",
        READ,
        lifecycle.show,
        answer=lifecycle.LifecycleShape,
        docs=TAGGED,
    ),
    Route(
        "PUT",
        "/api/v1/workflows/{id}/lifecycle",
        WRITE,
        lifecycle.update,
        body=LifecyclePolicy,
        answer=lifecycle.PolicyUpdateResult,
        docs=EDITS_WORKFLOW,
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
        "GET",
        "/api/v1/workflows/{id}/lifecycle/calendar",
        READ,
        lifecycle_calendar.show,
        answer=lifecycle_calendar.LifecycleCalendar,
    ),
    Route(
        "POST",
        "/api/v1/workflows/{id}/lifecycle/hold",
        WRITE,
        lifecycle_hold.keep,
        body=lifecycle_hold.HoldRequest,
        answer=lifecycle_hold.DeploymentHold,
        docs=OperationDoc(refusals=("not-owner", "not-deployed")),
    ),
    Route(
        "DELETE",
        "/api/v1/workflows/{id}/lifecycle/hold",
        WRITE,
        lifecycle_hold.end,
        status=204,
        docs=OperationDoc(refusals=("not-owner", "not-deployed")),
    ),
    Route(
        "POST",
        "/api/v1/workflows/{id}/lifecycle/preview",
        READ,
        lifecycle.preview,
        body=PolicyPreviewRequest,
        answer=lifecycle.PolicyPreview,
        docs=TAGGED,
    ),
    Route(
        "POST",
        TRIGGER,
        EXECUTE,
        trigger.start,
        body=trigger.TriggerRequest,
        answer=trigger.TriggerResult,
        docs=replace(
            TAKES_IN,
            takes=(*TAKES_IN.takes, PREFER),
            sends=(*TAKES_IN.sends, SERVER_TIMING, COLD_START, PREFERENCE_APPLIED),
            # The deployed definition was valid when it was deployed.
            refusals=[code for code in TAKES_IN.refusals if code != "unresolved-model-placeholder"],
        ).refusing(
            *("concurrency-limit", "not-deployed", "outside-window", "start-failed", "stopped-manually"),
            "workflow-not-active",
        ),
    ),
)
