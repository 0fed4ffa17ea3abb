"""How long the interpreter's lock is held at a time: nobody else in the process does anything meanwhile.

A second thread wakes up every half a millisecond and measures by how much it is late. What other processes of the
machine take counts for nothing: neither the time in which this one did not compute, nor that in which the second
thread could have gone on and had no processor. Python hands the lock on between two of its own instructions after 5 ms
at most, so that what is longer is one call of something that isn't written in Python.
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
"""That `_reference` takes on a core of an AMD EPYC in a cloud, for which the bounds are meant."""
MEGABYTE_SECONDS: Final = 0.05
"""The longest that a body of up to 1 MB may hold the lock, on that core."""
LIMIT_SECONDS: Final = 0.5
"""The longest that anything within the limits may hold it."""
ATTEMPTS: Final = 3
_SCHEDULING: Final = Path("/proc/thread-self/schedstat")
_TEXT: Final = "[" + ",".join(['{"a":[1,"b"]}'] * 20_000) + "]"


class LockHolds:
    longest_seconds = 0.0


@contextmanager
def measure_holds() -> Iterator[LockHolds]:
    """Measure the longest hold of the lock by all threads but the one that measures.

    Garbage is collected as in processes that serve, and not among what the tests have left.
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
    """Tell whether some work holds the lock for longer than `seconds` on the machine that the bounds are meant for.

    A hold that the work makes is there each time; one that a busy machine makes is not.
    """
    return all(_longest_hold(work) >= seconds * machine_slowness() for _ in range(ATTEMPTS))


def _longest_hold(work: Callable[[], object]) -> float:
    with measure_holds() as holds:
        work()
    return holds.longest_seconds


def _queued_seconds() -> float:
    """Return how long this thread has waited for a processor, as far as the system tells."""
    try:
        return int(_SCHEDULING.read_text().split()[1]) / 1e9
    except OSError:
        return 0.0


def machine_slowness() -> float:
    """Return by how much this machine is slower, right now, than the one that the bounds are meant for; 1 at least."""
    return max(1.0, min(_reference_seconds() for _ in range(3)) / REFERENCE_SECONDS)


def _reference_seconds() -> float:
    began_at = time.thread_time()
    json.loads(_TEXT)
    return time.thread_time() - began_at
