"""References to blobs, as rows and JSON values hold them in place of a blob."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import msgspec

from json_text import decoding

if TYPE_CHECKING:
    from engine.values import Json

MAX_NAME_CHARACTERS = 255
MAX_TYPE_CHARACTERS = 255


class InvalidBlobReference(ValueError):
    """The value is not a reference to a blob."""


class BlobReference(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Reference to a blob; valid only inside the chain of runs that owns the blob."""

    sha256: Annotated[str, msgspec.Meta(pattern=r"\A[0-9a-f]{64}\Z")]
    size: Annotated[int, msgspec.Meta(ge=0)]
    type: Annotated[str, msgspec.Meta(max_length=MAX_TYPE_CHARACTERS)] = "application/octet-stream"
    name: Annotated[str, msgspec.Meta(max_length=MAX_NAME_CHARACTERS)] = ""

    @classmethod
    def from_value(cls, value: Json) -> BlobReference:
        """Parse a reference from its JSON value, `{"$blob": {...}}`; raises `InvalidBlobReference`."""
        try:
            return msgspec.convert(value, _BlobReferenceEnvelope).blob
        except msgspec.ValidationError as error:
            raise InvalidBlobReference(f"The value is not a reference to a blob: {error}") from error

    @classmethod
    def from_text(cls, text: bytes) -> BlobReference:
        """Parse a reference from JSON text, as a row has it instead of a large value; raises
        `InvalidBlobReference`.
        """
        try:
            return decoding.decode(text, _BlobReferenceEnvelope).blob
        except msgspec.DecodeError as error:
            raise InvalidBlobReference(f"The value is not a reference to a blob: {error}") from error

    def as_json(self) -> dict[str, Json]:
        """Return the JSON value: `{"$blob": {sha256, size, type, name}}`."""
        wrapped: dict[str, Any] = msgspec.to_builtins(_BlobReferenceEnvelope(self))
        return wrapped

    def as_text(self) -> bytes:
        """Return the reference as JSON text, which a row holds in place of the large value."""
        return msgspec.json.encode(_BlobReferenceEnvelope(self))


class _BlobReferenceEnvelope(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    blob: BlobReference = msgspec.field(name="$blob")
