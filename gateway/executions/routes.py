"""Routes that start, follow, answer and end runs. Fixed paths precede `{id}`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Final

from gateway.executions import (
    approval_page,
    bulk,
    bulk_replay,
    callbacks,
    execute,
    executions,
    inputs,
    node_statistics,
    node_tests,
    replay,
    run_graphs,
    run_statistics,
    span_comparison,
)
from gateway.executions.execution_shapes import ExecutionShape, ProgressShape, SpanDetailsShape
from gateway.http.endpoint import AccessRule
from gateway.http.operation_docs import (
    DISPOSITION,
    ENDED,
    ETAG,
    EVENT_STREAM,
    IDEMPOTENCY_KEY,
    LAST_EVENT_ID,
    LOCATION,
    PREFER,
    PREFERENCE_APPLIED,
    REPLAYED,
    TAKES_IN,
    OperationDoc,
    OtherSuccess,
)
from gateway.http.refusals import BODY_CODES
from gateway.http.route import EXECUTE, READ, WRITE, Route

ROUTES: Final[Sequence[Route]] = (
    Route(
        "POST",
        "/api/v1/workflows/{id}/nodes/{sub}/test",
        EXECUTE,
        node_tests.run_node,
        body=node_tests.NodeTestRequest,
        answer=node_tests.NodeTestResult,
        docs=replace(
            TAKES_IN,
            also={
                202: OtherSuccess(
                    "The test did not end within the wait time; the execution continues.",
                    node_tests.PendingNodeTest,
                )
            },
        ).refusing("duplicate-node-id"),
    ),
    Route(
        "POST",
        "/api/v1/workflows/{id}/execute",
        EXECUTE,
        execute.start,
        body=execute.ExecuteRequest,
        answer=execute.ExecuteResult,
        status=201,
        docs=replace(
            TAKES_IN,
            takes=(*TAKES_IN.takes, PREFER),
            sends=(*TAKES_IN.sends, PREFERENCE_APPLIED),
            also={200: OtherSuccess(ENDED, execute.EndedExecuteResult)},
        ).refusing("concurrency-limit", "no-signing-secret"),
    ),
    Route(
        "GET",
        "/api/v1/workflows/{id}/statistics",
        READ,
        node_statistics.show,
        answer=node_statistics.WorkflowStatistics,
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
        "GET",
        "/api/v1/executions/statistics",
        READ,
        run_statistics.show,
        answer=run_statistics.RunStatistics,
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
        docs=OperationDoc(
            takes=(IDEMPOTENCY_KEY,),
            sends=(REPLAYED,),
            refusals=("invalid-idempotency-key", "idempotency-mismatch", "queue-full"),
        ),
    ),
    Route(
        "POST",
        "/api/v1/executions/bulk-replay",
        EXECUTE,
        bulk_replay.replay,
        body=bulk_replay.BulkReplayRequest,
        answer=bulk_replay.BulkReplayResult,
        docs=OperationDoc(
            takes=(IDEMPOTENCY_KEY,),
            sends=(REPLAYED,),
            refusals=("invalid-idempotency-key", "idempotency-mismatch", "queue-full"),
        ),
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
        "/live",
        READ,
        executions.live,
        query=(executions.TOPICS,),
        answer=executions.StreamedHint,
        docs=OperationDoc(
            media_type=EVENT_STREAM,
            also={204: OtherSuccess("All these executions have ended, so that no hint would follow.")},
            refusals=("not-found",),
        ),
    ),
    Route(
        "GET",
        "/api/v1/executions/{id}",
        READ,
        executions.show,
        query=(executions.SUMMARY, executions.EXPAND),
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
        "/api/v1/executions/{id}/graph",
        READ,
        run_graphs.show,
        query=(run_graphs.EXPAND,),
        answer=run_graphs.RunGraph,
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
        "/api/v1/executions/{id}/spans/{sub}",
        READ,
        executions.span,
        query=(executions.ITERATION, executions.EXPAND),
        answer=SpanDetailsShape,
    ),
    Route(
        "GET",
        "/api/v1/executions/{id}/spans/{sub}/diff",
        READ,
        span_comparison.compare,
        query=span_comparison.COMPARED,
        answer=span_comparison.SpanComparison,
    ),
    Route(
        "GET",
        "/api/v1/executions/{id}/logs",
        READ,
        executions.logs,
        query=executions.LOGS,
        answer=executions.LogList,
        docs=OperationDoc(
            takes=(LAST_EVENT_ID,),
            also={204: OtherSuccess("The client already received the end of this stream.")},
            refusals=("invalid-last-event-id",),
        ),
    ),
    Route(
        "GET",
        "/api/v1/executions/{id}/steps",
        READ,
        executions.steps,
        query=executions.STEPS,
        answer=executions.StepList,
        docs=OperationDoc(
            takes=(LAST_EVENT_ID,),
            also={204: OtherSuccess("The client already received the end of this stream.")},
            refusals=("invalid-last-event-id",),
        ),
    ),
    Route(
        "GET",
        "/api/v1/executions/{id}/blobs/{sha256}",
        READ,
        executions.blob,
        answer=str,
        docs=OperationDoc(
            sends=(replace(ETAG, description="SHA-256 of the content."), DISPOSITION),
            media_type="application/octet-stream",
        ),
    ),
    Route(
        "GET",
        "/api/v1/executions/{id}/events",
        READ,
        executions.events,
        answer=executions.StreamedEvent,
        docs=OperationDoc(
            takes=(LAST_EVENT_ID,),
            media_type=EVENT_STREAM,
            also={204: OtherSuccess("The client already received the end of this stream.")},
            refusals=("invalid-last-event-id",),
        ),
    ),
    Route(
        "GET",
        "/api/v1/pending-inputs",
        EXECUTE,
        inputs.index_assigned,
        answer=inputs.AssignedInputs,
    ),
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
        docs=OperationDoc(
            takes=(IDEMPOTENCY_KEY,),
            sends=(REPLAYED,),
            refusals=(
                "invalid-idempotency-key",
                "idempotency-mismatch",
                "not-assigned",
                "self-approval",
                "already-answered",
                "input-expired",
                "no-input-pending",
            ),
        ),
    ),
    Route(
        "POST",
        "/api/v1/executions/{id}/callback",
        AccessRule.PUBLIC,
        callbacks.receive,
        query=callbacks.PARAMETERS,
        answer=callbacks.CallbackReceipt,
        docs=OperationDoc(
            refusals=(
                *("not-found", "rate-limited", "not-ready", "already-answered"),
                *("callback-expired", "no-callback-pending", *BODY_CODES),
            )
        ),
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
        "/api/v1/executions/{id}/replay",
        EXECUTE,
        replay.replay,
        body=replay.ReplayRequest,
        answer=replay.ReplayResult,
        status=201,
        docs=OperationDoc(
            takes=(IDEMPOTENCY_KEY,),
            sends=(replace(LOCATION, is_always_sent=False), REPLAYED),
            refusals=(
                "invalid-idempotency-key",
                "idempotency-mismatch",
                "queue-full",
                "execution-not-ended",
                "plan-changed",
                "confirmation-required",
                "already-resumed",
                "workflow-deleted",
                "workflow-paused",
                "workflow-archived",
            ),
            also={200: OtherSuccess("With `dryRun`: the plan.", replay.ReplayPlanShape)},
        ),
    ),
    Route(
        "POST",
        "/api/v1/executions/{id}/resume",
        EXECUTE,
        executions.resume,
        body=executions.ResumeRequest,
        answer=executions.ResumeResult,
        status=201,
        docs=OperationDoc(
            takes=(IDEMPOTENCY_KEY,),
            sends=(LOCATION, REPLAYED),
            refusals=(
                "invalid-idempotency-key",
                "idempotency-mismatch",
                "execution-not-failed",
                "already-resumed",
                "workflow-deleted",
                "workflow-paused",
                "workflow-archived",
            ),
        ),
    ),
)

FOR_BROWSERS: Final[Sequence[Route]] = (
    Route("GET", "/approve/{id}", AccessRule.PUBLIC, approval_page.show, answer=bytes),
    Route("POST", "/approve/{id}", AccessRule.PUBLIC, approval_page.answer, answer=bytes),
)
"""Pages behind the links of approvals."""
