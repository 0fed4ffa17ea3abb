"""Data folder of `pilotflame dev`: used by one process at a time, and readable by its owner only."""

from __future__ import annotations

import fcntl
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Final

from pydantic import SecretStr

from models import durable_folders
from pilotflame.command_error import CommandError

if TYPE_CHECKING:
    from models.settings import ServerSettings

_FILE: Final = "secret.key"


@contextmanager
def lock_folder(folder: Path) -> Iterator[None]:
    """Create the data folder if needed, and hold its lock during the block; the lock file has the id of this process.

    Raises `CommandError` at once if another process holds it.
    """
    durable_folders.make_folder(folder)
    with (folder / "lock").open("a+") as lock:
        try:
            # The kernel releases the lock whenever the process ends.
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            lock.seek(0)
            raise CommandError(
                f"{folder} is in use by process {lock.read().strip()}: "
                "stop that process first, or set PILOTFLAME_DATA_DIR to another folder"
            ) from error
        lock.truncate(0)
        lock.write(f"{os.getpid()}\n")
        lock.flush()
        yield


def holds_database(settings: ServerSettings) -> bool:
    """Return whether the database is the default one in the data folder, so that the folder's lock covers it."""
    return "database_url" not in settings.model_fields_set


def secret_key(folder: Path) -> SecretStr | None:
    """Return the secret stored in the data folder; None without one."""
    path = folder / _FILE
    return SecretStr(path.read_text().strip()) if path.exists() else None


def make_secret_key(folder: Path) -> SecretStr:
    """Create the secret of the folder, store it durably in a file for its owner only, and return it.

    The caller holds the folder's lock and has found no secret in it.
    """
    secret = secrets.token_urlsafe(48)
    unfinished = folder / f"{_FILE}.unfinished"
    unfinished.unlink(missing_ok=True)
    unfinished.touch(mode=0o600)
    with unfinished.open("w") as file:
        file.write(secret + "\n")
        file.flush()
        os.fsync(file.fileno())
    unfinished.replace(folder / _FILE)
    durable_folders.sync_folder(folder)
    return SecretStr(secret)
