"""Messages of SNS: believed if SNS has signed them, for a topic of ours, under a certificate of its own."""

import json
from base64 import b64encode
from datetime import UTC, datetime, timedelta
from functools import cache

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.asymmetric.padding import PKCS1v15
from cryptography.hazmat.primitives.hashes import SHA1, SHA256
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import NameOID
from msgspec.structs import replace

from engine.values import Json
from senders import ses, sns
from senders.sender_request import RequestRefused
from senders.sns import SnsMessage
from tests.provider_requests import BY_NAME, build_request

NOW = datetime(2026, 9, 1, 12, tzinfo=UTC)
TOPIC = "arn:aws:sns:us-east-1:111122223333:mail"
HOST = "https://sns.us-east-1.amazonaws.com"
CERTIFICATE = f"/SimpleNotificationService-{'0af3' * 8}.pem"


@cache
def private_key() -> rsa.RSAPrivateKey:
    return rsa.generate_private_key(65_537, 2_048)


def make_certificate(
    key: rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey | None = None,
    *,
    start: datetime = NOW - timedelta(days=1),
    end: datetime = NOW + timedelta(days=1),
) -> bytes:
    key = key or private_key()
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "sns.amazonaws.com")])
    built = x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(key.public_key())
    built = built.serial_number(1).not_valid_before(start).not_valid_after(end)
    return built.sign(key, SHA256()).public_bytes(Encoding.PEM)


def sign_message(**changed: Json) -> dict[str, Json]:
    """Return a message, signed after it was changed."""
    members: dict[str, Json] = {
        "Type": "Notification",
        "MessageId": "5f1e-1",
        "TopicArn": TOPIC,
        "Message": "hello\nworld",
        "Timestamp": "2026-09-01T11:59:54.000Z",
        "SignatureVersion": "2",
        "SigningCertURL": HOST + CERTIFICATE,
        **changed,
    }
    names = ("Message", "MessageId", "Subject", "SubscribeURL", "Timestamp", "Token", "TopicArn", "Type")
    signed = "".join(f"{name}\n{members[name]}\n" for name in names if members.get(name) is not None)
    algorithm = SHA1() if members["SignatureVersion"] == "1" else SHA256()  # noqa: S303 - as SNS does
    members.setdefault(
        "Signature", b64encode(private_key().sign(signed.encode(), PKCS1v15(), algorithm)).decode()
    )
    return members


def parse_members(members: Json, **headers: str) -> SnsMessage:
    raw = [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()]
    return sns.parse_sns_message(build_request(json.dumps(members).encode(), raw, NOW))


def refusal_code(members: Json, pem: bytes | None = None, now: datetime = NOW) -> str:
    with pytest.raises(RequestRefused) as refused:
        sns.verify(parse_members(members), pem or make_certificate(), [TOPIC], now)
    return refused.value.code


@pytest.mark.parametrize("version", ["1", "2"])
@pytest.mark.parametrize("subject", [None, "A subject"])
def test_a_message_is_true_if_sns_has_signed_all_of_it(version: str, subject: str | None) -> None:
    members = sign_message(SignatureVersion=version, **({"Subject": subject} if subject else {}))
    assert sns.verify(parse_members(members), make_certificate(), [TOPIC], NOW).delivery_key
    for name in ("Message", "MessageId"):
        assert refusal_code({**members, name: "other"}) == "invalid-signature"
    assert refusal_code({**members, "Subject": "other"}) == "invalid-signature"


def test_a_subject_of_null_is_none() -> None:
    sns.verify(parse_members({**sign_message(), "Subject": None}), make_certificate(), [TOPIC], NOW)


def test_the_versions_of_signatures_are_not_mixed_up() -> None:
    assert (
        refusal_code({**sign_message(SignatureVersion="2"), "SignatureVersion": "1"}) == "invalid-signature"
    )
    assert refusal_code(sign_message(SignatureVersion="3")) == "invalid-signature"
    assert refusal_code({**sign_message(), "Signature": "not base64"}) == "invalid-signature"
    assert refusal_code({**sign_message(), "Signature": "é"}) == "invalid-signature"


@pytest.mark.parametrize(
    "topics", [[], ["arn:aws:sns:us-east-1:111122223333:other"], [TOPIC + "x"], [TOPIC[:-1]]]
)
def test_a_message_of_any_other_topic_is_refused_however_well_signed(topics: list[str]) -> None:
    with pytest.raises(RequestRefused) as refused:
        sns.verify(parse_members(sign_message()), make_certificate(), topics, NOW)
    assert refused.value.code == "unknown-topic"


@pytest.mark.parametrize(
    "url",
    [
        "http://sns.us-east-1.amazonaws.com" + CERTIFICATE,
        "HTTPS://sns.us-east-1.amazonaws.com" + CERTIFICATE,
        "https://sns.eu-west-1.amazonaws.com" + CERTIFICATE,
        "https://sns.us-east-1.amazonaws.com.evil.test" + CERTIFICATE,
        "https://sns.us-east-1.amazonaws.com.cn" + CERTIFICATE,
        "https://sns.us-east-1xamazonaws.com" + CERTIFICATE,
        "https://evil.test/sns.us-east-1.amazonaws.com" + CERTIFICATE,
        "https://sns.s3-us-west-2.amazonaws.com" + CERTIFICATE,
        "https://user@sns.us-east-1.amazonaws.com" + CERTIFICATE,
        "https://sns.us-east-1.amazonaws.com:443" + CERTIFICATE,
        "https://sns.us-east-1.amazonaws.com\\@evil.test" + CERTIFICATE,
        HOST + CERTIFICATE + "?a",
        HOST + CERTIFICATE + "#a",
        HOST + CERTIFICATE + " ",
        HOST + CERTIFICATE.upper(),
        HOST + CERTIFICATE.replace("0", "\N{ARABIC-INDIC DIGIT ZERO}"),
        HOST + "/bucket" + CERTIFICATE,
        HOST + "/../" + CERTIFICATE,
        HOST + "/SimpleNotificationService-0.pem",
        HOST,
    ],
)
def test_a_certificate_is_taken_from_sns_itself_and_from_nowhere_else(url: str) -> None:
    members = sign_message(SigningCertURL=url)
    with pytest.raises(RequestRefused) as refused:
        sns.signing_certificate_url(parse_members(members))
    assert refused.value.code == "untrusted-certificate"
    assert refusal_code(members) == "untrusted-certificate"


@pytest.mark.parametrize(
    ("topic", "host"),
    [
        ("arn:aws:sns:ap-southeast-2:111122223333:a", "sns.ap-southeast-2.amazonaws.com"),
        ("arn:aws-us-gov:sns:us-gov-west-1:111122223333:a", "sns.us-gov-west-1.amazonaws.com"),
        ("arn:aws-cn:sns:cn-north-1:111122223333:a", "sns.cn-north-1.amazonaws.com.cn"),
    ],
)
def test_the_host_of_sns_is_that_of_the_region_of_the_topic(topic: str, host: str) -> None:
    url = f"https://{host}{CERTIFICATE}"
    assert sns.signing_certificate_url(parse_members(sign_message(TopicArn=topic, SigningCertURL=url))) == url


@pytest.mark.parametrize(
    "topic",
    [
        "arn:aws:sns:s3-us-west-2:111122223333:a",
        "arn:aws:sns:us-east-1.evil:111122223333:a",
        "arn:aws:sns::111122223333:a",
        "arn:evil:sns:us-east-1:111122223333:a",
        "arn:aws:s3:us-east-1:111122223333:a",
        "arn:aws:sns:us-east-1:1:a",
        TOPIC + "\n",
        "",
        None,
    ],
)
def test_an_invalid_topic_is_refused(topic: str | None) -> None:
    with pytest.raises(RequestRefused) as refused:
        parse_members(sign_message(TopicArn=topic))
    assert refused.value.code == "malformed-message"


def test_a_certificate_must_be_one_of_now_with_a_strong_rsa_key() -> None:
    signed = sign_message()
    assert refusal_code(signed, make_certificate(end=NOW - timedelta(seconds=1))) == "invalid-certificate"
    assert refusal_code(signed, make_certificate(start=NOW + timedelta(seconds=1))) == "invalid-certificate"
    weak = rsa.generate_private_key(65_537, 1_024)  # noqa: S505 - which is to be refused
    assert refusal_code(signed, make_certificate(weak)) == "invalid-certificate"
    assert (
        refusal_code(signed, make_certificate(ec.generate_private_key(ec.SECP256R1())))
        == "invalid-certificate"
    )
    assert refusal_code(signed, b"no certificate") == "invalid-certificate"
    assert (
        refusal_code(signed, make_certificate(rsa.generate_private_key(65_537, 2_048))) == "invalid-signature"
    )


def test_a_message_is_true_for_the_hour_in_which_sns_repeats_it() -> None:
    signed = sign_message()
    sns.verify(parse_members(signed), make_certificate(), [TOPIC], NOW + timedelta(hours=1))
    assert refusal_code(signed, now=NOW + timedelta(hours=2)) == "stale-signature"
    assert refusal_code(signed, now=NOW - timedelta(minutes=6)) == "stale-signature"


@pytest.mark.parametrize(
    "members",
    [
        [],
        None,
        {},
        sign_message(Type="Other"),
        sign_message(Message=7),
        sign_message(MessageId="a\nb"),
        sign_message(Timestamp="yesterday"),
        sign_message(Timestamp="2026-13-01T00:00:00Z"),
        sign_message(Subject="a\nTimestamp\nb"),
        {**sign_message(), "Signature": None},
        sign_message(Type="SubscriptionConfirmation"),
        sign_message(Type="SubscriptionConfirmation", Token="a&b", SubscribeURL=HOST),
    ],
)
def test_a_message_has_all_its_members_in_their_form(members: Json) -> None:
    with pytest.raises(RequestRefused) as refused:
        parse_members(members)
    assert refused.value.code == "malformed-message"


def test_a_header_that_contradicts_the_body_is_refused() -> None:
    parse_members(sign_message(), x_amz_sns_message_type="Notification")
    with pytest.raises(RequestRefused):
        parse_members(sign_message(), x_amz_sns_message_type="SubscriptionConfirmation")


@pytest.mark.parametrize("value", ["true", "TRUE", "1", "false"])
def test_a_raw_delivery_without_a_signature_is_refused(value: str) -> None:
    with pytest.raises(RequestRefused) as refused:
        parse_members(sign_message(), x_amz_sns_rawdelivery=value)
    assert refused.value.code == "raw-delivery"


def test_a_message_is_not_larger_than_those_of_sns() -> None:
    with pytest.raises(RequestRefused) as refused:
        sns.parse_sns_message(build_request(b" " * (sns.MAX_BYTES + 1), [], NOW))
    assert refused.value.code == "too-large"


def test_a_confirmation_goes_to_sns_wherever_the_message_points() -> None:
    asked = sns.parse_sns_message(BY_NAME["ses_subscription_confirmation"].arrival)
    elsewhere = replace(asked, subscribe_url="https://evil.test/")
    assert sns.confirmation_url(elsewhere) == sns.confirmation_url(asked)
    assert sns.confirmation_url(asked).startswith(f"https://{asked.host}/?Action=ConfirmSubscription&")


@pytest.mark.parametrize("kind", ["Notification", "UnsubscribeConfirmation"])
def test_nothing_else_is_confirmed(kind: str) -> None:
    more: dict[str, Json] = {} if kind == "Notification" else {"Token": "ab", "SubscribeURL": HOST}
    with pytest.raises(RequestRefused):
        sns.confirmation_url(parse_members(sign_message(Type=kind, **more)))


@pytest.mark.parametrize(
    "told",
    [
        {"mail": {}},
        {"mail": {"messageId": "1", "source": ""}, "receipt": {"action": {}, "recipients": "a"}},
        {
            "mail": {"messageId": "1", "source": "", "headers": [], "commonHeaders": {}},
            "receipt": {"action": {"type": "SNS", "encoding": "BASE64"}, "recipients": []},
            "content": "not base64!",
        },
        {
            "mail": {"messageId": "1", "source": "", "headers": [], "commonHeaders": {}},
            "receipt": {"action": {"type": "S3"}, "recipients": []},
        },
    ],
)
def test_a_mail_that_ses_tells_of_in_pieces_is_refused(told: dict[str, Json]) -> None:
    text = json.dumps({"notificationType": "Received", **told})
    with pytest.raises(RequestRefused) as refused:
        ses.parse_ses_mail(parse_members(sign_message(Message=text)))
    assert refused.value.code == "malformed-mail"
