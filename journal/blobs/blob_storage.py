"""Interface of blob storages: durable blobs of a chain of runs, addressed by SHA-256."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import AbstractAsyncContextManager
from typing import TYPE_CHECKING, NamedTuple, Protocol

import msgspec
from msgspec import Struct

if TYPE_CHECKING:
    from datetime import timedelta


class BlobsUnavailable(Exception):
    """The storage did not answer or is full; the same call may succeed later."""


class BlobLost(Exception):
    """The blob does not exist or is corrupt; a retry can't bring it back."""


class BlobOwner(NamedTuple):
    """Owner of blobs: a chain of runs of an organization, which were resumed from, or are replays of, one another."""

    organization_id: str
    key_id: str
    """Id of the first run of the chain."""


class BlobLabel(msgspec.Struct, frozen=True):
    """Metadata of a blob: its media type and file name."""

    type: str
    name: str


class OpenBlob(Struct, frozen=True):
    """Blob that is open for reading, once. Only a reader that reaches its end knows that it is complete."""

    label: BlobLabel
    size: int
    chunks: AsyncIterator[bytes]


class BlobStorage(Protocol):
    """Storage of blobs as executors use it. Every method raises `BlobsUnavailable`."""

    async def put(self, owner: BlobOwner, sha256: str, content: bytes, label: BlobLabel) -> None:
        """Store a blob durably under its hash, which is not checked; if the owner has it already, it is kept or written
        again.
        """

    def open(self, owner: BlobOwner, sha256: str) -> AbstractAsyncContextManager[OpenBlob]:
        """Open a blob for reading in pieces until the block ends; raises `BlobLost` if it is missing."""

    async def close(self) -> None:
        """Close connections and threads; call it only when no transfer is in progress."""


class ManagedBlobStorage(BlobStorage, Protocol):
    """Storage of blobs with the operations that retention needs."""

    async def delete(self, owner: BlobOwner) -> None:
        """Delete all blobs of an owner, if there are any."""

    def idle_owners(self, age: timedelta) -> AsyncIterator[Sequence[BlobOwner]]:
        """Yield, in batches, owners without a new blob for `age`, by the clock of the storage itself."""
