"""Large values of runs, stored as blobs: inputs and outputs of nodes, and bodies of webhooks.

Values of nodes are moved to blobs when a span is committed, and restored when its run continues. A large body leaves
a reference in the trigger of the run's row.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final, Self

import msgspec
from msgspec import Raw, Struct

from concurrency import offload
from engine import values
from engine.run_records import SETTLED_STATUSES, NodeSpan
from journal.blobs.blob_reference import BlobReference, InvalidBlobReference
from journal.blobs.blob_storage import BlobLost, BlobOwner
from json_text import decoding

if TYPE_CHECKING:
    from engine.values import Json
    from journal.blobs.blob_store import RunBlobs

BODY: Final = "body"
MEDIA_TYPE: Final = "application/json"
MAX_ROW_BYTES: Final = 262_144
"""Size in bytes of JSON above which a body is stored as a blob."""
_FIELD: Final = b'{"body":'
SEPARATE_BODY: Final = '{ "body":'
"""Start of a row with a reference. No encoder writes this space, so no request body can pass for a reference.
"""


class RecordedValueLost(Exception):
    """A recorded value of a node can't be read back, so the run can't continue from it."""

    def __init__(self, message: str, node_id: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.node_id = node_id


class LargeValues(Struct, frozen=True):
    """Large values of one chain of runs. Its methods raise `BlobsUnavailable`."""

    blobs: RunBlobs
    owner: BlobOwner
    max_row_bytes: int

    async def store(self, spans: Sequence[NodeSpan]) -> list[NodeSpan]:
        """Store values over `max_row_bytes` as durable blobs; return the newest span of each node and iteration with
        references to them.

        Earlier spans of the same node and iteration are dropped. Raises `BlobsUnavailable`.
        """
        newest = {(span.node_id, span.iteration): span for span in spans}
        put: dict[bytes, bytes] = {}
        return [await self._without_large(span, put) for span in newest.values()]

    async def restore(self, spans: Sequence[NodeSpan]) -> list[NodeSpan]:
        """Return spans with references replaced by the values from the blobs, read one after another.

        All outputs are read, and inputs only for nodes that have not ended; a reference in place of a rendered config
        stays. Raises `RecordedValueLost` and `BlobsUnavailable`.
        """
        return [await self._restore_span(span) for span in spans]

    async def read_trigger(self, text: str) -> Json:
        """Return the output of a trigger whose body is stored as a blob, with that body; `text` is the row's
        JSON with the reference.

        Raises `RecordedValueLost` and `BlobsUnavailable`.
        """
        try:
            return await read_body(text, self.blobs, self.owner)
        except (BlobLost, InvalidBlobReference) as error:
            raise RecordedValueLost(
                f"The body of the trigger is gone from the blob storage: {error}"
            ) from error

    async def _without_large(self, span: NodeSpan, put: dict[bytes, bytes]) -> NodeSpan:
        """Return a span with references in place of an input, an output and a rendered config that are too large for a
        row.

        `put` has the texts of references to contents that are stored already, by content.
        """
        if self._is_large(span.input):
            span = msgspec.structs.replace(
                span, input=None, input_blob=await self._put_once(span.input or b"", put)
            )
        if self._is_large(span.output):
            span = msgspec.structs.replace(
                span, output=None, output_blob=await self._put_once(span.output or b"", put)
            )
        if self._is_large(span.rendered_config):
            span = msgspec.structs.replace(
                span, rendered_config=await self._put_once(span.rendered_config or b"", put)
            )
        return span

    def _is_large(self, value: bytes | None) -> bool:
        return value is not None and len(value) > self.max_row_bytes

    async def _put_once(self, content: bytes, put: dict[bytes, bytes]) -> bytes:
        """Store content as a blob, unless `put` (texts of references, by content) has it; add it there, and return the
        text of its reference.
        """
        if content not in put:
            put[content] = (await self.blobs.put(self.owner, content, media_type=MEDIA_TYPE)).as_text()
        return put[content]

    async def _restore_span(self, span: NodeSpan) -> NodeSpan:
        """Return a span with its values instead of references: the output, and the input of a node that has
        not ended.
        """
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
            return await self.blobs.get(self.owner, BlobReference.from_text(reference).sha256)
        except (BlobLost, InvalidBlobReference) as error:
            message = f"The {field} of the node {span.node_id!r} is gone from the blob storage: {error}"
            raise RecordedValueLost(message, span.node_id) from error


class EncodedTrigger(Struct, frozen=True):
    """Output of a webhook trigger as JSON: an object with the body as its first field."""

    content: bytes
    rest: bytes
    """The object without its body."""

    @classmethod
    def of(cls, trigger: Mapping[str, Json]) -> Self:
        """Encode the output of a trigger that has a `body`, twice: whole with the body first, and without the body.

        Raises `InvalidJson`, and `BudgetExceeded` within `offload.try_inline`.
        """
        rest = {name: value for name, value in trigger.items() if name != BODY}
        return cls(values.encode_json({BODY: trigger[BODY], **rest}), values.encode_json(rest))

    @property
    def is_large(self) -> bool:
        """Whether the body is too large for the row of its run, and is stored as a blob."""
        return len(self.content) - len(self.rest) - len(_FIELD) > MAX_ROW_BYTES

    @property
    def body(self) -> bytes:
        """JSON text of the body alone, without the other fields of the trigger's output."""
        return self.content[len(_FIELD) : len(self.content) - len(self.rest)]

    def as_row(self, reference: BlobReference) -> str:
        """Return the JSON text for the row of the run: the trigger's output with a reference in place of the body.

        Its first characters, `{ "body":`, mark it as such.
        """
        return f"{SEPARATE_BODY}{reference.as_text().decode()},{self.rest[1:].decode()}"


def has_separate_body(trigger: str) -> bool:
    """Return whether the trigger text of a row has a reference in place of its body, which is stored as a blob."""
    return trigger.startswith(SEPARATE_BODY)


def split_fields(trigger: str) -> dict[str, Raw]:
    """Return the fields of a trigger text whose body is a reference, each as JSON text; that of `body` is the
    reference.
    """
    return decoding.decode(trigger, dict[str, Raw])


def find_reference(trigger: str) -> BlobReference:
    """Return the reference to the body in a trigger text; raises `InvalidBlobReference`, and `KeyError`
    without a body.
    """
    row: dict[str, Any] = decoding.decode(trigger)
    return BlobReference.from_value(row[BODY])


async def read_body(trigger: str, blobs: RunBlobs, owner: BlobOwner) -> dict[str, Json]:
    """Return the whole trigger output for a trigger text with a reference to its body, which is read from its blob.

    Raises `BlobLost`, `BlobsUnavailable` and `InvalidBlobReference`.
    """
    row: dict[str, Any] = decoding.decode(trigger)
    content = await blobs.get(owner, BlobReference.from_value(row[BODY]).sha256)
    return {**row, BODY: await offload.run(values.decode_json, content)}


async def store_body(blobs: RunBlobs, owner: BlobOwner, encoded: EncodedTrigger) -> str:
    """Store the body of a trigger as a durable blob; return the trigger text with a reference to it.

    Raises `BlobsUnavailable`.
    """
    return encoded.as_row(await blobs.put(owner, encoded.body, media_type=MEDIA_TYPE))
