"""Blob service for nodes: each run reads only blobs of its own chain of runs."""

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
"""Maximum size of a blob for nodes, which hold the content in memory."""


class NodeBlobs:
    """Blobs for the nodes of a process; implements `engine.services.BlobService`."""

    def __init__(self, blobs: RunBlobs) -> None:
        self._blobs = blobs

    async def put(
        self, caller: RunCaller, content: bytes, *, media_type: str, name: str = ""
    ) -> dict[str, Json]:
        """Store content as a blob of the chain of the caller's run, and return the reference as JSON.

        Raises `NodeError` above 50 MB, and (retryable) if the storage is unavailable.
        """
        if len(content) > MAX_BLOB_BYTES:
            raise _blob_too_large(len(content), MAX_BLOB_BYTES)
        try:
            reference = await self._blobs.put(_blob_owner(caller), content, media_type=media_type, name=name)
        except BlobsUnavailable as error:
            raise _blobs_unavailable() from error
        return reference.as_json()

    async def get(self, caller: RunCaller, reference: Json, *, max_bytes: int) -> bytes:
        """Return the content of a blob of the caller's chain of runs; at most `max_bytes`, and never above 50 MB.

        Raises `NodeError` for an invalid reference, a missing or corrupt blob, a larger one, and (retryable)
        an unavailable storage.
        """
        max_bytes = min(max_bytes, MAX_BLOB_BYTES)
        try:
            # Only the hash of the reference counts: the run, never the reference, decides where to read.
            return await self._blobs.get(
                _blob_owner(caller), BlobReference.from_value(reference).sha256, max_bytes=max_bytes
            )
        except InvalidBlobReference as error:
            raise NodeError(str(error), code="invalid-blob") from error
        except BlobTooLarge as error:
            raise _blob_too_large(error.size, max_bytes) from error
        except BlobLost as error:
            raise NodeError(
                "This run has no such blob, or its content is corrupt", code="blob-not-found"
            ) from error
        except BlobsUnavailable as error:
            raise _blobs_unavailable() from error


def _blob_owner(caller: RunCaller) -> BlobOwner:
    return BlobOwner(caller.organization_id, caller.key_id)


def _blob_too_large(size: int, max_bytes: int) -> NodeError:
    message = f"The content has {size:,} bytes; the maximum is {max_bytes:,}"
    return NodeError(message, code="blob-too-large")


def _blobs_unavailable() -> NodeError:
    return NodeError("The blob storage does not answer", code="blobs-unavailable", retryable=True)
