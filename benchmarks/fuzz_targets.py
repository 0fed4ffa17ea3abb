"""Parsers of bytes from strangers, as targets of the fuzzer in `benchmarks.fuzz`.

A target parses any bytes. It may raise nothing: each refusal that the parser documents is caught here. Properties of
the results are assertions.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Final

from engine.conditions import compile_condition
from engine.expressions import ExpressionError, compile_template
from engine.values import InvalidJson, decode_json, encode_json, equal_json
from gateway.http.errors import ApiError
from gateway.http.request import ContentDecoder
from json_text import pieces
from json_text.decoding import build_decoder
from mail.mail_limits import InvalidMail
from mail.mail_parsing import parse_mail
from models.schedule_timetable import InvalidTimetable, parse_timetable, upcoming_instants
from nodes.sandbox import frames
from nodes.sql_text import SqlDialect, StatementRefused, parse_statement
from senders import cloudevents, sns
from senders.mail_kinds import MailKind, parse_mail_form
from senders.request_refusal import RequestRefused
from senders.sender_request import (
    MULTIPART_TYPE,
    URLENCODED_TYPE,
    MediaType,
    RequestHeaders,
    SenderRequest,
    parse_form,
)

if TYPE_CHECKING:
    from engine.values import Json
    from mail.mail_content import AttachmentLabel

PAYLOADS: Final = Path(__file__).parents[1] / "tests/payloads"
NOW: Final = datetime(2026, 11, 28, tzinfo=UTC)
BOUNDARY: Final = b"xYzZY"
SMALL_PIECE: Final = 16
LONGEST_SEED: Final = 16_384
_decode = build_decoder().decode


@dataclass(frozen=True, slots=True)
class FuzzTarget:
    """Parser, and the inputs from which the fuzzer starts."""

    parse: Callable[[bytes], None]
    seeds: Callable[[], Sequence[bytes]]


# ── parsers ─────────────────────────────────────────────────────────────────────────────────────────────────


def parse_json_value(data: bytes) -> None:
    """Decode a value, write it and decode it again, without a difference."""
    with suppress(InvalidJson):
        value = decode_json(data)
        assert equal_json(decode_json(encode_json(value)), value)


def parse_json_pieces(data: bytes) -> None:
    """Decode a text at once and in pieces, to the same value."""
    with suppress(ValueError, RecursionError):
        whole = _decode(data)
        with suppress(pieces.DuplicateName):
            assert pieces.decode_in_pieces(data, _decode, piece_bytes=SMALL_PIECE) == whole


def parse_mime(data: bytes) -> None:
    """Parse a mail and read its attachments."""
    with suppress(InvalidMail):
        encode_json(parse_mail(data, _read_attachment).as_json())


def parse_posted_mail(data: bytes) -> None:
    """Parse the form of a mail service; the first byte chooses the service and the encoding of the form."""
    choice, body = data[:1] or b"\0", data[1:]
    is_multipart, is_sendgrid = choice < b"\x80", choice[0] % 2 == 0
    media_type = (
        MediaType(MULTIPART_TYPE, {"boundary": BOUNDARY.decode()})
        if is_multipart
        else MediaType(URLENCODED_TYPE)
    )
    with suppress(RequestRefused, InvalidMail):
        kind = MailKind.SENDGRID_PARSED if is_sendgrid else MailKind.MAILGUN_PARSED
        mail, _ = parse_mail_form(parse_form(media_type, body), kind, _read_attachment)
        encode_json(mail.as_json())


def parse_cron(data: bytes) -> None:
    """Parse a cron expression; the instants of a valid one ascend."""
    with suppress(InvalidTimetable):
        timetable = parse_timetable({"cron": _to_text(data)})
        instants = upcoming_instants(timetable, NOW, NOW, 5)
        assert instants == sorted(set(instants))


def parse_expression(data: bytes) -> None:
    """Compile and render a template; the values that it reads do not change."""
    scope: dict[str, Json] = {"data": {"a": [1, {"b": "text"}]}, "trigger": {}, "nodes": {}, "execution": {}}
    before = json.dumps(scope)
    with suppress(ExpressionError):
        compile_template(_to_value(data)).render(scope, [])
    assert json.dumps(scope) == before


def parse_condition(data: bytes) -> None:
    with suppress(ExpressionError):
        compile_condition(_to_value(data))


def parse_frames(data: bytes) -> None:
    """Read the frames of a child process, each with every decoder."""
    stream = BytesIO(data)
    decoders = (frames.decode_value, frames.decode_line, frames.decode_paths, frames.decode_port)
    with suppress(frames.InvalidFrame):
        while len(header := stream.read(frames.HEADER.size)) == frames.HEADER.size:
            length, _ = frames.parse_header(header)
            body = stream.read(min(length, len(data)))
            for decode in (*decoders, frames.decode_failure):
                with suppress(frames.InvalidFrame):
                    frames.decode_frame(decode, body)


def parse_sql(data: bytes) -> None:
    """Parse a statement of each dialect; it has at most as many placeholders as question marks."""
    text = _to_text(data)
    for dialect in SqlDialect:
        with suppress(StatementRefused):
            assert parse_statement(text, dialect).placeholder_count <= text.count("?")


def parse_sender_event(data: bytes) -> None:
    """Parse a body as a CloudEvent, as a batch of them, and as a message of SNS."""
    for media_type in (cloudevents.STRUCTURED_TYPE, cloudevents.BATCHED_TYPE):
        with suppress(RequestRefused):
            cloudevents.parse_event(_to_request(data, media_type))
    with suppress(RequestRefused):
        sns.parse_sns_message(_to_request(data, "text/plain"))


def parse_encoded_body(data: bytes) -> None:
    """Decompress a body, given in two parts, by both encodings; no piece exceeds its limit."""
    half = len(data) // 2
    for encoding in ("gzip", "deflate"):
        with suppress(ApiError):
            decoder = ContentDecoder(encoding)
            for part in (data[:half], data[half:]):
                assert all(len(piece) <= 262_144 for piece in decoder.decode(part))
            decoder.finish()


# ── seeds ───────────────────────────────────────────────────────────────────────────────────────────────────


def _payloads(*patterns: str) -> Sequence[bytes]:
    """Return the sample requests of providers whose path matches a pattern."""
    found = [
        path.read_bytes() for pattern in patterns for path in sorted(PAYLOADS.glob(pattern)) if path.is_file()
    ]
    return [body for body in found if len(body) <= LONGEST_SEED]


def _mails() -> Sequence[bytes]:
    lines = [
        b"From: a@b.example",
        b"Subject: =?utf-8?q?a?=",
        b"Content-Type: multipart/mixed; boundary=x",
        b"",
        b"--x",
        b"Content-Type: text/plain; charset=latin-1",
        b"Content-Transfer-Encoding: quoted-printable",
        b"",
        b"=E9",
        b"--x",
        b"Content-Disposition: attachment; filename*=utf-8''a%20b.txt",
        b"Content-Transfer-Encoding: base64",
        b"",
        b"aGVsbG8=",
        b"--x--",
    ]
    return [b"\r\n".join(lines), *_payloads("*/*mime*", "ses/*")]


def _forms() -> Sequence[bytes]:
    part = b'--%b\r\nContent-Disposition: form-data; name="from"\r\n\r\nA <a@b.example>\r\n--%b--\r\n' % (
        BOUNDARY,
        BOUNDARY,
    )
    return [
        b"\0" + part,
        b"\1" + part,
        b"\x80from=a%40b.example&attachments=1",
        b"\x81body-plain=a&attachment-count=1",
    ]


def _json_texts() -> Sequence[bytes]:
    return [
        b'{"a":[1,-2.5e3,"\\ud83d\\ude00",null,true]}',
        *_payloads("stripe/*", "github/*", "cloudevents/*"),
    ]


def _expressions() -> Sequence[bytes]:
    return [
        b'"{{ data.a[1].b ?? \\"none\\" }} and {{ trigger.x }}"',
        b'{"$op":"concat","values":["{{ data.a[0] }}","x"]}',
        b'{"left":"{{ data.a }}","operator":"contains","right":1}',
        b'{"and":[{"left":1,"operator":"<","right":2},{"not":{"left":"a","operator":"is-empty"}}]}',
    ]


def _crons() -> Sequence[bytes]:
    return [b"*/5 8-18 * * 1-5", b"0 0 29 2 *", b"0 12 L * *", b"15,45 0 1 JAN,JUL MON#2"]


def _frames() -> Sequence[bytes]:
    tags = frames.FrameTag
    return [
        frames.encode_frame(tags.LOG, b'["info","a line"]') + frames.encode_frame(tags.DONE, b'"output"'),
        b"".join(frames.encode_value({"a": [1, 2, {"b": None}]})),
        frames.encode_frame(tags.FAILED, b'{"code":"a","message":"b","retryable":false}'),
    ]


def _statements() -> Sequence[bytes]:
    return [
        b"SELECT a, '?' FROM \"t?\" WHERE b = ? -- ?\n AND c = $x$ ? $x$",
        b"/* /* nested */ */ INSERT INTO t VALUES (?, E'\\'?')",
        b"WITH x AS (SELECT `a?` FROM t) UPDATE t SET a = ? # ?",
    ]


def _compressed() -> Sequence[bytes]:
    plain = b"text " * 50
    raw = zlib.compressobj(wbits=-15)
    gzip = zlib.compressobj(wbits=31)
    return [zlib.compress(plain), raw.compress(plain) + raw.flush(), gzip.compress(plain) + gzip.flush()]


def _events() -> Sequence[bytes]:
    return _payloads("cloudevents/*", "ses/*")


TARGETS: Final[Mapping[str, FuzzTarget]] = {
    "json": FuzzTarget(parse_json_value, _json_texts),
    "json-pieces": FuzzTarget(parse_json_pieces, _json_texts),
    "mime": FuzzTarget(parse_mime, _mails),
    "forms": FuzzTarget(parse_posted_mail, _forms),
    "cron": FuzzTarget(parse_cron, _crons),
    "expressions": FuzzTarget(parse_expression, _expressions),
    "conditions": FuzzTarget(parse_condition, _expressions),
    "frames": FuzzTarget(parse_frames, _frames),
    "sql": FuzzTarget(parse_sql, _statements),
    "events": FuzzTarget(parse_sender_event, _events),
    "encodings": FuzzTarget(parse_encoded_body, _compressed),
}


# ── helpers ─────────────────────────────────────────────────────────────────────────────────────────────────


def _read_attachment(_label: AttachmentLabel, content: Iterator[bytes]) -> None:
    for _ in content:
        pass


def _to_text(data: bytes) -> str:
    return data.decode("utf-8", "replace")


def _to_value(data: bytes) -> Json:
    """Return the JSON value of the bytes, or else their text."""
    try:
        return decode_json(data)
    except InvalidJson:
        return _to_text(data)


def _to_request(body: bytes, media_type: str) -> SenderRequest:
    headers = RequestHeaders([(b"content-type", media_type.encode())])
    return SenderRequest("POST", "/", {}, headers, body, NOW)
