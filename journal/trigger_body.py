"""Webhook bodies that are too large for a row: blobs of the run, named by a reference in the row's trigger."""

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
"""A larger body, as JSON, is kept as a blob."""
_FIELD: Final = b'{"body":'
_BEGINNING: Final = '{ "body":'
"""No encoder writes this space, so that nothing a sender sends can pass for a reference."""


@dataclass(frozen=True, slots=True)
class EncodedTrigger:
    """Output of a webhook trigger as JSON: an object whose first field is the body."""

    content: bytes
    rest: bytes
    """The object without its body."""

    @classmethod
    def of(cls, trigger: Mapping[str, Json]) -> Self:
        """Encode an output; raises `InvalidJson`, and `TakesLong` where others wait."""
        rest = {name: value for name, value in trigger.items() if name != BODY}
        return cls(values.encode_json({BODY: trigger[BODY], **rest}), values.encode_json(rest))

    @property
    def is_large(self) -> bool:
        """Whether the body is kept as a blob."""
        return len(self.content) - len(self.rest) - len(_FIELD) > MAX_ROW_BYTES

    @property
    def body(self) -> bytes:
        """The body alone."""
        return self.content[len(_FIELD) : len(self.content) - len(self.rest)]

    def as_row(self, reference: BlobReference) -> str:
        """Return the text of a row whose body is kept under a reference."""
        return f"{_BEGINNING}{reference.as_text().decode()},{self.rest[1:].decode()}"


def is_separate(trigger: str) -> bool:
    """Tell whether the text of a row has a reference in place of the body."""
    return trigger.startswith(_BEGINNING)


def split_fields(trigger: str) -> dict[str, Raw]:
    """Return the fields of a row with a reference, each as JSON text; `body` is the reference."""
    return decoding.decode(trigger, dict[str, Raw])


def find_reference(trigger: str) -> BlobReference:
    """Return the reference in the text of a row; raises `InvalidReference`."""
    row: dict[str, Any] = decoding.decode(trigger)
    return BlobReference.from_value(row[BODY])


async def read_body(trigger: str, blobs: RunBlobs, owner: BlobOwner) -> dict[str, Json]:
    """Return the whole output that the text of a row stands for.

    Raises `BlobLost`, `BlobsUnavailable` and `InvalidReference`.
    """
    row: dict[str, Any] = decoding.decode(trigger)
    content = await blobs.get(owner, BlobReference.from_value(row[BODY]).sha256)
    return {**row, BODY: await offload.run(values.decode_json, content)}


async def store_body(blobs: RunBlobs, owner: BlobOwner, encoded: EncodedTrigger) -> str:
    """Keep the body as a blob, durably; returns the text of the row. Raises `BlobsUnavailable`."""
    return encoded.as_row(await blobs.put(owner, encoded.body, media_type=MEDIA_TYPE))
