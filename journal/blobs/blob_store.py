"""Blobs: values that are too large or too raw for a row, stored by SHA-256 for a chain of runs."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from hashlib import sha256 as hash_of
from typing import TYPE_CHECKING

from msgspec.structs import replace

from journal.blobs.blob_reference import MAX_NAME_CHARACTERS, MAX_TYPE_CHARACTERS, BlobReference
from journal.blobs.blob_storage import BlobLabel, BlobLost, BlobOwner, BlobsUnavailable, OpenBlob
from models import ids

if TYPE_CHECKING:
    from journal.blobs.blob_storage import BlobStorage, ManagedBlobStorage

MAX_TRANSFERS = 4
"""Maximum number of blobs that one process holds in memory for transfers at once."""
TRANSFER_SECONDS = 60.0
RAW_MEDIA_TYPE = "application/octet-stream"

_SHA256 = re.compile(r"[0-9a-f]{64}")
_TOKEN = r"[A-Za-z0-9!#$&^_.+-]+"  # noqa: S105 - a part of a grammar
_MEDIA_TYPE = re.compile(rf"{_TOKEN}/{_TOKEN}(?:\s*;\s*{_TOKEN}=(?:{_TOKEN}|\"[\w .+-]*\"))*", re.ASCII)
_UNPRINTABLE = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")


class RunBlobs:
    """Reader and writer of blobs for executors, with limits of time and memory."""

    def __init__(self, contents: BlobStorage) -> None:
        self._contents = contents
        self._transfers = asyncio.Semaphore(MAX_TRANSFERS)

    async def put(
        self, owner: BlobOwner, content: bytes, *, media_type: str, name: str = ""
    ) -> BlobReference:
        """Store content durably as a blob named by its SHA-256, and return the reference to it.

        An unknown media type or a path in the name is replaced by a harmless one. Waits while four other transfers
        are in progress. Raises `BlobsUnavailable`, also after a transfer of 60 seconds.
        """
        _require_ids(owner)
        async with self._transfers, _limit_time():
            digest = await asyncio.to_thread(lambda: hash_of(content).hexdigest())
            label = BlobLabel(_clean_media_type(media_type), _clean_file_name(name))
            await self._contents.put(owner, digest, content, label)
        return BlobReference(digest, len(content), label.type, label.name)

    async def get(self, owner: BlobOwner, sha256: str, *, max_bytes: int | None = None) -> bytes:
        """Return the whole content of a blob, verified by its hash.

        Waits while four other transfers are in progress. Raises `BlobTooLarge` above `max_bytes` before it reads,
        `BlobLost` for a missing or corrupt blob or an invalid hash, and `BlobsUnavailable`, also after a transfer of
        60 seconds.
        """
        async with self._transfers, _limit_time(), self.open(owner, sha256) as opened:
            if max_bytes is not None and opened.size > max_bytes:
                raise BlobTooLarge(opened.size)
            return b"".join([chunk async for chunk in opened.chunks])

    async def copy(self, source: BlobOwner, target: BlobOwner, reference: BlobReference) -> bool:
        """Copy a blob to another owner of the same organization; return False if it is missing or corrupt.

        Raises `BlobsUnavailable` as `get` and `put` do.
        """
        try:
            content = await self.get(source, reference.sha256)
        except BlobLost:
            return False
        await self.put(target, content, media_type=reference.type, name=reference.name)
        return True

    @asynccontextmanager
    async def open(self, owner: BlobOwner, sha256: str) -> AsyncIterator[OpenBlob]:
        """Open a blob for reading in chunks within the block, without a limit of time or of the number of transfers.

        Raises `BlobLost` for a missing blob and an invalid hash and, instead of the last chunk, for a corrupt blob; and
        `BlobsUnavailable`.
        """
        _require_ids(owner)
        if not _SHA256.fullmatch(sha256):
            raise BlobLost("There is no such blob")
        async with self._contents.open(owner, sha256) as opened:
            yield replace(opened, chunks=_verify_chunks(opened, sha256))

    async def close(self) -> None:
        await self._contents.close()


class BlobStore(RunBlobs):
    """Blobs with direct access to their storage, for processes that delete them."""

    def __init__(self, backend: ManagedBlobStorage) -> None:
        super().__init__(backend)
        self._backend = backend

    async def delete_all(self, owners: Iterable[BlobOwner]) -> None:
        """Delete all blobs of each owner, one owner after another; raises `BlobsUnavailable` at the first failure.

        An owner is a run with the runs that resumed or replayed it. The caller checks that no run is left.
        """
        for owner in owners:
            _require_ids(owner)
            await self._backend.delete(owner)

    @property
    def backend(self) -> ManagedBlobStorage:
        """The underlying storage, for maintenance of the storage as a whole."""
        return self._backend


class BlobTooLarge(Exception):
    """The blob has more bytes than the caller's limit."""

    def __init__(self, size: int) -> None:
        super().__init__(f"The blob has {size:,} bytes")
        self.size = size


@asynccontextmanager
async def _limit_time() -> AsyncIterator[None]:
    """Raise `BlobsUnavailable` if the block takes longer than `TRANSFER_SECONDS`."""
    limit = asyncio.timeout(TRANSFER_SECONDS)
    try:
        async with limit:
            yield
    except TimeoutError as error:
        raise BlobsUnavailable(f"The blob storage took longer than {TRANSFER_SECONDS:g} s") from error


async def _verify_chunks(opened: OpenBlob, sha256: str) -> AsyncIterator[bytes]:
    """Yield each chunk once the next one is read, so that a wrong hash of the whole raises `BlobLost` instead of the
    last chunk.
    """
    digest = hash_of()
    held = b""
    async for chunk in opened.chunks:
        digest.update(chunk)
        if held:
            yield held
        held = chunk
    if digest.hexdigest() != sha256:
        raise BlobLost("The blob is corrupt: its content does not match its SHA-256")
    yield held


def _require_ids(owner: BlobOwner) -> None:
    """Raise `ValueError` for an owner with ids that could lead out of the storage's folder, since ids are parts of
    paths.

    Callers don't expect the error, for the ids are read from rows.
    """
    if not all(map(ids.is_id, owner)):
        raise ValueError("The owner of a blob must be two ids")


def _clean_media_type(text: str) -> str:
    is_one = len(text) <= MAX_TYPE_CHARACTERS and _MEDIA_TYPE.fullmatch(text)
    return text if is_one else RAW_MEDIA_TYPE


def _clean_file_name(text: str) -> str:
    """Return the last part of an untrusted path as a file name, without control characters, cut to its last
    255 characters.

    It may be empty.
    """
    return _UNPRINTABLE.sub("", text).replace("\\", "/").rpartition("/")[2][-MAX_NAME_CHARACTERS:]
