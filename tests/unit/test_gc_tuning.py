"""Everything is looked through for garbage when there is little of it, and not while a large value is there."""

from __future__ import annotations

import subprocess
import sys

SCRIPT = """
import asyncio, gc, weakref
from concurrency import gc_tuning

gc_tuning.CHECK_SECONDS, gc_tuning.REMEMBERED_CHECKS = 0.01, 10_000

class Cycle:
    pass

def full_collections():
    return gc.get_stats()[2]["collections"]

async def main():
    gc_tuning.freeze_loaded(asyncio.get_running_loop())
    begun = full_collections()
    cycle = Cycle()
    cycle.itself = cycle
    reference = weakref.ref(cycle)
    large = [[number] for number in range(1_500_000)]
    del cycle
    assert gc.get_count()[2] >= gc_tuning.MIDDLE_COLLECTIONS
    for _ in range(10):
        await asyncio.sleep(gc_tuning.CHECK_SECONDS)
    assert full_collections() == begun, "looked through while a large value is there"
    del large
    async with asyncio.timeout(30):
        while reference() is not None:
            await asyncio.sleep(gc_tuning.CHECK_SECONDS)
    assert full_collections() == begun + 1

asyncio.run(main())
"""


def test_a_large_value_is_not_looked_through_again_and_again() -> None:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=False, timeout=100
    )
    assert done.returncode == 0, done.stderr
