"""Measurement of GIL holds, during which no other thread of the process runs.

A second thread wakes up every half a millisecond and measures its delay. Load of other processes is excluded:
neither the time in which this process did not compute counts, nor the time in which the second thread was
runnable without a processor. Python switches threads between two of its own instructions after 5 ms at most,
so a longer hold is one call into native code.
"""

from __future__ import annotations

import gc
import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from concurrency import gc_tuning

BEAT_SECONDS: Final = 0.0005
REFERENCE_SECONDS: Final = 0.0035
"""Seconds of `_reference` on a core of an AMD EPYC in a cloud, the reference machine of the bounds."""
MEGABYTE_SECONDS: Final = 0.05
"""Longest GIL hold for a body of up to 1 MB, on that core."""
LIMIT_SECONDS: Final = 0.5
"""Longest GIL hold for any input within the limits, on that core."""
ATTEMPTS: Final = 3
_SCHEDULING: Final = Path("/proc/thread-self/schedstat")
_TEXT: Final = "[" + ",".join(['{"a":[1,"b"]}'] * 20_000) + "]"


class LockHolds:
    """Longest hold of the GIL so far, in seconds."""

    longest_seconds = 0.0


@contextmanager
def measure_holds() -> Iterator[LockHolds]:
    """Measure the longest GIL hold during the block by all threads except the measuring one.

    The garbage collector is tuned as in serving processes, and skips the objects of other tests.
    """
    before = gc.get_threshold()
    gc.freeze()
    gc.set_threshold(gc_tuning.YOUNG_OBJECTS, gc_tuning.YOUNG_COLLECTIONS, gc_tuning.MOST_MIDDLE_COLLECTIONS)
    holds = LockHolds()
    is_done = threading.Event()
    started = threading.Event()

    def beat() -> None:
        started.set()
        while not is_done.is_set():
            queued_before, used_before = _queued_seconds(), time.process_time()
            began_at = time.monotonic()
            time.sleep(BEAT_SECONDS)
            late = time.monotonic() - began_at - BEAT_SECONDS
            used = time.process_time() - used_before
            late -= _queued_seconds() - queued_before
            holds.longest_seconds = max(holds.longest_seconds, min(late, used))

    thread = threading.Thread(target=beat)
    thread.start()
    started.wait()
    try:
        yield holds
    finally:
        is_done.set()
        thread.join()
        gc.set_threshold(*before)


def holds_longer(work: Callable[[], object], seconds: float) -> bool:
    """Return whether `work` holds the GIL for longer than `seconds` in each of three calls,
    scaled to the reference machine.

    A hold by the work occurs every time; a hold by a busy machine does not.
    """
    return all(_longest_hold(work) >= seconds * machine_slowness() for _ in range(ATTEMPTS))


def _longest_hold(work: Callable[[], object]) -> float:
    with measure_holds() as holds:
        work()
    return holds.longest_seconds


def _queued_seconds() -> float:
    """Return the time for which this thread was runnable without a processor, if the system reports it."""
    try:
        return int(_SCHEDULING.read_text().split()[1]) / 1e9
    except OSError:
        return 0.0


def machine_slowness() -> float:
    """Return the current slowness of this machine relative to the reference machine; at least 1."""
    return max(1.0, min(_reference_seconds() for _ in range(3)) / REFERENCE_SECONDS)


def _reference_seconds() -> float:
    began_at = time.thread_time()
    json.loads(_TEXT)
    return time.thread_time() - began_at
