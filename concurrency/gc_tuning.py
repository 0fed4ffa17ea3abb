"""How a process that serves lives with Python's collector of garbage."""

from __future__ import annotations

import asyncio
import gc
import sys
from collections import deque
from typing import Final

YOUNG_OBJECTS: Final = 10_000
"""So many new ones are looked through at once. Python's own 700 are those of a few requests and runs under way, so that
nearly all are still in use; what is not in use is mostly gone by then, since its references are counted.
"""
YOUNG_COLLECTIONS: Final = 4
"""So many make one of what they have left: of some ten thousand objects, in some milliseconds."""
MIDDLE_COLLECTIONS: Final = 20
"""So many of those make one of everything due: after a million new objects, as with Python itself."""
MOST_MIDDLE_COLLECTIONS: Final = 200
"""So many make one that can't wait any longer: ten million new objects are there."""
LARGE_HEAP_BLOCKS: Final = 500_000
"""Pieces of memory that it takes some hundredths of a second to look through."""
CHECK_SECONDS: Final = 1.0
REMEMBERED_CHECKS: Final = 60


def tune_at_start() -> None:
    """Collect less often, from the start on: what modules are made of is no garbage."""
    gc.set_threshold(YOUNG_OBJECTS, YOUNG_COLLECTIONS, MIDDLE_COLLECTIONS)


def freeze_loaded() -> None:
    """Leave out of collections what was loaded so far, and put off those of everything while large values are there.

    A body of 10 MB may be five million objects, none of them garbage: to look through them holds up everybody for half
    a second, again and again while they are there. A loop has to be running.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(YOUNG_OBJECTS, YOUNG_COLLECTIONS, MOST_MIDDLE_COLLECTIONS)
    _collect_when_due(asyncio.get_running_loop(), deque(maxlen=REMEMBERED_CHECKS))


def _collect_when_due(loop: asyncio.AbstractEventLoop, sizes: deque[int]) -> None:
    """Collect everything where that is due, and no more is there than at rest; look again in a second."""
    sizes.append(sys.getallocatedblocks())
    if gc.get_count()[2] >= MIDDLE_COLLECTIONS and sizes[-1] - min(sizes) < LARGE_HEAP_BLOCKS:
        gc.collect()
    loop.call_later(CHECK_SECONDS, _collect_when_due, loop, sizes)
