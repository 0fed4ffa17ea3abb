"""Folders with names that survive a power cut: a new name is durable only after its parent folder is synced."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

PRIVATE_MODE = 0o700


def make_folder(folder: Path, mode: int = PRIVATE_MODE) -> None:
    """Create a folder and its missing parents durably, all with `mode`; an existing folder is not changed.

    The parent folder is always synced, if it is readable: another process may have died between creating and syncing.
    Raises `OSError`.
    """
    if not folder.parent.is_dir():
        make_folder(folder.parent, mode)
    folder.mkdir(mode=mode, exist_ok=True)
    # Only a user who may read a folder can sync it.
    with suppress(PermissionError):
        sync_folder(folder.parent)


def sync_folder(folder: Path) -> None:
    """Make the names of the files in a folder durable (fsync); raises `OSError`."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
