"""What the document says of an operation besides its line in the table: headers, and the refusals of its own.

A test holds these to what the handlers do.
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
from gateway.openapi.refusals import JSON_CODES
from gateway.workflows import copies, graph, nodes, sharing, validation, versions, workflows

if TYPE_CHECKING:
    from engine.values import Json
    from gateway.http.endpoint import Handler

JSON: Final = "application/json"
EVENT_STREAM: Final = "text/event-stream"


@dataclass(frozen=True, slots=True)
class HeaderDoc:
    """A header that is read, or sent."""

    name: str
    description: str
    schema: Mapping[str, Json] = field(default_factory=lambda: {"type": "string"})
    is_always_sent: bool = True


@dataclass(frozen=True, slots=True)
class OtherSuccess:
    """Another success than the usual one: when it is, and the type of its body, if it has one."""

    meaning: str
    answer: object = None


@dataclass(frozen=True, slots=True)
class OperationDoc:
    """What is true of an operation."""

    takes: Sequence[HeaderDoc] = ()
    sends: Sequence[HeaderDoc] = ()
    """With the answer of success."""
    refusals: Sequence[str] = ()
    """Codes besides those that follow from the operation's line."""
    media_type: str = JSON
    also: Mapping[int, OtherSuccess] = field(default_factory=dict)
    """Other statuses of success."""

    def refusing(self, *codes: str) -> OperationDoc:
        """Return this with further codes."""
        return replace(self, refusals=(*self.refusals, *codes))


@dataclass(frozen=True, slots=True)
class PathParameterDoc:
    """What a name in a path stands for, told by the word before it."""

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
    "versions": PathParameterDoc(
        "Number of the version, from 1 on; where two are compared, or `current`.", "1"
    ),
    "diff": PathParameterDoc("Number of the version to compare it with, or `current`.", "current"),
    "share": PathParameterDoc("Id of the user.", "user_789"),
    "datasources": PathParameterDoc("Id of the data source.", "ds_001"),
    "workflow-nodes": PathParameterDoc("Name of the node type.", "http-request"),
    "deliveries": PathParameterDoc("Id of the delivery.", "dlv_abc123"),
    "executions": PathParameterDoc("Id of the execution.", "exec_xyz789"),
    "hooks": PathParameterDoc("The trigger token of the workflow.", "tt-abc123"),
    "mail": PathParameterDoc("The trigger token of the workflow.", "tt-mail123"),
    "blobs": PathParameterDoc(
        "What stands as `sha256` in the reference to the content.",
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
    "If-Match", "The `ETag` of the state that the change is meant for; in any other it is refused with 412."
)
IF_NONE_MATCH: Final = HeaderDoc("If-None-Match", "The `ETag` of what the client has already.")
LAST_EVENT_ID: Final = HeaderDoc(
    "Last-Event-ID", "The id of the last event that was seen, or `end`: the stream goes on behind it."
)
ETAG: Final = HeaderDoc("ETag", "Names the object's state, for a later `If-Match`.")
REPLAYED: Final = HeaderDoc(
    "Idempotent-Replayed",
    "`true` where the answer is that of an earlier request with the same `Idempotency-Key`.",
    {"type": "string", "const": "true"},
    is_always_sent=False,
)
SERVER_TIMING: Final = HeaderDoc(
    "Server-Timing",
    "What the answer's time went into: `accept`, the run; `wake`, until a pod took it; `run`, until this answer.",
)
COLD_START: Final = HeaderDoc(
    "X-Cold-Start",
    "Whether the workflow's pods had to be started.",
    {"type": "string", "enum": ["true", "false"]},
)
LOCATION: Final = HeaderDoc("Location", "Where the execution is to be found.")
RATES: Final = (
    HeaderDoc(
        "RateLimit-Policy",
        "The limits that the request is under: `q` requests at once, which come back within `w` seconds.",
        is_always_sent=False,
    ),
    HeaderDoc(
        "RateLimit",
        "Where the client stands: `r` requests are left, and all of them again after `t` seconds.",
        is_always_sent=False,
    ),
)
"""Sent where rates are limited."""
ALLOW: Final = HeaderDoc("Allow", "What the path takes.")
ALLOWED_ORIGIN: Final = HeaderDoc(
    "WebHook-Allowed-Origin",
    "The `WebHook-Request-Origin` of the request: it may send.",
    is_always_sent=False,
)
ALLOWED_RATE: Final = HeaderDoc(
    "WebHook-Allowed-Rate", "Requests a minute; `*`: as many as it likes.", is_always_sent=False
)
DISPOSITION: Final = HeaderDoc("Content-Disposition", "A name for the file.")

KEPT: Final = OperationDoc(
    takes=(IF_NONE_MATCH,),
    sends=(replace(ETAG, description="Names this text, for a later `If-None-Match`."),),
    also={304: OtherSuccess("The client has it already.")},
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
            "It is no mail, and was noted; Mailgun is answered so on a mail, with the body of 201.",
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
"""Mails are taken in wherever they are handed in."""

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
                "The run that was waited for has ended without an answer of its own, or nothing is run for this. To"
                " Slack also in the place of 202.",
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
    document.page: replace(KEPT, media_type="text/html"),
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
        also={202: OtherSuccess("The wait ended first: the execution goes on.", node_tests.PendingNodeTest)},
    ).refusing("duplicate-node-id"),
    copies.duplicate: CREATES.refusing("validation-failed"),
    copies.use_template: CREATES.refusing("not-found"),
    copies.save_as_template: CREATES.refusing("admin-required"),
    copies.export_workflow: OperationDoc(sends=(ETAG, DISPOSITION)),
    copies.import_workflow: replace(
        CREATES,
        also={200: OtherSuccess("Without `references`: what there is to resolve.", copies.ImportAnswer)},
    ),
    graph.build: replace(
        CREATES, also={200: OtherSuccess("With `dryRun`: what is wrong.", graph.BuildFindings)}
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
        also={202: OtherSuccess("Its pods are not there yet, or can't start.", deployments.DeployResult)},
    ),
    deployments.deploy_version: replace(
        EDITS,
        also={202: OtherSuccess("Its pods are not there yet, or can't start.", deployments.DeployResult)},
    ),
    deployments.undeploy: replace(
        EDITS, also={202: OtherSuccess("Its pods are not gone yet.", deployments.UndeployResult)}
    ),
    deployments.stop: OperationDoc(
        refusals=("not-owner", "not-deployed"),
        also={202: OtherSuccess("Its pods are not gone yet.", deployments.StopResult)},
    ),
    deployments.start: OperationDoc(
        refusals=("not-owner", "not-deployed"),
        also={202: OtherSuccess("Its pods are not there yet, or can't start.", deployments.StartResult)},
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
        sends=(replace(ETAG, description="The content's SHA-256."), DISPOSITION),
        media_type="application/octet-stream",
    ),
    executions.events: OperationDoc(
        takes=(LAST_EVENT_ID,),
        media_type=EVENT_STREAM,
        also={204: OtherSuccess("The client has seen the end of this stream.")},
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
