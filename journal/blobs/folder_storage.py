"""Blob storage in a folder that all processes share, as files `organization/first run/sha256`.

Each file begins with a line that holds its label, so that one rename publishes label and content together.
"""

from __future__ import annotations

import asyncio
import os
import secrets
import shutil
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from hashlib import sha256 as hash_of
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, TypeVar

import msgspec

from journal.blobs.blob_storage import BlobLabel, BlobLost, BlobOwner, BlobsUnavailable, OpenBlob
from json_text import decoding
from models import durable_folders, ids

if TYPE_CHECKING:
    from datetime import timedelta

T = TypeVar("T")

THREADS = 4
CHUNK_BYTES = 1_048_576
MAX_LABEL_BYTES = 4_096
BATCH_OWNERS = 500


class FolderBlobStorage:
    """`ManagedBlobStorage` in a file system; files are accessible to the process's user alone."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._is_made = False
        """Whether the root exists and its name is durable."""
        # A pool of its own: a disk that hangs blocks its threads, and nothing else may wait for them.
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="blobs")

    async def put(self, owner: BlobOwner, sha256: str, content: bytes, label: BlobLabel) -> None:
        """Write a blob to a file in the folder of its owner, durable when the call returns.

        An existing file is kept if its content matches the hash, and replaced otherwise. Raises
        `BlobsUnavailable`.
        """
        await self._in_thread(lambda: self._put(owner, sha256, content, label))

    @asynccontextmanager
    async def open(self, owner: BlobOwner, sha256: str) -> AsyncIterator[OpenBlob]:
        """Open the file of a blob for reading in chunks of a megabyte until the block ends.

        Raises `BlobLost` if it is missing or its label (media type and name) unreadable, and
        `BlobsUnavailable`.
        """
        file, label, size = await self._in_thread(lambda: _open_labeled(self._folder_of(owner) / sha256))
        try:
            yield OpenBlob(label, size, self._chunks(file))
        finally:
            file.close()

    async def delete(self, owner: BlobOwner) -> None:
        """Remove the folder with all blobs of one run, or of one chain of runs; none is no error.

        Raises `BlobsUnavailable`.
        """
        await self._in_thread(lambda: _remove_folder(self._folder_of(owner)))

    async def idle_owners(self, age: timedelta) -> AsyncIterator[Sequence[BlobOwner]]:
        """Yield batches of at most 500 owners whose folders have not changed for `age`, by the time of the
        file system.

        Raises `BlobsUnavailable`.
        """
        found = self._idle(age.total_seconds())
        while batch := await self._in_thread(lambda: list(islice(found, BATCH_OWNERS))):
            yield batch

    async def close(self) -> None:
        """Let the threads end after their reads and writes in progress, without waiting for them; queued work is
        dropped.
        """
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def _in_thread(self, work: Callable[[], T]) -> T:
        try:
            return await asyncio.get_running_loop().run_in_executor(self._threads, work)
        except OSError as error:
            raise BlobsUnavailable(f"The folder of blobs can't be used: {error.strerror}") from error

    async def _chunks(self, file: BinaryIO) -> AsyncIterator[bytes]:
        while chunk := await self._in_thread(lambda: file.read(CHUNK_BYTES)):
            yield chunk

    # ── in a thread ───────────────────────────────────────────────────────────────────────────────

    def _folder_of(self, owner: BlobOwner) -> Path:
        """Return the folder of an owner's blobs."""
        return self._root / owner.organization_id / owner.key_id

    def _put(self, owner: BlobOwner, sha256: str, content: bytes, label: BlobLabel) -> None:
        """Write a blob to its file, as `put` describes; blocks the thread, and raises `OSError`."""
        folder = self._folder_of(owner)
        if not _is_whole(folder / sha256, sha256):
            if not self._is_made:
                durable_folders.make_folder(self._root)
                self._is_made = True
            folder.parent.mkdir(mode=0o700, exist_ok=True)
            folder.mkdir(mode=0o700, exist_ok=True)
            _write_atomically(folder / sha256, msgspec.json.encode(label) + b"\n", content)
        # Another process that created one of the folders may not have synced it yet.
        for changed in (folder, folder.parent, self._root):
            durable_folders.sync_folder(changed)

    def _idle(self, age_seconds: float) -> Iterator[BlobOwner]:
        """Yield the owners whose folders were last changed more than `age_seconds` ago."""
        if not self._root.is_dir():
            return
        since = self._now() - age_seconds
        for organization in _list_id_folders(self._root):
            for line in _list_id_folders(Path(organization.path)):
                try:
                    is_idle = line.stat(follow_symlinks=False).st_mtime < since
                except FileNotFoundError:
                    continue
                if is_idle:
                    yield BlobOwner(organization.name, line.name)

    def _now(self) -> float:
        """Return the file system's time, by which it dates files, in seconds since 1970, from a probe file."""
        with tempfile.TemporaryFile(dir=self._root) as probe:
            probe.write(b"0")
            probe.flush()
            return os.fstat(probe.fileno()).st_mtime


def _list_id_folders(folder: Path) -> Iterator[os.DirEntry[str]]:
    """Yield the subfolders whose names are ids of the server, and nothing else; none if the folder is missing."""
    try:
        with os.scandir(folder) as entries:
            yield from (
                entry for entry in entries if ids.is_id(entry.name) and entry.is_dir(follow_symlinks=False)
            )
    except FileNotFoundError:
        return


def _write_atomically(path: Path, *parts: bytes) -> None:
    """Write the parts to a file that is complete or absent, even after a crash; raises `OSError`.

    The name is durable once the folder is synced.
    """
    unfinished = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    try:
        with _create_file(unfinished) as file:
            for part in parts:
                file.write(part)
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(path)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise


def _create_file(path: Path) -> BinaryIO:
    return os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600), "wb")


def _is_whole(path: Path, sha256: str) -> bool:
    """Return whether the file of a blob exists and its content, without the label, has this SHA-256."""
    try:
        file, _, _ = _open_labeled(path)
    except BlobLost:
        return False
    with file:
        digest = hash_of()
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest() == sha256


def _open_labeled(path: Path) -> tuple[BinaryIO, BlobLabel, int]:
    """Open the file of a blob; return it positioned behind its label, the label, and the number of bytes that
    follow.

    Raises `BlobLost` for a missing file or an unreadable label, and `OSError`.
    """
    try:
        file = os.fdopen(os.open(path, os.O_RDONLY | os.O_NOFOLLOW), "rb")
    except FileNotFoundError as error:
        raise BlobLost("There is no such blob") from error
    try:
        label = decoding.decode(file.readline(MAX_LABEL_BYTES), BlobLabel)
        return file, label, os.fstat(file.fileno()).st_size - file.tell()
    except msgspec.DecodeError as error:
        file.close()
        raise BlobLost("The blob is corrupt: its label can't be read") from error


def _remove_folder(folder: Path) -> None:
    try:
        shutil.rmtree(folder)
    except FileNotFoundError:
        return
