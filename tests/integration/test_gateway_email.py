"""Mail of providers: ingested once after verification, parsed by workers, and run with its meaning."""

from __future__ import annotations

import asyncio
import json
import time
from base64 import b64decode, b64encode
from collections import OrderedDict
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from hashlib import sha256
from typing import Any
from unittest.mock import AsyncMock
from uuid import uuid4

import pytest
from sqlalchemy import update
from sqlmodel import col

from gateway.ingest import delivery_log
from journal import queue_delays, unparsed_mail
from journal.blobs.blob_storage import BlobOwner, BlobsUnavailable
from journal.store import ClaimedRun, ClaimQuery, ExecutionKey, InboundRequest
from journal.unparsed_mail import UnparsedMail
from mail import headers
from messages.token_buckets import BucketRate
from models.errors import DatabaseUnavailable
from models.execution import ISOLATED_UNPARSED_TARGET, UNPARSED_TARGET, Execution
from nodes.outbound_http import OutboundRefusalCode, OutboundRefused, OutboundResponse
from tests import fake_s3
from tests.integration.gateway_harness import STEP, GatewayHarness, OrganizationUsers, assert_refused
from tests.integration.mail_harness import MailHarness, run_mail_harness, wait_until
from tests.loop_heartbeat import measure_heartbeat
from tests.provider_requests import BY_NAME, CASES, CONFIG, ProviderCase, ProviderStep
from workers import mail_parsing

MAILS = [case for case in CASES if case.provider in {"native", "sendgrid", "mailgun", "ses"}]
NO_RUNS = {
    "ses_subscription_confirmation": "subscription-confirmed",
    "ses_topic_validation_note": "no-mail",
    "ses_bounce_to_wrong_topic": "no-mail",
}
OF_KEY = {"native_full", "native_aliases", "native_empty_object"}
PLAIN = "From: Ada <ada@example.org>\r\nTo: b@example.org\r\nSubject: Hello\r\n{}\r\nHello.\r\n"


@pytest.fixture(scope="module")
async def mails(harness: GatewayHarness) -> AsyncIterator[MailHarness]:
    async with run_mail_harness(harness) as mails:
        yield mails


def status_is_as_expected(status: int, step: ProviderStep) -> bool:
    classes = step.respond["status_class"].split("|")
    return any(f"{status // 100}xx" == one for one in classes)


def of_address(headers: Any, name: str) -> Any:  # noqa: ANN401 - any JSON value
    return next((value for each, value in headers.items() if each.lower() == name.lower()), None)


def assert_is(given: dict[str, Any], case: ProviderCase) -> None:
    """Check that the trigger data of a run is that of a recorded mail."""
    expected = case.expected["normalized"]
    for name in ("body_text", "body_html"):
        assert given[name].replace("\r\n", "\n").rstrip() == (expected[name] or "").rstrip(), case.name
    assert given["subject"] == expected["subject"], case.name
    for name in ("from", "to"):
        assert headers.bare_addresses(given[name]) == headers.bare_addresses(expected[name]), case.name
    shown = [{key: one.get(key) for key in wanted} for one, wanted in attachments(given, expected)]
    assert shown == expected["attachments"], case.name
    assert len(given["attachments"]) == len(expected["attachments"])
    for name, value in expected["email_headers"].items():
        assert of_address(given["email_headers"], name) == value, case.name
    if case.provider != "native":
        assert given["envelope"] == case.expected["envelope"], case.name
        assert_reports(given, case.expected.get("signals", {}))


def assert_reports(given: dict[str, Any], signals: dict[str, Any]) -> None:
    """Check that a run was given the results that the mail service reports."""
    for name in ("spf", "dkim", "dmarc"):
        if name in signals:
            assert given["authentication"][name] == "pass"
    if "spam_score" in signals:
        assert given["spam"] == {"score": signals["spam_score"], "verdict": "pass"}
        assert given["senderIp"] == signals["sender_ip"]
    if "virus" in signals:
        assert (given["spam"]["verdict"], given["virus"]) == ("pass", "pass")


def attachments(given: dict[str, Any], expected: dict[str, Any]) -> Sequence[tuple[Any, Any]]:
    return list(zip(given["attachments"], expected["attachments"], strict=True))


# ── requests of providers ───────────────────────────────────────────────────────────────────────────────────


@pytest.mark.every_database
async def test_every_recorded_request_is_answered_kept_and_read_as_it_was_meant(
    mails: MailHarness, people: OrganizationUsers
) -> None:
    owner = people.owner
    workflow_id = await mails.workflow(owner, **await mails.whole_config(owner))
    runs: list[tuple[ProviderCase, str]] = []
    for case in MAILS:
        for step in case.steps:
            before = len(await mails.rows(Execution, workflow_id=workflow_id))
            key = owner.key if case.name in OF_KEY else None
            answer = await mails.post(workflow_id, step, key)
            assert status_is_as_expected(answer.status_code, step), (case.name, answer.text)
            after = len(await mails.rows(Execution, workflow_id=workflow_id))
            assert after - before == step.respond["creates_execution"], case.name
            if case.name in NO_RUNS:
                assert answer.json() == {"noted": NO_RUNS[case.name]}
            elif answer.is_success:
                assert answer.json() == {
                    "executionId": answer.json()["executionId"],
                    "trigger_type": "email",
                }
                assert answer.status_code == (200 if case.provider == "mailgun" else 201)
                runs.append((case, answer.json()["executionId"]))
            elif case.provider == "mailgun":
                assert_refused(answer, 406, "mail-refused")
    first, again = (one for case, one in runs if case.name == "mg_retry_after_lost_reply")
    assert first == again
    unread_runs = [await mails.run(one) for case, one in runs if case.provider != "native"]
    assert {(run.target, run.status) for run in unread_runs} == {(UNPARSED_TARGET, "pending")}
    assert {run.user_id for run in unread_runs} == {owner.user.id}

    outcomes = [(one.outcome, one.sender.partition(":")[0]) for one in await mails.deliveries(workflow_id)]
    # Unauthenticated requests that fail verification leave no delivery here: anybody could send them.
    assert {one for one in outcomes if one[0] == "rejected"} == {("rejected", "mailgun")}
    assert outcomes.count(("duplicate", "mailgun")) == 1
    assert {sender for outcome, sender in outcomes if outcome == "accepted"} == {
        *("api-key", "sendgrid", "mailgun", "sns", "basic-auth"),
    }
    confirmed = BY_NAME["ses_subscription_confirmation"].expected["confirm"]["url"]
    assert mails.sns.asked == [CONFIG["sns"]["signing_cert_url"], confirmed]

    await mails.read(*(one for _, one in runs))
    for case, execution_id in runs:
        given = await mails.given(execution_id)
        assert_is(given, case)
        run = await mails.run(execution_id)
        assert (run.target, run.status, run.started_at, run.attempt) == ("shared", "pending", None, 0)
        for told in given["attachments"] if case.provider != "native" else ():
            if "blob" in told:
                content = await mails.gateway.blobs.get(
                    BlobOwner(owner.user.organization_id, execution_id), told["sha256"]
                )
                assert sha256(content).hexdigest() == told["sha256"] == told["blob"]["$blob"]["sha256"]


@pytest.mark.every_database
async def test_without_anything_configured_only_keys_and_tokens_let_mail_in(
    mails: MailHarness, people: OrganizationUsers
) -> None:
    owner = people.owner
    workflow_id = await mails.workflow(owner)
    names = ("sg_parsed_basic", "mg_parsed_urlencoded", "ses_sns_utf8_v1", "sg_parsed_basic_auth")
    for name in names:
        assert_refused(await mails.post(workflow_id, BY_NAME[name].steps[0]), 401, "unauthorized")
    made = await owner.api.post(f"{mails_url(workflow_id)}/trigger-token", json={})
    for name in names:
        answer = await mails.post(workflow_id, BY_NAME[name].steps[0], token=made.json()["token"])
        assert answer.is_success, answer.text
    other = await mails.workflow(owner)
    answer = await mails.post(other, BY_NAME[names[0]].steps[0], token=made.json()["token"])
    assert_refused(answer, 401, "unauthorized")
    assert_refused(
        await mails.post("wf_00000000000000000000000000", BY_NAME[names[0]].steps[0]), 401, "unauthorized"
    )
    # A token alone permits neither SNS subscriptions nor reads from a bucket.
    for name, status, code in (
        ("ses_subscription_confirmation", 400, "unknown-topic"),
        ("ses_s3_action", 503, "trigger-not-ready"),
    ):
        answer = await mails.post(workflow_id, BY_NAME[name].steps[0], token=made.json()["token"])
        assert_refused(answer, status, code)


def mails_url(workflow_id: str) -> str:
    return f"/api/v1/workflows/{workflow_id}"


async def test_an_invalid_signature_is_refused_despite_a_valid_key(
    mails: MailHarness, people: OrganizationUsers
) -> None:
    owner = people.owner
    config = await mails.whole_config(owner)
    workflow_id = await mails.workflow(owner, **config)
    for name, status, code in (
        ("sg_bad_signature", 401, "invalid-signature"),
        ("mg_bad_signature", 406, "mail-refused"),
        ("ses_bad_signature", 401, "invalid-signature"),
        ("ses_topic_not_allowed", 400, "unknown-topic"),
    ):
        assert_refused(await mails.post(workflow_id, BY_NAME[name].steps[0], owner.key), status, code)
    assert [one.outcome for one in await mails.deliveries(workflow_id)] == ["rejected"] * 4

    strict = await mails.workflow(owner, **config, requireSignature=True)
    for name in ("native_full", "sg_parsed_basic_auth"):
        answer = await mails.post(strict, BY_NAME[name].steps[0], owner.key)
        assert_refused(answer, 401, "invalid-signature")
    assert (await mails.post(strict, BY_NAME["sg_parsed_basic"].steps[0], owner.key)).status_code == 201


async def test_passwords_and_tokens_let_in_and_can_not_be_tried_for_long(
    mails: MailHarness, people: OrganizationUsers
) -> None:
    owner = people.owner
    config = await mails.whole_config(owner)
    workflow_id = await mails.workflow(owner, **{name: config[name] for name in ("basicAuth", "bearer")})
    client = await mails.harness.client()

    async def post(authorization: str) -> Any:  # noqa: ANN401 - a response
        url = f"{mails_url(workflow_id)}/email-trigger"
        return await client.post(url, json={"subject": "x"}, headers={"Authorization": authorization})

    right = b64encode("{username}:{password}".format(**CONFIG["basic_auth"]).encode()).decode()
    assert (await post(f"Basic {right}")).status_code == 201
    assert (await post(f"Bearer {CONFIG['bearer_token']}")).status_code == 201
    for _ in range(50):
        assert_refused(await post("Basic d3Jvbmc6d3Jvbmc="), 401, "invalid-signature")
    assert_refused(await post("Basic d3Jvbmc6d3Jvbmc="), 429, "rate-limited")
    assert_refused(await post("Digest x"), 429, "rate-limited")
    # Credentials that were valid before don't count as guesses: mail services send from shared addresses.
    assert (await post(f"Basic {right}")).status_code == 201
    assert_refused(await post(f"basic {right}"), 429, "rate-limited")


async def test_a_mail_is_known_again_and_a_token_of_mailgun_is_good_for_one_mail(
    mails: MailHarness, people: OrganizationUsers
) -> None:
    owner = people.owner
    workflow_id = await mails.workflow(owner, **await mails.whole_config(owner))
    step = BY_NAME["mg_parsed_urlencoded"].steps[0]
    answers = await asyncio.gather(*(mails.post(workflow_id, step) for _ in range(20)))
    assert {answer.status_code for answer in answers} == {200}
    assert len({answer.content for answer in answers}) == 1
    assert sum("Idempotent-Replayed" not in answer.headers for answer in answers) == 1
    assert len(await mails.rows(Execution, workflow_id=workflow_id)) == 1

    token = b"token=" + BY_NAME["mg_parsed_urlencoded"].expected["idempotency"]["key"][0].encode()
    assert token in step.body
    other = ProviderStep(
        **{
            **{name: getattr(step, name) for name in ProviderStep.__dataclass_fields__},
            "body": step.body.replace(b"Message-Id=", b"Message-Id=x"),
        }
    )
    assert other.body != step.body
    replayed = await mails.post(workflow_id, other)
    assert_refused(replayed, 406, "mail-refused")
    assert "replayed-delivery" in replayed.json()["error"]["message"]

    await mails.set_status(owner, workflow_id, "draft")
    assert (await mails.post(workflow_id, step)).content == answers[0].content
    fresh = BY_NAME["mg_raw_mime"].steps[0]
    assert_refused(await mails.post(workflow_id, fresh), 406, "mail-refused")
    assert_refused(
        await mails.post(workflow_id, BY_NAME["sg_parsed_basic"].steps[0]), 409, "workflow-not-active"
    )


def notified(step: ProviderStep, content: str, ses_id: str) -> ProviderStep:
    """Return another notification of SES about a mail with the given content and SES id."""
    envelope = json.loads(step.body)
    told = json.loads(envelope["Message"])
    told["content"] = b64encode(content.encode()).decode()
    told["mail"]["messageId"] = ses_id
    envelope |= {"Message": json.dumps(told), "MessageId": str(uuid4())}
    return replace(step, body=json.dumps(envelope).encode())


async def test_a_notification_of_sns_that_is_repeated_is_one_run(
    mails: MailHarness, people: OrganizationUsers
) -> None:
    workflow_id = await mails.workflow(people.owner, **await mails.whole_config(people.owner))
    for name in ("ses_sns_base64_v2", "ses_s3_action"):
        step = BY_NAME[name].steps[0]
        answers = await asyncio.gather(*(mails.post(workflow_id, step) for _ in range(5)))
        assert {answer.status_code for answer in answers} == {201}
        (execution_id,) = {answer.json()["executionId"] for answer in answers}
        await mails.read(execution_id)
    assert len(await mails.rows(Execution, workflow_id=workflow_id)) == 2


async def test_a_mail_that_ses_received_twice_is_one_run(
    mails: MailHarness, people: OrganizationUsers
) -> None:
    """A mail server repeats a mail without a received acknowledgment; SES gives it another id."""
    owner = people.owner
    workflow_id = await mails.workflow(owner)

    async def run_of(step: ProviderStep) -> str:
        answer = await mails.post(workflow_id, step, owner.key)
        assert answer.status_code == 201, answer.text
        execution_id: str = answer.json()["executionId"]
        return execution_id

    step = BY_NAME["ses_sns_base64_v2"].steps[0]
    told = json.loads(json.loads(step.body)["Message"])
    content = b64decode(told["content"]).decode()
    first = await run_of(step)
    assert await run_of(notified(step, content, "another-id")) == first
    assert await run_of(notified(step, f"Received: from elsewhere\r\n{content}", "a-third-id")) == first
    other = content.replace("Subject: ", "Subject: Re: ")
    assert await run_of(notified(step, other, "a-fourth-id")) != first
    # Several actions of an SES rule that report the same mail start one run.
    assert await run_of(notified(step, other, told["mail"]["messageId"])) == first


async def test_a_transient_failure_is_503_and_a_repetition_is_ingested(
    mails: MailHarness, people: OrganizationUsers, monkeypatch: pytest.MonkeyPatch
) -> None:
    owner = people.owner
    workflow_id = await mails.workflow(owner, **await mails.whole_config(owner))
    store, sns = mails.gateway.store, mails.sns

    async def away(_batch: Sequence[InboundRequest]) -> Any:  # noqa: ANN401 - never returns
        raise DatabaseUnavailable("The database is away")

    steps = [
        BY_NAME[name].steps[0]
        for name in ("sg_parsed_basic", "mg_raw_mime", "ses_sns_base64_v2", "native_full")
    ]
    with monkeypatch.context() as patch:
        patch.setattr(store, "ingest", away)
        for step in steps:
            assert_refused(await mails.post(workflow_id, step, owner.key), 503, "not-ready")
        # Its content is durable by then, for a run that is never created.
        envelope = '{"from": "a@example.org", "to": ["b@example.org"]}'
        large = {"envelope": envelope, "email": PLAIN.format("") + "x" * 100_000}
        assert_refused(await mails.post_form(workflow_id, owner, large), 503, "not-ready")
    answers = [await mails.post(workflow_id, step, owner.key) for step in steps]
    answers.append(await mails.post_form(workflow_id, owner, large))
    for answer in answers:
        assert answer.is_success, answer.text
        assert "Idempotent-Replayed" not in answer.headers
    assert len(await mails.rows(Execution, workflow_id=workflow_id)) == 5
    blob = (await mails.given(answers[-1].json()["executionId"]))["$intake"]["blob"]
    whose = BlobOwner(owner.user.organization_id, answers[-1].json()["executionId"])
    assert len(await mails.gateway.blobs.get(whose, blob["sha256"])) > 100_000
    again = await mails.post_form(workflow_id, owner, large)
    assert again.json() == answers[-1].json()

    confirmation = BY_NAME["ses_subscription_confirmation"].steps[0]
    sns.statuses = [500]
    assert_refused(await mails.post(workflow_id, confirmation), 503, "not-ready")
    sns.statuses = [403]
    assert_refused(await mails.post(workflow_id, confirmation), 400, "malformed-message")
    assert (await mails.post(workflow_id, confirmation)).status_code == 200


async def test_a_certificate_of_sns_that_can_not_be_had_never_refuses_a_mail_for_good(
    mails: MailHarness, people: OrganizationUsers, monkeypatch: pytest.MonkeyPatch
) -> None:
    workflow_id = await mails.workflow(people.owner, **await mails.whole_config(people.owner))
    step = BY_NAME["ses_sns_base64_v2"].steps[0]
    monkeypatch.setattr(mails.gateway.certificates, "_kept", OrderedDict())
    not_allowed = OutboundRefused(OutboundRefusalCode.ADDRESS_NOT_ALLOWED, "10.0.0.7 is not a public address")
    page_of_proxy = OutboundResponse(200, {}, b"<html>Sign in to the proxy</html>", "")
    for outcome in ({"side_effect": not_allowed}, {"return_value": page_of_proxy}):
        with monkeypatch.context() as patch:
            patch.setattr(mails.sns, "request", AsyncMock(**outcome))
            answer = await mails.post(workflow_id, step)
        assert_refused(answer, 503, "not-ready")
        assert ("10.0.0.7" in answer.text) == ("side_effect" in outcome)
    mails.sns.statuses.append(404)
    assert_refused(await mails.post(workflow_id, step), 503, "not-ready")
    assert (await mails.post(workflow_id, step)).status_code == 201


@pytest.mark.parametrize("envelope", ["<ada@example.org>", '"x"', '{"from": 7, "to": "b@example.org"}'])
async def test_an_envelope_that_is_no_json_object_keeps_no_mail_away(
    mails: MailHarness, people: OrganizationUsers, envelope: str
) -> None:
    workflow_id = await mails.workflow(people.owner)
    form = {"envelope": envelope, "charsets": "utf-8", "headers": "Subject: Hi\r\n", "text": "Hello."}
    answer = await mails.post_form(workflow_id, people.owner, form)
    assert answer.status_code == 201, answer.text
    execution_id = answer.json()["executionId"]
    await mails.read(execution_id)
    given = await mails.given(execution_id)
    assert (given["body_text"], given["envelope"]) == ("Hello.", {"from": "", "to": []})


async def test_a_mail_in_json_has_header_values_of_one_line(
    mails: MailHarness, people: OrganizationUsers
) -> None:
    workflow_id = await mails.workflow(people.owner)
    mail = {"from": "a@example.org", "subject": "Hello\r\nBcc: everybody@example.org"}
    answer = await people.owner.api.post(f"/api/v1/workflows/{workflow_id}/email-trigger", json=mail)
    given = await mails.given(answer.json()["executionId"])
    assert given["subject"] == "Hello Bcc: everybody@example.org"


@pytest.mark.every_database
async def test_a_mail_in_json_has_its_attachments_as_blobs_like_others(
    mails: MailHarness, people: OrganizationUsers
) -> None:
    owner = people.owner
    workflow_id = await mails.workflow(owner)
    path = f"/api/v1/workflows/{workflow_id}/email-trigger"
    pdf = {"filename": "../a.pdf", "content_type": "application/pdf", "content": b64encode(b"%PDF").decode()}
    described = {"filename": "b.txt", "size": 7}
    mail = {"cc": "c@example.org", "reply_to": "r@example.org", "attachments": [pdf, described]}
    answer = await owner.api.post(path, json=mail)
    assert answer.status_code == 201, answer.text
    execution_id = answer.json()["executionId"]
    given = await mails.given(execution_id)
    assert (given["cc"], given["reply_to"]) == ("c@example.org", "r@example.org")
    stored, as_it_was = given["attachments"]
    assert as_it_was == described
    assert (stored["filename"], stored["size"], "content" in stored) == ("a.pdf", 4, False)
    owner_of_blob = BlobOwner(owner.user.organization_id, execution_id)
    assert await mails.gateway.blobs.get(owner_of_blob, stored["blob"]["$blob"]["sha256"]) == b"%PDF"

    wrong = {"attachments": [pdf, {"content": "%%%"}, {"content": 7}]}
    refusal = await owner.api.post(path, json=wrong)
    assert_refused(refusal, 422, "validation-failed")
    assert [one["path"] for one in refusal.json()["error"]["details"]] == [
        "attachments.1.content",
        "attachments.2.content",
    ]


async def test_a_mail_that_is_stored_is_read_only_where_the_trigger_says(
    mails: MailHarness, people: OrganizationUsers
) -> None:
    owner, step = people.owner, BY_NAME["ses_s3_action"].steps[0]
    topics = CONFIG["sns"]["allowed_topic_arns"]
    for config in (
        {"topics": topics},
        {"topics": topics, "objects": await mails.bucket(owner, "other")},
        {"topics": topics, "objects": await mails.bucket(owner, "mai")},
    ):
        workflow_id = await mails.workflow(owner, ses=config)
        assert_refused(await mails.post(workflow_id, step), 503, "trigger-not-ready")
        (delivery,) = await mails.deliveries(workflow_id)
        assert delivery.reason.startswith("trigger-not-ready: ")
    # The object is unreadable at first, and readable a moment later.
    workflow_id = await mails.workflow(
        owner, ses={"topics": topics, "objects": await mails.bucket(owner, "")}
    )
    execution_id = (await mails.post(workflow_id, step)).json()["executionId"]
    mails.s3.failures = [fake_s3.S3Error(403, "AccessDenied")]
    before = datetime.now(UTC)
    await mails.read(execution_id)
    run = await mails.run(execution_id)
    assert (run.status, run.target, run.attempt) == ("waiting", UNPARSED_TARGET, 0)
    assert before < run.due_at <= datetime.now(UTC) + timedelta(seconds=5)
    await make_due(mails, execution_id)
    await mails.read(execution_id)
    assert_is(await mails.given(execution_id), BY_NAME["ses_s3_action"])


async def make_due(mails: MailHarness, execution_id: str) -> None:
    await change_run(mails, execution_id, due_at=datetime(2020, 1, 1, tzinfo=UTC))
    await mails.gateway.store.promote_due()


async def change_run(mails: MailHarness, execution_id: str, **values: Any) -> None:  # noqa: ANN401 - columns of any type
    await mails.gateway.database.transaction(
        lambda connection: connection.execute(
            update(Execution).where(col(Execution.id) == execution_id).values(**values)
        )
    )


# ── reading ─────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.every_database
async def test_a_mail_of_a_dead_parser_is_parsed_by_another_one(
    mails: MailHarness, people: OrganizationUsers
) -> None:
    workflow_id = await mails.workflow(people.owner)
    execution_id = await mails.mail(workflow_id, people.owner, PLAIN.format(""))
    store = mails.gateway.store
    (dead,) = [one for one in await claim_mails(mails, "dead.reader") if one.execution_id == execution_id]
    await change_run(mails, execution_id, lease_until=datetime(2020, 1, 1, tzinfo=UTC))
    assert (await store.sweep(100)).requeued >= 1
    await mails.read(execution_id)
    given = await mails.given(execution_id)
    assert given["subject"] == "Hello"
    late = unparsed_mail.MailParseResult(
        ExecutionKey(dead.execution_id, dead.shard), dead.token, "dead.reader", workflow_id, {}, "{}"
    )
    left = await mails.gateway.database.transaction(
        lambda connection: unparsed_mail.release_parsed(connection, [late])
    )
    assert left == [None]
    assert await mails.given(execution_id) == given
    run = await mails.run(execution_id)
    assert (run.status, run.target, run.attempt, run.has_journal) == ("pending", "shared", 0, False)


async def test_a_run_that_was_asked_to_end_while_it_was_read_ends_and_the_others_go_assigned_deployment_id(
    mails: MailHarness, people: OrganizationUsers
) -> None:
    workflow_id = await mails.workflow(people.owner)
    assigned_deployment_ids = {
        await mails.mail(
            workflow_id, people.owner, PLAIN.format(f"Message-ID: <{assigned_deployment_id}@x>\r\n")
        ): assigned_deployment_id
        for assigned_deployment_id in ("cancelled", "stopped", workflow_id, None)
    }
    held = [
        one for one in await claim_mails(mails, "a.reader") if one.execution_id in assigned_deployment_ids
    ]
    for one in held:
        assigned_deployment_id = assigned_deployment_ids[one.execution_id]
        if assigned_deployment_id in {"cancelled", "stopped"}:
            key = ExecutionKey(one.execution_id, one.shard)
            await mails.gateway.store.request_end(
                key, "cancel" if assigned_deployment_id == "cancelled" else "stop"
            )
        else:
            await change_run(mails, one.execution_id, assigned_deployment_id=assigned_deployment_id)
    batch = [
        unparsed_mail.MailParseResult(
            ExecutionKey(one.execution_id, one.shard), one.token, "a.reader", workflow_id, {}, "{}"
        )
        for one in held
    ]
    left = await mails.gateway.database.transaction(
        lambda connection: unparsed_mail.release_parsed(connection, batch)
    )
    runs = [await mails.run(one.execution_id) for one in held]
    assert {assigned_deployment_ids[run.id]: (run.status, run.target) for run in runs} == {
        "cancelled": ("cancelled", "shared"),
        "stopped": ("stopped", "shared"),
        workflow_id: ("pending", workflow_id),
        None: ("pending", "shared"),
    }
    assert [one.status for one in left if one is not None] == [run.status for run in runs]
    assert [run.id for run in runs if run.ended_at] == [run.id for run in runs if run.status != "pending"]


async def test_a_mail_under_which_two_readers_died_is_read_apart_from_others(
    mails: MailHarness, people: OrganizationUsers
) -> None:
    workflow_id = await mails.workflow(people.owner)
    execution_id = await mails.mail(workflow_id, people.owner, PLAIN.format("Message-ID: <suspect@x>\r\n"))
    for _ in range(2):
        assert execution_id in {one.execution_id for one in await claim_mails(mails, "dead.reader")}
        await mails.gateway.store.reclaim("dead")
    assert (await mails.run(execution_id)).target == ISOLATED_UNPARSED_TARGET
    async with mails.gateway.database.read() as connection:
        assert (ISOLATED_UNPARSED_TARGET, 1, False) in await queue_delays.count_pending(connection)

    async def is_read() -> bool:
        return bool((await mails.run(execution_id)).target == "shared")

    async with mails.reading():
        await wait_until(is_read)
    run = await mails.run(execution_id)
    assert (run.status, run.attempt, run.isolated) == ("pending", 0, False)


async def claim_mails(mails: MailHarness, owner: str) -> Sequence[ClaimedRun]:
    return await mails.gateway.store.claim(ClaimQuery(owner, 30.0, 100, target=UNPARSED_TARGET))


async def test_a_stopping_parser_releases_unparsed_mails(
    mails: MailHarness, people: OrganizationUsers, monkeypatch: pytest.MonkeyPatch
) -> None:
    workflow_id = await mails.workflow(people.owner)
    big = "Content-Type: multipart/mixed; boundary=b\r\n\r\n--b\r\nContent-Disposition: attachment\r\n\r\nx\r\n--b--"
    execution_id = await mails.mail(workflow_id, people.owner, PLAIN.format(f"{big}\r\n"))
    begun = asyncio.Event()

    async def put(*_: Any, **__: Any) -> Any:  # noqa: ANN401 - never returns
        begun.set()
        await asyncio.Event().wait()

    with monkeypatch.context() as patch:
        patch.setattr(mails.gateway.blobs, "put", put)
        patch.setattr(mail_parsing, "CLOSE_SECONDS", 0.01)
        async with mails.reading():
            await asyncio.wait_for(begun.wait(), 60)
    run = await mails.run(execution_id)
    assert (run.status, run.target, run.attempt, run.lease_owner) == ("pending", UNPARSED_TARGET, 0, None)


@pytest.mark.every_database
async def test_an_unreadable_mail_fails_at_once_and_an_unavailable_one_after_a_day(
    mails: MailHarness, people: OrganizationUsers, monkeypatch: pytest.MonkeyPatch
) -> None:
    owner = people.owner
    workflow_id = await mails.workflow(owner)
    wide = PLAIN.format("X: " + "x" * 300_000 + "\r\n")
    unreadable = await mails.mail(workflow_id, owner, wide)
    await mails.read(unreadable)
    failed = await mails.run(unreadable)
    assert (failed.status, failed.error["code"]) == ("failed", "invalid-input")
    assert "more than 262,144 bytes" in failed.error["message"]

    large = await mails.mail(workflow_id, owner, PLAIN.format("Message-ID: <l@x>\r\n") + "x" * 100_000)

    def away(*_: Any) -> Any:  # noqa: ANN401 - never returns
        raise BlobsUnavailable("The folder is away")

    with monkeypatch.context() as patch:
        patch.setattr(mails.gateway.blobs, "open", away)
        await mails.read(large)
        assert (await mails.run(large)).status == "waiting"
        shown = await owner.api.get(f"/api/v1/executions/{large}")
        assert shown.json()["trigger"]["data"] == {}
        await make_due(mails, large)
        await change_run(mails, large, started_at=datetime.now(UTC) - timedelta(days=1, minutes=1))
        await mails.read(large)
    failed = await mails.run(large)
    assert (failed.status, failed.error["code"]) == ("failed", "invalid-input")

    # A failed mail may be resumed, and is then parsed.
    resumed = await owner.api.post(f"/api/v1/executions/{large}/resume")
    assert resumed.status_code == 201, resumed.text
    again = resumed.json()["executionId"]
    await mails.read(again)
    assert (await mails.given(again))["body_text"].startswith("Hello.")


async def test_an_exception_of_a_parser_fails_the_run_at_once_and_its_delivery_can_be_redriven(
    mails: MailHarness, people: OrganizationUsers, monkeypatch: pytest.MonkeyPatch
) -> None:
    owner = people.owner
    workflow_id = await mails.workflow(owner)
    execution_id = await mails.mail(workflow_id, owner, PLAIN.format(""))

    def break_down(*_: Any) -> Any:  # noqa: ANN401 - never returns
        raise IndexError("list index out of range")

    with monkeypatch.context() as patch:
        patch.setattr(UnparsedMail, "parse", break_down)
        await mails.read(execution_id)
    failed = await mails.run(execution_id)
    assert (failed.status, failed.error["code"], failed.attempt) == ("failed", "invalid-input", 1)
    assert "parsing it raised IndexError" in failed.error["message"]

    (delivery,) = await mails.deliveries(workflow_id)
    answer = await owner.api.post(f"/api/v1/deliveries/{delivery.id}/redrive")
    assert answer.status_code == 201, answer.text
    again = answer.json()["executionId"]
    await mails.read(again)
    assert (await mails.given(again))["subject"] == "Hello"


async def test_trouble_with_storing_an_attachment_leaves_the_mail_to_a_later_attempt(
    mails: MailHarness, people: OrganizationUsers, monkeypatch: pytest.MonkeyPatch
) -> None:
    workflow_id = await mails.workflow(people.owner)
    attached = "Content-Type: image/png\r\nMessage-ID: <p@x>\r\n"
    execution_id = await mails.mail(workflow_id, people.owner, PLAIN.format(attached))

    async def away(*_: Any, **__: Any) -> Any:  # noqa: ANN401 - never returns
        raise BlobsUnavailable("The folder is away")

    with monkeypatch.context() as patch:
        patch.setattr(mails.gateway.blobs, "put", away)
        await mails.read(execution_id)
    assert (await mails.run(execution_id)).status == "waiting"


async def test_mails_that_answer_ours_without_end_are_accepted_and_not_run(
    mails: MailHarness, people: OrganizationUsers
) -> None:
    owner = people.owner
    workflow_id = await mails.workflow(owner)
    automatic = await mails.mail(workflow_id, owner, PLAIN.format("Auto-Submitted: auto-replied\r\n" * 2))
    ours = "References: <a@x>\r\n <pilotflame.{}@example.org>\r\nMessage-ID: <{}@x>\r\n"
    answers = [await mails.mail(workflow_id, owner, PLAIN.format(ours.format(n, n))) for n in range(11)]
    await mails.read(automatic, *answers)
    runs = [await mails.run(one) for one in answers]
    assert sorted(run.status for run in runs) == ["cancelled", *["pending"] * 10]
    looped = next(run for run in runs if run.status == "cancelled")
    for run in (await mails.run(automatic), looped):
        assert (run.status, run.error["code"]) == ("cancelled", "mail-loop")
        (delivery,) = [one for one in await mails.deliveries(workflow_id) if one.execution_id == run.id]
        assert (delivery.outcome, delivery.reason.partition(":")[0]) == ("accepted", "mail-loop")


REJECTED = [
    ({"rejectOn": ["spf"]}, {"SPF": "fail"}, "spf check"),
    ({"rejectOn": ["dkim", "spam"]}, {"dkim": "{@a.example : fail}"}, "dkim check"),
    ({"rejectOn": ["spam"]}, {"spam_score": "6", "spam_report": "(6.0 points, 5.0 required)"}, "spam check"),
    ({"maxSpamScore": 3}, {"spam_score": "3.5"}, "spam score of 3.5"),
]


@pytest.mark.parametrize(("config", "fields", "reason"), REJECTED, ids=["spf", "dkim", "spam", "score"])
async def test_a_mail_that_its_trigger_rejects_is_accepted_and_not_run_until_it_is_redriven(
    mails: MailHarness, people: OrganizationUsers, config: dict[str, Any], fields: dict[str, str], reason: str
) -> None:
    owner = people.owner
    workflow_id = await mails.workflow(owner, **config)
    mail = {"envelope": "{}", "headers": "Message-ID: <1@x>\r\n", "text": "Hello."}
    answers = [
        await mails.post_form(workflow_id, owner, mail | more)
        for more in ({"headers": "Message-ID: <2@x>\r\n"}, fields)
    ]
    good, bad = (answer.json()["executionId"] for answer in answers)
    await mails.read(good, bad)
    assert (await mails.run(good)).target == "shared"
    rejected = await mails.run(bad)
    assert (rejected.status, rejected.error["code"]) == ("cancelled", "mail-rejected")
    assert reason in rejected.error["message"]
    (delivery,) = [one for one in await mails.deliveries(workflow_id) if one.execution_id == bad]
    assert delivery.reason.startswith("mail-rejected: ")

    redriven = (await owner.api.post(f"/api/v1/deliveries/{delivery.id}/redrive")).json()["executionId"]
    await mails.read(redriven)
    assert (await mails.run(redriven)).target == "shared"


async def test_a_mail_waits_for_the_owner_to_mend_the_trigger_and_runs_once(
    mails: MailHarness, people: OrganizationUsers
) -> None:
    owner, step = people.owner, BY_NAME["mg_raw_mime"].steps[0]
    signing_key = CONFIG["mailgun"]["webhook_signing_key"]
    gone = await mails.source(owner, "webhook-secret", {}, secret=signing_key)
    config = {"mailgun": {"signingKey": gone}}
    workflow_id = await mails.workflow(owner, **config)
    await owner.api.delete(f"/api/v1/datasources/{gone}?force=true")
    mails.gateway.pod_services.sources.clear()
    for _ in range(2):
        answer = await mails.post(workflow_id, step)
        assert_refused(answer, 503, "trigger-not-ready")
        assert answer.headers["Retry-After"] == "60"
    first, second = await mails.deliveries(workflow_id)
    assert (first.sender, first.outcome, first.status) == ("unverified", "rejected", 503)

    mended = await mails.source(owner, "webhook-secret", {}, secret=signing_key)
    trigger = {"id": "start", "nodeId": "email-trigger", "label": "Start"}
    nodes = [{**trigger, "config": {"mailgun": {"signingKey": mended}}}, STEP]
    edited = await owner.api.put(f"/api/v1/workflows/{workflow_id}", json={"nodes": nodes})
    assert edited.status_code == 200, edited.text
    redriven = await owner.api.post(f"/api/v1/deliveries/{first.id}/redrive")
    assert redriven.status_code == 201, redriven.text
    execution_id = redriven.json()["executionId"]
    # Mailgun repeats the mail, and the owner redrives the other delivery: both are answered with the same run.
    assert (await mails.post(workflow_id, step)).json()["executionId"] == execution_id
    again = await owner.api.post(f"/api/v1/deliveries/{second.id}/redrive")
    assert again.json()["executionId"] == execution_id
    assert len(await mails.rows(Execution, workflow_id=workflow_id)) == 1
    await mails.read(execution_id)
    assert_is(await mails.given(execution_id), BY_NAME["mg_raw_mime"])


async def test_a_flood_of_unverified_requests_leaves_few_deliveries(
    mails: MailHarness, people: OrganizationUsers, monkeypatch: pytest.MonkeyPatch
) -> None:
    owner, step = people.owner, BY_NAME["mg_raw_mime"].steps[0]
    gone = await mails.source(owner, "webhook-secret", {}, secret="x" * 20)
    workflow_id = await mails.workflow(owner, mailgun={"signingKey": gone})
    await owner.api.delete(f"/api/v1/datasources/{gone}?force=true")
    mails.gateway.pod_services.sources.clear()
    monkeypatch.setattr(delivery_log, "UNVERIFIED", BucketRate(per_second=1 / 3_600, burst=3))
    for _ in range(5):
        assert_refused(await mails.post(workflow_id, step), 503, "trigger-not-ready")
    assert len(await mails.deliveries(workflow_id)) == 3


async def test_a_mail_for_a_draft_can_be_redriven_once_the_workflow_is_active(
    mails: MailHarness, people: OrganizationUsers
) -> None:
    owner, step = people.owner, BY_NAME["sg_parsed_basic"].steps[0]
    workflow_id = await mails.workflow(owner, **await mails.whole_config(owner))
    await mails.set_status(owner, workflow_id, "draft")
    assert_refused(await mails.post(workflow_id, step), 409, "workflow-not-active")
    (delivery,) = await mails.deliveries(workflow_id)
    await mails.set_status(owner, workflow_id, "active")
    redriven = await owner.api.post(f"/api/v1/deliveries/{delivery.id}/redrive")
    assert redriven.status_code == 201, redriven.text
    assert (await mails.post(workflow_id, step)).json()["executionId"] == redriven.json()["executionId"]


BOUNCE = "Content-Type: multipart/report; report-type=delivery-status; boundary=b\r\n"


@pytest.mark.parametrize("header", [BOUNCE, "Auto-Submitted: auto-replied\r\n"], ids=["bounce", "reply"])
async def test_automatic_mails_are_run_only_where_the_trigger_accepts_them(
    mails: MailHarness, people: OrganizationUsers, header: str
) -> None:
    owner = people.owner
    for config, status in (({}, "cancelled"), ({"acceptAutomatic": True}, "pending")):
        workflow_id = await mails.workflow(owner, **config)
        execution_id = await mails.mail(workflow_id, owner, PLAIN.format(header))
        await mails.read(execution_id)
        assert (await mails.run(execution_id)).status == status


@pytest.mark.every_database
async def test_a_mail_takes_its_place_among_the_runs_that_its_workflow_allows(
    mails: MailHarness, people: OrganizationUsers
) -> None:
    owner = people.owner
    by_sender = {"limit": 1, "key": "{{ trigger.from }}"}
    queueing = await mails.workflow(owner, settings={"concurrency": by_sender})
    rejecting = await mails.workflow(owner, settings={"concurrency": {**by_sender, "onLimit": "reject"}})
    for workflow_id, second in ((queueing, ("pending", "limited")), (rejecting, ("failed", "limited"))):
        runs = []
        for number in range(2):
            message_id = f"Message-ID: <{number}@x>\r\n"
            runs.append(await mails.mail(workflow_id, owner, PLAIN.format(message_id)))
            await mails.read(runs[-1])
        found = [await mails.run(one) for one in runs]
        assert [(run.status, run.target) for run in found] == [("pending", "shared"), second]
    assert found[1].error["code"] == "concurrency-limit"


async def test_a_mail_that_is_run_once_more_has_its_attachments_and_one_unread_is_read(
    mails: MailHarness, people: OrganizationUsers
) -> None:
    owner = people.owner
    workflow_id = await mails.workflow(owner, **await mails.whole_config(owner))
    case = BY_NAME["mg_parsed_multipart"]
    read_first = (await mails.post(workflow_id, case.steps[0])).json()["executionId"]
    await mails.read(read_first)
    large = await mails.mail(workflow_id, owner, PLAIN.format("Message-ID: <l@x>\r\n") + "x" * 100_000)
    for delivery in await mails.deliveries(workflow_id):
        answer = await owner.api.post(f"/api/v1/deliveries/{delivery.id}/redrive")
        assert answer.status_code == 201, answer.text
        again = answer.json()["executionId"]
        if delivery.execution_id == large:
            assert (await mails.run(again)).target == UNPARSED_TARGET
            await mails.read(again)
            assert len((await mails.given(again))["body_text"]) > 100_000
            continue
        assert (await mails.run(again)).target == "shared"
        for told in (await mails.given(again))["attachments"]:
            whose = BlobOwner(owner.user.organization_id, again)
            assert await mails.gateway.blobs.get(whose, told["sha256"]) is not None


async def test_a_large_mail_does_not_delay_other_mails(mails: MailHarness, people: OrganizationUsers) -> None:
    if mails.gateway.database.url.get_backend_name() != "sqlite":
        pytest.skip("The database has no part in it")
    owner = people.owner
    workflow_id = await mails.workflow(owner)
    line = b64encode(bytes(range(57)))
    part = b"Content-Type: application/pdf\r\nContent-Transfer-Encoding: base64\r\n\r\n"
    body = b"--b\r\n" + part + (line + b"\r\n") * (25_000_000 // 78) + b"--b--\r\n"
    raw = PLAIN.format("Content-Type: multipart/mixed; boundary=b\r\n").encode() + b"\r\n" + body
    execution_id = await mails.mail(workflow_id, owner, raw)
    began = time.process_time()
    async with measure_heartbeat() as heartbeat:
        await mails.read(execution_id)
    seconds = time.process_time() - began
    (told,) = (await mails.given(execution_id))["attachments"]
    assert told["size"] == 57 * (25_000_000 // 78)
    assert seconds < 3  # processor time; usually a twentieth of that
    assert heartbeat.longest_delay_seconds < 0.25
