"""Preloaded libraries that change what the system reports to a process, compiled from C when a test first
needs them.
"""

from __future__ import annotations

import atexit
import functools
import os
import shutil
import struct
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import mkdtemp

SHIFTED_CLOCK = Path(__file__).with_name("shifted_clock.c")
FAULTY_DISK = Path(__file__).with_name("faulty_disk.c")


@functools.cache
def compile_library(source: Path) -> Path | None:
    """Compile a C file and return the shared library; None if there is no compiler."""
    compiler = shutil.which("cc")
    if compiler is None:
        return None
    folder = Path(mkdtemp(prefix="preload-"))
    atexit.register(_delete_folder, folder, os.getpid())
    library = folder / f"{source.stem}.so"
    subprocess.run([compiler, "-shared", "-fPIC", "-O2", "-o", library, source], check=True)
    return library


def _delete_folder(folder: Path, owner: int) -> None:
    if os.getpid() == owner:  # not in a process that was forked from it
        shutil.rmtree(folder, ignore_errors=True)


@dataclass(frozen=True, slots=True)
class ShiftedClock:
    """Wall clock of one process, which a test sets, also while the process runs."""

    library: Path
    file: Path

    def set(self, seconds: float) -> None:
        """Set the clock ahead by `seconds`; behind, if negative."""
        with self.file.open("r+b" if self.file.exists() else "wb") as file:
            file.write(struct.pack("=q", round(seconds * 1_000_000_000)))

    @property
    def environment(self) -> dict[str, str]:
        """Environment variables of the process."""
        return {"LD_PRELOAD": str(self.library), "CLOCK_SHIFT_FILE": str(self.file)}


@dataclass(frozen=True, slots=True)
class FaultyDisk:
    """Disk of one process and its children, which a test lets fail while they run."""

    library: Path
    file: Path

    @contextmanager
    def full(self) -> Iterator[None]:
        """Let every write to a file fail with ENOSPC during a block."""
        with self._fault(b"f"):
            yield

    @contextmanager
    def slow(self) -> Iterator[None]:
        """Delay every sync by 150 ms during a block."""
        with self._fault(b"s"):
            yield

    def mend(self) -> None:
        """Let writes and syncs work again, also of a fault that another call has begun."""
        self._set(b"-")

    @contextmanager
    def _fault(self, kind: bytes) -> Iterator[None]:
        """Let the disk have a fault during the block: `f` for full, `s` for slow."""
        self._set(kind)
        try:
            yield
        finally:
            self.mend()

    def _set(self, kind: bytes) -> None:
        with self.file.open("r+b" if self.file.exists() else "wb") as file:
            file.write(kind)

    @property
    def environment(self) -> dict[str, str]:
        """Environment variables of the process."""
        return {"LD_PRELOAD": str(self.library), "DISK_FAULT_FILE": str(self.file)}
