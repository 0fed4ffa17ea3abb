"""Large webhook bodies: stored as blobs of the run, with a reference in the trigger of the run's row."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Self

from msgspec import Raw

from concurrency import offload
from engine import values
from journal.blobs.blob_reference import BlobReference
from json_text import decoding

if TYPE_CHECKING:
    from engine.values import Json
    from journal.blobs.blob_storage import BlobOwner
    from journal.blobs.blob_store import RunBlobs

BODY: Final = "body"
MEDIA_TYPE: Final = "application/json"
MAX_ROW_BYTES: Final = 262_144
"""Size in bytes of JSON above which a body is stored as a blob."""
_FIELD: Final = b'{"body":'
_BEGINNING: Final = '{ "body":'
"""Start of a row with a reference. No encoder writes this space, so no request body can pass for a reference.
"""


@dataclass(frozen=True, slots=True)
class EncodedTrigger:
    """Output of a webhook trigger as JSON: an object with the body as its first field."""

    content: bytes
    rest: bytes
    """The object without its body."""

    @classmethod
    def of(cls, trigger: Mapping[str, Json]) -> Self:
        """Encode an output; raises `InvalidJson`, and `BudgetExceeded` where large work may not run inline."""
        rest = {name: value for name, value in trigger.items() if name != BODY}
        return cls(values.encode_json({BODY: trigger[BODY], **rest}), values.encode_json(rest))

    @property
    def is_large(self) -> bool:
        """Whether the body is stored as a blob."""
        return len(self.content) - len(self.rest) - len(_FIELD) > MAX_ROW_BYTES

    @property
    def body(self) -> bytes:
        """JSON of the body alone."""
        return self.content[len(_FIELD) : len(self.content) - len(self.rest)]

    def as_row(self, reference: BlobReference) -> str:
        """Return the row's text with a reference in place of the body."""
        return f"{_BEGINNING}{reference.as_text().decode()},{self.rest[1:].decode()}"


def is_separate(trigger: str) -> bool:
    """Return whether the row's text has a reference in place of the body."""
    return trigger.startswith(_BEGINNING)


def split_fields(trigger: str) -> dict[str, Raw]:
    """Return the fields of a row with a reference, each as JSON text; `body` is the reference."""
    return decoding.decode(trigger, dict[str, Raw])


def find_reference(trigger: str) -> BlobReference:
    """Return the reference in the row's text; raises `InvalidBlobReference`."""
    row: dict[str, Any] = decoding.decode(trigger)
    return BlobReference.from_value(row[BODY])


async def read_body(trigger: str, blobs: RunBlobs, owner: BlobOwner) -> dict[str, Json]:
    """Return the whole trigger output for the row's text.

    Raises `BlobLost`, `BlobsUnavailable` and `InvalidBlobReference`.
    """
    row: dict[str, Any] = decoding.decode(trigger)
    content = await blobs.get(owner, BlobReference.from_value(row[BODY]).sha256)
    return {**row, BODY: await offload.run(values.decode_json, content)}


async def store_body(blobs: RunBlobs, owner: BlobOwner, encoded: EncodedTrigger) -> str:
    """Store the body as a durable blob; returns the row's text. Raises `BlobsUnavailable`."""
    return encoded.as_row(await blobs.put(owner, encoded.body, media_type=MEDIA_TYPE))
