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
    """Touch a file periodically while the context lasts and the event loop runs; None touches nothing.

    Raises `OSError` at the start if the file can't be touched.
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
    while True:
        await asyncio.sleep(every_seconds)
        # A full disk, for example, is no reason to exit; if it lasts, the age of the file shows it.
        with suppress(OSError):
            _touch(file)


def _touch(file: Path) -> None:
    file.touch()
