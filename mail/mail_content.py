"""What a mail is to a workflow."""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from io import BytesIO
from typing import TYPE_CHECKING, Any, Final, TypeAlias

if TYPE_CHECKING:
    from mail.headers import HeaderValues

MAX_NAME_CHARACTERS: Final = 255
_LOOKED_AT_CHARACTERS: Final = 1_000
DEFAULT_TYPE: Final = "application/octet-stream"
CONTROL_CHARACTERS: Final = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")
"""What no line holds."""
_TYPE: Final = re.compile(r"[a-z0-9][a-z0-9!#$&^_.+-]{0,126}/[a-z0-9][a-z0-9!#$&^_.+-]{0,126}(?![^;\s])")
_CHARSET: Final = re.compile(r"[A-Za-z0-9_.:+-]{1,40}")
_UNSHOWABLE: Final = frozenset({"Cc", "Cf", "Cs", "Zl", "Zp"})
"""Control characters, those that turn the direction of writing, halves of characters, and ends of lines."""


@dataclass(frozen=True, slots=True)
class AttachmentLabel:
    """What a mail says about one of its attachments: for people, and never a path."""

    filename: str = ""
    content_type: str = DEFAULT_TYPE
    content_id: str = ""
    """By which the HTML shows it: `cid:` and this."""
    disposition: str = ""
    charset: str = ""
    """Of a text."""

    @property
    def media_type(self) -> str:
        """The type with the charset, as HTTP writes it."""
        return f"{self.content_type}; charset={self.charset}" if self.charset else self.content_type


@dataclass(frozen=True, slots=True)
class MailAttachment:
    """An attachment that was kept, or that is still with the mail service."""

    label: AttachmentLabel
    size: int
    """In bytes, decoded."""
    sha256: str = ""
    """Empty: the content hasn't been here."""
    url: str = ""
    """Where the mail service keeps the content, if it didn't hand it in."""

    def as_json(self) -> dict[str, Any]:
        """Return it as workflows see it, but for the reference to its content."""
        label = self.label
        told = {
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
        return {name: value for name, value in told.items() if value or name in always}


KeepAttachment: TypeAlias = Callable[[AttachmentLabel, Iterator[bytes]], object]
"""Is handed each attachment in the order of the mail, its content in pieces: what it doesn't take is passed over."""


@dataclass(frozen=True, slots=True)
class ParsedMailContent:
    from_: str = ""
    to: str = ""
    cc: str = ""
    reply_to: str = ""
    subject: str = ""
    body_text: str = ""
    body_html: str = ""
    attachments: Sequence[MailAttachment] = ()
    """In the order of the mail, inline images included."""
    email_headers: HeaderValues = field(default_factory=dict)
    message_id: str = ""
    """With its angle brackets."""
    truncated: Mapping[str, int] = field(default_factory=dict)
    """Numbers of headers, parts and attachments beyond the limits, which were left out; none where there were none."""

    @property
    def content_digest(self) -> str:
        """SHA-256 of what the mail says, in hexadecimal: the same however it was encoded, signed and sent on.

        Covers From, Subject, Date, both texts, and names and contents of attachments; line ends and white space at the
        end of a text don't count.
        """
        date = next((value for name, value in self.email_headers.items() if name.lower() == "date"), "")
        said = [self.from_, self.subject, date, self.body_text.rstrip(), self.body_html.rstrip()]
        files = [[each.label.filename, each.sha256 or each.url] for each in self.attachments]
        return sha256(json.dumps([said, files]).encode()).hexdigest()

    def as_json(self, attachments: Sequence[dict[str, Any]] | None = None) -> dict[str, Any]:
        """Return it as an e-mail trigger gives it, with `attachments` in the place of its own."""
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
    """Return a content as one: to join its pieces would take the memory twice."""
    written = BytesIO()
    written.writelines(pieces)
    return written.getvalue()


def join_lines(text: str) -> str:
    """Return the value of a header as one line."""
    return " ".join(text.splitlines()).strip()


# ── labels from outside ─────────────────────────────────────────────────────────────────────────────────────


def clean_file_name(text: str) -> str:
    """Return what a file's name is to a person: without a path, of one line, and with nothing that can't be seen."""
    name = _strip_unshowable(text[-_LOOKED_AT_CHARACTERS:]).replace("\\", "/").rpartition("/")[2].strip()
    return "" if name in {".", ".."} else name[-MAX_NAME_CHARACTERS:]


def clean_media_type(text: str) -> str:
    """Return a media type in lower case and without parameters."""
    found = _TYPE.match(text.strip().lower())
    return found[0] if found else DEFAULT_TYPE


def clean_charset(text: str) -> str:
    return text.lower() if _CHARSET.fullmatch(text) else ""


def clean_content_id(text: str) -> str:
    return (
        _strip_unshowable(text[:_LOOKED_AT_CHARACTERS])
        .strip()
        .removeprefix("<")
        .removesuffix(">")
        .strip()[:MAX_NAME_CHARACTERS]
    )


def _strip_unshowable(text: str) -> str:
    normal = unicodedata.normalize("NFC", text)
    return "".join(each for each in normal if unicodedata.category(each) not in _UNSHOWABLE)
