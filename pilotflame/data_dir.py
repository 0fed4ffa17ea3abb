"""The folder of everything that `pilotflame dev` keeps on disk: one process at a time, its owner alone."""

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
def locked(folder: Path) -> Iterator[None]:
    """Make the folder if it isn't there, and keep all other processes out of it; raises `Refusal` if one is in."""
    durable_folders.make_folder(folder)
    with (folder / "lock").open("a+") as lock:
        try:
            # Let go by the kernel when the process ends, however it ends.
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            lock.seek(0)
            raise CommandError(
                f"{folder} is in use by process {lock.read().strip()}: "
                "stop that one first, or set PILOTFLAME_DATA_DIR to another folder"
            ) from error
        lock.truncate(0)
        lock.write(f"{os.getpid()}\n")
        lock.flush()
        yield


def holds_database(settings: ServerSettings) -> bool:
    """Tell whether the database is the one in the data folder, so that whoever holds the folder has it alone."""
    return "database_url" not in settings.model_fields_set


def secret_key(folder: Path) -> SecretStr | None:
    """Return the folder's own secret, or None where it has none yet."""
    path = folder / _FILE
    return SecretStr(path.read_text().strip()) if path.exists() else None


def make_secret_key(folder: Path) -> SecretStr:
    """Give the folder a secret of its own; to be called by the process that holds it."""
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
