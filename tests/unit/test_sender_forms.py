"""Forms of senders: whole where they are in order, refused where not, and never the more work for being made so."""

import json
import time
from base64 import b64encode
from binascii import b2a_qp
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime
from functools import partial
from urllib.parse import quote_plus, unquote_to_bytes, urlencode

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from concurrency import offload
from senders import event_senders, mail_kinds, sender_request, ses, sns
from senders.event_senders import EventSender
from senders.mail_kinds import MailKind
from senders.sender_request import PostedForm, RequestRefused, SenderRequest
from tests.provider_requests import build_request

NOW = datetime(2026, 9, 1, 12, tzinfo=UTC)
MULTIPART = "multipart/form-data; boundary=b"
URLENCODED = "application/x-www-form-urlencoded"


def parse_body(body: bytes, content_type: str = MULTIPART) -> PostedForm:
    return sender_request.parse_form(sender_request.parse_media_type(content_type), body)


def form_part(value: bytes, header: bytes = b'Content-Disposition: form-data; name="a"') -> bytes:
    return b"--b\r\n" + header + b"\r\n\r\n" + value + b"\r\n"


def first_value(found: PostedForm) -> bytes:
    return bytes(found.values("a")[0])


def refusal_code(body: bytes, content_type: str = MULTIPART) -> str:
    with pytest.raises(RequestRefused) as refused:
        parse_body(body, content_type)
    return refused.value.code


# ── multipart ───────────────────────────────────────────────────────────────────────────────────────────────

VALUES = [
    b"",
    b"\r\n",
    b"\n--b\n",
    b"\r\n--",
    b"\r\n--c\r\n",
    b"\r\n--bb\r\n",
    b"\r\n--b.",
    b"a\0b\xff",
    b"\r\n\r\n\r\n",
]


@pytest.mark.parametrize("value", VALUES)
def test_a_value_comes_byte_for_byte(value: bytes) -> None:
    found = parse_body(form_part(value) + form_part(value) + b"--b--\r\n")
    assert [bytes(one) for one in found.values("a")] == [value, value]


@pytest.mark.parametrize("end", [b"--b--", b"--b--\r\n", b"--b--\r\nafterwards\r\n--b\r\n"])
def test_after_the_last_boundary_nothing_matters(end: bytes) -> None:
    assert len(parse_body(form_part(b"1") + end).parts) == 1


def test_a_boundary_may_be_quoted_and_padded() -> None:
    body = form_part(b"1").replace(b"--b\r\n", b"--b \t\r\n") + b"--b--"
    assert first_value(parse_body(body, 'multipart/form-data; charset=x; Boundary="b"')) == b"1"


def test_values_are_views_of_the_body() -> None:
    body = form_part(b"1" * 1_000) + b"--b--"
    value = parse_body(body).first("a")
    assert value is not None
    assert value.obj is body


@pytest.mark.parametrize(
    ("header", "name", "filename", "is_file"),
    [
        (b'Content-Disposition: form-data; name="a"; filename="x.pdf"', "a", "x.pdf", True),
        (b'content-disposition: form-data; filename=""; name=a', "a", "", True),
        (b'Content-Disposition: form-data; filename="../../etc/passwd"', "", "../../etc/passwd", True),
        (b'Content-Disposition: form-data; name="a"; filename="a\\"b;c"', "a", 'a"b;c', True),
        (b'Content-Disposition: form-data; name="a"; filename="caf\xc3\xa9"', "a", "café", True),
        (b'Content-Disposition: form-data; name="a"; filename="caf\xe9"', "a", "café", True),
        (b"Content-Disposition: form-data; name=\"a\"; filename*=UTF-8''x", "a", None, True),
        (b"Content-Type: text/plain", "", None, False),
        (b'X: "', "", None, False),
    ],
)
def test_a_part_with_any_name_is_stored(
    header: bytes,
    name: str,
    filename: str | None,
    is_file: bool,  # noqa: FBT001
) -> None:
    (found,) = parse_body(form_part(b"1", header) + b"--b--").parts
    assert (found.name, found.filename, found.is_file, bytes(found.value)) == (name, filename, is_file, b"1")
    assert (name in parse_body(form_part(b"1", header) + b"--b--")) is not is_file


def test_a_part_without_a_header_is_kept_too() -> None:
    (found,) = parse_body(b"--b\r\n\r\n1\r\n--b--").parts
    assert bytes(found.value) == b"1"


@pytest.mark.parametrize(
    "content_type",
    [
        "multipart/form-data",
        "multipart/form-data; boundary=",
        'multipart/form-data; boundary=""',
        "multipart/form-data; bound=b",
        "multipart/form-data; boundary=" + "b" * 300,
        "multipart/form-data; boundary=c",
    ],
)
def test_a_form_without_its_boundary_is_refused(content_type: str) -> None:
    assert refusal_code(form_part(b"1") + b"--b--", content_type) == "malformed-form"


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"--b",
        b"--b\r\n",
        form_part(b"1"),
        form_part(b"1") + b"--b",
        b"before\r\n" + form_part(b"1") + b"--b--",
        b"--b\r\n--b--",
        b"--b\r\na: b\r\n--b--",
        form_part(b"1", b"X: " + b"x" * sender_request.MAX_HEADER_BYTES) + b"--b--",
    ],
)
def test_a_form_that_is_cut_or_broken_is_refused(body: bytes) -> None:
    assert refusal_code(body) == "malformed-form"


def test_media_types_other_than_forms_are_refused() -> None:
    assert refusal_code(b"{}", "application/json") == "unsupported-media-type"


HEADER_OF_PARAMETERS = b'Content-Disposition: form-data; x="' + b';a="' * 2_000
BOMBS: dict[str, tuple[str, Callable[[], bytes]]] = {
    "parts": (MULTIPART, lambda: form_part(b"") * (sender_request.MAX_PARTS + 1) + b"--b--"),
    "almost boundaries": (MULTIPART, lambda: form_part(b"") + b"\r\n--bx" * 5_000_000),
    "padding": (MULTIPART, lambda: form_part(b"")[:-2] + b"\r\n--b" + b" " * 30_000_000 + b"\r\n"),
    "line ends": (MULTIPART, lambda: b"\r\n" * 15_000_000),
    "parameters": (MULTIPART, lambda: form_part(b"", HEADER_OF_PARAMETERS) * 2_000 + b"--b--"),
    "fields": (URLENCODED, lambda: b"&" * 30_000_000),
    "a name": (URLENCODED, lambda: b"a" * 30_000_000),
}


@pytest.mark.parametrize(("content_type", "made"), BOMBS.values(), ids=BOMBS)
def test_a_form_that_is_made_to_cost_time_costs_little(content_type: str, made: Callable[[], bytes]) -> None:
    body = made()
    began = time.process_time()
    assert refusal_code(body, content_type) == "malformed-form"
    assert time.process_time() - began < 6


# ── urlencoded ──────────────────────────────────────────────────────────────────────────────────────────────


@given(st.lists(st.tuples(st.text(), st.binary()), max_size=5))
def test_urlencoded_fields_are_decoded(pairs: list[tuple[str, bytes]]) -> None:
    found = parse_body(urlencode(pairs).encode(), URLENCODED)
    assert [(one.name, bytes(one.value)) for one in found.parts] == pairs


@given(st.text(alphabet="%+=ab_\r\n 3Dfé"))
def test_escapes_are_read_as_everywhere(text: str) -> None:
    raw = text.encode().replace(b"&", b"")
    try:
        value = first_value(parse_body(b"a=" + raw, URLENCODED))
    except RequestRefused:
        assert unquote_to_bytes(raw).count(b"%")
    else:
        assert value == unquote_to_bytes(raw.replace(b"+", b" "))


@pytest.mark.parametrize("shift", range(4))
def test_an_escape_is_read_whole_wherever_a_large_value_is_cut(shift: int) -> None:
    value = b"x" * shift + "é".encode() * 600_000
    assert first_value(parse_body(b"a=" + quote_plus(value).encode(), URLENCODED)) == value


def test_a_large_value_is_not_read_while_others_wait() -> None:
    found = parse_body(b"a=" + b"x" * 2_000_000, URLENCODED)
    with pytest.raises(offload.BudgetExceeded):
        offload.try_inline(found.first, "a")
    assert first_value(found) == b"x" * 2_000_000


@pytest.mark.parametrize("body", [b"a=%", b"a=%4", b"a=%zz", b"%=1", b"a" * 9_000 + b"=1"])
def test_invalid_urlencoding_is_refused(body: bytes) -> None:
    with pytest.raises(RequestRefused) as refused:
        _ = [one.value for one in parse_body(body, URLENCODED).parts]
    assert refused.value.code == "malformed-form"


def test_names_without_values_and_values_without_names_are_kept() -> None:
    found = parse_body(b"a&=b&&c=", URLENCODED)
    assert [(one.name, bytes(one.value)) for one in found.parts] == [("a", b""), ("", b"b"), ("c", b"")]


# ── mails ───────────────────────────────────────────────────────────────────────────────────────────────────


def mail_request(body: bytes, content_type: str) -> SenderRequest:
    return build_request(body, [(b"Content-Type", content_type.encode())] if content_type else [], NOW)


@pytest.mark.parametrize(
    ("body", "content_type", "expected"),
    [
        (b"", "", MailKind.NATIVE),
        (b"{}", "application/json; charset=utf-8", MailKind.NATIVE),
        (b'{"signature": "x", "event": {}}', "application/json", MailKind.NATIVE),
        (b'{"Type":1,"MessageId":1,"TopicArn":1,"Signature":1}', "application/json", MailKind.SNS),
        (b"timestamp=&token=&signature=", URLENCODED, MailKind.MAILGUN_PARSED),
        (b"envelope=&headers=", URLENCODED, MailKind.SENDGRID_PARSED),
    ],
)
def test_the_kind_of_a_mail_follows_from_its_media_type_and_fields(
    body: bytes, content_type: str, expected: MailKind
) -> None:
    assert mail_kinds.recognize_mail(mail_request(body, content_type)) is expected


@pytest.mark.parametrize(
    ("body", "content_type", "expected"),
    [
        (b"{}", "", "unsupported-media-type"),
        (b"{}", "text/plain", "unsupported-media-type"),
        (b"{", "application/json", "malformed-json"),
        (b"a=b", URLENCODED, "unknown-mail"),
        (b"timestamp=&token=", URLENCODED, "unknown-mail"),
        (b"envelope=", URLENCODED, "unknown-mail"),
        (b"", "multipart/form-data", "malformed-form"),
    ],
)
def test_requests_without_a_mail_are_refused(body: bytes, content_type: str, expected: str) -> None:
    with pytest.raises(RequestRefused) as refused:
        mail_kinds.recognize_mail(mail_request(body, content_type))
    assert refused.value.code == expected


def deduplication_key_of(fields: dict[str, str]) -> str | None:
    request = mail_request(urlencode(fields).encode(), URLENCODED)
    return mail_kinds.deduplication_key(request, mail_kinds.recognize_mail(request))


SIGNATURE = {"timestamp": "1", "token": "2", "signature": "3"}
SENT = {**SIGNATURE, "recipient": "a@in.test", "Message-Id": "<1@test>"}


def test_a_mail_for_another_recipient_or_with_another_content_is_another() -> None:
    assert deduplication_key_of(SENT) == deduplication_key_of(
        {**SENT, "token": "other", "X-Mailgun-Sscore": "0.3", "body-plain": "\r\n"}
    )
    assert deduplication_key_of(SENT) != deduplication_key_of({**SENT, "recipient": "b@in.test"})
    assert deduplication_key_of(SENT) != deduplication_key_of({**SENT, "Message-Id": "<2@test>"})
    for name in ("from", "subject", "body-plain", "body-html"):
        assert deduplication_key_of(SENT) != deduplication_key_of({**SENT, name: "other"})


RAW = (
    "Received: from {}\r\nFrom: Ada <ada@example.org>\r\nSubject: {}\r\nDate: Tue, 1 Sep 2026 11:59:20 +0000\r\n"
    "Message-ID: <1@test>\r\nContent-Type: multipart/mixed; boundary={}\r\n\r\n{}"
)


def raw_deduplication_key(
    received: str, subject: str, boundary: str, content: bytes, encoding: str
) -> str | None:
    encoded = b64encode(content).decode() if encoding == "base64" else b2a_qp(content).decode()
    attached = (
        f"--{boundary}\r\nContent-Type: text/plain; charset=utf-8\r\nContent-Disposition: attachment; filename=a.txt"
        f"\r\nContent-Transfer-Encoding: {encoding}\r\n\r\n{encoded}\r\n--{boundary}--\r\n"
    )
    envelope = '{"to": ["a@in.test"], "from": ""}'
    return deduplication_key_of(
        {"email": RAW.format(received, subject, boundary, attached), "envelope": envelope}
    )


def test_a_mail_that_is_encoded_and_sent_on_anew_is_the_same_mail() -> None:
    first = raw_deduplication_key("one", "=?utf-8?q?Gr=C3=BC=C3=9Fe?=", "b1", "Grüße".encode(), "base64")
    assert first == raw_deduplication_key(
        "two", "=?utf-8?b?R3LDvMOfZQ==?=", "b2", "Grüße".encode(), "quoted-printable"
    )
    assert first != raw_deduplication_key("one", "=?utf-8?q?Gr=C3=BC=C3=9Fe?=", "b1", b"other", "base64")


def test_a_mail_without_a_message_id_is_known_by_all_that_is_said_of_it() -> None:
    anonymous = {**SENT, "Message-Id": " ", "subject": "one"}
    assert deduplication_key_of(anonymous) == deduplication_key_of(
        {**anonymous, **dict.fromkeys(SIGNATURE, "new")}
    )
    assert deduplication_key_of(anonymous) != deduplication_key_of({**anonymous, "subject": "two"})


@pytest.mark.parametrize(
    ("head", "found"),
    [
        ("Subject: a\nMessage-ID: <1@test>\nTo: b\n", True),
        ("subject: a\r\nmessage-id:\r\n <1@test>\r\n\r\n", True),
        ("Subject: a\n\nMessage-ID: <1@test>\n", False),
        ("X-Message-ID: <1@test>\n", False),
        ("Subject: a\n Message-ID: <1@test>\n", False),
    ],
)
def test_the_message_id_is_read_from_the_header_of_a_mail_alone(head: str, found: bool) -> None:  # noqa: FBT001
    message_id = mail_kinds.find_message_id(memoryview(head.encode()))
    assert message_id == ("<1@test>" if found else None)


@pytest.mark.parametrize("told", ["[]", "{", '{"to": "a"}', '{"from": 1}', "<a@in.test>"])
def test_an_envelope_that_cannot_be_read_is_empty(told: str) -> None:
    mail_ = {"email": "Message-ID: <1@test>\n\n"}
    assert deduplication_key_of({**mail_, "envelope": told}) == deduplication_key_of(
        {**mail_, "envelope": "{}"}
    )


def test_a_mail_as_json_is_known_by_the_message_id_that_its_caller_gives() -> None:
    def native(body: bytes) -> str | None:
        return mail_kinds.deduplication_key(mail_request(body, "application/json"), MailKind.NATIVE)

    sent = b'{"to": "a@in.test", "subject": "%s", "email_headers": {"message-ID": "<1@test>", "X": "%s"}}'
    assert native(sent % (b"a", b"1")) == native(sent % (b"a", b"2"))
    assert native(sent % (b"a", b"1")) != native(sent % (b"b", b"1"))
    for body in (b"", b"{}", b"[]", b'{"email_headers": []}', b'{"email_headers": {"Message-ID": 1}}'):
        assert native(body) is None


def stored_key(ses_id: str, *, dkim: str = "PASS", **headers: str | None) -> str | None:
    """Return the storage key of a mail that SES has stored; `headers` replace the usual ones, or remove them
    if None.
    """
    usual = {
        "From": "a@example.org",
        "Subject": "One",
        "Date": "Tue, 1 Sep 2026 11:59:20 +0000",
        "Message-ID": "<1@test>",
        "DKIM-Signature": "v=1; d=example.org; bh=aGFz\r\n aA==; b=c2ln",
    }
    told = {
        "notificationType": "Received",
        "mail": {
            "messageId": ses_id,
            "source": "a@example.org",
            "headers": [
                {"name": name, "value": value}
                for name, value in {**usual, **headers}.items()
                if value is not None
            ],
            "commonHeaders": {},
        },
        "receipt": {
            "recipients": ["b@in.test"],
            "dkimVerdict": {"status": dkim},
            "action": {"type": "S3", "bucketName": "b", "objectKey": "k"},
        },
    }
    message = {
        "Type": "Notification",
        "MessageId": "1",
        "TopicArn": "arn:aws:sns:us-east-1:111122223333:inbound-mail",
        "Message": json.dumps(told),
        "Timestamp": "2026-09-01T11:59:54.000Z",
        "SignatureVersion": "2",
        "Signature": "s",
        "SigningCertURL": "https://example.org",
    }
    return mail_kinds.deduplication_key(
        mail_request(json.dumps(message).encode(), "application/json"), MailKind.SNS
    )


def test_a_stored_mail_is_known_by_headers_that_prove_its_content() -> None:
    assert stored_key("1") == stored_key("2", Received="from elsewhere")
    assert stored_key("1") == stored_key("2", **{"DKIM-Signature": "v=1; bh=aGFzaA==; b=new; d=example.org"})
    for name in ("From", "Subject", "Date", "Message-ID"):
        assert stored_key("1") != stored_key("1", **{name: "other"})
    assert stored_key("1") != stored_key("1", **{"DKIM-Signature": "v=1; bh=b3RoZXI=; b=c2ln"})


@pytest.mark.parametrize(
    ("dkim", "headers"),
    [
        ("FAIL", {}),
        ("PASS", {"Message-ID": None}),
        ("PASS", {"DKIM-Signature": None}),
        ("PASS", {"DKIM-Signature": "v=1; b=c2ln"}),
        ("PASS", {"DKIM-Signature": "v=1; bh=aGFzaA==; l=10; b=c2ln"}),
    ],
)
def test_a_stored_mail_with_unproven_headers_is_deduplicated_by_its_id(
    dkim: str, headers: dict[str, str | None]
) -> None:
    assert stored_key("1", dkim=dkim, **headers) == stored_key("1", dkim=dkim, **headers)
    assert stored_key("1", dkim=dkim, **headers) != stored_key("2", dkim=dkim, **headers)


# ── arbitrary input ─────────────────────────────────────────────────────────────────────────────────────────

PIECES = st.sampled_from(
    b"""--b \r\n -- Content-Disposition:form-data;name= filename= " a ; = % %4 & { } [ ] : , "Type" "data" "type" "id"
    \xff \0 \\ 1.0 timestamp= token= signature= envelope= headers= email= payload=""".split(b" ")
)
BODIES = st.one_of(st.binary(max_size=50), st.lists(PIECES, max_size=30).map(b"".join))
TYPES = st.sampled_from(
    [
        *(
            MULTIPART,
            URLENCODED,
            'multipart/form-data; boundary="b',
            "application/json",
            "text/plain",
            "a;b",
            "",
        ),
        *(
            "application/cloudevents+json",
            "application/cloudevents-batch+json",
            "application/cloudevents+xml",
        ),
    ]
)
NAMES = st.sampled_from(
    [b"ce-specversion", b"ce-id", b"ce-type", b"ce-source", b"ce-time", b"x-github-event"]
)
HEADER_LISTS = st.lists(st.tuples(NAMES, st.one_of(st.binary(max_size=10), st.just(b"1.0"))), max_size=6)


@settings(max_examples=200)
@given(BODIES, TYPES, HEADER_LISTS)
def test_any_bytes_are_parsed_or_refused(
    body: bytes, content_type: str, headers: list[tuple[bytes, bytes]]
) -> None:
    request = build_request(body, [(b"Content-Type", content_type.encode()), *headers], NOW)
    for sender in EventSender:
        _read_or_refused(partial(event_senders.parse_event, request, sender))
    _read_or_refused(lambda: event_senders.recognize_sender(request))
    _read_or_refused(lambda: ses.parse_ses_mail(sns.parse_sns_message(request)))
    _read_or_refused(lambda: mail_kinds.deduplication_key(request, mail_kinds.recognize_mail(request)))
    _read_or_refused(lambda: [bytes(one.value) for one in mail_kinds.parse_mail_fields(request).parts])


def _read_or_refused(read: Callable[[], object]) -> None:
    with suppress(RequestRefused):
        read()
