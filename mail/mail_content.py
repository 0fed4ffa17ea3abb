"""Content of a mail in the shape that workflows get."""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from hashlib import sha256
from io import BytesIO
from typing import Any, Final, TypeAlias

from msgspec import Struct, field

HeaderValues: TypeAlias = "dict[str, str | list[str]]"
MAX_NAME_CHARACTERS: Final = 255
_LOOKED_AT_CHARACTERS: Final = 1_000
DEFAULT_TYPE: Final = "application/octet-stream"
CONTROL_CHARACTERS: Final = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")
"""Control characters, line separators and surrogates, which a header line can't contain."""
_TYPE: Final = re.compile(r"[a-z0-9][a-z0-9!#$&^_.+-]{0,126}/[a-z0-9][a-z0-9!#$&^_.+-]{0,126}(?![^;\s])")
_CHARSET: Final = re.compile(r"[A-Za-z0-9_.:+-]{1,40}")
_UNSHOWABLE: Final = frozenset({"Cc", "Cf", "Cs", "Zl", "Zp"})
"""Categories of control characters, direction marks, surrogates and line ends."""


class AttachmentLabel(Struct, frozen=True):
    """Attributes of an attachment as the mail gives them; for display, never for paths."""

    filename: str = ""
    content_type: str = DEFAULT_TYPE
    content_id: str = ""
    """Id by which the HTML refers to the file, as `cid:<content_id>`."""
    disposition: str = ""
    charset: str = ""
    """Charset of a text."""

    @property
    def media_type(self) -> str:
        """Content type with its charset, if there is one, in the syntax of HTTP: `text/plain; charset=utf-8`."""
        return f"{self.content_type}; charset={self.charset}" if self.charset else self.content_type


class MailAttachment(Struct, frozen=True):
    """Attachment that is stored here or by the mail service."""

    label: AttachmentLabel
    size: int
    """Decoded size in bytes."""
    sha256: str = ""
    """Empty if the content is not available here."""
    url: str = ""
    """URL of the content at the mail service, if it did not post the content."""

    def as_json(self) -> dict[str, Any]:
        """Return the attachment as the JSON that workflows get, without the reference to its content.

        File name, type and size are always present; other fields only if they aren't empty.
        """
        label = self.label
        fields = {
            "filename": label.filename,
            "content_type": label.content_type,
            "size": self.size,
            "sha256": self.sha256,
            "content_id": label.content_id,
            "disposition": label.disposition,
            "charset": label.charset,
            "url": self.url,
        }
        always = {"filename", "content_type", "size"}
        return {name: value for name, value in fields.items() if value or name in always}


KeepAttachment: TypeAlias = Callable[[AttachmentLabel, Iterator[bytes]], object]
"""Callback for each attachment in the order of the mail, with its content in pieces; unread pieces are skipped."""


class ParsedMailContent(Struct, frozen=True):
    from_: str = ""
    to: str = ""
    cc: str = ""
    reply_to: str = ""
    subject: str = ""
    body_text: str = ""
    body_html: str = ""
    attachments: Sequence[MailAttachment] = ()
    """Attachments in the order of the mail, inline images included."""
    email_headers: HeaderValues = field(default_factory=dict)
    message_id: str = ""
    """With its angle brackets."""
    truncated: Mapping[str, int] = field(default_factory=dict)
    """Numbers of headers, parts and attachments beyond the limits, which were left out; only those above zero."""

    @property
    def content_digest(self) -> str:
        """SHA-256 of the decoded mail in hexadecimal, the same for every encoding, signature and relay of the mail.

        Covers From, Subject, Date, both texts, and names and contents of attachments; line ends and white
        space at the end of a text don't count.
        """
        date = next((value for name, value in self.email_headers.items() if name.lower() == "date"), "")
        said = [self.from_, self.subject, date, self.body_text.rstrip(), self.body_html.rstrip()]
        files = [[each.label.filename, each.sha256 or each.url] for each in self.attachments]
        return sha256(json.dumps([said, files]).encode()).hexdigest()

    def as_json(self, attachments: Sequence[dict[str, Any]] | None = None) -> dict[str, Any]:
        """Return the mail as the output of an e-mail trigger.

        `attachments` replaces the mail's own; None keeps them. `truncated` is present only if something was
        left out.
        """
        if attachments is None:
            attachments = [each.as_json() for each in self.attachments]
        truncated = {"truncated": dict(self.truncated)} if self.truncated else {}
        return {
            "from": self.from_,
            "to": self.to,
            "cc": self.cc,
            "reply_to": self.reply_to,
            "subject": self.subject,
            "body_text": self.body_text,
            "body_html": self.body_html,
            "attachments": list(attachments),
            "email_headers": dict(self.email_headers),
            **truncated,
        }


def join_pieces(pieces: Iterable[bytes]) -> bytes:
    """Return the pieces joined; `bytes.join` over a list of them would take twice the memory."""
    written = BytesIO()
    written.writelines(pieces)
    return written.getvalue()


def join_lines(text: str) -> str:
    """Return a text as one line: line ends become spaces, and white space at its ends is dropped."""
    return " ".join(text.splitlines()).strip()


# ── sanitizing of labels ────────────────────────────────────────────────────────────────────────────────────


def clean_file_name(text: str) -> str:
    """Return a file name for display: one line of at most 255 characters, without a path and invisible characters.

    May be empty. Of a longer name the end is kept.
    """
    name = _strip_unshowable(text[-_LOOKED_AT_CHARACTERS:]).replace("\\", "/").rpartition("/")[2].strip()
    return "" if name in {".", ".."} else name[-MAX_NAME_CHARACTERS:]


def clean_media_type(text: str) -> str:
    """Return a media type in lower case without parameters; `application/octet-stream` for a malformed one."""
    found = _TYPE.match(text.strip().lower())
    return found[0] if found else DEFAULT_TYPE


def clean_charset(text: str) -> str:
    """Return the name of a charset in lower case if it is well-formed (up to 40 characters), else an empty text."""
    return text.lower() if _CHARSET.fullmatch(text) else ""


def clean_content_id(text: str) -> str:
    """Return a Content-ID without angle brackets and invisible characters, at most 255 characters."""
    return (
        _strip_unshowable(text[:_LOOKED_AT_CHARACTERS])
        .strip()
        .removeprefix("<")
        .removesuffix(">")
        .strip()[:MAX_NAME_CHARACTERS]
    )


def _strip_unshowable(text: str) -> str:
    """Return a text in NFC without control, format and line-separator characters."""
    normal = unicodedata.normalize("NFC", text)
    return "".join(each for each in normal if unicodedata.category(each) not in _UNSHOWABLE)
