"""Mails as services hand them in, as they should be, and as they should not be."""

from __future__ import annotations

import base64
import binascii
import email
import email.policy
import json
import random
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from hashlib import sha256
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from mail import content_decoding, headers, mail_content, mail_parsing, service_forms
from mail.mail_content import AttachmentLabel, ParsedMailContent
from mail.mail_limits import InvalidMail, MailLimits
from mail.mail_parsing import MailPart
from mail.service_forms import FormFile, MailForm
from tests import hostile_json, lock_holds

PAYLOADS = Path(__file__).parent.parent / "payloads"
S3_OBJECT = "ses/s3/fixture-inbound-mail/mail/c49c250cf75ad2a6f058032ec89a2e21b845f938.eml"


class KeptAttachments:
    """The contents of attachments, in their order."""

    def __init__(self) -> None:
        self.contents: list[bytes] = []

    def __call__(self, _label: AttachmentLabel, pieces: Iterator[bytes]) -> None:
        self.contents.append(mail_content.join_pieces(pieces))


def read(raw: bytes | str, limits: MailLimits | None = None) -> tuple[ParsedMailContent, list[bytes]]:
    kept = KeptAttachments()
    written = raw.encode("latin-1") if isinstance(raw, str) else raw
    return mail_parsing.parse_mail(memoryview(written), kept, limits or MailLimits()), kept.contents


def only_attachment(raw: bytes | str) -> tuple[AttachmentLabel, bytes]:
    """Return the only attachment of a mail."""
    mail, contents = read(raw)
    assert len(mail.attachments) == 1
    return mail.attachments[0].label, contents[0]


# ── as the services hand them in ────────────────────────────────────────────────────────────────────────────


def recorded_body(name: str) -> tuple[str, bytes]:
    """Return the content type and the body of a recorded request."""
    head, _, body = (PAYLOADS / name).read_bytes().partition(b"\r\n\r\n")
    lines = dict(line.split(": ", 1) for line in head.decode().split("\r\n")[1:])
    return lines["Content-Type"], body


def recorded_form(name: str) -> MailForm:
    content_type, body = recorded_body(name)
    fields: dict[str, list[bytes]] = {}
    if not content_type.startswith("multipart/"):
        for key, value in parse_qsl(body.decode(), keep_blank_values=True):
            fields.setdefault(key, []).append(value.encode())
        return MailForm(fields)
    files = []
    boundary = b"--" + content_type.partition("boundary=")[2].encode()
    for part in (b"\r\n" + body).split(b"\r\n" + boundary)[1:-1]:
        head, _, content = part.removeprefix(b"\r\n").partition(b"\r\n\r\n")
        told = email.message_from_bytes(head)
        field = str(told.get_param("name", header="content-disposition"))
        if filename := told.get_filename():
            files.append(FormFile(field, filename, told.get_content_type(), content))
        else:
            fields.setdefault(field, []).append(content)
    return MailForm(fields, files)


def sns_content(name: str) -> bytes:
    told = json.loads(json.loads(recorded_body(name)[1])["Message"])
    is_base64 = told["receipt"]["action"].get("encoding") == "BASE64"
    return base64.b64decode(told["content"]) if is_base64 else told["content"].encode()


def read_recorded(name: str) -> tuple[ParsedMailContent, list[bytes]]:
    kept = KeptAttachments()
    match name.partition("_")[0]:
        case "sg":
            return service_forms.parse_sendgrid_form(
                recorded_form(f"sendgrid/{name}.http"), kept
            ), kept.contents
        case "mg":
            return service_forms.parse_mailgun_form(
                recorded_form(f"mailgun/{name}.http"), kept
            ), kept.contents
    raw = (PAYLOADS / S3_OBJECT).read_bytes() if "s3" in name else sns_content(f"ses/{name}.http")
    return mail_parsing.parse_mail(raw, kept), kept.contents


@pytest.mark.parametrize(
    "name",
    [
        "sg_raw_mime",
        "sg_raw_mime_lf",
        "sg_parsed_basic",
        "sg_parsed_attachments",
        "sg_parsed_latin1",
        "mg_raw_mime",
        "mg_parsed_multipart",
        "mg_parsed_urlencoded",
        "mg_html_only",
        "mg_store_notify",
        "ses_sns_utf8_v1",
        "ses_sns_base64_v2",
        "ses_sns_base64_8bit_latin1",
        "ses_s3_action",
    ],
)
def test_a_recorded_mail_is_read_as_it_was_meant(name: str) -> None:
    case = json.loads((PAYLOADS / f"expected/{name}.json").read_text())
    mail, contents = read_recorded(name)
    expected, found = case["normalized"], mail.as_json()
    for part in ("from", "to", "subject"):
        assert found[part] == expected[part]
    for part in ("body_text", "body_html"):
        assert found[part].rstrip() == expected[part].rstrip()
    for each in expected["attachments"]:
        each.setdefault("content_id", "")
    assert [
        {key: each.get(key, "") for key in told}
        for each, told in zip(found["attachments"], expected["attachments"], strict=True)
    ] == expected["attachments"]
    assert [sha256(each).hexdigest() for each in contents] == [
        each["sha256"] for each in expected["attachments"] if "sha256" in each
    ]
    shown = {key.lower(): value for key, value in mail.email_headers.items()}
    assert (
        expected["email_headers"].items()
        <= {key: shown.get(key.lower()) for key in expected["email_headers"]}.items()
    )
    assert mail.message_id == expected["email_headers"]["Message-ID"]
    assert len(shown["received"]) == 2
    for part in ("from", "to"):
        assert headers.bare_addresses(found[part]) == case["addresses"][part]


def test_a_form_that_lies_about_its_files_is_read_all_the_same() -> None:
    form = MailForm(
        {
            "attachment-info": [b'{"attachment1": [], "attachment2": {"filename": 7, "type": {}}}'],
            "content-ids": [b'{"a": ["attachment1"], "b": "attachment1"}'],
            "charsets": [b'{"text": 5, "subject": "klingon"'],
            "headers": [b"no header at all"],
            "subject": [b"two\r\nlines \xff"],
        },
        [
            FormFile("attachment2", "../b", "text/x; charset=utf-8", b""),
            FormFile("attachment1", "\ud800", "?", b"1"),
        ],
    )
    mail = service_forms.parse_sendgrid_form(form, KeptAttachments())
    assert mail.subject == "two lines ÿ"
    assert [each.label for each in mail.attachments] == [
        AttachmentLabel("", "application/octet-stream", content_id="b"),
        AttachmentLabel("b", "text/x", charset="utf-8"),
    ]
    kept = service_forms.parse_mailgun_form(
        MailForm({"attachments": [b'[1, {"url": "http://a", "size": -1}]'], "message-headers": [b"[[]]"]}),
        KeptAttachments(),
    )
    assert [(each.url, each.size) for each in kept.attachments] == [("", 0)]


# ── headers ─────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("written", "shown"),
    [
        ("=?utf-8?q?Gr=C3=BC=C3=9Fe?=", "Grüße"),
        ("=?UTF-8?B?R3LDvMOfZQ==?= aus =?iso-8859-1?Q?K=F6ln?=", "Grüße aus Köln"),
        ("=?utf-8?b?R3LD?= =?utf-8?b?vMOfZQ?=", "Grüße"),  # cut in the middle of a character
        ("=?utf-8?q?a?=\r\n =?utf-8?q?_b?=", "a b"),
        ("=?utf-8*de?q?a?= c", "a c"),
        ("=?klingon?q?a=FC?=", "aü"),
        ("=?utf-8?b?!!!?= x", " x"),
        ("=?utf-8?x?a?=", "=?utf-8?x?a?="),
        ("=?utf-8?q?a=0D=0ABcc:_b?=", "a Bcc: b"),
        ("Gr\xc3\xbc\xc3\x9fe", "Grüße"),  # raw bytes of UTF-8
        ("Gr\xfc\xdfe", "Grüße"),  # of ISO-8859-1
        ("a\r\n\tb", "a b"),
        ("nul \x00", "nul \ufffd"),
    ],
)
def test_a_header_is_shown_decoded(written: str, shown: str) -> None:
    mail, _ = read(f"Subject: {written}\r\n\r\n")
    assert mail.subject == shown
    assert mail.email_headers == {"Subject": mail.subject}


def test_a_name_that_was_encoded_is_not_taken_for_an_address() -> None:
    mail, _ = read(
        "From: =?utf-8?q?boss=40example=2Eorg=2C_=3Cboss=40example=2Eorg=3E?= <eve@example.net>\n\n"
    )
    assert mail.from_ == '"boss@example.org, <boss@example.org>" <eve@example.net>'
    assert mail.email_headers["From"] == mail.from_
    assert headers.bare_addresses(mail.from_) == ["eve@example.net"]


def test_headers_keep_all_their_values_and_their_spelling() -> None:
    mail, _ = read("X-A: 1\nReceived: b\nx-a: 2\nMessage-id: <a@b> (c)\nTo: a@b\nTo: C <c@d>\n\n")
    assert mail.email_headers["X-A"] == ["1", "2"]
    assert (mail.message_id, mail.to) == ("<a@b>", "a@b, C <c@d>")


@pytest.mark.parametrize(
    ("disposition", "name"),
    [
        ('attachment; filename="a b.txt"', "a b.txt"),
        (r'attachment; filename="a\"b\\.txt"', ".txt"),
        ("attachment; filename*=utf-8''%C3%A4%20b.txt", "ä b.txt"),
        ("attachment; filename=\"a.txt\"; filename*=UTF-8'de'%C3%A4.txt", "ä.txt"),
        ("attachment; filename*0*=iso-8859-1''%E4; filename*2=.txt; filename*1=\"b c\"", "äb c.txt"),
        ('attachment; filename="=?utf-8?q?=C3=A4?= =?utf-8?q?=2Etxt?="', "ä.txt"),
        ('attachment;\r\n filename="\xc3\xa4.txt"', "ä.txt"),
        ('attachment; filename="\xe4.txt"', "ä.txt"),
        ('attachment; filename="../../etc/passwd"', "passwd"),
        (r'attachment; filename="C:\\Temp\\a.txt"', "a.txt"),
        ('attachment; filename=".."', ""),
        ("attachment; filename*=utf-8''a%0D%0Ab%00%E2%80%AEfdp.exe", "ab\ufffdfdp.exe"),
        ('attachment; filename="' + "x" * 300 + '.txt"', "x" * 251 + ".txt"),
        ('attachment; filename="open', "open"),
        ("attachment; filename=a.txt; filename=b.txt", "a.txt"),
        ("attachment; =; ;;filename= a.txt ", "a.txt"),
        ("attachment", ""),
    ],
)
def test_the_name_of_a_file_is_read_and_made_harmless(disposition: str, name: str) -> None:
    label, content = only_attachment(
        f"Content-Disposition: {disposition}\r\nContent-Type: text/plain\r\n\r\nx"
    )
    assert (label.filename, content) == (name, b"x")


# ── bodies ──────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("content_type", "raw", "text"),
    [
        ("text/plain; charset=utf-8", b"\xc3\xa9", "é"),
        ("text/plain; charset=iso-8859-1", b"\xe9 \x80", "é €"),
        ("text/plain; charset=us-ascii", b"\xe9", "é"),
        ("text/plain; charset=us-ascii", b"\xc3\xa9", "é"),
        ("text/plain; charset=utf-8", b"ok \xe9 \xc3\xa9", "ok \ufffd é"),
        ("text/plain; charset=unicode_escape", b"\\ud800", "\\ud800"),
        ("text/plain; charset=zlib", b"x", "x"),
        ("text/plain; charset=../../x", b"x", "x"),
        ('text/plain; charset="gb2312"', "鎔".encode("gb18030"), "鎔"),
        ("text/plain; charset=iso-2022-jp", "日本".encode("iso-2022-jp"), "日本"),
        ("text/plain; charset=utf-16", "日\r\n本".encode("utf-16"), "日\n本"),
        ("text", b"x", "x"),
        ("", b"a\x00b\r\nc", "a\ufffdb\nc"),
        ("text/plain; format=flowed", b"a \r\n>b \r\n-- \r\n", "a \n>b \n-- \n"),
    ],
)
def test_a_text_is_decoded_with_any_name_of_its_charset(content_type: str, raw: bytes, text: str) -> None:
    mail, _ = read(b"Content-Type: " + content_type.encode() + b"\r\n\r\n" + raw)
    assert mail.body_text == text


PLAIN = "Content-Type: text/plain\n\n"
PNG = "Content-Type: image/png\nContent-ID: <p@q>\nContent-Transfer-Encoding: base64\n\naGk=\n"


def make_container(boundary: str, *parts: str, kind: str = "mixed", end: str = "--", head: str = "") -> str:
    joined = "".join(f"\n--{boundary}\n{part}" for part in parts)
    head += f'Content-Type: multipart/{kind}; boundary="{boundary}"\n\n'
    return f"{head}preamble{joined}\n--{boundary}{end}\nepilogue"


def test_both_forms_of_a_text_are_taken_and_pictures_in_it_are_attachments() -> None:
    page = "Content-Type: text/html; charset=utf-8\n\n<img src=cid:p@q>"
    related = make_container("r", page, PNG, kind="related")
    alternative = make_container("a", PLAIN + "text", related, kind="alternative")
    mail, contents = read(
        make_container("m", alternative, "Content-Type: text/calendar\n\nBEGIN", head="Subject: s\n")
    )
    assert (mail.subject, mail.body_text, mail.body_html) == ("s", "text", "<img src=cid:p@q>")
    assert [each.as_json() for each in mail.attachments] == [
        {
            "filename": "",
            "content_type": "image/png",
            "size": 2,
            "sha256": sha256(b"hi").hexdigest(),
            "content_id": "p@q",
        },
        {"filename": "", "content_type": "text/calendar", "size": 5, "sha256": sha256(b"BEGIN").hexdigest()},
    ]
    assert contents == [b"hi", b"BEGIN"]


def test_a_text_around_a_picture_stays_one_text() -> None:
    mail, _ = read(make_container("m", PLAIN + "one", PNG, PLAIN + "two", PLAIN))
    assert mail.body_text == "one\ntwo"


def test_attachments_of_one_name_none_at_all_and_no_content_are_all_kept() -> None:
    named = 'Content-Disposition: attachment; filename="a"\nContent-Type: text/plain\n\n'
    mail, contents = read(
        make_container("m", named + "1", named + "2", named, "Content-Type: a/b\n\n3", named.rstrip())
    )
    assert [each.label.filename for each in mail.attachments] == ["a", "a", "a", "", "a"]
    assert contents == [b"1", b"2", b"", b"3", b""]
    assert mail.body_text == ""


def test_a_mail_within_the_mail_is_an_attachment_and_nothing_of_it_is_the_mails() -> None:
    inner = make_container("i", PLAIN + "inner", PNG, head="Subject: inner\n")
    mail, contents = read(
        make_container(
            "m", PLAIN + "outer", f"Content-Type: message/rfc822\n\n{inner}", head="Subject: outer\n"
        )
    )
    assert (mail.subject, mail.body_text) == ("outer", "outer")
    assert contents == [inner.encode()]
    digest = make_container("m", "\nSubject: a\n\nb", kind="digest")
    assert only_attachment(digest)[0].content_type == "message/rfc822"


BROKEN: list[tuple[str, str, list[bytes]]] = [
    (make_container("m", PLAIN + "a", PNG, end=""), "a\nepilogue", [b"hi"]),
    (make_container("m", PLAIN + "a").replace("\n--m--\nepilogue", ""), "a", []),
    (
        make_container("m", PLAIN + "a").replace('"m"', '"n"'),
        "preamble\n--m\nContent-Type: text/plain\n\na\n--m--\nepilogue",
        [],
    ),
    ("Content-Type: multipart/mixed\n\na", "a", []),
    (make_container("=?utf-8?q?m?=", PLAIN + "a"), "a", []),
    (make_container("m"), "preamble\n--m--\nepilogue", []),
    (make_container("m", PLAIN + "a\n--mm\n --m\n--m x\nb"), "a\n--mm\n --m\n--m x\nb", []),
    (make_container("m", PLAIN + "a").replace("\n--m\n", "\n--m \t\n"), "a", []),
    (make_container("m", make_container("n", PLAIN + "a", end=""), PNG), "a\nepilogue", [b"hi"]),
    (make_container("m", make_container("m", PLAIN + "a", PNG)), "preamble\na", [b"hi"]),
    ("Subject: s\nno header\nbody", "no header\nbody", []),
    ("From a@b Tue Sep  1\nSubject: s\n\nb", "b", []),
    ("\r\n\r\nSubject: s\n\nb", "b", []),
    ("Subject: s", "", []),
    ("", "", []),
    ("\n", "", []),
    ("just text", "just text", []),
    (
        make_container(
            "m", PLAIN + "a", "Content-Transfer-Encoding: base64\nContent-Type: a/b\n\naGk\n*-- garbage"
        ),
        "a",
        [base64.b64decode("aGkgarbage==")],
    ),
]


@pytest.mark.parametrize(("raw", "text", "contents"), BROKEN)
def test_a_broken_mail_is_parsed_as_far_as_possible(raw: str, text: str, contents: list[bytes]) -> None:
    for written in (raw, raw.replace("\r\n", "\n").replace("\n", "\r\n")):
        mail, found = read(written)
        assert mail.body_text.replace("\r\n", "\n") == text
        assert len(found) == len(contents)
    assert read(raw)[1] == contents


@pytest.mark.parametrize("size", [0, 1, 56, 57, 58, 262_143, 262_144, 262_145, 700_001])
@pytest.mark.parametrize(
    ("encoding", "encoded"),
    [
        ("base64", base64.encodebytes),
        ("BASE64 ", lambda content: base64.encodebytes(content).replace(b"\n", b"\r\n")),
        ("base64", lambda content: base64.b64encode(content).rstrip(b"=")),
        ("quoted-printable", lambda content: binascii.b2a_qp(content, istext=False)),
        ("Quoted-Printable", lambda content: b"".join(b"=%02X" % byte for byte in content)),
        ("binary", bytes),
        ("x-unheard-of", bytes),
    ],
)
def test_a_content_is_decoded_alike_wherever_it_is_cut(
    size: int, encoding: str, encoded: Callable[[bytes], bytes]
) -> None:
    content = (bytes(range(256)) * (size // 256 + 1))[:size]
    head = f"Content-Type: a/b\nContent-Transfer-Encoding: {encoding}\n\n".encode()
    assert only_attachment(head + encoded(content))[1] == content


# ── beside the parser of Python's own ───────────────────────────────────────────────────────────────────────

TYPES = ["text/plain", "image/png", "multipart/mixed; boundary=b", "message/rfc822"]
ENCODINGS = ["base64", "quoted-printable"]
LINES = [
    *("--a", "--a--", "--b", "--b--", "--a ", "", "", "x: y", "text", " more", "=3D=", "aGk=", "\t"),
    *(f"Content-Type: {kind}" for kind in TYPES),
    *(f"Content-Transfer-Encoding: {encoding}" for encoding in ENCODINGS),
]
BOUNDARIES = re.compile(rb"--[ab](?:--)?[ \t]*\r?\n--[ab]")
"""One directly behind the other: Python's own parser passes over the second, even where it is the last."""


@given(st.lists(st.sampled_from(LINES), max_size=30), st.sampled_from(["\n", "\r\n"]))
@settings(max_examples=200)
def test_the_parts_are_those_that_pythons_own_parser_finds(lines: list[str], line_end: str) -> None:
    raw = line_end.join(["Content-Type: multipart/mixed; boundary=a", "", "--a", *lines]).encode()
    assume(not BOUNDARIES.search(raw))
    root = MailPart.parse(raw, 0, len(raw), MailLimits())
    ours = [
        (each.content_type, raw[each.start : each.end])
        for each in mail_parsing.find_leaves(raw, root, MailLimits()).leaves
    ]
    theirs = [
        (each.get_content_type().split()[0], each) for each in iterate_leaves(email.message_from_bytes(raw))
    ]
    assert [kind for kind, _ in ours] == [kind for kind, _ in theirs]
    for (kind, content), (_, part) in zip(ours, theirs, strict=True):
        # A mail within the mail is taken apart there, and a container without a part has no text.
        assert (
            kind in {"message/rfc822", "multipart/mixed"}
            or content.rstrip() == part.get_payload().encode().rstrip()
        )


def iterate_leaves(message: Any) -> Iterator[Any]:  # noqa: ANN401 - the type is generic in some versions alone
    if message.get_content_maintype() == "multipart" and message.is_multipart():
        for each in message.get_payload():
            yield from iterate_leaves(each)
    else:
        yield message


# ── bombs ───────────────────────────────────────────────────────────────────────────────────────────────────


def nested_mail(depth: int) -> str:
    raw = PLAIN + "x"
    for level in range(depth):
        raw = make_container(f"b{level}x", raw)
    return raw


@pytest.mark.parametrize(
    ("raw", "limits", "what"),
    [
        ("X: " + "y" * 300_000, MailLimits(), "headers take"),
        ("X: y\n z\n" * 40_000, MailLimits(), "headers take"),
        (make_container("m", *["X: y" + "\n z" * 80_000 + "\n\n"] * 10), MailLimits(), "of all parts"),
        (make_container("m", PNG, PNG), MailLimits(max_attachment_bytes=1), "An attachment"),
        (make_container("m", PNG, PNG), MailLimits(max_attachments_bytes=3), "together"),
    ],
)
def test_a_mail_that_holds_too_much_is_refused(raw: str, limits: MailLimits, what: str) -> None:
    with pytest.raises(InvalidMail, match=what):
        read(raw, limits)
    assert read(nested_mail(20))[0].body_text == "x"


@pytest.mark.parametrize(
    ("headers", "spf"),
    [
        ("X-Mailgun-Spf: Pass\n", "pass"),
        ("X-Mailgun-Spf: SoftFail\n", "softfail"),
        ("X-Mailgun-Spf: Pass\nX-Mailgun-Spf: Fail\n", "fail"),
        ("X-Mailgun-Spf: Pass\nX-Mailgun-Spf: Neutral\n", None),
        ("", None),
    ],
)
def test_a_header_that_a_sender_adds_never_improves_a_result_of_mailgun(
    headers: str, spf: str | None
) -> None:
    assert service_forms.parse_mailgun_reception(read(headers + "\nx")[0]).spf == spf


@pytest.mark.parametrize(
    ("raw", "limits", "truncated"),
    [
        (make_container("m", *[PNG] * 3), MailLimits(max_attachments=1), {"attachments": 2}),
        (make_container("m", *[PNG] * 1_000), MailLimits(), {"attachments": 749, "parts": 1}),
        (
            make_container("m", PLAIN + "x", *[make_container(f"m{n}", *["\n"] * 400) for n in range(3)]),
            MailLimits(),
            {"parts": 205},
        ),
        (nested_mail(22), MailLimits(), {"parts": 1}),
    ],
    ids=["attachments", "many attachments", "parts", "depth"],
)
def test_a_mail_with_too_many_pieces_is_cut_and_marked(
    raw: str, limits: MailLimits, truncated: dict[str, int]
) -> None:
    mail, contents = read(raw, limits)
    assert mail.as_json()["truncated"] == truncated
    assert len(contents) == len(mail.attachments) <= limits.max_attachments


def test_forms_with_too_many_pieces_are_cut_and_marked() -> None:
    files = [FormFile(f"attachment{n}", "a", "image/png", b"png") for n in range(1_000)]
    many_headers = "".join(f"X-{n}: y\n" for n in range(1_200))
    of_sendgrid = MailForm({"headers": [many_headers.encode()]}, files)
    of_mailgun = MailForm(
        {"message-headers": [json.dumps([[f"X-{n}", "y"] for n in range(1_200)]).encode()]}, files
    )
    for read_form, form in (
        (service_forms.parse_sendgrid_form, of_sendgrid),
        (service_forms.parse_mailgun_form, of_mailgun),
    ):
        mail = read_form(form, KeptAttachments())
        assert (mail.truncated, len(mail.email_headers)) == ({"attachments": 750}, 1_200)
        assert len(mail.attachments) == 250


def test_a_mail_keeps_each_of_its_headers_or_is_refused() -> None:
    mail, _ = read("".join(f"X-{n}: y\n" for n in range(1_200)) + "X: y\n" * 1_200 + "\nx")
    assert [*mail.email_headers] == [*(f"X-{n}" for n in range(1_200)), "X"]
    assert mail.email_headers["X"] == ["y"] * 1_200
    assert "truncated" not in mail.as_json()
    pairs = [[f"X-{n}", "y" * 300] for n in range(1_000)]
    form = MailForm({"message-headers": [json.dumps(pairs).encode()]}, [])
    with pytest.raises(InvalidMail, match="more than 262,144 bytes"):
        service_forms.parse_mailgun_form(form, KeptAttachments())


CODECS = sorted(
    {
        *content_decoding.CODECS,
        "utf_7",
        "rot13",
        "base64",
        "punycode",
        "idna",
        "raw_unicode_escape",
        "mbcs",
        "undefined",
    }
)


@pytest.mark.parametrize("codec", CODECS)
def test_a_text_cut_at_any_byte_is_some_text(codec: str) -> None:
    chance = random.Random(codec)
    samples = [b"\x1b$B\x1b$)C\x0e~{\xff\xfe\x00\xd8" * 2, b"=" * 3, bytes(range(0, 256, 7))]
    samples += [chance.randbytes(40) for _ in range(20)]
    with suppress(LookupError, UnicodeError):
        samples.append("Grüße 日本語 한국어 привет € \U0001f600".encode(codec, "ignore"))
    for raw in samples:
        for at in range(len(raw) + 1):
            for pieces in ([raw[:at]], [raw[:at], raw[at:]]):
                text = content_decoding.decode_text_pieces(pieces, codec)
                assert "\0" not in text
                text.encode()  # no lone surrogates, which JSON can't contain


@pytest.mark.parametrize("codec", ["utf-16-le", "utf-16-be", "utf-32-le", "utf-32-be"])
def test_a_text_without_a_byte_order_mark_is_read_in_the_order_of_its_zeros(codec: str) -> None:
    charset = codec[:6]
    raw = "Grüße".encode(codec)
    encoded = base64.b64encode(raw).decode()
    mail, _ = read(
        f"Subject: =?{charset}?b?{encoded}?=\nFrom: =?{charset}?b?{encoded}?= <a@b.example>\n"
        f"Content-Type: text/plain; charset={charset}\nContent-Transfer-Encoding: base64\n\n{encoded}\n"
    )
    assert (mail.subject, mail.from_, mail.body_text) == ("Grüße", "Grüße <a@b.example>", "Grüße")
    form = MailForm({"text": [raw], "charsets": [json.dumps({"text": charset}).encode()]})
    assert service_forms.parse_sendgrid_form(form, KeptAttachments()).body_text == "Grüße"


def test_a_text_too_long_for_a_body_is_kept_as_an_attachment() -> None:
    mail, contents = read(
        make_container("m", PLAIN + "a" * 11, PLAIN + "short"), MailLimits(max_text_bytes=10)
    )
    assert (mail.body_text, contents) == ("short", [b"a" * 11])


HOSTILE = [
    "From: " + "(" * 200_000,
    "From: " + '"' * 200_000,
    "To: " + "<" * 100_000,
    "To: " + "a:" * 100_000,
    "Subject: " + "=?utf-8?q?a?= " * 18_000,
    "Subject: " + "=?a?q?" * 40_000,
    "Content-Type: a/b" + ";" * 200_000,
    "Content-Type: a/b; a=" + '"' * 200_000,
    "Content-Type: a/b" + '; a="' * 40_000,
    "Content-Disposition: attachment" + "".join(f"; filename*{n % 1000}=a" for n in range(15_000)),
    "Content-Disposition: attachment; filename*=utf-8'" + "%41" * 80_000,
    "Content-Type: multipart/mixed; boundary=" + "b" * 1_000 + "\n\n" + ("--" + "b" * 1_000) * 2_000,
    "Content-Type: multipart/mixed; boundary=b\n\n" + "--b" * 700_000,
    "Content-Type: multipart/mixed; boundary=b\n\n" + "\n--bb" * 1_000_000,
    "Content-Type: multipart/mixed; boundary=b\n\n" + ("\n--b" + " " * 199 + "x") * 20_000,
    "Content-Transfer-Encoding: base64\nContent-Type: a/b\n\n" + "\x80=" * 1_000_000,
    "Content-Transfer-Encoding: quoted-printable\nContent-Type: a/b\n\n" + "=" * 2_000_000,
]


@pytest.mark.parametrize("raw", HOSTILE, ids=range(len(HOSTILE)))
@pytest.mark.timeout(20)
def test_no_mail_takes_more_time_than_it_is_long(raw: str) -> None:
    read(raw + "\n\n")


@given(st.binary(max_size=400))
def test_any_bytes_parse_as_a_mail(raw: bytes) -> None:
    for head in (
        b"",
        b"Content-Type: multipart/mixed; boundary=",
        b"Content-Disposition: ",
        b"From: ",
        b"Subject: =?",
    ):
        told = json.dumps(read(head + raw)[0].as_json(), ensure_ascii=False)
        assert "\\u0000" not in told.replace("\\\\", "")
        told.encode()


# ── size ────────────────────────────────────────────────────────────────────────────────────────────────────

MEASURED = """
import re, sys, time
from mail import mail_content, mail_parsing

def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) * 1024

contents = []
before, began = peak(), time.process_time()
with open(sys.argv[1], "rb") as file:
    mail = mail_parsing.parse_mail(file, lambda label, pieces: contents.append(mail_content.join_pieces(pieces)))
print(time.process_time() - began, peak() - before, mail.attachments[0].size, len(contents[0]))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak of memory is read from /proc")
def test_a_mail_of_25_mb_takes_less_than_two_seconds_and_twice_its_memory(tmp_path: Path) -> None:
    content = bytes(range(256)) * 70_400
    encoded = base64.encodebytes(content).replace(b"\n", b"\r\n")
    head = make_container("m", PLAIN + "text", "@").replace("\n", "\r\n").encode()
    part = b"Content-Type: application/pdf\r\nContent-Transfer-Encoding: base64\r\n\r\n" + encoded
    file = tmp_path / "large.eml"
    file.write_bytes(head.replace(b"@", part))
    size = file.stat().st_size
    assert 24_000_000 < size < 26_000_000
    done = subprocess.run(
        [sys.executable, "-c", MEASURED, str(file)],
        capture_output=True,
        text=True,
        check=True,
        cwd=PAYLOADS.parent.parent,
    )
    seconds, growth, found, kept = map(float, done.stdout.split())
    assert (found, kept) == (len(content), len(content))
    assert growth < 2 * size, f"{growth / 1e6:.0f} MB for a mail of {size / 1e6:.0f} MB"
    assert seconds < 4


def test_a_long_field_of_json_is_read_piece_by_piece() -> None:
    nested = hostile_json.TEXTS["nested lists"](2_000_000)
    described = b'{"attachment1":{"filename":"a.txt"},"b":%s}' % nested
    form = MailForm({"attachment-info": [described]}, [FormFile("attachment1", "x", "text/plain", b"1")])
    mails: list[ParsedMailContent] = []
    assert not lock_holds.holds_longer(
        lambda: mails.append(service_forms.parse_sendgrid_form(form, KeptAttachments())),
        lock_holds.MEGABYTE_SECONDS,
    )
    assert [each.label.filename for each in mails[0].attachments] == ["a.txt"]
    twice = b'{"attachment1":{},%s"attachment1":{}}' % (b'"a":1,' * 30_000)
    assert not service_forms.parse_sendgrid_form(
        MailForm({"attachment-info": [twice]}), KeptAttachments()
    ).attachments
