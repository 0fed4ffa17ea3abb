"""Attachments of a mail posted as JSON: contents in base64 become blobs of the run."""

from __future__ import annotations

from base64 import b64decode
from collections.abc import Mapping, Sequence
from hashlib import sha256
from typing import TYPE_CHECKING, Final

from msgspec import Struct

from gateway.http import errors
from mail import mail_content
from mail.mail_content import AttachmentLabel, MailAttachment
from mail.mail_limits import DEFAULT_LIMITS

if TYPE_CHECKING:
    from engine.values import Json
    from journal.blobs.blob_storage import BlobOwner
    from journal.blobs.blob_store import BlobStore

CONTENT: Final = "content"
_FIELD: Final = "attachments"


class JsonAttachment(Struct, frozen=True):
    """Attachment with its decoded content; None when the caller describes it without content."""

    members: Mapping[str, Json]
    content: bytes | None

    async def store(self, blobs: BlobStore, owner: BlobOwner) -> dict[str, Json]:
        """Store the content as a blob of the run, and return the attachment with its reference for the run's input.

        An attachment without content is returned as it was sent. Raises `BlobsUnavailable`.
        """
        if self.content is None:
            return dict(self.members)
        label = self._label()
        reference = await blobs.put(owner, self.content, media_type=label.media_type, name=label.filename)
        attachment = MailAttachment(label, len(self.content), sha256(self.content).hexdigest())
        return {**attachment.as_json(), "blob": reference.as_json()}

    def _label(self) -> AttachmentLabel:
        """Return file name, media type, content id and disposition of the attachment, cleaned.

        Absent or invalid ones are "", except the media type: `application/octet-stream`.
        """

        def text(name: str) -> str:
            value = self.members.get(name)
            return value if isinstance(value, str) else ""

        disposition = text("disposition")
        return AttachmentLabel(
            filename=mail_content.clean_file_name(text("filename")),
            content_type=mail_content.clean_media_type(text("content_type")),
            content_id=mail_content.clean_content_id(text("content_id")),
            disposition=disposition if disposition in {"attachment", "inline"} else "",
        )


def decode_attachments(attachments: Sequence[Mapping[str, Json]]) -> Sequence[JsonAttachment]:
    """Return the attachments with their contents decoded from base64; the content of one sent without content is None.

    Raises a 422 error for invalid base64 and for too many attachments.
    """
    if len(attachments) > DEFAULT_LIMITS.max_attachments:
        most = f"A mail may have at most {DEFAULT_LIMITS.max_attachments:,} attachments"
        raise errors.invalid([errors.problem(_FIELD, "too-many", most)])
    decoded: list[JsonAttachment] = []
    problems: list[Mapping[str, Json]] = []
    for number, members in enumerate(attachments):
        try:
            decoded.append(JsonAttachment(members, _decode_content(members)))
        except ValueError:
            path = f"{_FIELD}.{number}.{CONTENT}"
            problems.append(errors.problem(path, "invalid-base64", "The content must be a base64 string"))
    if problems:
        raise errors.invalid(problems)
    return decoded


def _decode_content(members: Mapping[str, Json]) -> bytes | None:
    """Return the decoded content of an attachment, None without one; white space in the base64 is ignored.

    Raises ValueError for invalid base64, and for a content that is not a text.
    """
    value = members.get(CONTENT)
    if value is None:
        return None
    if not isinstance(value, str):
        raise ValueError("no text")  # noqa: TRY004 - the same error as for invalid base64
    return b64decode("".join(value.split()), validate=True)
