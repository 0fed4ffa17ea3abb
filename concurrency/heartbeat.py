"""Heartbeat file that the event loop touches; a supervisor restarts a process that hangs when the file gets
old.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

HEARTBEAT_SECONDS = 5.0


@asynccontextmanager
async def run_heartbeat(file: Path | None, every_seconds: float = HEARTBEAT_SECONDS) -> AsyncIterator[None]:
    """Touch a file at once, and every `every_seconds` while the block lasts, as a sign that the event loop runs.

    Does nothing if `file` is None. Raises `OSError` if the first touch fails; later failures are ignored.
    """
    if file is None:
        yield
        return
    _touch(file)
    task = asyncio.create_task(_beat_forever(file, every_seconds))
    try:
        yield
    finally:
        task.cancel()


async def _beat_forever(file: Path, every_seconds: float) -> None:
    """Touch a file every `every_seconds`, first after that time, until canceled; ignores `OSError`."""
    while True:
        await asyncio.sleep(every_seconds)
        # A full disk, for example, is no reason to exit; if it lasts, the age of the file shows it.
        with suppress(OSError):
            _touch(file)


def _touch(file: Path) -> None:
    """Set the time of the file's last change to now; create it if it is missing."""
    file.touch()
