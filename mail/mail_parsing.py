"""Lenient parser for raw mails (RFC 5322, MIME): everything readable is returned, even if other parts are malformed.

Parts are located in place: containers are split at their boundaries without copies of content. Python's own parser
makes a string of every line of a mail first: 150 MB for a mail of 25 MB.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from hashlib import sha256
from mmap import mmap
from typing import TYPE_CHECKING, Final

from msgspec import Struct
from msgspec.structs import replace

from mail import composition, content_decoding, headers, mail_content
from mail.mail_content import AttachmentLabel, KeepAttachment, MailAttachment, ParsedMailContent
from mail.mail_limits import DEFAULT_LIMITS, InvalidMail, MailLimits

if TYPE_CHECKING:
    from typing import BinaryIO

    from mail.content_decoding import Raw
    from mail.headers import MailHeaders


_MESSAGE_ID: Final = re.compile(r"<[^<>\s]{1,998}>")
_BLANK: Final = re.compile(rb"(?:\xef\xbb\xbf)?[\r\n]*")
_MAX_BLANK_BYTES: Final = 100
_AUTOMATIC_REPORTS: Final = frozenset({"delivery-status", "disposition-notification"})
_REPLY_HEADERS: Final = ("in-reply-to", "references")


def parse_mail(
    raw: Raw | BinaryIO, keep_attachment: KeepAttachment, limits: MailLimits = DEFAULT_LIMITS
) -> ParsedMailContent:
    """Parse a raw mail, calling `keep_attachment` with each attachment.

    Raises `InvalidMail` for headers or attachments with too many bytes. Headers, parts and attachments beyond the
    maximum numbers are left out, and counted in `truncated`. Malformed parts are read leniently. Text parts beyond
    `max_text_bytes` become attachments. The time is proportional to the size of the mail, in steps of milliseconds:
    call it in a thread.
    """
    given = raw if isinstance(raw, bytes | bytearray | memoryview | mmap) else raw.read()
    root = MailPart.parse(given, _find_beginning(given), len(given), limits)
    kept = AttachmentCollector(keep_attachment, limits)
    bodies: dict[str, list[str]] = {TEXT_TYPE: [], HTML_TYPE: []}
    remaining = limits.max_text_bytes
    found = find_leaves(given, root, limits)
    for part in found.leaves:
        if part.body_type is None or part.size > remaining:
            kept.add(part.label, part.content(given))
            continue
        remaining -= part.size
        bodies[part.body_type].append(decode_body(part.content(given), part.parameters.get("charset", "")))
    return replace(
        mail_of_headers(root.headers),
        body_text=_join_texts(bodies[TEXT_TYPE]),
        body_html=_join_texts(bodies[HTML_TYPE]),
        attachments=kept.found,
        truncated=count_omissions(parts=found.omitted, attachments=kept.omitted),
    )


def count_omissions(**omitted: int) -> dict[str, int]:
    """Return those of the given counts that are not zero, by their names."""
    return {name: number for name, number in omitted.items() if number}


def mail_of_headers(found: MailHeaders) -> ParsedMailContent:
    """Return a mail with only its headers filled in: addresses, subject, Message-ID; texts and attachments
    are empty.
    """
    message_id = _MESSAGE_ID.search(found.first("message-id"))
    return ParsedMailContent(
        from_=headers.format_addresses(found.first("from")),
        to=headers.format_addresses(", ".join(found.values("to"))),
        cc=headers.format_addresses(", ".join(found.values("cc"))),
        reply_to=headers.format_addresses(", ".join(found.values("reply-to"))),
        subject=headers.decode_value(found.first("subject")),
        email_headers=found.display_values(_display_value),
        message_id=message_id[0] if message_id else "",
    )


def _display_value(name: str, value: str) -> str:
    """Decode a header value for display: addresses in address headers, encoded words in others."""
    return headers.format_addresses(value) if name in headers.ADDRESS_HEADERS else headers.decode_value(value)


def decode_body(pieces: Iterable[bytes], charset: str) -> str:
    r"""Return the text of a body given in pieces, in a charset, with CRLF converted to `\n`."""
    return content_decoding.decode_text_pieces(pieces, charset).replace("\r\n", "\n")


class AttachmentCollector:
    """Attachments of one mail, counted, measured and digested while the callback reads them."""

    def __init__(self, keep: KeepAttachment, limits: MailLimits) -> None:
        self.found: list[MailAttachment] = []
        self.omitted = 0
        """Number of attachments beyond the limit, which are not kept."""
        self._keep = keep
        self._limits = limits
        self._bytes = 0

    def add(self, label: AttachmentLabel, pieces: Iterable[bytes]) -> None:
        """Pass one attachment to the callback, and add it to `found` with its size and SHA-256.

        Pieces that the callback doesn't take are read all the same. Beyond the maximum number the attachment is only
        counted in `omitted`. Raises `InvalidMail` for one that is too large, alone or together with the earlier ones,
        and the errors of the callback.
        """
        if len(self.found) == self._limits.max_attachments:
            self.omitted += 1
            return
        before = self._bytes
        digest = sha256()

        def measured() -> Iterator[bytes]:
            for piece in pieces:
                self._bytes += len(piece)
                self._check(self._bytes - before)
                digest.update(piece)
                yield piece

        content = measured()
        self._keep(label, content)
        for _ in content:
            pass
        self.found.append(MailAttachment(label, self._bytes - before, digest.hexdigest()))

    def _check(self, size: int) -> None:
        """Raise `InvalidMail` if this attachment, with `size` bytes so far, or all together, have more bytes than the
        limits allow.
        """
        if size > self._limits.max_attachment_bytes:
            most = f"{self._limits.max_attachment_bytes:,}"
            raise InvalidMail(f"An attachment has more than {most} bytes")
        if self._bytes > self._limits.max_attachments_bytes:
            most = f"{self._limits.max_attachments_bytes:,}"
            raise InvalidMail(f"The attachments have more than {most} bytes together")


def _find_beginning(raw: Raw) -> int:
    """Return the offset of the headers, after a byte order mark and line ends in the first 100 bytes.

    Some services post mails with blank lines in front of them.
    """
    found = _BLANK.match(bytes(raw[:_MAX_BLANK_BYTES]))
    return found.end() if found else 0


def _join_texts(texts: Iterable[str]) -> str:
    """Join the non-blank texts of a body with line ends: clients split it at inline images, and mailing lists
    append texts.
    """
    return "\n".join(text for text in texts if text.strip())


# ── automatic mail ──────────────────────────────────────────────────────────────────────────────────────────


def is_automatic(mail: ParsedMailContent) -> bool:
    """Return whether a mail is an automatic reply (RFC 3834), a bounce or a receipt (RFC 6522).

    Only the headers Auto-Submitted and Content-Type are looked at. A mail that is merely `auto-generated`
    doesn't count.
    """
    submitted = headers.parse_parameters(_first_header(mail, "auto-submitted"))[0]
    content_type, parameters = headers.parse_parameters(_first_header(mail, "content-type"))
    reports = parameters.get("report-type", "").lower()
    return "auto-replied" in submitted.split() or (
        content_type == "multipart/report" and reports in _AUTOMATIC_REPORTS
    )


def is_reply_to_workflow(mail: ParsedMailContent) -> bool:
    """Return whether a mail answers a mail that a workflow has sent.

    True if its In-Reply-To or References has a Message-ID that `is_workflow_mail` recognizes.
    """
    named = " ".join(_first_header(mail, name) for name in _REPLY_HEADERS)
    return any(composition.is_workflow_mail(one) for one in named.split())


def _first_header(mail: ParsedMailContent, name: str) -> str:
    """Return the value of a header of a parsed mail, by its lower-case name; of a repeated header, all values with
    spaces between; empty without it.
    """
    values = next((value for each, value in mail.email_headers.items() if each.lower() == name), "")
    return values if isinstance(values, str) else " ".join(values)


# ── MIME parts ──────────────────────────────────────────────────────────────────────────────────────────────


TEXT_TYPE: Final = "text/plain"
HTML_TYPE: Final = "text/html"
MESSAGE_TYPE: Final = "message/rfc822"
CONTAINER_PREFIX: Final = "multipart/"
DIGEST_TYPE: Final = "multipart/digest"
ATTACHMENT_DISPOSITION: Final = "attachment"
_WINDOW_BYTES: Final = 1_048_576
_MAX_BOUNDARY_CHARACTERS: Final = 1_000
_MAX_PADDING_BYTES: Final = 200
"""Maximum white space after a boundary; RFC 2046 allows some."""


class MailPart(Struct, frozen=True):
    """MIME part with the offsets of its body."""

    headers: MailHeaders
    start: int
    end: int
    content_type: str
    parameters: Mapping[str, str]
    label: AttachmentLabel

    @classmethod
    def parse(
        cls, raw: Raw, start: int, end: int, limits: MailLimits, default_type: str = TEXT_TYPE
    ) -> MailPart:
        """Parse the headers of a MIME part at offset `start` and return the part; its body is not decoded.

        `default_type` is the content type without a Content-Type header. Raises `InvalidMail` if the headers
        are too long.
        """
        found, body = headers.take_headers(raw, start, end, limits)
        written, parameters = headers.parse_parameters(found.first("content-type"))
        disposition, more = headers.parse_parameters(found.first("content-disposition"))
        content_type = mail_content.clean_media_type(written) if "/" in written else default_type
        is_text = content_type.startswith("text/")
        label = AttachmentLabel(
            filename=mail_content.clean_file_name(
                headers.decode_value(more.get("filename") or parameters.get("name", ""))
            ),
            content_type=content_type,
            content_id=mail_content.clean_content_id(found.first("content-id")),
            disposition=disposition if disposition in {ATTACHMENT_DISPOSITION, "inline"} else "",
            charset=mail_content.clean_charset(parameters.get("charset", "")) if is_text else "",
        )
        return cls(found, body, end, content_type, parameters, label)

    @property
    def size(self) -> int:
        """Size in bytes of the part's content as it is written in the mail, before decoding."""
        return self.end - self.start

    @property
    def body_type(self) -> str | None:
        """Text type (plain or HTML) if the part belongs to the body; None for an attachment.

        A container without usable parts counts as plain text.
        """
        if self.content_type.startswith(CONTAINER_PREFIX):
            return TEXT_TYPE
        is_file = self.label.disposition == ATTACHMENT_DISPOSITION or self.label.filename
        return self.content_type if self.content_type in {TEXT_TYPE, HTML_TYPE} and not is_file else None

    def content(self, raw: Raw) -> Iterator[bytes]:
        """Yield the content in pieces, decoded by the part's `Content-Transfer-Encoding`."""
        encoding = self.headers.first("content-transfer-encoding").partition(";")[0].strip().lower()
        return content_decoding.decode_pieces(raw, self.start, self.end, encoding)


class PartSearch(Struct):
    """Leaf parts of a mail: those that aren't containers."""

    leaves: Iterator[MailPart]
    omitted: int = 0
    """Number of parts beyond the limits of number and depth that `leaves` has left out so far; those inside them don't
    count.
    """


def find_leaves(raw: Raw, root: MailPart, limits: MailLimits) -> PartSearch:
    """Return the leaf parts (those that aren't containers) in order; they are found while they are iterated.

    An embedded mail is one part. Parts beyond the limits are counted in `omitted`. The iteration raises `InvalidMail`
    for headers that are too long, of one part or together.
    """
    found = PartSearch(iter(()))
    found.leaves = _iterate_leaves(raw, root, limits, found)
    return found


def _iterate_leaves(raw: Raw, root: MailPart, limits: MailLimits, found: PartSearch) -> Iterator[MailPart]:
    """Yield the leaf parts of a mail in order, and count those beyond the limits in `found.omitted`.

    Raises `InvalidMail` for headers that are too long, of one part or together.
    """
    opened = 1
    header_bytes = 0
    waiting = [(root, 0)]
    while waiting:
        part, depth = waiting.pop()
        places = _inner_parts(raw, part, limits) if part.content_type.startswith(CONTAINER_PREFIX) else []
        if not places:
            # A container without a boundary, or without a part: its content is read as text.
            yield part
            continue
        # Parts nested too deeply are left out; read as text, they would be boundaries and encoded bytes.
        remaining = limits.max_parts - opened if depth < limits.max_depth else 0
        found.omitted += max(0, len(places) - remaining)
        places = places[:remaining]
        opened += len(places)
        default_type = MESSAGE_TYPE if part.content_type == DIGEST_TYPE else TEXT_TYPE
        inner: list[MailPart] = []
        for start, end in places:
            inner.append(MailPart.parse(raw, start, end, limits, default_type))
            header_bytes += inner[-1].start - start
            if header_bytes > limits.max_headers_bytes:
                most = f"{limits.max_headers_bytes:,}"
                raise InvalidMail(f"The headers of all parts take more than {most} bytes")
        waiting += [(each, depth + 1) for each in reversed(inner)]


def _inner_parts(raw: Raw, container: MailPart, limits: MailLimits) -> list[tuple[int, int]]:
    """Return start and end offset of each part of a container; empty if its headers name no boundary.

    The last part may lack its closing boundary. The search stops after `max_parts`, with a part or two more.
    """
    boundary = container.parameters.get("boundary", "").rstrip()[:_MAX_BOUNDARY_CHARACTERS]
    if not boundary:
        return []
    places: list[tuple[int, int]] = []
    begun: int | None = None
    for line, following, is_last in _find_delimiters(raw, container, b"--" + boundary.encode()):
        if begun is not None:
            places.append((begun, _strip_line_end(raw, begun, line)))
        begun = None if is_last else following
        if is_last or len(places) > limits.max_parts:
            break
    if begun is not None:
        places.append((begun, container.end))
    return places


def _find_delimiters(raw: Raw, container: MailPart, delimiter: bytes) -> Iterator[tuple[int, int, bool]]:
    """Yield the start and end offset of each boundary line of a container, and whether it is the last.

    Searches windows of a megabyte, so that other threads run in between.
    """
    pattern = re.compile(rb"\n" + re.escape(delimiter) + rb"(--)?[ \t\r]{0,%d}(?:\n|\Z)" % _MAX_PADDING_BYTES)
    overlap = len(delimiter) + 2 * _MAX_PADDING_BYTES
    at = max(0, container.start - 1)  # The line end before the first boundary may be that of the headers.
    while at < container.end:
        # Window by window: a long search would hold the GIL and delay other threads.
        window_end = at + _WINDOW_BYTES
        found = pattern.search(raw, at, min(container.end, window_end + overlap))
        if found is None or found.start() >= window_end:
            at = window_end
            continue
        yield found.start() + 1, found.end(), found[1] is not None
        at = found.end() - 1


def _strip_line_end(raw: Raw, start: int, end: int) -> int:
    """Return the end of a part without one final line end, which belongs to the boundary behind it."""
    if end > start and raw[end - 1 : end] == b"\n":
        end -= 1
        if end > start and raw[end - 1 : end] == b"\r":
            end -= 1
    return end
