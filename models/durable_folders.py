"""Folders whose names survive a power cut: a new name lasts only once the folder that it stands in is synced."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

PRIVATE_MODE = 0o700


def make_folder(folder: Path, mode: int = PRIVATE_MODE) -> None:
    """Make a folder, and those above it that are missing, so that they last; one that is there is kept.

    The folder above is synced in any case: another process may have died between making this one and that. Raises
    OSError.
    """
    if not folder.parent.is_dir():
        make_folder(folder.parent, mode)
    folder.mkdir(mode=mode, exist_ok=True)
    # A folder can be synced only by users that may read it.
    with suppress(PermissionError):
        sync_folder(folder.parent)


def sync_folder(folder: Path) -> None:
    """Make the names in a folder last; raises OSError."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
