"""Values that are too large for a row: explained in place, or expanded on request."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Mapping, Sequence
from enum import StrEnum
from typing import TYPE_CHECKING, Any, Final

import msgspec
from msgspec import Raw

from gateway.http import errors, limits
from gateway.http.wire import WireStruct
from journal import unparsed_mail
from journal.blobs import large_values
from journal.blobs.blob_reference import BlobReference, InvalidBlobReference
from journal.blobs.blob_storage import BlobLost, BlobsUnavailable
from journal.blobs.blob_store import BlobTooLarge
from json_text import decoding

if TYPE_CHECKING:
    from journal.blobs.blob_storage import BlobOwner
    from journal.blobs.blob_store import RunBlobs

EXPANSIONS_AT_ONCE: Final = 4
"""Concurrent answers with expanded outputs of one gateway; others wait, so that memory is bounded."""

_encode = msgspec.json.Encoder().encode


class OmissionReason(StrEnum):
    """Reason for the omission of an output."""

    TOO_LARGE = "too-large"
    OVER_LIMIT = "over-limit"
    LOST = "lost"


class OmissionNote(WireStruct):
    """Size of an omitted output, the reason, and the URL that returns it as JSON."""

    bytes: int
    reason: OmissionReason
    message: str
    url: str


_MESSAGES: Final = {
    OmissionReason.TOO_LARGE: (
        "It is larger than PILOTFLAME_MAX_ROW_OUTPUT_BYTES: GET the url, or ask for the execution or its spans with"
        " ?expand=blobs"
    ),
    OmissionReason.OVER_LIMIT: (
        f"?expand=blobs shows at most {limits.EXPANDED_BYTES:,} bytes of large outputs in one answer: GET the url"
    ),
    OmissionReason.LOST: "The blob storage no longer has it, or not as it was stored",
}


class LargeOutputs:
    """Views of the large outputs of executions, for one gateway."""

    def __init__(self, blobs: RunBlobs, public_url: str) -> None:
        self._blobs = blobs
        self._address = f"{public_url.rstrip('/')}/api/v1/executions"
        self._slots = asyncio.Semaphore(EXPANSIONS_AT_ONCE)

    def explain(self, execution_id: str) -> ShownOutputs:
        """Return the view of an execution's outputs that shows a note with a download URL in place of each
        large one.
        """
        return ShownOutputs(f"{self._address}/{execution_id}", {}, {})

    async def expand(self, execution_id: str, owner: BlobOwner, texts: Sequence[str]) -> ShownOutputs:
        """Return the view of an execution's outputs that shows large ones, up to 10 MB in all; others are explained.

        `texts` are their references, each repeated for every place that shows it. A lost blob is explained too. Raises
        a 503 error if the blob storage does not answer.
        """
        contents: dict[str, Raw] = {}
        reasons: dict[str, OmissionReason] = {}
        left_bytes = limits.EXPANDED_BYTES
        async with self._slots:
            for text, count in Counter(texts).items():
                reference = _reference_of(text)
                if reference is None:
                    continue
                if reference.size * count > left_bytes:
                    reasons[text] = OmissionReason.OVER_LIMIT
                    continue
                content = await self._content(owner, reference)
                if content is None:
                    reasons[text] = OmissionReason.LOST
                    continue
                left_bytes -= reference.size * count
                contents[text] = content
        return ShownOutputs(f"{self._address}/{execution_id}", contents, reasons)

    async def _content(self, owner: BlobOwner, reference: BlobReference) -> Raw | None:
        """Return the content of a blob as JSON; None if it is lost, larger than its reference says, or no JSON.

        Raises a 503 error if the storage does not answer.
        """
        try:
            content = await self._blobs.get(owner, reference.sha256, max_bytes=reference.size)
            # A pod may have stored any bytes, and the answer as a whole must be JSON.
            return await asyncio.to_thread(_check_json, content)
        except (BlobLost, BlobTooLarge, ValueError, RecursionError):
            return None
        except BlobsUnavailable as error:
            raise errors.not_ready(
                "The blob storage does not answer: try again, or without expand"
            ) from error


class ShownOutputs:
    """View of the inputs and outputs of one execution."""

    def __init__(
        self, address: str, contents: Mapping[str, Raw], reasons: Mapping[str, OmissionReason]
    ) -> None:
        """`contents` and `reasons` are keyed by the text of the reference; other references are `too-large`."""
        self._address = address
        self._contents = contents
        self._reasons = reasons

    def show(self, text: str, *, is_reference: bool) -> Raw:
        """Return an output as JSON text; for a reference, its content or an explanation.

        The explanation is `{"$blob": {sha256, size, type, name}, "omitted": {bytes, reason, message, url}}`.
        Text that is no valid reference is returned unchanged.
        """
        if not is_reference:
            return Raw(text)
        if text in self._contents:
            return self._contents[text]
        reference = _reference_of(text)
        if reference is None:
            return Raw(text)
        reason = self._reasons.get(text, OmissionReason.TOO_LARGE)
        note = OmissionNote(
            bytes=reference.size,
            reason=reason,
            message=_MESSAGES[reason],
            url=f"{self._address}/blobs/{reference.sha256}",
        )
        explained: dict[str, Any] = {**reference.as_json(), "omitted": note}
        return Raw(_encode(explained))

    def show_trigger(self, text: str) -> Raw:
        """Return the output of a trigger as JSON; a webhook body that is a blob is shown as large outputs are.

        An unparsed mail is shown as an empty object.
        """
        if not large_values.has_separate_body(text):
            return Raw(unparsed_mail.visible_trigger(text))
        fields = large_values.split_fields(text)
        fields[large_values.BODY] = self.show(_text_of(fields[large_values.BODY]), is_reference=True)
        return Raw(_encode(fields))


def trigger_references(text: str) -> list[str]:
    """Return the text of the blob reference in the output of a trigger, as a list of one; empty unless its
    body is a blob.
    """
    if not large_values.has_separate_body(text):
        return []
    return [_text_of(large_values.split_fields(text)[large_values.BODY])]


def _text_of(json_text: Raw) -> str:
    return bytes(json_text).decode()


def _reference_of(text: str) -> BlobReference | None:
    try:
        return BlobReference.from_text(text.encode())
    except InvalidBlobReference:
        return None


def _check_json(content: bytes) -> Raw:
    """Return JSON text unchanged; raises ValueError for bytes that aren't JSON in UTF-8."""
    content.decode()
    return decoding.decode(content, Raw)
