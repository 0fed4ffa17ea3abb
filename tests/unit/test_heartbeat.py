import asyncio
import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from concurrency import heartbeat

EVERY_SECONDS = 0.01


async def wait_until(holds: Callable[[], bool]) -> None:
    async with asyncio.timeout(60):
        while not holds():  # noqa: ASYNC110 - of a file, which sets no event
            await asyncio.sleep(EVERY_SECONDS)


def forget(file: Path) -> None:
    os.utime(file, (0, 0))


def is_touched(file: Path) -> bool:
    return file.stat().st_mtime > 0


async def test_a_loop_that_turns_touches_the_file_again_and_again(tmp_path: Path) -> None:
    file = tmp_path / "heartbeat"
    async with heartbeat.run_heartbeat(file, EVERY_SECONDS):
        for _ in range(2):
            forget(file)
            await wait_until(lambda: is_touched(file))


async def test_a_loop_that_hangs_leaves_the_file_alone(tmp_path: Path) -> None:
    file = tmp_path / "heartbeat"
    async with heartbeat.run_heartbeat(file, EVERY_SECONDS):
        await wait_until(lambda: is_touched(file))
        forget(file)
        time.sleep(EVERY_SECONDS * 5)  # noqa: ASYNC251 - it hangs
        assert not is_touched(file)


async def test_a_file_that_was_taken_away_comes_back(tmp_path: Path) -> None:
    file = tmp_path / "heartbeat"
    async with heartbeat.run_heartbeat(file, EVERY_SECONDS):
        file.unlink()
        await wait_until(file.exists)


async def test_a_place_where_no_file_can_be_is_refused_at_the_start(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        async with heartbeat.run_heartbeat(tmp_path / "absent" / "heartbeat"):
            pass
