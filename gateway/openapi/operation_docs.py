"""Headers, statuses and refusals of operations that their routes don't declare.

A test holds these to the behavior of the handlers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Final

from gateway import health
from gateway.access import access, signing
from gateway.data_sources import data_sources
from gateway.deployments import deployments, lifecycle, trigger
from gateway.executions import bulk, execute, executions, inputs, node_tests
from gateway.http import limits
from gateway.http.refusals import JSON_CODES
from gateway.ingest import (
    dead_letters,
    deliveries,
    email_trigger,
    enqueue,
    enqueue_batch,
    event_tokens,
    events,
    hooks,
    mail_addresses,
    schedule,
    trigger_tokens,
)
from gateway.openapi import document
from gateway.workflows import copies, graph, nodes, sharing, validation, versions, workflows

if TYPE_CHECKING:
    from engine.values import Json
    from gateway.http.endpoint import Handler

JSON: Final = "application/json"
EVENT_STREAM: Final = "text/event-stream"


@dataclass(frozen=True, slots=True)
class HeaderDoc:
    """Request or response header."""

    name: str
    description: str
    schema: Mapping[str, Json] = field(default_factory=lambda: {"type": "string"})
    is_always_sent: bool = True


@dataclass(frozen=True, slots=True)
class OtherSuccess:
    """Second success status of an operation: its condition, and the type of its body, if any."""

    meaning: str
    answer: object = None


@dataclass(frozen=True, slots=True)
class OperationDoc:
    """Headers, refusals and further statuses of one operation."""

    takes: Sequence[HeaderDoc] = ()
    sends: Sequence[HeaderDoc] = ()
    """Headers of the success response."""
    refusals: Sequence[str] = ()
    """Error codes besides those that follow from the route."""
    media_type: str = JSON
    also: Mapping[int, OtherSuccess] = field(default_factory=dict)
    """Other success statuses."""

    def refusing(self, *codes: str) -> OperationDoc:
        """Return a copy with further error codes."""
        return replace(self, refusals=(*self.refusals, *codes))


@dataclass(frozen=True, slots=True)
class PathParameterDoc:
    """Path parameter, chosen by the path segment before it."""

    description: str
    example: str
    schema: Mapping[str, Json] = field(
        default_factory=lambda: {"type": "string", "pattern": "^[A-Za-z0-9_-]{1,64}$"}
    )


PLACES: Final[Mapping[str, PathParameterDoc]] = {
    "keys": PathParameterDoc("Id of the key.", "key_abc123"),
    "event-tokens": PathParameterDoc("Id of the token.", "tok_abc123"),
    "events": PathParameterDoc("Id of the event.", "event_abc123"),
    "workflows": PathParameterDoc("Id of the workflow.", "wf_abc123"),
    "nodes": PathParameterDoc("Id of the node in the workflow.", "node-xyz123"),
    "connections": PathParameterDoc("Id of the connection in the workflow.", "conn-abc123"),
    "versions": PathParameterDoc("Number of the version, from 1; in comparisons also `current`.", "1"),
    "diff": PathParameterDoc("Number of the version to compare with, or `current`.", "current"),
    "share": PathParameterDoc("Id of the user.", "user_789"),
    "datasources": PathParameterDoc("Id of the data source.", "ds_001"),
    "workflow-nodes": PathParameterDoc("Name of the node type.", "http-request"),
    "deliveries": PathParameterDoc("Id of the delivery.", "dlv_abc123"),
    "executions": PathParameterDoc("Id of the execution.", "exec_xyz789"),
    "hooks": PathParameterDoc("The trigger token of the workflow.", "tt-abc123"),
    "mail": PathParameterDoc("The trigger token of the workflow.", "tt-mail123"),
    "blobs": PathParameterDoc(
        "SHA-256 of the content, as in the field `sha256` of its reference.",
        "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855",
        {"type": "string", "pattern": "^[0-9a-f]{64}$"},
    ),
}

IDEMPOTENCY_KEY: Final = HeaderDoc(
    "Idempotency-Key",
    "Makes the request safe to repeat: for a day, the same key and body of the same user get the first answer again.",
    {"type": "string", "pattern": "^[!-~]+$", "minLength": 1, "maxLength": limits.IDEMPOTENCY_KEY_LENGTH},
)
IF_MATCH: Final = HeaderDoc(
    "If-Match",
    "`ETag` of the state to change. If the object has changed since, the request is refused with 412.",
)
IF_NONE_MATCH: Final = HeaderDoc("If-None-Match", "`ETag` of the copy that the client already has.")
LAST_EVENT_ID: Final = HeaderDoc(
    "Last-Event-ID", "Id of the last event that the client received, or `end`: the stream resumes after it."
)
ETAG: Final = HeaderDoc("ETag", "Identifies the object's state, for a later `If-Match`.")
REPLAYED: Final = HeaderDoc(
    "Idempotent-Replayed",
    "`true` if this is the answer to an earlier request with the same `Idempotency-Key`.",
    {"type": "string", "const": "true"},
    is_always_sent=False,
)
SERVER_TIMING: Final = HeaderDoc(
    "Server-Timing",
    "Durations: `accept`, to store the execution; `wake`, until a pod claimed it; `run`, until this answer.",
)
COLD_START: Final = HeaderDoc(
    "X-Cold-Start",
    "Whether the workflow's pods had to be started.",
    {"type": "string", "enum": ["true", "false"]},
)
LOCATION: Final = HeaderDoc("Location", "URL of the execution.")
RATES: Final = (
    HeaderDoc(
        "RateLimit-Policy",
        "Limits of the request: a quota of `q` requests, restored within `w` seconds.",
        is_always_sent=False,
    ),
    HeaderDoc(
        "RateLimit",
        "Remaining quota: `r` requests are left; the whole quota is restored after `t` seconds.",
        is_always_sent=False,
    ),
)
"""Response headers of operations with rate limits."""
ALLOW: Final = HeaderDoc("Allow", "Methods of the path.")
ALLOWED_ORIGIN: Final = HeaderDoc(
    "WebHook-Allowed-Origin",
    "The `WebHook-Request-Origin` of the request, which may send events.",
    is_always_sent=False,
)
ALLOWED_RATE: Final = HeaderDoc(
    "WebHook-Allowed-Rate", "Permitted requests per minute; `*` means no limit.", is_always_sent=False
)
DISPOSITION: Final = HeaderDoc("Content-Disposition", "Suggested file name.")

KEPT: Final = OperationDoc(
    takes=(IF_NONE_MATCH,),
    sends=(replace(ETAG, description="Identifies this text, for a later `If-None-Match`."),),
    also={304: OtherSuccess("The client already has the current text.")},
)
TAGGED: Final = OperationDoc(sends=(ETAG,))
EDITS: Final = OperationDoc(
    takes=(IF_MATCH,),
    sends=(ETAG,),
    refusals=("not-owner", "precondition-failed", "edit-conflict", "validation-failed"),
)
CREATES: Final = OperationDoc(
    takes=(IDEMPOTENCY_KEY,),
    sends=(replace(ETAG, is_always_sent=False), REPLAYED),
    refusals=("invalid-idempotency-key", "idempotency-mismatch"),
)
TAKES_IN: Final = OperationDoc(
    takes=(IDEMPOTENCY_KEY,),
    sends=(LOCATION, REPLAYED, *RATES),
    refusals=(
        "queue-full",
        "invalid-idempotency-key",
        "idempotency-mismatch",
        "workflow-paused",
        "workflow-archived",
        "workflow-changed",
    ),
)
ARRIVES: Final = OperationDoc(
    sends=(LOCATION, REPLAYED),
    refusals=("workflow-changed", "workflow-not-active", "concurrency-limit"),
)

TAKES_MAIL: Final = replace(
    ARRIVES,
    takes=(IDEMPOTENCY_KEY,),
    sends=(replace(LOCATION, is_always_sent=False), REPLAYED, *RATES),
    also={
        200: OtherSuccess(
            "A notification of the mail service, not a mail. Mailgun also gets 200 for a mail, with the body of 201.",
            email_trigger.MailNotification,
        )
    },
    refusals=(
        *ARRIVES.refusals,
        *("invalid-idempotency-key", "idempotency-mismatch", "no-email-trigger", "queue-full"),
        *("duplicate-header", "malformed-form", "malformed-mail", "malformed-message", "unknown-mail"),
        *("raw-delivery", "unknown-topic", "untrusted-certificate", "invalid-certificate"),
        *("invalid-signature", "trigger-not-ready", "mail-refused", "replayed-delivery"),
    ),
)
"""Mail intake, the same on each of its paths."""

OPERATION_DOCS: Final[Mapping[Handler, OperationDoc]] = {
    deliveries.redrive: replace(ARRIVES, takes=(IDEMPOTENCY_KEY,)).refusing(
        "invalid-idempotency-key",
        "idempotency-mismatch",
        *("not-redrivable", "queue-full", "validation-failed", "workflow-paused"),
        *(f"no-{kind}-trigger" for kind in ("queue", "email", "webhook")),
    ),
    dead_letters.purge: OperationDoc(refusals=("not-owner",)),
    trigger_tokens.replace: OperationDoc(refusals=("not-owner",)),
    trigger_tokens.revoke: OperationDoc(refusals=("not-owner",)),
    email_trigger.receive: TAKES_MAIL,
    mail_addresses.show: OperationDoc(
        refusals=("not-found", "unauthorized", "rate-limited", "not-ready", "internal-error")
    ),
    mail_addresses.receive: TAKES_MAIL.refusing("not-found", "unauthorized", "rate-limited", "not-ready"),
    hooks.receive: replace(
        ARRIVES,
        takes=(IDEMPOTENCY_KEY,),
        sends=(*ARRIVES.sends, *RATES),
        also={
            200: OtherSuccess(
                "The execution ended without an answer of its own, or the request starts no execution. Slack gets"
                " 200 in place of 202.",
                hooks.WebhookReceipt,
            )
        },
        refusals=(
            *ARRIVES.refusals,
            *("not-found", "unauthorized", "rate-limited", "not-ready", "internal-error"),
            *("execution-failed", "queue-full"),
            *("no-webhook-trigger", "no-verification", "trigger-not-ready", "validation-failed"),
            *("invalid-signature", "network-not-allowed", "method-not-allowed", "payload-too-large"),
            *(
                *JSON_CODES,
                "duplicate-header",
                "invalid-event",
                "invalid-query",
                "malformed-form",
                "malformed-body",
            ),
            *("unsupported-media-type", "invalid-idempotency-key", "idempotency-mismatch"),
        ),
    ),
    enqueue_batch.enqueue: replace(ARRIVES, takes=(IDEMPOTENCY_KEY,), sends=(REPLAYED, *RATES)).refusing(
        *("queue-full", "workflow-paused"),
        *("invalid-idempotency-key", "idempotency-mismatch", "no-queue-trigger", "no-signing-secret"),
        *("invalid-signature", "duplicate-header", "no-verification", "trigger-not-ready"),
        *("invalid-event", "malformed-form"),
    ),
    events.emit: OperationDoc(
        takes=(IDEMPOTENCY_KEY,),
        sends=(REPLAYED,),
        refusals=(
            *("invalid-idempotency-key", "idempotency-mismatch", "invalid-signature", "invalid-event"),
            *("malformed-form", "duplicate-header", "workflow-changed", "queue-full"),
        ),
    ),
    events.handshake: OperationDoc(sends=(ALLOW, ALLOWED_ORIGIN, ALLOWED_RATE)),
    events.show: OperationDoc(refusals=("not-found",)),
    events.replay: replace(ARRIVES, takes=(IDEMPOTENCY_KEY,)).refusing(
        "invalid-idempotency-key", "idempotency-mismatch", "no-event-trigger", "workflow-paused"
    ),
    event_tokens.index: OperationDoc(refusals=("admin-required",)),
    event_tokens.create: OperationDoc(refusals=("admin-required",)),
    event_tokens.revoke: OperationDoc(refusals=("admin-required",)),
    enqueue.enqueue: replace(ARRIVES, takes=(IDEMPOTENCY_KEY,), sends=(*ARRIVES.sends, *RATES)).refusing(
        *("queue-full", "workflow-paused"),
        *("invalid-idempotency-key", "idempotency-mismatch", "no-queue-trigger", "no-signing-secret"),
        *("invalid-signature", "duplicate-header", "no-verification", "trigger-not-ready"),
        *("invalid-event", "malformed-form"),
    ),
    health.ready: OperationDoc(refusals=("not-ready",)),
    document.openapi: KEPT,
    access.create_key: OperationDoc(refusals=("not-found",)),
    access.create_user: OperationDoc(refusals=("email-taken",)),
    signing.show: OperationDoc(refusals=("admin-required", "not-found")),
    signing.replace: OperationDoc(refusals=("admin-required",)),
    workflows.create: CREATES,
    workflows.show: TAGGED,
    workflows.update: EDITS,
    workflows.set_status: EDITS,
    workflows.delete: replace(EDITS, sends=()).refusing("workflow-deployed", "workflow-running"),
    execute.start: TAKES_IN.refusing("concurrency-limit", "no-signing-secret"),
    node_tests.run_node: replace(
        TAKES_IN,
        also={
            202: OtherSuccess(
                "The test did not end within the wait time; the execution continues.",
                node_tests.PendingNodeTest,
            )
        },
    ).refusing("duplicate-node-id"),
    copies.duplicate: CREATES.refusing("validation-failed"),
    copies.use_template: CREATES.refusing("not-found"),
    copies.save_as_template: CREATES.refusing("admin-required"),
    copies.export_workflow: OperationDoc(sends=(ETAG, DISPOSITION)),
    copies.import_workflow: replace(
        CREATES,
        also={
            200: OtherSuccess(
                "The request has no `references`: the answer lists those to resolve. Nothing is created.",
                copies.ImportAnswer,
            )
        },
    ),
    graph.build: replace(
        CREATES,
        also={200: OtherSuccess("With `dryRun`: the findings. Nothing is created.", graph.BuildFindings)},
    ),
    graph.layout: EDITS,
    validation.check: TAGGED,
    validation.compute_scopes: EDITS,
    nodes.index: TAGGED,
    nodes.add: EDITS.refusing("duplicate-node-id"),
    nodes.configure: EDITS.refusing("duplicate-node-id"),
    nodes.remove: EDITS,
    nodes.set_mappings: EDITS.refusing("duplicate-node-id"),
    nodes.set_pass_through: EDITS.refusing("duplicate-node-id"),
    nodes.connect: EDITS.refusing("duplicate-connection"),
    nodes.disconnect: EDITS,
    versions.index: TAGGED,
    versions.show: TAGGED,
    versions.compare: TAGGED,
    versions.create: EDITS.refusing("version-tag-taken", "too-many-versions"),
    versions.restore: EDITS,
    sharing.index: TAGGED,
    sharing.add: EDITS.refusing("too-many-shares"),
    sharing.remove: EDITS,
    sharing.set_visibility: EDITS.refusing("admin-required"),
    deployments.deploy: replace(
        EDITS,
        also={202: OtherSuccess("The pods are not ready yet, or cannot start.", deployments.DeployResult)},
    ),
    deployments.deploy_version: replace(
        EDITS,
        also={202: OtherSuccess("The pods are not ready yet, or cannot start.", deployments.DeployResult)},
    ),
    deployments.undeploy: replace(
        EDITS, also={202: OtherSuccess("The pods have not stopped yet.", deployments.UndeployResult)}
    ),
    deployments.stop: OperationDoc(
        refusals=("not-owner", "not-deployed"),
        also={202: OtherSuccess("The pods have not stopped yet.", deployments.StopResult)},
    ),
    deployments.start: OperationDoc(
        refusals=("not-owner", "not-deployed"),
        also={202: OtherSuccess("The pods are not ready yet, or cannot start.", deployments.StartResult)},
    ),
    deployments.show: TAGGED,
    trigger.start: replace(TAKES_IN, sends=(*TAKES_IN.sends, SERVER_TIMING, COLD_START)).refusing(
        *("concurrency-limit", "not-deployed", "outside-window", "start-failed", "stopped-manually"),
        "workflow-not-active",
    ),
    deployments.logs: OperationDoc(refusals=("not-deployed",)),
    schedule.show: TAGGED,
    lifecycle.show: TAGGED,
    lifecycle.update: EDITS,
    lifecycle.preview: TAGGED,
    data_sources.create: CREATES.refusing("data-source-name-taken", "too-many-data-sources"),
    data_sources.show: TAGGED,
    data_sources.update: EDITS.refusing("data-source-name-taken"),
    data_sources.delete: OperationDoc(
        takes=(IF_MATCH,), refusals=("not-owner", "precondition-failed", "data-source-in-use")
    ),
    data_sources.list_shares: TAGGED,
    data_sources.share: EDITS.refusing("too-many-shares"),
    data_sources.unshare: replace(EDITS, refusals=("not-owner", "precondition-failed", "edit-conflict")),
    data_sources.set_visibility: EDITS,
    executions.blob: OperationDoc(
        sends=(replace(ETAG, description="SHA-256 of the content."), DISPOSITION),
        media_type="application/octet-stream",
    ),
    executions.events: OperationDoc(
        takes=(LAST_EVENT_ID,),
        media_type=EVENT_STREAM,
        also={204: OtherSuccess("The client already received the end of this stream.")},
        refusals=("invalid-last-event-id",),
    ),
    bulk.retry: OperationDoc(
        takes=(IDEMPOTENCY_KEY,),
        sends=(REPLAYED,),
        refusals=("invalid-idempotency-key", "idempotency-mismatch", "queue-full"),
    ),
    inputs.answer: OperationDoc(
        takes=(IDEMPOTENCY_KEY,),
        sends=(REPLAYED,),
        refusals=(
            "invalid-idempotency-key",
            "idempotency-mismatch",
            "already-answered",
            "input-expired",
            "no-input-pending",
        ),
    ),
    executions.resume: OperationDoc(
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
}
