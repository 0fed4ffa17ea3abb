"""Folder for each organization with the interface of a bucket: below `objects`, apart from SQLite files.

Every step of a path is opened relative to the one before it and is never a link, so no path leads out of the folder.
"""

from __future__ import annotations

import asyncio
import errno
import os
import secrets
import stat
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from engine.run_errors import NodeError
from engine.services import StoredObject
from models import durable_folders
from nodes.connections import object_keys

if TYPE_CHECKING:
    from engine.services import RunCaller

T = TypeVar("T")

OBJECTS_FOLDER = "objects"
THREADS = 4
MAX_OBJECT_BYTES = 50_000_000
MAX_FILES = 10_000
MAX_FOLDER_BYTES = 5_000_000_000
MAX_NAME_BYTES = 255
OPEN_FOLDER_FLAGS = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
OPEN_READ_FLAGS = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
CREATE_FLAGS = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
UNREACHABLE_ERRORS = frozenset({errno.ELOOP, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.ENXIO})


class OrganizationFolders:
    """Implements `engine.services.FileFolderService`."""

    def __init__(self, root: Path) -> None:
        self._root = root
        # Own threads, since a hanging disk blocks them.
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="files")

    async def folder(self, caller: RunCaller) -> OrganizationFolder:
        return OrganizationFolder(self._root, caller.organization_id, self._threads)

    def close(self) -> None:
        """Let the threads end after their current work, without waiting for them; queued work is canceled."""
        self._threads.shutdown(wait=False, cancel_futures=True)


class OrganizationFolder:
    """Implements `engine.services.ObjectBucket`."""

    def __init__(self, root: Path, organization_id: str, threads: ThreadPoolExecutor) -> None:
        self._root = root
        self._organization_id = organization_id
        self._threads = threads

    async def get(self, key: str, *, max_bytes: int, timeout_seconds: float) -> bytes:
        """Return the content of a file of the organization, at most `max_bytes`.

        Raises `NodeError` for an invalid key, a missing or larger file, and at the time limit.
        """
        return await self._in_time(timeout_seconds, partial(self._get, *_split_key(key), max_bytes))

    async def put(self, key: str, content: bytes, *, media_type: str, timeout_seconds: float) -> str:  # noqa: ARG002 - a file has no type
        """Write a file atomically, so that readers see the old or the new content, never a part; return its tag.

        `media_type` is ignored, since files have none. Raises `NodeError` for an invalid key, content over 50 MB, a
        full folder (10,000 files or 5 GB, without the file that is replaced), and at the time limit.
        """
        if len(content) > MAX_OBJECT_BYTES:
            message = f"The content has {len(content):,} bytes; at most {MAX_OBJECT_BYTES:,} are written"
            raise NodeError(message, code="object-too-large")
        return await self._in_time(timeout_seconds, partial(self._put, *_split_key(key), content))

    async def list(self, prefix: str, *, max_objects: int, timeout_seconds: float) -> Sequence[StoredObject]:
        """Return all files whose key begins with the prefix, sorted by key; empty if the folder doesn't exist.

        Raises `NodeError` for a prefix with control characters, for more than `max_objects`, and at the time limit.
        """
        found = await self._in_time(
            timeout_seconds, partial(self._list, object_keys.require_key_prefix(prefix))
        )
        if len(found) > max_objects:
            raise NodeError(
                f"More than {max_objects:,} files are there: take a longer prefix", code="too-many-objects"
            )
        return found

    async def _in_time(self, seconds: float, work: Callable[[], T]) -> T:
        """Run blocking work in a thread and return its result; raises `NodeError` for its failures, and at the time
        limit.

        The thread finishes the work all the same.
        """
        try:
            async with asyncio.timeout(seconds):
                return await asyncio.get_running_loop().run_in_executor(self._threads, work)
        except FileNotFoundError as error:
            raise NodeError("There is no such file", code="object-not-found") from error
        except TimeoutError as error:
            message = f"The folder took longer than {seconds:g} s"
            raise NodeError(message, code="timed-out", retryable=True) from error
        except OSError as error:
            if error.errno in UNREACHABLE_ERRORS:
                raise NodeError("The key does not lead to a file", code="invalid-key") from error
            message = f"The folder can't be used: {error.strerror}"
            raise NodeError(message, code="not-available", retryable=True) from error

    # ── work in threads ───────────────────────────────────────────────────────────────────────────

    def _get(self, folders: Sequence[str], name: str, max_bytes: int) -> bytes:
        with self._open_folder(folders) as folder:
            descriptor = os.open(name, OPEN_READ_FLAGS, dir_fd=folder)
        with os.fdopen(descriptor, "rb") as file:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                raise NodeError("The key does not lead to a file", code="invalid-key")
            content = file.read(max_bytes + 1)
        if len(content) > max_bytes:
            message = f"The file has {status.st_size:,} bytes; at most {max_bytes:,} are read"
            raise NodeError(message, code="object-too-large")
        return content

    def _put(self, folders: Sequence[str], name: str, content: bytes) -> str:
        """Write a file atomically and durably, creating missing folders, and return its tag.

        Raises `NodeError` if the folder of the organization is full, and `OSError`.
        """
        self._require_capacity("/".join((*folders, name)), len(content))
        unfinished = f".{secrets.token_hex(16)}"
        with self._open_folder(folders, makes=True) as folder:
            try:
                with os.fdopen(os.open(unfinished, CREATE_FLAGS, 0o600, dir_fd=folder), "wb") as file:
                    file.write(content)
                    file.flush()
                    os.fsync(file.fileno())
                    etag = _entity_tag(os.fstat(file.fileno()))
                os.replace(unfinished, name, src_dir_fd=folder, dst_dir_fd=folder)
            except BaseException:
                with suppress(FileNotFoundError):
                    os.unlink(unfinished, dir_fd=folder)
                raise
            os.fsync(folder)
        return etag

    def _list(self, prefix: str) -> Sequence[StoredObject]:
        found = [
            StoredObject(
                key, status.st_size, _entity_tag(status), datetime.fromtimestamp(status.st_mtime, UTC)
            )
            for key, status in self._iterate_files()
            if key.startswith(prefix)
        ]
        return sorted(found, key=lambda one: one.key)

    def _require_capacity(self, key: str, wanted_bytes: int) -> None:
        """Raise `NodeError` if the file of the key would exceed the number of files or bytes that the limits allow; the
        file that it replaces does not count.
        """
        sizes = [status.st_size for found, status in self._iterate_files() if found != key]
        if len(sizes) >= MAX_FILES:
            message = f"The folder has {MAX_FILES:,} files, which is the limit"
            raise NodeError(message, code="folder-full")
        if sum(sizes) + wanted_bytes > MAX_FOLDER_BYTES:
            message = f"The folder would have more than {MAX_FOLDER_BYTES:,} bytes"
            raise NodeError(message, code="folder-full")

    def _iterate_files(self) -> Iterator[tuple[str, os.stat_result]]:
        """Yield the key and the stat result of each file; links, and files with a leading dot, such as incomplete
        files, are left out.

        Yields nothing if the folder doesn't exist.
        """
        try:
            with self._open_folder(()) as folder:
                for path, _, names, descriptor in os.fwalk(".", dir_fd=folder):
                    for name in names:
                        with suppress(FileNotFoundError):
                            status = os.stat(name, dir_fd=descriptor, follow_symlinks=False)
                            if stat.S_ISREG(status.st_mode) and not name.startswith("."):
                                yield os.path.normpath(f"{path}/{name}"), status
        except FileNotFoundError:
            return

    @contextmanager
    def _open_folder(self, folders: Sequence[str], *, makes: bool = False) -> Iterator[int]:
        """Yield the descriptor of a folder below the organization's folder, opened step by step without following
        links.

        With `makes`, missing folders are created durably; without, `FileNotFoundError` is raised for them. The
        descriptor is closed with the block.
        """
        if makes:
            durable_folders.make_folder(self._root)
        descriptor = os.open(self._root, OPEN_FOLDER_FLAGS & ~os.O_NOFOLLOW)
        try:
            for name in (self._organization_id, OBJECTS_FOLDER, *folders):
                if makes:
                    with suppress(FileExistsError):
                        os.mkdir(name, 0o700, dir_fd=descriptor)
                    # In any case: another process that has created it may not have synced it yet.
                    os.fsync(descriptor)
                below = os.open(name, OPEN_FOLDER_FLAGS, dir_fd=descriptor)
                os.close(descriptor)
                descriptor = below
            yield descriptor
        finally:
            os.close(descriptor)


def _split_key(key: str) -> tuple[Sequence[str], str]:
    """Return the folders and the file name of a key.

    Raises `NodeError` for an invalid key, and for parts that are empty, begin with a dot, or are too long.
    """
    *folders, name = parts = object_keys.require_object_key(key).split("/")
    if not all(parts) or any(part.startswith(".") or len(part.encode()) > MAX_NAME_BYTES for part in parts):
        message = f"A part of the key {key[:100]!r} is empty, begins with a dot, or is too long for a file"
        raise NodeError(message, code="invalid-key")
    return folders, name


def _entity_tag(status: os.stat_result) -> str:
    return f"{status.st_mtime_ns:x}-{status.st_size:x}"
