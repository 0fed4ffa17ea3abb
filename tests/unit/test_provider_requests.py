"""Every provider request of the samples: recognized, verified, deduplicated, and parsed."""

from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from hashlib import sha256
from typing import Any

import pytest

from senders import (
    basic_auth,
    event_senders,
    github,
    mail_kinds,
    mailgun,
    sendgrid,
    ses,
    signatures,
    slack,
    sns,
    standard_webhooks,
    stripe,
)
from senders.event_senders import EventBatch, EventSender, SenderEvent, UrlChallenge
from senders.mail_kinds import MailKind
from senders.sender_request import RequestRefused, SenderRequest
from senders.signatures import SignatureResult
from tests.provider_requests import (
    BY_NAME,
    CASES,
    CONFIG,
    FOLDER,
    VECTORS,
    ProviderCase,
    ProviderStep,
    build_request,
    read_certificate,
)

STANDARD_WEBHOOKS = [CONFIG["standard_webhooks"]["secret"], CONFIG["standard_webhooks"]["public_key"]]
REASONS = {
    "bad_signature": "invalid-signature",
    "stale_timestamp": "stale-signature",
    "topic_not_allowed": "unknown-topic",
}


def verify_sns(request: SenderRequest) -> SignatureResult:
    message = sns.parse_sns_message(request)
    pem = read_certificate(sns.signing_certificate_url(message))
    return sns.verify(message, pem, CONFIG["sns"]["allowed_topic_arns"], request.received_at)


VERIFY: Mapping[str, Callable[[SenderRequest], SignatureResult]] = {
    "sendgrid-ecdsa": lambda request: sendgrid.verify(request, [CONFIG["sendgrid"]["public_key"]]),
    "mailgun-hmac": lambda request: mailgun.verify(request, [CONFIG["mailgun"]["webhook_signing_key"]]),
    "sns-rsa": verify_sns,
    "github-hmac": lambda request: github.verify(request, [CONFIG["github"]["secret"]]),
    "stripe-hmac": lambda request: stripe.verify(request, [CONFIG["stripe"]["secret"]]),
    "slack-hmac": lambda request: slack.verify(request, [CONFIG["slack"]["signing_secret"]]),
    "standard-webhooks": lambda request: standard_webhooks.verify(request, STANDARD_WEBHOOKS),
    "basic": lambda request: basic_auth.verify(
        request, [basic_auth.BasicCredentials(**CONFIG["basic_auth"])]
    ),
}
SIGNED = [step for case in CASES for step in case.steps if step.auth["scheme"] in VERIFY]
WITH_EVENTS = [case for case in CASES if "event" in case.expected or "events" in case.expected]
KINDS = {
    "mg_raw_mime": MailKind.MAILGUN_RAW,
    "mg_store_notify": MailKind.MAILGUN_STORED,
    "mg_tracking_event_to_wrong_url": MailKind.MAILGUN_EVENT,
    "sg_raw_mime": MailKind.SENDGRID_RAW,
    "sg_raw_mime_lf": MailKind.SENDGRID_RAW,
}
KINDS_OF_OTHERS = {
    "native": MailKind.NATIVE,
    "sendgrid": MailKind.SENDGRID_PARSED,
    "mailgun": MailKind.MAILGUN_PARSED,
    "ses": MailKind.SNS,
}
SENDERS = {
    "github": EventSender.GITHUB,
    "stripe": EventSender.STRIPE,
    "slack": EventSender.SLACK,
    "standardwebhooks": EventSender.STANDARD_WEBHOOKS,
    "cloudevents": EventSender.CLOUDEVENTS,
}


def test_the_requests_are_those_that_were_recorded() -> None:
    steps = [step for case in CASES for step in case.expected.get("steps", [case.expected])]
    assert len(CASES) == 55
    for step in steps:
        assert sha256((FOLDER / step["request"]).read_bytes()).hexdigest() == step["sha256"]


@pytest.mark.parametrize("step", SIGNED, ids=str)
def test_a_request_is_found_true_or_not(step: ProviderStep) -> None:
    verify = VERIFY[step.auth["scheme"]]
    if step.auth["result"] == "pass":
        assert isinstance(verify(step.arrival), SignatureResult)
        return
    with pytest.raises(RequestRefused) as refused:
        verify(step.arrival)
    assert refused.value.code == REASONS[step.auth["reason"]]


BODY_SIGNED = {"sendgrid-ecdsa", "github-hmac", "stripe-hmac", "slack-hmac", "standard-webhooks"}


@pytest.mark.parametrize("step", [step for step in SIGNED if step.auth["scheme"] in BODY_SIGNED], ids=str)
def test_not_even_white_space_may_be_added_to_a_signed_body(step: ProviderStep) -> None:
    with pytest.raises(RequestRefused):
        VERIFY[step.auth["scheme"]](build_request(step.body + b" ", step.headers, step.at))


@pytest.mark.parametrize("case", [case for case in CASES if case.provider in KINDS_OF_OTHERS], ids=str)
def test_the_kind_of_a_mail_is_recognized_by_its_content(case: ProviderCase) -> None:
    for step in case.steps:
        expected = KINDS.get(case.name, KINDS_OF_OTHERS[case.provider])
        assert mail_kinds.recognize_mail(step.arrival) is expected


@pytest.mark.parametrize("case", [case for case in CASES if case.provider in SENDERS], ids=str)
def test_a_webhook_is_recognised_by_its_headers(case: ProviderCase) -> None:
    is_event = case.arrival.method == "POST"
    assert event_senders.recognize_sender(case.arrival) is (SENDERS[case.provider] if is_event else None)


@pytest.mark.parametrize("case", [case for case in CASES if case.provider == "native"], ids=str)
def test_a_call_of_the_api_is_of_no_known_sender(case: ProviderCase) -> None:
    assert event_senders.recognize_sender(case.arrival) is None


@pytest.mark.parametrize("case", WITH_EVENTS, ids=str)
def test_allowed_events_of_a_webhook_are_interpreted_as_intended(case: ProviderCase) -> None:
    expected = case.expected.get("events") or [case.expected["event"]]
    meaning = event_senders.parse_event(case.arrival, SENDERS[case.provider])
    found = meaning.events if isinstance(meaning, EventBatch) else [meaning]
    for event, fields in zip(found, expected, strict=True):
        assert isinstance(event, SenderEvent)
        assert event.event_type == fields["event_type"]
        assert event.source == fields["source"]
        assert event.data == fields.get("event_data", {"data_base64": fields.get("data_base64")})
        assert event.id == fields.get("id", event.id)
        assert event.attributes.get("subject") == fields.get("subject", event.attributes.get("subject"))


@pytest.mark.parametrize("case", WITH_EVENTS, ids=str)
def test_verification_and_parsing_agree_on_the_delivery_key(case: ProviderCase) -> None:
    if case.steps[0].auth["scheme"] not in VERIFY:
        return
    meaning = event_senders.parse_event(case.arrival, SENDERS[case.provider])
    assert isinstance(meaning, SenderEvent)
    assert meaning.key == VERIFY[case.steps[0].auth["scheme"]](case.arrival).delivery_key is not None


def test_slack_wants_its_challenge_back() -> None:
    meaning = event_senders.parse_event(BY_NAME["slack_url_verification"].arrival, EventSender.SLACK)
    assert meaning == UrlChallenge(BY_NAME["slack_url_verification"].expected["respond"]["body_contains"])


def test_repeated_slack_deliveries_are_recognized() -> None:
    first, again = (
        event_senders.parse_event(BY_NAME[name].arrival, EventSender.SLACK)
        for name in ("slack_event", "slack_retry")
    )
    assert first == again


def test_a_cloud_event_without_an_id_is_refused() -> None:
    with pytest.raises(RequestRefused) as refused:
        event_senders.parse_event(BY_NAME["ce_missing_id"].arrival, EventSender.CLOUDEVENTS)
    assert refused.value.code == "invalid-event"


def deduplication_key_of(step: ProviderStep) -> str | None:
    return mail_kinds.deduplication_key(step.arrival, mail_kinds.recognize_mail(step.arrival))


def test_each_mail_has_a_name_of_its_own() -> None:
    mails = [
        case
        for case in CASES
        if case.provider in {"sendgrid", "mailgun", "ses"} and "normalized" in case.expected
    ]
    keys = {case.name: deduplication_key_of(case.steps[0]) for case in mails}
    assert None not in keys.values()
    assert len(set(keys.values())) == len(mails)


def test_a_mail_that_mailgun_signs_anew_is_known_again_and_its_token_is_another() -> None:
    case = BY_NAME["mg_retry_after_lost_reply"]
    first, again = case.steps
    assert deduplication_key_of(first) == deduplication_key_of(again)
    tokens = [VERIFY["mailgun-hmac"](step.arrival).delivery_key for step in case.steps]
    assert tokens[0] != tokens[1]


def test_mailgun_names_a_delivery_by_its_token() -> None:
    case = BY_NAME["mg_parsed_urlencoded"]
    token, _ = case.expected["idempotency"]["key"]
    assert VERIFY["mailgun-hmac"](case.arrival) == SignatureResult(signatures.delivery_key("mailgun", token))


def test_sns_names_a_message_and_ses_a_mail() -> None:
    case = BY_NAME["ses_sns_utf8_v1"]
    message_id, mail_id = case.expected["idempotency"]["key"]
    assert verify_sns(case.arrival) == SignatureResult(signatures.delivery_key("sns", message_id))
    mail = ses.parse_ses_mail(sns.parse_sns_message(case.arrival))
    assert mail is not None
    assert mail.mail_id == mail_id


@pytest.mark.parametrize(
    "case", [case for case in CASES if case.provider in {"sendgrid", "mailgun"}], ids=str
)
def test_the_envelope_of_a_form_is_that_of_the_mail(case: ProviderCase) -> None:
    expected = case.expected.get("envelope")
    if expected is not None:
        request = case.steps[0].arrival
        envelope = mail_kinds.parse_envelope(
            mail_kinds.parse_mail_fields(request), mail_kinds.recognize_mail(request)
        )
        assert (envelope.sender, envelope.recipients) == (expected["from"], expected["to"])


@pytest.mark.parametrize("name", ["sg_parsed_attachments", "mg_parsed_multipart"])
def test_the_files_of_a_form_are_whole(name: str) -> None:
    case = BY_NAME[name]
    files = mail_kinds.parse_mail_fields(case.arrival).files
    found = {(file.filename, file.content_type, sha256(file.value).hexdigest()) for file in files}
    attachments = case.expected["normalized"]["attachments"]
    assert found == {(one["filename"], one["content_type"], one["sha256"]) for one in attachments}


def parse_recorded_mail(name: str) -> ses.SesMail | None:
    return ses.parse_ses_mail(sns.parse_sns_message(BY_NAME[name].arrival))


@pytest.mark.parametrize("name", ["ses_sns_utf8_v1", "ses_sns_base64_v2", "ses_sns_base64_8bit_latin1"])
def test_a_mail_of_ses_comes_whole_in_its_notification(name: str) -> None:
    mail = parse_recorded_mail(name)
    expected = BY_NAME[name].expected
    assert mail is not None
    assert mail.content is not None
    assert mail.content.endswith(b"\r\n")
    assert (mail.sender, mail.recipients) == (expected["envelope"]["from"], expected["envelope"]["to"])
    if name == "ses_sns_base64_8bit_latin1":
        with pytest.raises(UnicodeDecodeError):
            mail.content.decode()


def test_a_mail_that_ses_has_stored_is_named_by_bucket_and_key() -> None:
    mail = parse_recorded_mail("ses_s3_action")
    expected = BY_NAME["ses_s3_action"].expected
    assert mail is not None
    assert mail.content is None
    assert mail.stored is not None
    assert (mail.stored.bucket, mail.stored.key) == (expected["s3"]["bucket"], expected["s3"]["key"])
    assert mail.common_headers["subject"] == expected["normalized_without_s3"]["subject"]
    assert mail.verdicts == dict.fromkeys(("spam", "virus", "spf", "dkim", "dmarc"), "PASS")


@pytest.mark.parametrize(
    "name", ["ses_topic_validation_note", "ses_bounce_to_wrong_topic", "ses_subscription_confirmation"]
)
def test_not_every_message_of_a_topic_is_a_mail(name: str) -> None:
    assert parse_recorded_mail(name) is None


def test_a_subscription_is_confirmed_at_the_host_of_its_topic() -> None:
    case = BY_NAME["ses_subscription_confirmation"]
    assert sns.confirmation_url(sns.parse_sns_message(case.arrival)) == case.expected["confirm"]["url"]


@pytest.mark.parametrize("vector", VECTORS, ids=[vector["scheme"] for vector in VECTORS])
def test_signatures_that_providers_have_published_are_found_true(vector: Mapping[str, Any]) -> None:
    headers = [(name.encode(), value.encode()) for name, value in vector["headers"].items()]
    times = [value for name, value in vector["headers"].items() if name.lower().endswith("timestamp")]
    request = build_request(
        vector["body"].encode(),
        [*headers, (b"Content-Type", b"application/x-www-form-urlencoded")],
        datetime.fromtimestamp(int(times[0]) if times else 0, UTC),
    )
    verify: Mapping[str, Callable[[SenderRequest, list[str]], SignatureResult]] = {
        "github-hmac": github.verify,
        "slack-hmac": slack.verify,
        "standard-webhooks": standard_webhooks.verify,
        "sendgrid-ecdsa": sendgrid.verify,
    }
    verify[vector["scheme"]](request, [vector.get("secret") or vector["public_key"]])
