"""Routes of queues, mail, webhooks, events and schedules, deliveries and dead letters. Fixed paths precede `{id}`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Final

from gateway.http.endpoint import AccessRule
from gateway.http.operation_docs import (
    ALLOW,
    ALLOWED_ORIGIN,
    ALLOWED_RATE,
    ARRIVES,
    IDEMPOTENCY_KEY,
    LOCATION,
    RATES,
    REPLAYED,
    TAGGED,
    OperationDoc,
    OtherSuccess,
)
from gateway.http.refusals import JSON_CODES
from gateway.http.route import EXECUTE, KEYS, READ, WRITE, Route
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

ROUTES: Final[Sequence[Route]] = (
    Route(
        "GET",
        "/api/v1/auth/event-tokens",
        KEYS,
        event_tokens.index,
        query=event_tokens.LISTED,
        answer=event_tokens.EventTokenList,
        docs=OperationDoc(refusals=("admin-required",)),
    ),
    Route(
        "POST",
        "/api/v1/auth/event-tokens",
        KEYS,
        event_tokens.create,
        body=event_tokens.CreateEventToken,
        answer=event_tokens.NewEventToken,
        status=201,
        docs=OperationDoc(refusals=("admin-required",)),
    ),
    Route(
        "DELETE",
        "/api/v1/auth/event-tokens/{id}",
        KEYS,
        event_tokens.revoke,
        status=204,
        docs=OperationDoc(refusals=("admin-required",)),
    ),
    Route(
        "GET",
        "/api/v1/schedules",
        READ,
        schedule.index,
        answer=schedule.ScheduleList,
        query=schedule.LISTED,
    ),
    Route(
        "GET",
        "/api/v1/workflows/{id}/schedule",
        READ,
        schedule.show,
        answer=schedule.WorkflowSchedule,
        docs=TAGGED,
    ),
    Route(
        "POST",
        "/api/v1/workflows/{id}/enqueue",
        AccessRule.SENDER,
        enqueue.enqueue,
        body=enqueue.EnqueueRequest,
        answer=enqueue.EnqueueResult,
        status=201,
        query=(TOKEN,),
        docs=replace(ARRIVES, takes=(IDEMPOTENCY_KEY,), sends=(*ARRIVES.sends, *RATES)).refusing(
            *("queue-full", "workflow-paused"),
            *("invalid-idempotency-key", "idempotency-mismatch", "no-queue-trigger", "no-signing-secret"),
            *("invalid-signature", "duplicate-header", "no-verification", "trigger-not-ready"),
            *("invalid-event", "malformed-form"),
        ),
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
        docs=replace(ARRIVES, takes=(IDEMPOTENCY_KEY,), sends=(REPLAYED, *RATES)).refusing(
            *("queue-full", "workflow-paused"),
            *("invalid-idempotency-key", "idempotency-mismatch", "no-queue-trigger", "no-signing-secret"),
            *("invalid-signature", "duplicate-header", "no-verification", "trigger-not-ready"),
            *("invalid-event", "malformed-form"),
        ),
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
        docs=TAKES_MAIL,
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
        docs=OperationDoc(refusals=("not-owner",)),
    ),
    Route(
        "DELETE",
        "/api/v1/workflows/{id}/trigger-token",
        WRITE,
        trigger_tokens.revoke,
        status=204,
        docs=OperationDoc(refusals=("not-owner",)),
    ),
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
        docs=replace(ARRIVES, takes=(IDEMPOTENCY_KEY,)).refusing(
            "invalid-idempotency-key",
            "idempotency-mismatch",
            *("not-redrivable", "queue-full", "validation-failed", "workflow-paused"),
            *(f"no-{kind}-trigger" for kind in ("queue", "email", "webhook")),
        ),
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
        docs=OperationDoc(refusals=("not-owner",)),
    ),
    Route(
        "POST",
        "/api/v1/workflows/events",
        AccessRule.SENDER,
        events.emit,
        body=events.EmitEventRequest,
        answer=events.EmitEventResult,
        query=(TOKEN,),
        docs=OperationDoc(
            takes=(IDEMPOTENCY_KEY,),
            sends=(REPLAYED,),
            refusals=(
                *("invalid-idempotency-key", "idempotency-mismatch", "invalid-signature", "invalid-event"),
                *("malformed-form", "duplicate-header", "workflow-changed", "queue-full"),
            ),
        ),
    ),
    Route(
        "GET",
        "/api/v1/events",
        READ,
        events.index,
        query=events.LISTED,
        answer=events.EventList,
    ),
    Route(
        "GET",
        "/api/v1/events/{id}",
        READ,
        events.show,
        answer=events.EventShape,
        docs=OperationDoc(refusals=("not-found",)),
    ),
    Route(
        "POST",
        "/api/v1/events/{id}/replay",
        EXECUTE,
        events.replay,
        body=events.ReplayEvent,
        answer=events.EventReplayResult,
        status=201,
        docs=replace(ARRIVES, takes=(IDEMPOTENCY_KEY,)).refusing(
            "invalid-idempotency-key", "idempotency-mismatch", "no-event-trigger", "workflow-paused"
        ),
    ),
    Route(
        "OPTIONS",
        "/api/v1/workflows/events",
        AccessRule.PUBLIC,
        events.handshake,
        status=204,
        docs=OperationDoc(sends=(ALLOW, ALLOWED_ORIGIN, ALLOWED_RATE)),
    ),
    Route(
        "POST",
        "/hooks/{id}",
        AccessRule.PUBLIC,
        hooks.receive,
        answer=hooks.WebhookReceipt,
        status=202,
        also_by=tuple(method for method in hooks.METHODS if method != "POST"),
        docs=replace(
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
    ),
    Route(
        "GET",
        "/mail/{id}",
        AccessRule.PUBLIC,
        mail_addresses.show,
        answer=mail_addresses.MailAddress,
        docs=OperationDoc(
            refusals=("not-found", "unauthorized", "rate-limited", "not-ready", "internal-error")
        ),
    ),
    Route(
        "POST",
        "/mail/{id}",
        AccessRule.PUBLIC,
        mail_addresses.receive,
        body=email_trigger.ParsedMailRequest,
        answer=email_trigger.MailReceipt,
        status=201,
        docs=TAKES_MAIL.refusing("not-found", "unauthorized", "rate-limited", "not-ready"),
    ),
)
