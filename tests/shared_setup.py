"""Files and folders that one process of a run of tests makes, and the others copy."""

import atexit
import fcntl
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from tests import services

FOLDER_VARIABLE = "TESTS_SHARED_FOLDER"


def find_folder() -> Path:
    """Return the folder of this run; the first process to ask creates it, and removes it when it ends."""
    if FOLDER_VARIABLE not in os.environ:
        memory = services.find_memory(services.SERVERS_ROOM_BYTES)
        os.environ[FOLDER_VARIABLE] = tempfile.mkdtemp(prefix="pilotflame-tests-", dir=memory)
        atexit.register(_remove_folder, os.environ[FOLDER_VARIABLE], os.getpid())
    return Path(os.environ[FOLDER_VARIABLE])


def _remove_folder(folder: str, creator: int) -> None:
    if os.getpid() == creator:  # not a fork of it
        shutil.rmtree(folder)


def make_once(name: str, make: Callable[[Path], None]) -> Path:
    """Return the path of the file or folder of a name, for reading only.

    In each run, `make` is called once, with a path at which it creates the file or folder; others wait for its end.
    """
    folder = find_folder()
    made = folder / name
    with (folder / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not made.exists():
            with tempfile.TemporaryDirectory(dir=folder) as unfinished:
                make(Path(unfinished, name))
                Path(unfinished, name).rename(made)
    return made
