"""Inputs and outputs that are too large for a row: explained in their place, or shown where a client asks for that."""

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
from journal import trigger_body, unparsed_mail
from journal.blobs.blob_reference import BlobReference, InvalidBlobReference
from journal.blobs.blob_storage import BlobLost, BlobsUnavailable
from journal.blobs.blob_store import BlobTooLarge
from json_text import decoding

if TYPE_CHECKING:
    from journal.blobs.blob_storage import BlobOwner
    from journal.blobs.blob_store import RunBlobs

EXPANSIONS_AT_ONCE: Final = 4
"""Answers with expanded outputs that one gateway puts together at a time; others wait, so that memory is bounded."""

_encode = msgspec.json.Encoder().encode


class OmissionReason(StrEnum):
    """Why an output is not shown where it would stand."""

    TOO_LARGE = "too-large"
    OVER_LIMIT = "over-limit"
    LOST = "lost"


class OmissionNote(WireStruct):
    """The size of an output that is not shown, the reason, and the URL that returns it as JSON."""

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
    OmissionReason.LOST: "The blob storage does not have it any more, or not as it was stored",
}


class LargeOutputs:
    """Those of all executions that one gateway shows."""

    def __init__(self, blobs: RunBlobs, public_url: str) -> None:
        self._blobs = blobs
        self._address = f"{public_url.rstrip('/')}/api/v1/executions"
        self._room = asyncio.Semaphore(EXPANSIONS_AT_ONCE)

    def explain(self, execution_id: str) -> ShownOutputs:
        """Return the view of one execution's outputs in which large ones are explained."""
        return ShownOutputs(f"{self._address}/{execution_id}", {}, {})

    async def expand(self, execution_id: str, owner: BlobOwner, texts: Sequence[str]) -> ShownOutputs:
        """Return the view in which large outputs are shown, as far as all of them stay within the limit.

        `texts` are the references, one for each place where an output would stand. Raises 503 where the storage of
        blobs does not answer.
        """
        contents: dict[str, Raw] = {}
        reasons: dict[str, OmissionReason] = {}
        left_bytes = limits.EXPANDED_BYTES
        async with self._room:
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
        try:
            content = await self._blobs.get(owner, reference.sha256, max_bytes=reference.size)
            # A pod may have put anything there, and an answer is JSON as a whole.
            return await asyncio.to_thread(_checked, content)
        except (BlobLost, BlobTooLarge, ValueError, RecursionError):
            return None
        except BlobsUnavailable as error:
            raise errors.not_ready(
                "The blob storage does not answer: try again, or without expand"
            ) from error


class ShownOutputs:
    """One execution's inputs and outputs as an answer shows them."""

    def __init__(
        self, address: str, contents: Mapping[str, Raw], reasons: Mapping[str, OmissionReason]
    ) -> None:
        """`contents` and `reasons` are by the text of the reference; the reason of all others is their size."""
        self._address = address
        self._contents = contents
        self._reasons = reasons

    def show(self, text: str, *, is_reference: bool) -> Raw:
        """Return an output as it is shown: itself, or for a reference its content or an explanation.

        The explanation is `{"$blob": {sha256, size, type, name}, "omitted": {bytes, reason, message, url}}`.
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
        """Return the output of a trigger; a webhook body that is a blob is shown as large outputs are.

        An unparsed mail is shown as an empty object.
        """
        if not trigger_body.is_separate(text):
            return Raw(unparsed_mail.visible_trigger(text))
        fields = trigger_body.split_fields(text)
        fields[trigger_body.BODY] = self.show(_text_of(fields[trigger_body.BODY]), is_reference=True)
        return Raw(_encode(fields))


def trigger_references(text: str) -> list[str]:
    """Return the text of the reference in the output of a trigger; none unless its body is a blob."""
    if not trigger_body.is_separate(text):
        return []
    return [_text_of(trigger_body.split_fields(text)[trigger_body.BODY])]


def _text_of(json_text: Raw) -> str:
    return bytes(json_text).decode()


def _reference_of(text: str) -> BlobReference | None:
    try:
        return BlobReference.from_text(text.encode())
    except InvalidBlobReference:
        return None


def _checked(content: bytes) -> Raw:
    """Return JSON as it is; raises `ValueError` for what is none."""
    content.decode()
    return decoding.decode(content, Raw)
