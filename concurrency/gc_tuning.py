"""Settings of Python's garbage collector for server processes."""

from __future__ import annotations

import gc
import sys
from collections import deque
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    import asyncio  # Only for types: the parent of a worker loads this module, and no event loop.

YOUNG_OBJECTS: Final = 10_000
"""Number of new objects that trigger a young collection.

Python's default of 700 matches a few requests and runs in progress.
Nearly all of those objects are still in use. Most unused objects are gone by then anyway, by reference counting.
"""
YOUNG_COLLECTIONS: Final = 4
"""Young collections per middle collection. A middle collection traverses some ten thousand objects, in
milliseconds.
"""
MIDDLE_COLLECTIONS: Final = 20
"""Middle collections after which a full collection is due: a million new objects, as in Python's defaults."""
MOST_MIDDLE_COLLECTIONS: Final = 200
"""Middle collections after which a full collection is forced: ten million new objects."""
LARGE_HEAP_BLOCKS: Final = 500_000
"""Allocated memory blocks that take some hundredths of a second to traverse."""
STARTING_OBJECTS: Final = 500_000
"""New objects that trigger a collection while a server process starts: more than any of them loads."""
CHECK_SECONDS: Final = 1.0
REMEMBERED_CHECKS: Final = 60


def tune_at_start() -> None:
    """Raise the thresholds of Python's garbage collector for this process: objects that imports create are no
    garbage.
    """
    gc.set_threshold(YOUNG_OBJECTS, YOUNG_COLLECTIONS, MIDDLE_COLLECTIONS)


def postpone_until_loaded() -> None:
    """Put off collections until `freeze_loaded`, which must be called after the imports of a server process.

    Young collections during these imports take 4 % of their instructions and free next to nothing.
    """
    gc.set_threshold(STARTING_OBJECTS, YOUNG_COLLECTIONS, MIDDLE_COLLECTIONS)


def freeze_loaded(loop: asyncio.AbstractEventLoop) -> None:
    """Exclude all existing objects from garbage collection, and put off full collections while the heap grows.

    Call it once after startup. From then on, the event loop, which must run already, checks every second: a full
    collection that is due runs once the heap has not grown much for a minute, or after ten million new objects. A body
    of 10 MB may be five million objects, none of them garbage, and each traversal would block the process for half a
    second.
    """
    # Without a collection before it: it would take a sixth of the CPU of a start, and free 800 of 190,000 objects.
    gc.freeze()
    gc.set_threshold(YOUNG_OBJECTS, YOUNG_COLLECTIONS, MOST_MIDDLE_COLLECTIONS)
    _collect_when_due(loop, deque(maxlen=REMEMBERED_CHECKS))


def _collect_when_due(loop: asyncio.AbstractEventLoop, sizes: deque[int]) -> None:
    """Run a full garbage collection if one is due and the heap has not grown much in the last 60 checks.

    `sizes` has the heap's size at these checks. Schedules the next check in a second.
    """
    sizes.append(sys.getallocatedblocks())
    if gc.get_count()[2] >= MIDDLE_COLLECTIONS and sizes[-1] - min(sizes) < LARGE_HEAP_BLOCKS:
        gc.collect()
    loop.call_later(CHECK_SECONDS, _collect_when_due, loop, sizes)
