"""A raw mail is read, as it came over the wire: what can be made of it is made of it, whatever is wrong with it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import replace
from hashlib import sha256
from mmap import mmap
from typing import TYPE_CHECKING, Final

from mail import addresses, charsets, headers, parts
from mail.limits import DEFAULT, InvalidMail, Limits
from mail.message import Attachment, Keep, Label, Mail
from mail.parts import Part

if TYPE_CHECKING:
    from typing import BinaryIO

    from mail.headers import Headers, Raw

_MESSAGE_ID: Final = re.compile(r"<[^<>\s]{1,998}>")
_BLANK: Final = re.compile(rb"(?:\xef\xbb\xbf)?[\r\n]*")
_MAX_BLANK_BYTES: Final = 100


def read(raw: Raw | BinaryIO, keep_attachment: Keep, limits: Limits = DEFAULT) -> Mail:
    """Return a mail, and hand out its attachments on the way; raises `InvalidMail`.

    It computes for as long as the mail is large, in steps of milliseconds: call it in a thread.
    """
    given = raw if isinstance(raw, bytes | bytearray | memoryview | mmap) else raw.read()
    root = Part.at(given, _beginning(given), len(given), limits)
    kept = Attachments(keep_attachment, limits)
    bodies: dict[str, list[str]] = {parts.TEXT: [], parts.HTML: []}
    room = limits.max_text_bytes
    found = parts.find_leaves(given, root, limits)
    for part in found.leaves:
        if part.body_type is None or part.size > room:
            kept.add(part.label, part.content(given))
            continue
        room -= part.size
        bodies[part.body_type].append(text_of(part.content(given), part.parameters.get("charset", "")))
    return replace(
        of_headers(root.headers),
        body_text=_joined(bodies[parts.TEXT]),
        body_html=_joined(bodies[parts.HTML]),
        attachments=kept.found,
        truncated=count_omissions(
            headers=root.headers.omitted, parts=found.omitted, attachments=kept.omitted
        ),
    )


def count_omissions(**omitted: int) -> dict[str, int]:
    """Return the numbers that are not zero, by their names."""
    return {name: number for name, number in omitted.items() if number}


def of_headers(found: Headers) -> Mail:
    """Return a mail of which nothing but the headers is known."""
    message_id = _MESSAGE_ID.search(found.first("message-id"))
    return Mail(
        from_=addresses.shown(found.first("from")),
        to=addresses.shown(", ".join(found.all("to"))),
        cc=addresses.shown(", ".join(found.all("cc"))),
        reply_to=addresses.shown(", ".join(found.all("reply-to"))),
        subject=headers.decoded(found.first("subject")),
        email_headers=found.shown(_shown),
        message_id=message_id[0] if message_id else "",
        truncated=count_omissions(headers=found.omitted),
    )


def _shown(name: str, value: str) -> str:
    return addresses.shown(value) if name in addresses.HEADERS else headers.decoded(value)


def text_of(pieces: Iterable[bytes], charset: str) -> str:
    """Return a text whose lines end as ours do."""
    return charsets.decoded_pieces(pieces, charset).replace("\r\n", "\n")


class Attachments:
    """Those of one mail, counted and measured on their way to whoever keeps them."""

    def __init__(self, keep: Keep, limits: Limits) -> None:
        self.found: list[Attachment] = []
        self.omitted = 0
        """Attachments beyond the limit, which nobody keeps."""
        self._keep = keep
        self._limits = limits
        self._bytes = 0

    def add(self, label: Label, pieces: Iterable[bytes]) -> None:
        """Hand out one attachment, or count it where there are too many; raises `InvalidMail`."""
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
        self.found.append(Attachment(label, self._bytes - before, digest.hexdigest()))

    def _check(self, size: int) -> None:
        if size > self._limits.max_attachment_bytes:
            most = f"{self._limits.max_attachment_bytes:,}"
            raise InvalidMail(f"An attachment has more than {most} bytes")
        if self._bytes > self._limits.max_attachments_bytes:
            most = f"{self._limits.max_attachments_bytes:,}"
            raise InvalidMail(f"The attachments have more than {most} bytes together")


def _beginning(raw: Raw) -> int:
    """Return where the headers begin: some services hand mails in with blank lines before them."""
    found = _BLANK.match(bytes(raw[:_MAX_BLANK_BYTES]))
    return found.end() if found else 0


def _joined(texts: Iterable[str]) -> str:
    """Return the pieces of a body as one: writers cut it where a picture stands, and lists add their lines to it."""
    return "\n".join(text for text in texts if text.strip())
