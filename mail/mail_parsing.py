"""Lenient parser for raw mails (RFC 5322, MIME): everything readable is returned, whatever is malformed."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import replace
from hashlib import sha256
from mmap import mmap
from typing import TYPE_CHECKING, Final

from mail import addresses, charsets, headers, parts
from mail.mail_content import AttachmentLabel, KeepAttachment, MailAttachment, ParsedMailContent
from mail.mail_limits import DEFAULT_LIMITS, InvalidMail, MailLimits
from mail.parts import MailPart

if TYPE_CHECKING:
    from typing import BinaryIO

    from mail.headers import MailHeaders, Raw

_MESSAGE_ID: Final = re.compile(r"<[^<>\s]{1,998}>")
_BLANK: Final = re.compile(rb"(?:\xef\xbb\xbf)?[\r\n]*")
_MAX_BLANK_BYTES: Final = 100


def parse_mail(
    raw: Raw | BinaryIO, keep_attachment: KeepAttachment, limits: MailLimits = DEFAULT_LIMITS
) -> ParsedMailContent:
    """Parse a mail, calling `keep_attachment` for each attachment; raises `InvalidMail`.

    Its time is proportional to the size of the mail, in steps of milliseconds: call it in a thread.
    """
    given = raw if isinstance(raw, bytes | bytearray | memoryview | mmap) else raw.read()
    root = MailPart.parse(given, _find_beginning(given), len(given), limits)
    kept = AttachmentCollector(keep_attachment, limits)
    bodies: dict[str, list[str]] = {parts.TEXT_TYPE: [], parts.HTML_TYPE: []}
    remaining = limits.max_text_bytes
    found = parts.find_leaves(given, root, limits)
    for part in found.leaves:
        if part.body_type is None or part.size > remaining:
            kept.add(part.label, part.content(given))
            continue
        remaining -= part.size
        bodies[part.body_type].append(decode_body(part.content(given), part.parameters.get("charset", "")))
    return replace(
        mail_of_headers(root.headers),
        body_text=_join_texts(bodies[parts.TEXT_TYPE]),
        body_html=_join_texts(bodies[parts.HTML_TYPE]),
        attachments=kept.found,
        truncated=count_omissions(
            headers=root.headers.omitted, parts=found.omitted, attachments=kept.omitted
        ),
    )


def count_omissions(**omitted: int) -> dict[str, int]:
    """Return the counts that are not zero, by their names."""
    return {name: number for name, number in omitted.items() if number}


def mail_of_headers(found: MailHeaders) -> ParsedMailContent:
    """Return a mail with only its headers filled in."""
    message_id = _MESSAGE_ID.search(found.first("message-id"))
    return ParsedMailContent(
        from_=addresses.format_addresses(found.first("from")),
        to=addresses.format_addresses(", ".join(found.values("to"))),
        cc=addresses.format_addresses(", ".join(found.values("cc"))),
        reply_to=addresses.format_addresses(", ".join(found.values("reply-to"))),
        subject=headers.decode_value(found.first("subject")),
        email_headers=found.display_values(_display_value),
        message_id=message_id[0] if message_id else "",
        truncated=count_omissions(headers=found.omitted),
    )


def _display_value(name: str, value: str) -> str:
    return (
        addresses.format_addresses(value)
        if name in addresses.ADDRESS_HEADERS
        else headers.decode_value(value)
    )


def decode_body(pieces: Iterable[bytes], charset: str) -> str:
    r"""Decode a text and convert its line ends to `\n`."""
    return charsets.decode_text_pieces(pieces, charset).replace("\r\n", "\n")


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
        """Pass one attachment to the callback, or count it beyond the limit; raises `InvalidMail`."""
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
        if size > self._limits.max_attachment_bytes:
            most = f"{self._limits.max_attachment_bytes:,}"
            raise InvalidMail(f"An attachment has more than {most} bytes")
        if self._bytes > self._limits.max_attachments_bytes:
            most = f"{self._limits.max_attachments_bytes:,}"
            raise InvalidMail(f"The attachments have more than {most} bytes together")


def _find_beginning(raw: Raw) -> int:
    """Return the offset of the headers: some services post mails with blank lines in front of them."""
    found = _BLANK.match(bytes(raw[:_MAX_BLANK_BYTES]))
    return found.end() if found else 0


def _join_texts(texts: Iterable[str]) -> str:
    """Join the texts of a body: clients split it at inline images, and mailing lists append texts."""
    return "\n".join(text for text in texts if text.strip())
