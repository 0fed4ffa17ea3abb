"""The blobs of a process as its nodes use them: each sees those of its own line of runs, and no others."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from engine.run_errors import NodeError
from journal.blobs.blob_reference import BlobReference, InvalidBlobReference
from journal.blobs.blob_storage import BlobLost, BlobOwner, BlobsUnavailable
from journal.blobs.blob_store import BlobTooLarge

if TYPE_CHECKING:
    from engine.services import RunCaller
    from engine.values import Json
    from journal.blobs.blob_store import RunBlobs

MAX_BLOB_BYTES: Final = 50_000_000
"""What a node has of a content, it has in memory."""


class NodeBlobs:
    """Keeps the promises of `engine.services.BlobService`."""

    def __init__(self, blobs: RunBlobs) -> None:
        self._blobs = blobs

    async def put(
        self, caller: RunCaller, content: bytes, *, media_type: str, name: str = ""
    ) -> dict[str, Json]:
        """Keep a content; see `Blobs.put`."""
        if len(content) > MAX_BLOB_BYTES:
            raise _blob_too_large(len(content), MAX_BLOB_BYTES)
        try:
            reference = await self._blobs.put(_blob_owner(caller), content, media_type=media_type, name=name)
        except BlobsUnavailable as error:
            raise _blobs_unavailable() from error
        return reference.as_json()

    async def get(self, caller: RunCaller, reference: Json, *, max_bytes: int) -> bytes:
        """Return a content; see `Blobs.get`."""
        max_bytes = min(max_bytes, MAX_BLOB_BYTES)
        try:
            # Only the hash of what was given counts: where it leads is decided by the run, never by the reference.
            return await self._blobs.get(
                _blob_owner(caller), BlobReference.from_value(reference).sha256, max_bytes=max_bytes
            )
        except InvalidBlobReference as error:
            raise NodeError(str(error), code="invalid-blob") from error
        except BlobTooLarge as error:
            raise _blob_too_large(error.size, max_bytes) from error
        except BlobLost as error:
            raise NodeError(
                "This run was given no such blob, or it is spoilt", code="blob-not-found"
            ) from error
        except BlobsUnavailable as error:
            raise _blobs_unavailable() from error


def _blob_owner(caller: RunCaller) -> BlobOwner:
    return BlobOwner(caller.organization_id, caller.key_id)


def _blob_too_large(size: int, max_bytes: int) -> NodeError:
    message = f"The content has {size:,} bytes; at most {max_bytes:,} are taken"
    return NodeError(message, code="blob-too-large")


def _blobs_unavailable() -> NodeError:
    return NodeError("The blob storage does not answer", code="blobs-unavailable", retryable=True)
