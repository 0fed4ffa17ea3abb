"""Signatures of senders: accepted requests, and every kind of forgery."""

import hmac
from base64 import b64encode
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime, timedelta

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding as KeyEncoding
from cryptography.hazmat.primitives.serialization import PublicFormat

from concurrency import offload
from senders import (
    basic_auth,
    event_senders,
    github,
    hmac_signature,
    mailgun,
    sendgrid,
    signatures,
    slack,
    standard_webhooks,
    stripe,
)
from senders.basic_auth import BasicCredentials
from senders.event_senders import EventSender, SenderEvent, UrlChallenge
from senders.hmac_signature import HmacScheme, SignatureAlgorithm, SignatureEncoding
from senders.sender_request import RequestHeaders, RequestRefused, SenderRequest
from senders.signatures import SignatureResult
from tests.provider_requests import build_request

NOW = datetime(2026, 9, 1, 12, tzinfo=UTC)
SECRET, OTHER = "a secret", "another secret"
WHSEC = "whsec_" + b64encode(SECRET.encode()).decode()
BODY = b'{"id": "one", "type": "made"}'
SENDGRID_KEY = ec.generate_private_key(ec.SECP256R1())
SENDGRID_PUBLIC = b64encode(
    SENDGRID_KEY.public_key().public_bytes(KeyEncoding.DER, PublicFormat.SubjectPublicKeyInfo)
).decode()
MAILGUN_TOKEN = "0123456789" * 5
WITH_TIME = HmacScheme("X-Signature", timestamp_header="X-Time", delivery_header="X-Id")


def unix_seconds(at: datetime) -> bytes:
    return b"%d" % at.timestamp()


def hex_signature(message: bytes, secret: str = SECRET) -> bytes:
    return hmac.digest(secret.encode(), message, "sha256").hex().encode()


def github_request(at: datetime) -> SenderRequest:  # noqa: ARG001 - it signs no time
    return request((b"X-Hub-Signature-256", b"sha256=" + hex_signature(BODY)))


def stripe_request(at: datetime) -> SenderRequest:
    signature = hex_signature(unix_seconds(at) + b"." + BODY)
    return request((b"Stripe-Signature", b"t=%s,v1=%s" % (unix_seconds(at), signature)))


def slack_request(at: datetime) -> SenderRequest:
    signature = hex_signature(b"v0:%s:%s" % (unix_seconds(at), BODY))
    return request(
        (b"X-Slack-Request-Timestamp", unix_seconds(at)), (b"X-Slack-Signature", b"v0=" + signature)
    )


def standard_request(at: datetime) -> SenderRequest:
    signed = hmac.digest(SECRET.encode(), b"msg_1.%s.%s" % (unix_seconds(at), BODY), "sha256")
    return request(
        (b"webhook-id", b"msg_1"),
        (b"webhook-timestamp", unix_seconds(at)),
        (b"webhook-signature", b"v1," + b64encode(signed)),
    )


def svix_request(at: datetime) -> SenderRequest:
    signed = hmac.digest(SECRET.encode(), b"msg_1.%s.%s" % (unix_seconds(at), BODY), "sha256")
    return request(
        (b"svix-id", b"msg_1"),
        (b"svix-timestamp", unix_seconds(at)),
        (b"svix-signature", b"v1," + b64encode(signed)),
    )


def hmac_request(at: datetime) -> SenderRequest:
    signature = hex_signature(unix_seconds(at) + b"." + BODY)
    return request((b"X-Signature", signature), (b"X-Time", unix_seconds(at)), (b"X-Id", b"7"))


def sendgrid_request(at: datetime) -> SenderRequest:
    signature = SENDGRID_KEY.sign(unix_seconds(at) + BODY, ec.ECDSA(SHA256()))
    return request(
        (sendgrid.SIGNATURE_HEADER.encode(), b64encode(signature)),
        (sendgrid.TIME_HEADER.encode(), unix_seconds(at)),
    )


def mailgun_request(at: datetime) -> SenderRequest:
    signature = hex_signature(unix_seconds(at) + MAILGUN_TOKEN.encode())
    return mailgun_form(unix_seconds(at), MAILGUN_TOKEN.encode(), signature)


def mailgun_form(time: bytes, token: bytes, signature: bytes) -> SenderRequest:
    body = b"timestamp=%s&token=%s&signature=%s" % (time, token, signature)
    return build_request(body, [(b"Content-Type", b"application/x-www-form-urlencoded")], NOW)


def request(*headers: tuple[bytes, bytes], body: bytes = BODY) -> SenderRequest:
    return build_request(body, [(b"Content-Type", b"application/json"), *headers], NOW)


Verify = Callable[[SenderRequest, Sequence[str]], SignatureResult]
SIGNED: Mapping[str, tuple[Callable[[datetime], SenderRequest], Verify, str]] = {
    "github": (github_request, github.verify, SECRET),
    "stripe": (stripe_request, stripe.verify, SECRET),
    "slack": (slack_request, slack.verify, SECRET),
    "standard": (standard_request, standard_webhooks.verify, WHSEC),
    "svix": (svix_request, standard_webhooks.verify, WHSEC),
    "hmac": (hmac_request, lambda given, secrets: hmac_signature.verify(given, secrets, WITH_TIME), SECRET),
    "sendgrid": (sendgrid_request, sendgrid.verify, SENDGRID_PUBLIC),
    "mailgun": (mailgun_request, mailgun.verify, SECRET),
}
EACH = pytest.mark.parametrize(("sign", "verify", "secret"), SIGNED.values(), ids=SIGNED)
OF_MINUTES = {name: SIGNED[name] for name in ("stripe", "slack", "standard", "hmac")}


def refusal_code(verify: Verify, given: SenderRequest, *secrets: str) -> str:
    with pytest.raises(RequestRefused) as refused:
        verify(given, secrets)
    assert not any(secret in refused.value.message for secret in secrets if secret.strip())
    return refused.value.code


@EACH
def test_any_of_several_secrets_will_do(
    sign: Callable[[datetime], SenderRequest], verify: Verify, secret: str
) -> None:
    other = {WHSEC: "whsec_" + b64encode(b"other").decode(), SENDGRID_PUBLIC: "AAAA"}.get(secret, OTHER)
    verify(sign(NOW), [other, secret])
    verify(sign(NOW), [secret, other])


@EACH
def test_without_a_secret_nothing_is_let_in(
    sign: Callable[[datetime], SenderRequest], verify: Verify, secret: str
) -> None:
    assert secret
    for secrets in ([], [""], ["", "  "]):
        assert refusal_code(verify, sign(NOW), *secrets) == "no-secret"


@pytest.mark.parametrize("empty", ["", " ", "\t"])
def test_signatures_with_an_empty_secret_are_refused(empty: str) -> None:
    signed = request((b"X-Hub-Signature-256", b"sha256=" + hex_signature(BODY, empty)))
    assert refusal_code(github.verify, signed, empty) == "no-secret"


@EACH
def test_a_request_without_a_signature_is_told_from_one_with_a_wrong_one(
    sign: Callable[[datetime], SenderRequest], verify: Verify, secret: str
) -> None:
    if verify is mailgun.verify:
        unsigned = build_request(b"a=b", [(b"Content-Type", b"application/x-www-form-urlencoded")], NOW)
    else:
        unsigned = request()
    assert refusal_code(verify, unsigned, secret) == "missing-signature"
    assert sign(NOW) is not unsigned


@EACH
def test_a_header_given_twice_decides_nothing(
    sign: Callable[[datetime], SenderRequest], verify: Verify, secret: str
) -> None:
    if verify is mailgun.verify:
        return
    once = sign(NOW)
    signed = [(name, value) for name in HEADERS for value in once.headers.values(name)]
    raw = [(name.encode(), value.encode()) for name, value in signed]
    for number in range(len(raw)):
        twice = build_request(BODY, [*raw, raw[number]], NOW)
        assert refusal_code(verify, twice, secret) == "duplicate-header"


HEADERS = (
    "X-Hub-Signature-256", "Stripe-Signature", "X-Slack-Request-Timestamp", "X-Slack-Signature", "webhook-id",
    "webhook-timestamp", "webhook-signature", "svix-id", "svix-timestamp", "svix-signature", "X-Signature", "X-Time",
    sendgrid.SIGNATURE_HEADER,
    sendgrid.TIME_HEADER,
)  # fmt: skip


@pytest.mark.parametrize("name", OF_MINUTES)
def test_five_minutes_are_the_most_either_way(name: str) -> None:
    sign, verify, secret = OF_MINUTES[name]
    for age in (timedelta(minutes=-5), timedelta(), timedelta(minutes=5)):
        verify(sign(NOW - age), [secret])
    for age in (timedelta(seconds=-301), timedelta(seconds=301)):
        assert refusal_code(verify, sign(NOW - age), secret) == "stale-signature"


@pytest.mark.parametrize(("name", "hours"), [("mailgun", 8), ("sendgrid", 72)])
def test_a_mail_is_true_for_as_long_as_its_service_may_repeat_it(name: str, hours: int) -> None:
    sign, verify, secret = SIGNED[name]
    verify(sign(NOW - timedelta(hours=hours, minutes=30)), [secret])
    assert refusal_code(verify, sign(NOW - timedelta(hours=hours + 12)), secret) == "stale-signature"
    assert refusal_code(verify, sign(NOW + timedelta(minutes=6)), secret) == "stale-signature"


WRONG = (
    b"",
    b"\xff\xe9",
    b"v1",
    b"sha256=",
    b"v0=\xc3\xa9",
    b"v1,",
    b"v1a,AAAA",
    b"v1,\xff",
    b"t=x,v1=\xff",
    b"t=,v1=a",
)


@pytest.mark.parametrize("wrong", WRONG)
@EACH
def test_any_text_in_place_of_a_signature_is_refused(
    sign: Callable[[datetime], SenderRequest], verify: Verify, secret: str, wrong: bytes
) -> None:
    given = sign(NOW)
    raw = []
    for name in HEADERS:
        is_signature = "ignature" in name
        raw += [
            (name.encode(), wrong if is_signature else value.encode()) for value in given.headers.values(name)
        ]
    if verify is mailgun.verify:
        given = mailgun_form(unix_seconds(NOW), MAILGUN_TOKEN.encode(), wrong)
    else:
        given = build_request(BODY, raw, NOW)
    assert refusal_code(verify, given, secret) == "invalid-signature"


@pytest.mark.parametrize("time", [b"", b"now", b"1e9", b"-1", b" 1", b"\xd9\xa1", b"9" * 20])
def test_a_time_is_a_number_of_seconds(time: bytes) -> None:
    signature = hex_signature(b"v0:%s:%s" % (time, BODY))
    given = request((b"X-Slack-Request-Timestamp", time), (b"X-Slack-Signature", b"v0=" + signature))
    assert refusal_code(slack.verify, given, SECRET) == "invalid-signature"


def test_github_is_not_believed_for_a_signature_with_sha1() -> None:
    sha1 = hmac.digest(SECRET.encode(), BODY, "sha1").hex().encode()
    assert (
        refusal_code(github.verify, request((b"X-Hub-Signature", b"sha1=" + sha1)), SECRET)
        == "missing-signature"
    )
    given = request((b"X-Hub-Signature-256", b"sha1=" + sha1))
    assert refusal_code(github.verify, given, SECRET) == "invalid-signature"


@pytest.mark.parametrize(
    "header",
    [
        b"t=%(t)s,t=%(t)s,v1=%(good)s",
        b"v1=%(good)s",
        b"t=%(t)s,v0=%(good)s",
        b"t=%(t)s," + b",".join([b"v1=00"] * 30) + b",v1=%(good)s",
    ],
)
def test_stripe_gives_one_time_and_few_signatures_of_the_first_version(header: bytes) -> None:
    good = hex_signature(unix_seconds(NOW) + b"." + BODY)
    given = request((b"Stripe-Signature", header % {b"t": unix_seconds(NOW), b"good": good}))
    assert refusal_code(stripe.verify, given, SECRET) == "invalid-signature"


def test_mailguns_own_signature_is_the_one_that_counts_and_not_header_lines_of_a_mail() -> None:
    signature = hex_signature(unix_seconds(NOW) + MAILGUN_TOKEN.encode())
    body = b"timestamp=1&token=x&signature=y&timestamp=%s&token=%s&signature=%s" % (
        unix_seconds(NOW),
        MAILGUN_TOKEN.encode(),
        signature,
    )
    mailgun.verify(
        build_request(body, [(b"Content-Type", b"application/x-www-form-urlencoded")], NOW), [SECRET]
    )


def test_mailguns_time_and_token_cannot_be_cut_elsewhere() -> None:
    joined = unix_seconds(NOW) + MAILGUN_TOKEN.encode()
    moved = mailgun_form(joined[:9], joined[9:], hex_signature(joined))
    assert refusal_code(mailgun.verify, moved, SECRET) == "invalid-signature"


def test_a_public_key_does_not_verify_signatures_made_with_its_text() -> None:
    public = "whpk_" + b64encode(bytes(32)).decode()
    signed = hmac.digest(bytes(32), b"msg_1.%s.%s" % (unix_seconds(NOW), BODY), "sha256")
    given = request(
        (b"webhook-id", b"msg_1"),
        (b"webhook-timestamp", unix_seconds(NOW)),
        (b"webhook-signature", b"v1," + b64encode(signed)),
    )
    assert refusal_code(standard_webhooks.verify, given, public) == "invalid-signature"


@pytest.mark.parametrize(
    ("scheme", "digest"),
    [
        (HmacScheme("X-Signature", SignatureAlgorithm.SHA512, SignatureEncoding.BASE64), "sha512"),
        (
            HmacScheme("X-Signature", SignatureAlgorithm.SHA384, SignatureEncoding.HEX, prefix="hmac "),
            "sha384",
        ),
    ],
)
def test_senders_write_their_hmac_as_they_like(scheme: HmacScheme, digest: str) -> None:
    signed = hmac.digest(SECRET.encode(), BODY, digest)
    written = (
        b64encode(signed) if scheme.encoding is SignatureEncoding.BASE64 else signed.hex().upper().encode()
    )
    given = request((b"x-signature", scheme.prefix.encode() + written))
    assert hmac_signature.verify(given, [SECRET], scheme) == SignatureResult()
    if scheme.prefix:
        with pytest.raises(RequestRefused):
            hmac_signature.verify(request((b"x-signature", written)), [SECRET], scheme)


def test_the_sender_s_id_of_a_delivery_is_its_key() -> None:
    sign, verify, secret = SIGNED["hmac"]
    assert verify(sign(NOW), [secret]) == SignatureResult(signatures.delivery_key("hmac", "7"))


@pytest.mark.parametrize("names", [("a b",), ("a", "b"), ("b", "a"), ("",), ("\0é\n" * 500,)])
def test_different_names_have_different_printable_keys(names: tuple[str, ...]) -> None:
    key = signatures.delivery_key("mail", *names)
    assert key != signatures.delivery_key("mail", "ab")
    assert key != signatures.delivery_key("other", *names)
    assert len(key) < 100
    assert key.isascii()
    assert key.isprintable()


def test_basic_takes_user_and_password_of_any_that_are_accepted() -> None:
    accepted = [BasicCredentials("inbound", "old"), BasicCredentials("inbound", "pâss:word")]
    assert "old" not in repr(accepted)
    for scheme in (b"Basic ", b"basic "):
        given = request((b"authorization", scheme + b64encode("inbound:pâss:word".encode())))
        assert basic_auth.verify(given, accepted) == SignatureResult()


@pytest.mark.parametrize(
    ("header", "expected"),
    [
        (b"Basic " + b64encode(b"inbound:wrong"), "invalid-signature"),
        (b"Basic \xff", "invalid-signature"),
        (b"Basic", "invalid-signature"),
        (b"Bearer " + b64encode(b"inbound:right"), "missing-signature"),
        (b"", "missing-signature"),
    ],
)
def test_basic_refuses_everything_else(header: bytes, expected: str) -> None:
    with pytest.raises(RequestRefused) as refused:
        basic_auth.verify(request((b"authorization", header)), [BasicCredentials("inbound", "right")])
    assert refused.value.code == expected


def test_basic_authentication_without_a_password_admits_no_request() -> None:
    given = request((b"authorization", b"Basic " + b64encode(b"inbound:")))
    with pytest.raises(RequestRefused) as refused:
        basic_auth.verify(given, [BasicCredentials("inbound", "")])
    assert refused.value.code == "no-secret"


def test_headers_have_names_in_any_case_and_keep_all_values() -> None:
    headers = RequestHeaders([(b"X-One", b"1"), (b"x-two", b"a"), (b"X-TWO", b"\xe9")])
    assert "x-one" in headers
    assert headers.single("X-ONE") == "1"
    assert headers.single("absent") is None
    assert headers.values("x-Two") == ["a", "é"]
    with pytest.raises(RequestRefused):
        headers.single("X-Two")


def test_a_request_hides_its_content_in_its_representation() -> None:
    given = build_request(b"secret", [(b"Authorization", b"secret")], NOW, target="/hooks/secret?key=secret")
    assert "secret" not in repr(given)


def test_a_long_body_is_not_hashed_while_others_wait() -> None:
    body = b"x" * 2_000_000
    given = request((b"X-Hub-Signature-256", b"sha256=" + hex_signature(body)), body=body)
    with pytest.raises(offload.BudgetExceeded):
        offload.try_inline(github.verify, given, [SECRET])
    github.verify(given, [SECRET])


# ── meaning of requests ─────────────────────────────────────────────────────────────────────────────────────


def test_a_click_in_slack_is_an_event_of_the_type_that_slack_gives_it() -> None:
    body = b"payload=%7B%22type%22%3A%22block_actions%22%2C%22trigger_id%22%3A%22t1%22%7D"
    given = build_request(body, [(b"Content-Type", b"application/x-www-form-urlencoded")], NOW)
    meaning = event_senders.parse_event(given, EventSender.SLACK)
    assert isinstance(meaning, SenderEvent)
    assert (meaning.event_type, meaning.id) == ("slack.block_actions", "t1")
    assert meaning.data == {"type": "block_actions", "trigger_id": "t1"}


def test_a_header_of_svix_is_not_believed_beside_a_signature_of_the_standard() -> None:
    given = standard_request(NOW)
    names = ("webhook-id", "webhook-timestamp", "webhook-signature")
    signed = [(name.encode(), str(given.headers.single(name)).encode()) for name in names]
    forged = request(*signed, (b"svix-id", b"msg_2"), (b"svix-timestamp", b"0"))
    assert standard_webhooks.verify(forged, [WHSEC]) == standard_webhooks.verify(given, [WHSEC])
    svix = svix_request(NOW)
    assert standard_webhooks.verify(svix, [WHSEC]) == standard_webhooks.verify(given, [WHSEC])
    assert event_senders.recognize_sender(svix) is EventSender.STANDARD_WEBHOOKS


def test_a_look_of_slack_at_a_certificate_is_no_event() -> None:
    given = build_request(
        b"ssl_check=1&token=x", [(b"Content-Type", b"application/x-www-form-urlencoded")], NOW
    )
    assert event_senders.parse_event(given, EventSender.SLACK) == UrlChallenge("")


@pytest.mark.parametrize(
    ("sender", "headers", "body", "expected"),
    [
        (EventSender.GITHUB, [], b"{}", "invalid-event"),
        (EventSender.GITHUB, [(b"X-GitHub-Event", b"push")], b"[]", "invalid-event"),
        (EventSender.GITHUB, [(b"X-GitHub-Event", b"a b")], b"{}", "invalid-event"),
        (EventSender.GITHUB, [(b"X-GitHub-Event", b"push")], b"{", "malformed-json"),
        (EventSender.STRIPE, [], b'{"id": "evt_1", "type": ""}', "invalid-event"),
        (EventSender.STRIPE, [], b'{"id": "evt_1", "type": "*"}', "invalid-event"),
        (EventSender.STRIPE, [], b'{"id": "evt_1", "id": "evt_2", "type": "a"}', "duplicate-key"),
        (EventSender.STRIPE, [], b'{"type": "a"}', "invalid-event"),
        (EventSender.STANDARD_WEBHOOKS, [], b'{"data": {}}', "invalid-event"),
        (EventSender.STANDARD_WEBHOOKS, [], b"[" * 500 + b"]" * 500, "too-deep"),
        (EventSender.SLACK, [], b'{"type": "event_callback", "event": "a"}', "invalid-event"),
        (EventSender.SLACK, [], b'{"type": "url_verification"}', "invalid-event"),
        (
            EventSender.SLACK,
            [(b"Content-Type", b"application/x-www-form-urlencoded")],
            b"command=%00",
            "nul-character",
        ),
    ],
)
def test_a_malformed_event_is_refused(
    sender: EventSender, headers: list[tuple[bytes, bytes]], body: bytes, expected: str
) -> None:
    with pytest.raises(RequestRefused) as refused:
        event_senders.parse_event(build_request(body, headers, NOW), sender)
    assert refused.value.code == expected
