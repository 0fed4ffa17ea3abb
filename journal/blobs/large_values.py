"""Large inputs and outputs of nodes, stored as blobs.

They are moved to blobs when a span is committed, and restored when its run continues.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

import msgspec

from engine.run_records import SETTLED_STATUSES, NodeSpan
from journal import trigger_body
from journal.blobs.blob_reference import BlobReference, InvalidBlobReference
from journal.blobs.blob_storage import BlobLost, BlobOwner

if TYPE_CHECKING:
    from engine.values import Json
    from journal.blobs.blob_store import RunBlobs

JSON_MEDIA_TYPE: Final = "application/json"


class RecordedValueLost(Exception):
    """A recorded value of a node can't be read back, so the run can't continue from it."""

    def __init__(self, message: str, node_id: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.node_id = node_id


class LargeValues:
    """Large values of one chain of resumed runs. Its methods raise `BlobsUnavailable`."""

    def __init__(self, blobs: RunBlobs, owner: BlobOwner, max_row_bytes: int) -> None:
        self.max_row_bytes = max_row_bytes
        self._blobs = blobs
        self._owner = owner

    async def store(self, spans: Sequence[NodeSpan]) -> list[NodeSpan]:
        """Return the newest span of each node for its row, with large values as references.

        Values larger than a row are durable as blobs by then.
        """
        newest = {(span.node_id, span.iteration): span for span in spans}
        put: dict[bytes, bytes] = {}
        return [await self._without_large(span, put) for span in newest.values()]

    async def restore(self, spans: Sequence[NodeSpan]) -> list[NodeSpan]:
        """Return spans with their recorded values, read one after another; raises `RecordedValueLost`."""
        return [await self._restore_span(span) for span in spans]

    async def trigger(self, text: str) -> Json:
        """Return the whole output of a trigger with a separate body; raises `RecordedValueLost`."""
        try:
            return await trigger_body.read_body(text, self._blobs, self._owner)
        except (BlobLost, InvalidBlobReference) as error:
            raise RecordedValueLost(
                f"The body of the trigger is gone from the blob storage: {error}"
            ) from error

    async def _without_large(self, span: NodeSpan, put: dict[bytes, bytes]) -> NodeSpan:
        if self._is_large(span.input):
            span = msgspec.structs.replace(
                span, input=None, input_blob=await self._reference(span.input or b"", put)
            )
        if self._is_large(span.output):
            span = msgspec.structs.replace(
                span, output=None, output_blob=await self._reference(span.output or b"", put)
            )
        return span

    def _is_large(self, value: bytes | None) -> bool:
        return value is not None and len(value) > self.max_row_bytes

    async def _reference(self, content: bytes, put: dict[bytes, bytes]) -> bytes:
        if content not in put:
            put[content] = (await self._blobs.put(self._owner, content, media_type=JSON_MEDIA_TYPE)).as_text()
        return put[content]

    async def _restore_span(self, span: NodeSpan) -> NodeSpan:
        # Nothing reads the input of a settled node again.
        if span.input_blob is not None and span.status not in SETTLED_STATUSES:
            span = msgspec.structs.replace(
                span, input=await self._read_content(span, "input", span.input_blob), input_blob=None
            )
        if span.output_blob is not None:
            span = msgspec.structs.replace(
                span, output=await self._read_content(span, "output", span.output_blob), output_blob=None
            )
        return span

    async def _read_content(self, span: NodeSpan, field: str, reference: bytes) -> bytes:
        try:
            return await self._blobs.get(self._owner, BlobReference.from_text(reference).sha256)
        except (BlobLost, InvalidBlobReference) as error:
            message = f"The {field} of the node {span.node_id!r} is gone from the blob storage: {error}"
            raise RecordedValueLost(message, span.node_id) from error
