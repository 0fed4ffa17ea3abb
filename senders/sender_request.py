"""Inbound request of a sender: its headers, and its body as JSON or as a form.

A body is parsed on first use, and only once. The parser of forms passes over it once, without copies of values. Each of
its steps is bounded or runs in the C code of `bytes`, so a malicious body costs little more time than another.
"""

from __future__ import annotations

import re
from binascii import a2b_qp
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from functools import cached_property
from typing import Final

from msgspec import Struct

from concurrency import offload
from engine import values
from engine.values import InvalidJson, Json
from senders.request_refusal import RequestRefused

__all__ = ["RequestHeaders", "RequestRefused", "SenderRequest"]

LONG_BODY_BYTES: Final = 1_000_000
"""From this size on, hashing or splitting a body takes milliseconds and must not run on the event loop."""


class RequestHeaders:
    """Header lines by case-insensitive names; a name may occur several times."""

    def __init__(self, raw: Iterable[tuple[bytes, bytes]]) -> None:
        self._values: dict[str, list[str]] = {}
        for name, value in raw:
            # Latin-1 maps every byte to a character, so the original bytes can be restored.
            self._values.setdefault(name.decode("latin-1").lower(), []).append(value.decode("latin-1"))

    def __contains__(self, name: str) -> bool:
        return name.lower() in self._values

    def values(self, name: str) -> Sequence[str]:
        """Return every value of a header in the order of the request; empty without the header.

        The name may be in any case.
        """
        return self._values.get(name.lower(), ())

    def single(self, name: str) -> str | None:
        """Return the value of a header, None without it; the name may be in any case.

        Raises `RequestRefused` if the request has several values of it.
        """
        found = self.values(name)
        if len(found) > 1:
            raise RequestRefused("duplicate-header", f"The header {name} is given more than once")
        return found[0] if found else None

    def names_with_prefix(self, prefix: str) -> Sequence[str]:
        """Return the lower-case names of all headers that begin with a prefix, which may be in any case."""
        return [name for name in self._values if name.startswith(prefix.lower())]


@dataclass(frozen=True, repr=False)  # path and headers may contain secrets
class SenderRequest:
    """Request with the time of its arrival; accessors of the body raise `RequestRefused` if it is malformed."""

    method: str
    path: str
    query: Mapping[str, Sequence[str]]
    headers: RequestHeaders
    body: bytes
    received_at: datetime

    @cached_property
    def media_type(self) -> MediaType:
        """Media type of the body with its parameters; its name is empty without a Content-Type.

        Raises `RequestRefused` if the request has several Content-Type headers.
        """
        return parse_media_type(self.headers.single("Content-Type") or "")

    @cached_property
    def json(self) -> Json:
        """Body decoded as JSON, with any media type; decoded once.

        Raises `RequestRefused` for malformed JSON, and `BudgetExceeded` for a long body inside `try_inline`,
        so that the caller repeats the work in a thread.
        """
        return parse_json(self.body)

    @cached_property
    def form(self) -> PostedForm:
        """Body parsed as a form, multipart or urlencoded; parsed once.

        Raises `RequestRefused` for a malformed form, and `BudgetExceeded` for a body of a megabyte or more
        inside `try_inline`, so that the caller repeats the work in a thread.
        """
        self.require_offloaded()
        return parse_form(self.media_type, self.body)

    def require_offloaded(self) -> None:
        """Raise `BudgetExceeded` inside `try_inline` if the body has a megabyte or more.

        Called before each pass over the whole body; the caller of `try_inline` then repeats the work in a
        thread.
        """
        if len(self.body) >= LONG_BODY_BYTES:
            offload.require_offloaded()


def parse_json(text: bytes | memoryview) -> Json:
    """Decode a part of a request as JSON; raises `RequestRefused` for malformed or too deeply nested JSON."""
    try:
        return values.decode_json(text)
    except InvalidJson as error:
        raise RequestRefused(error.code, error.message) from error


# ── posted forms ────────────────────────────────────────────────────────────────────────────────────────────


MULTIPART_TYPE: Final = "multipart/form-data"
URLENCODED_TYPE: Final = "application/x-www-form-urlencoded"

MAX_PARTS: Final = 2_000
"""Maximum number of fields and files. Mailgun makes a field of every header of a mail."""
MAX_HEADER_BYTES: Final = 8_192
"""Maximum size of the header of a part, and of the name of a urlencoded field; longer than any file name."""
MAX_HEADERS_BYTES: Final = 1_000_000
"""Maximum size of the headers of all parts together."""
MAX_BOUNDARY_LENGTH: Final = 256
"""RFC 2046 allows 70 characters; some senders use more."""
MAX_PADDING_BYTES: Final = 100
"""Maximum white space between a boundary and the end of its line."""

_UNESCAPED_BYTES: Final = 1_048_576
_IS_NO_ESCAPE: Final = re.compile(rb"%(?![0-9A-Fa-f]{2})")
_AS_QUOTED_PRINTABLE: Final = bytes.maketrans(b"+%", b" =")


@dataclass(frozen=True)
class FormPart:
    """Field or file of a form: a view on the body, which keeps the whole body in memory."""

    body: bytes = field(repr=False)
    start: int
    end: int
    name: str
    """Empty for a part without a name."""
    content_type: str | None = None
    filename: str | None = None
    """As the sender gives it: never use it as a path."""
    is_file: bool = False
    is_escaped: bool = False

    @cached_property
    def value(self) -> memoryview:
        """Bytes of the part, without percent escapes; a view on the body where it has none.

        Raises `RequestRefused` for an invalid escape, and `BudgetExceeded` for an escaped part of over a megabyte
        inside `try_inline`.
        """
        if self.is_escaped:
            return _unescape(self.body, self.start, self.end)
        return memoryview(self.body)[self.start : self.end]


class PostedForm(Struct, frozen=True, dict=True):
    """Parts of a form in their order."""

    parts: Sequence[FormPart]

    def __contains__(self, name: str) -> bool:
        return name in self.fields

    @property
    def files(self) -> Sequence[FormPart]:
        """Parts of the form that have a file name, in their order; the others are fields."""
        return [part for part in self.parts if part.is_file]

    def values(self, name: str) -> Sequence[memoryview]:
        """Return the bytes of every field with this case-sensitive name, in order; empty without one.

        Files don't count. Raises `RequestRefused` for an invalid escape.
        """
        return [part.value for part in self.fields.get(name, ())]

    def first(self, name: str) -> memoryview | None:
        """Return the bytes of the first field with this case-sensitive name, None without one.

        Files don't count. Raises `RequestRefused` for an invalid escape.
        """
        fields = self.fields.get(name)
        return fields[0].value if fields else None

    def last(self, name: str) -> memoryview | None:
        """Return the bytes of the last field with this case-sensitive name, None without one.

        Files don't count. Raises `RequestRefused` for an invalid escape.
        """
        fields = self.fields.get(name)
        return fields[-1].value if fields else None

    def text_of_header(self, name: str) -> str | None:
        """Return the text of the first field with this name, in any case as in mail headers; None without one.

        Raises `RequestRefused` for an invalid escape.
        """
        wanted = name.lower()
        found = (part for part in self.parts if not part.is_file and part.name.lower() == wanted)
        first = next(found, None)
        return None if first is None else decode_value(first.value)

    @cached_property
    def fields(self) -> Mapping[str, Sequence[FormPart]]:
        """Parts without a file name, by case-sensitive name."""
        fields: dict[str, list[FormPart]] = {}
        for part in self.parts:
            if not part.is_file:
                fields.setdefault(part.name, []).append(part)
        return fields


def parse_form(media_type: MediaType, body: bytes) -> PostedForm:
    """Parse a body as a form of at most 2,000 parts.

    Raises `RequestRefused` for another media type, a malformed form or more parts.
    """
    if media_type.name == MULTIPART_TYPE:
        return PostedForm(list(_parse_multipart(body, media_type.parameters.get("boundary", ""))))
    if media_type.name == URLENCODED_TYPE:
        return PostedForm(list(_parse_urlencoded(body)))
    raise RequestRefused("unsupported-media-type", f"Send a form as {MULTIPART_TYPE} or {URLENCODED_TYPE}")


def decode_value(value: memoryview | bytes) -> str:
    """Decode bytes as UTF-8, or as Latin-1 where they aren't valid UTF-8."""
    try:
        return str(value, "utf-8")
    except UnicodeDecodeError:
        return str(value, "latin-1")


# ── multipart ───────────────────────────────────────────────────────────────────────────────────────────────


def _parse_multipart(body: bytes, boundary: str) -> Iterator[FormPart]:
    """Yield the parts of a multipart body; text after the last delimiter is skipped.

    Raises `RequestRefused` for a missing or overlong boundary (256 characters), for a body that doesn't begin with a
    delimiter or lacks the last one, for headers that are too long, alone or together (a megabyte), and for over 2,000
    parts.
    """
    if not 1 <= len(boundary) <= MAX_BOUNDARY_LENGTH:
        raise RequestRefused("malformed-form", "The Content-Type of the form has no valid boundary")
    delimiter = b"--" + boundary.encode("latin-1")
    if not body.startswith(delimiter):
        raise _refuse_form("it does not begin with its boundary")
    start: int | None = None
    headers_bytes = 0
    for position, after, is_last in _find_delimiters(body, delimiter):
        if start is not None:
            part = _parse_part(body, start, position)
            headers_bytes += part.start - start
            if headers_bytes > MAX_HEADERS_BYTES:
                raise _refuse_form("its parts have headers that are too long")
            yield part
        if is_last:
            return
        start = after
    raise _refuse_form("it ends before its last boundary")


def _find_delimiters(body: bytes, delimiter: bytes) -> Iterator[tuple[int, int, bool]]:
    """Yield the start and end of each delimiter line of a multipart body, and whether it is the last.

    Raises `RequestRefused` for more than 2,001 delimiters.
    """
    found = position = 0
    after = len(delimiter)
    while True:
        found += 1
        # Lines that only begin with the delimiter count too, since each costs as much time.
        if found > MAX_PARTS + 1:
            raise _too_many_parts()
        if body.startswith(b"--", after):
            yield position, after, True
            return
        end = body.find(b"\r\n", after, after + MAX_PADDING_BYTES + 2)
        if end != -1 and not body[after:end].strip(b" \t"):
            yield position, end, False
        position = body.find(b"\r\n" + delimiter, after)
        if position == -1:
            return
        after = position + len(delimiter) + 2


def _parse_part(body: bytes, start: int, end: int) -> FormPart:
    """Parse the part in `body[start:end]`, which begins with a CRLF: header lines, an empty line, and the value.

    The name is empty where the part gives none. Raises `RequestRefused` for a header that doesn't end within
    8,192 bytes.
    """
    headers_end = body.find(b"\r\n\r\n", start, start + MAX_HEADER_BYTES)
    if headers_end == -1 or headers_end + 4 > end:
        raise _refuse_form("a part has no header, or one that is too long")
    disposition = MediaType("")
    content_type = None
    for line in body[start:headers_end].split(b"\r\n"):
        name, _, value = line.decode("latin-1").partition(":")
        match name.strip().lower():
            case "content-disposition":
                disposition = parse_media_type(value)
            case "content-type":
                content_type = value.strip()
    members = disposition.parameters
    filename = members.get("filename")
    return FormPart(
        body,
        headers_end + 4,
        end,
        _decode_header(members.get("name", "")),
        content_type,
        None if filename is None else _decode_header(filename),
        # A file name in the syntax of RFC 2231 is not allowed in forms (RFC 7578); the part is a file all the
        # same.
        is_file=filename is not None or "filename*" in members,
    )


def _decode_header(text: str) -> str:
    """Decode a name or file name in a part's header as UTF-8, or else as Latin-1.

    `text` has a Latin-1 character for each byte. Percent escapes, which browsers write for quotes and line ends, stay.
    """
    return decode_value(text.encode("latin-1"))


# ── urlencoded ──────────────────────────────────────────────────────────────────────────────────────────────


def _parse_urlencoded(body: bytes) -> Iterator[FormPart]:
    """Yield the fields of a urlencoded body, with names decoded and values still escaped.

    Empty pairs are skipped. Raises `RequestRefused` for over 2,000 fields, a name of over 8,192 bytes, and an
    invalid escape in a name.
    """
    if body.count(b"&") >= MAX_PARTS:
        raise _too_many_parts()
    start = 0
    while start < len(body):
        end = body.find(b"&", start)
        end = len(body) if end == -1 else end
        equals = body.find(b"=", start, end)
        name_end = end if equals == -1 else equals
        if name_end - start > MAX_HEADER_BYTES:
            raise _refuse_form("the name of a field is too long")
        if end > start:
            name = decode_value(_unescape(body, start, name_end))
            yield FormPart(body, min(name_end + 1, end), end, name, is_escaped=True)
        start = end + 1


def _unescape(body: bytes, start: int, end: int) -> memoryview:
    """Return the unescaped bytes of `body[start:end]` of a urlencoded body; raises `RequestRefused` for an
    invalid escape.

    It works in pieces of a megabyte, since values are as large as mails. Quoted-printable has the same
    escapes with another sign; its decoder in C is twenty times as fast as `urllib`. Inside `try_inline`, a
    longer part raises `BudgetExceeded`.
    """
    value = bytearray()
    while start < end:
        stop = min(start + _UNESCAPED_BYTES, end)
        if stop < end:
            offload.require_offloaded()
            if (escape := body.rfind(b"%", stop - 2, stop)) != -1:
                stop = escape
        piece = body[start:stop]
        if _IS_NO_ESCAPE.search(piece):
            raise _refuse_form("a percent sign is not followed by two hexadecimal digits")
        value += a2b_qp(piece.replace(b"=", b"%3D").translate(_AS_QUOTED_PRINTABLE))
        start = stop
    return memoryview(value).toreadonly()


def _refuse_form(reason: str) -> RequestRefused:
    return RequestRefused("malformed-form", f"The form can't be read: {reason}")


def _too_many_parts() -> RequestRefused:
    return RequestRefused("malformed-form", f"The form has more than {MAX_PARTS:,} fields and files")


# ── media types ─────────────────────────────────────────────────────────────────────────────────────────────


_PARAMETER: Final = re.compile(r""";[ \t]*(?:([^\s;="]+)=(?:"((?:[^"\\]|\\.)*)"[ \t]*|([^;"]*)))?""")
_ESCAPED: Final = re.compile(r'\\(["\\])')


@dataclass(frozen=True, slots=True)
class MediaType:
    """Media type name in lower case, such as `text/plain`, and parameters by lower-case names."""

    name: str
    parameters: Mapping[str, str] = field(default_factory=dict)

    @property
    def is_json(self) -> bool:
        """Whether the media type is JSON or has the suffix `+json`."""
        return self.name == "application/json" or self.name.endswith("+json")


def parse_media_type(text: str) -> MediaType:
    """Return the first part of a header, in lower case, and its parameters; of repeated ones the first counts.

    Nothing is refused: parameters that can't be parsed are left out.
    """
    name, separator, rest = text.partition(";")
    parameters: dict[str, str] = {}
    for parameter in _PARAMETER.finditer(separator + rest):
        key, quoted, plain = parameter.groups()
        if key is not None:
            value = plain.strip() if quoted is None else _ESCAPED.sub(r"\1", quoted)
            parameters.setdefault(key.lower(), value)
    return MediaType(name.strip().lower(), parameters)
