"""Blob storage in an S3 bucket, as objects `prefix/organization/first run/sha256`."""

from __future__ import annotations

import secrets
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from datetime import timedelta
from itertools import groupby
from typing import TYPE_CHECKING
from urllib.parse import quote, unquote

import obstore
from obstore.exceptions import BaseError
from obstore.store import S3Store

from journal.blobs.blob_storage import BlobLabel, BlobLost, BlobOwner, BlobsUnavailable, OpenBlob
from models import ids

if TYPE_CHECKING:
    from datetime import datetime

    from obstore.store import S3Config

CONNECT_SECONDS = 5
RESPONSE_SECONDS = 30
RETRY_SECONDS = 20
CHUNK_BYTES = 1_048_576
BATCH_OWNERS = 500
CLOCK_FOLDER = "clock"
"""Prefix of the objects that are written to read the clock of the bucket."""
NAME_ATTRIBUTE = "name"
"""Key of the object metadata that holds the file name, percent-encoded in ASCII."""


class BucketBlobStorage:
    """`ManagedBlobStorage` in a bucket. S3 makes an object durable before it answers."""

    def __init__(self, bucket: str, prefix: str, config: S3Config, *, allow_http: bool) -> None:
        self._store = S3Store(
            bucket,
            prefix=prefix or None,
            config=config,
            client_options={
                "allow_http": allow_http,
                "connect_timeout": timedelta(seconds=CONNECT_SECONDS),
                "timeout": timedelta(seconds=RESPONSE_SECONDS),
            },
            retry_config={"max_retries": 3, "retry_timeout": timedelta(seconds=RETRY_SECONDS)},
        )

    async def put(self, owner: BlobOwner, sha256: str, content: bytes, label: BlobLabel) -> None:
        """Write a blob as an object of the bucket, with its media type and file name as attributes.

        An existing object is replaced. Raises `BlobsUnavailable`.
        """
        attributes = {
            "Content-Type": label.type,
            **({NAME_ATTRIBUTE: quote(label.name)} if label.name else {}),
        }
        with _translate_errors():
            await obstore.put_async(
                self._store, _blob_path(owner, sha256), content, attributes=attributes, use_multipart=False
            )

    @asynccontextmanager
    async def open(self, owner: BlobOwner, sha256: str) -> AsyncIterator[OpenBlob]:
        """Open the object of a blob for reading in pieces until the block ends.

        Raises `BlobLost` if it is missing, and `BlobsUnavailable`.
        """
        with _translate_errors():
            result = await obstore.get_async(self._store, _blob_path(owner, sha256))
        attributes = result.attributes
        label = BlobLabel(attributes.get("Content-Type", ""), unquote(attributes.get(NAME_ATTRIBUTE, "")))
        yield OpenBlob(label, result.meta["size"], _read_chunks(result))

    async def delete(self, owner: BlobOwner) -> None:
        """Delete all objects of one run, or of one chain of runs; none is no error.

        Raises `BlobsUnavailable`.
        """
        with _translate_errors():
            async for listed in obstore.list(self._store, prefix=_blob_path(owner, "")):
                await obstore.delete_async(self._store, [entry["path"] for entry in listed])

    async def idle_owners(self, age: timedelta) -> AsyncIterator[Sequence[BlobOwner]]:
        """Yield batches of owners whose newest object is older than `age`, by the time of the bucket; batches
        may be empty.

        Objects that are no blobs are skipped. Raises `BlobsUnavailable`.
        """
        since = await self._now() - age
        newest: dict[BlobOwner, datetime] = {}
        with _translate_errors():
            async for listed in obstore.list(self._store, chunk_size=BATCH_OWNERS):
                for owner, entries in groupby(listed, key=lambda entry: _owner_of_path(entry["path"])):
                    if owner is None:
                        continue
                    added = max(entry["last_modified"] for entry in entries)
                    newest[owner] = max(added, newest.get(owner, added))
                # Listings are sorted by key: only the last owner may have more objects.
                complete = list(newest)[:-1]
                yield [owner for owner in complete if newest.pop(owner) < since]
        yield [owner for owner, added in newest.items() if added < since]

    async def _now(self) -> datetime:
        """Return the bucket's time, by which it dates objects, from a probe object that is deleted again.

        Raises `BlobsUnavailable`.
        """
        probe = f"{CLOCK_FOLDER}/{secrets.token_hex(8)}"
        with _translate_errors():
            await obstore.put_async(self._store, probe, b"", use_multipart=False)
            try:
                async for listed in obstore.list(self._store, prefix=CLOCK_FOLDER):
                    for entry in listed:
                        if entry["path"] == probe:
                            return entry["last_modified"]
            finally:
                await obstore.delete_async(self._store, [probe])
        raise BlobsUnavailable("The bucket of blobs does not list an object that was just written")

    async def close(self) -> None:
        """Do nothing: idle connections close by themselves."""


async def _read_chunks(result: obstore.GetResult) -> AsyncIterator[bytes]:
    """Yield the content of an object in chunks of about `CHUNK_BYTES`; raises `BlobsUnavailable`."""
    with _translate_errors():
        async for chunk in result.stream(min_chunk_size=CHUNK_BYTES):
            yield bytes(chunk)


@contextmanager
def _translate_errors() -> Iterator[None]:
    """Raise `BlobLost` for a missing object, and `BlobsUnavailable` for other failures of the bucket in the block."""
    try:
        yield
    except FileNotFoundError as error:
        raise BlobLost("There is no such blob") from error
    except (BaseError, OSError, ValueError) as error:
        raise BlobsUnavailable("The bucket of blobs did not answer or refused the request") from error


def _blob_path(owner: BlobOwner, sha256: str) -> str:
    return f"{owner.organization_id}/{owner.key_id}/{sha256}"


def _owner_of_path(path: str) -> BlobOwner | None:
    """Return the owner that the path of an object of the bucket names; None for an object that is no blob."""
    match path.split("/"):
        case [organization_id, key_id, _] if ids.is_id(organization_id) and ids.is_id(key_id):
            return BlobOwner(organization_id, key_id)
    return None
