"""What a folder and a bucket promise alike: contents of a line of runs by their SHA-256, durable when they are put."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, Protocol

import msgspec

if TYPE_CHECKING:
    from datetime import timedelta


class BlobsUnavailable(Exception):
    """The storage did not answer, or had no room; the same call may succeed later."""


class BlobLost(Exception):
    """There is no such content, or it is not what was put: another try won't bring it back."""


class BlobOwner(NamedTuple):
    """Whose a content is: that of all runs that were resumed from one another, in one organisation."""

    organization_id: str
    key_id: str
    """The id of the first of those runs."""


class BlobLabel(msgspec.Struct, frozen=True):
    """What is known of a content besides the content."""

    type: str
    name: str


@dataclass(frozen=True, slots=True)
class OpenBlob:
    """A content, to be read once; only who has read it to its end knows that it is whole."""

    label: BlobLabel
    size: int
    chunks: AsyncIterator[bytes]


class BlobStorage(Protocol):
    """A place for contents, as whoever runs executions uses it. Every method raises `BlobsUnavailable`."""

    async def put(self, owner: BlobOwner, sha256: str, content: bytes, label: BlobLabel) -> None:
        """Keep a content, durably; one that is there already stays, or is replaced by the same."""

    def open(self, owner: BlobOwner, sha256: str) -> AbstractAsyncContextManager[OpenBlob]:
        """Open a content; raises `BlobLost`."""

    async def close(self) -> None:
        """Let go of what is open."""


class ManagedBlobStorage(BlobStorage, Protocol):
    """The place itself, with what it takes to keep it tidy."""

    async def delete(self, owner: BlobOwner) -> None:
        """Delete all contents of a line of runs, if there are any."""

    def idle_owners(self, age: timedelta) -> AsyncIterator[Sequence[BlobOwner]]:
        """Return, in batches, those to whom nothing has been added for so long, by the clock of the storage itself."""
