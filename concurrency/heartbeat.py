"""A sign of life for whoever restarts processes that hang: a file that the event loop touches, and nobody else."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

HEARTBEAT_SECONDS = 5.0


@asynccontextmanager
async def run_heartbeat(file: Path | None, every_seconds: float = HEARTBEAT_SECONDS) -> AsyncIterator[None]:
    """Touch the file again and again, as long as the context lasts and the loop turns; raises OSError at the start."""
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
        # A disk that is full, say, is no reason to die; if it lasts, the old sign tells.
        with suppress(OSError):
            _touch(file)


def _touch(file: Path) -> None:
    file.touch()
