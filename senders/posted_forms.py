"""Forms as senders post them, `multipart/form-data` and urlencoded: looked through once, values copied by nobody.

Each step is bounded or done by the C of `bytes`, so that a body made to cost time costs little more than another.
"""

from __future__ import annotations

import re
from binascii import a2b_qp
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Final

from concurrency import offload
from senders import media_types
from senders.media_types import MediaType
from senders.request_refusal import RequestRefused

MULTIPART_TYPE: Final = "multipart/form-data"
URLENCODED_TYPE: Final = "application/x-www-form-urlencoded"

MAX_PARTS: Final = 2_000
"""Fields and files together. Mailgun makes a field of every header line of a mail."""
MAX_HEADER_BYTES: Final = 8_192
"""Of the header of one part, and of the name of a urlencoded field: more than any file name needs."""
MAX_HEADERS_BYTES: Final = 1_000_000
"""Of the headers of all parts together."""
MAX_BOUNDARY_LENGTH: Final = 256
"""RFC 2046 allows 70, which not every sender has read."""
MAX_PADDING_BYTES: Final = 100
"""White space between a boundary and the end of its line."""

_UNESCAPED_BYTES: Final = 1_048_576
_IS_NO_ESCAPE: Final = re.compile(rb"%(?![0-9A-Fa-f]{2})")
_AS_QUOTED_PRINTABLE: Final = bytes.maketrans(b"+%", b" =")


@dataclass(frozen=True)
class FormPart:
    """A field or a file of a form. Of the body it is a view, so that to keep it is to keep the body."""

    body: bytes = field(repr=False)
    start: int
    end: int
    name: str
    """Empty where the part has none: it is kept all the same."""
    content_type: str | None = None
    filename: str | None = None
    """As the sender gives it: not to be made a path of."""
    is_file: bool = False
    is_escaped: bool = False

    @cached_property
    def value(self) -> memoryview:
        """The bytes of it; raises `Refused` where they can't be told."""
        if self.is_escaped:
            return _unescape(self.body, self.start, self.end)
        return memoryview(self.body)[self.start : self.end]


@dataclass(frozen=True)
class PostedForm:
    """The parts of a form in their order."""

    parts: Sequence[FormPart]

    def __contains__(self, name: str) -> bool:
        return name in self.fields

    @property
    def files(self) -> Sequence[FormPart]:
        """The parts that are files."""
        return [part for part in self.parts if part.is_file]

    def values(self, name: str) -> Sequence[memoryview]:
        """Return the bytes of every field of a name; raises `Refused`."""
        return [part.value for part in self.fields.get(name, ())]

    def first(self, name: str) -> memoryview | None:
        """Return the bytes of the first field of a name, or None; raises `Refused`."""
        fields = self.fields.get(name)
        return fields[0].value if fields else None

    def last(self, name: str) -> memoryview | None:
        """Return the bytes of the last field of a name, or None; raises `Refused`."""
        fields = self.fields.get(name)
        return fields[-1].value if fields else None

    def text_of_header(self, name: str) -> str | None:
        """Return the first field of a name in any case as a text, as header lines are posted; raises `Refused`."""
        wanted = name.lower()
        found = (part for part in self.parts if not part.is_file and part.name.lower() == wanted)
        first = next(found, None)
        return None if first is None else decode_value(first.value)

    @cached_property
    def fields(self) -> Mapping[str, Sequence[FormPart]]:
        """The parts that are no files, by names in their own case."""
        fields: dict[str, list[FormPart]] = {}
        for part in self.parts:
            if not part.is_file:
                fields.setdefault(part.name, []).append(part)
        return fields


def parse_form(media_type: MediaType, body: bytes) -> PostedForm:
    """Return the form that a body is; raises `Refused`."""
    if media_type.name == MULTIPART_TYPE:
        return PostedForm(list(_parse_multipart(body, media_type.parameters.get("boundary", ""))))
    if media_type.name == URLENCODED_TYPE:
        return PostedForm(list(_parse_urlencoded(body)))
    raise RequestRefused("unsupported-media-type", f"Send a form as {MULTIPART_TYPE} or {URLENCODED_TYPE}")


def decode_value(value: memoryview | bytes) -> str:
    """Return bytes as a text: in UTF-8 if they are that, or else each byte as Latin-1 has it."""
    try:
        return str(value, "utf-8")
    except UnicodeDecodeError:
        return str(value, "latin-1")


# ── multipart ───────────────────────────────────────────────────────────────────────────────────────────────


def _parse_multipart(body: bytes, boundary: str) -> Iterator[FormPart]:
    if not 1 <= len(boundary) <= MAX_BOUNDARY_LENGTH:
        raise RequestRefused(
            "malformed-form", "The Content-Type of the form names no boundary that parts could have"
        )
    delimiter = b"--" + boundary.encode("latin-1")
    if not body.startswith(delimiter):
        raise _malformed_form("it does not begin with its boundary")
    start: int | None = None
    headers_bytes = 0
    for position, after, is_last in _find_delimiters(body, delimiter):
        if start is not None:
            part = _parse_part(body, start, position)
            headers_bytes += part.start - start
            if headers_bytes > MAX_HEADERS_BYTES:
                raise _malformed_form("its parts have headers that are too long")
            yield part
        if is_last:
            return
        start = after
    raise _malformed_form("it ends before its last boundary")


def _find_delimiters(body: bytes, delimiter: bytes) -> Iterator[tuple[int, int, bool]]:
    """Return where each line that separates parts begins, where it ends, and whether it is the last of them."""
    found = position = 0
    after = len(delimiter)
    while True:
        found += 1
        # Lines that only begin like one are counted too: each costs as much.
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
    """Return the part that begins with the line end at `start`: header lines, an empty one, and the value."""
    headers_end = body.find(b"\r\n\r\n", start, start + MAX_HEADER_BYTES)
    if headers_end == -1 or headers_end + 4 > end:
        raise _malformed_form("a part has no header, or one that is too long")
    disposition = MediaType("")
    content_type = None
    for line in body[start:headers_end].split(b"\r\n"):
        name, _, value = line.decode("latin-1").partition(":")
        match name.strip().lower():
            case "content-disposition":
                disposition = media_types.parse_media_type(value)
            case "content-type":
                content_type = value.strip()
    told = disposition.parameters
    filename = told.get("filename")
    return FormPart(
        body,
        headers_end + 4,
        end,
        _decode_header(told.get("name", "")),
        content_type,
        None if filename is None else _decode_header(filename),
        # A name in the manner of RFC 2231 has no place in a form, but a file is no field for it.
        is_file=filename is not None or "filename*" in told,
    )


def _decode_header(text: str) -> str:
    return decode_value(text.encode("latin-1"))


# ── urlencoded ──────────────────────────────────────────────────────────────────────────────────────────────


def _parse_urlencoded(body: bytes) -> Iterator[FormPart]:
    if body.count(b"&") >= MAX_PARTS:
        raise _too_many_parts()
    start = 0
    while start < len(body):
        end = body.find(b"&", start)
        end = len(body) if end == -1 else end
        equals = body.find(b"=", start, end)
        name_end = end if equals == -1 else equals
        if name_end - start > MAX_HEADER_BYTES:
            raise _malformed_form("the name of a field is too long")
        if end > start:
            name = decode_value(_unescape(body, start, name_end))
            yield FormPart(body, min(name_end + 1, end), end, name, is_escaped=True)
        start = end + 1


def _unescape(body: bytes, start: int, end: int) -> memoryview:
    """Return a stretch of a urlencoded body as it was before; piece by piece, since values are as large as mails.

    Quoted-printable escapes bytes in the same manner, and is read by C, which is twenty times as fast as `urllib`.
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
            raise _malformed_form("a percent sign is followed by no hexadecimal number")
        value += a2b_qp(piece.replace(b"=", b"%3D").translate(_AS_QUOTED_PRINTABLE))
        start = stop
    return memoryview(value).toreadonly()


def _malformed_form(reason: str) -> RequestRefused:
    return RequestRefused("malformed-form", f"The form can't be read: {reason}")


def _too_many_parts() -> RequestRefused:
    return RequestRefused("malformed-form", f"The form has more than {MAX_PARTS:,} fields and files")
