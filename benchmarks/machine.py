"""Current speed of this machine and of its disk, other load included."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from statistics import median
from time import perf_counter

CALIBRATION_ROUNDS = 5
CALIBRATION_STEPS = 200_000
SYNCS = 300
PAGE_BYTES = 8192
PAGES = 128


def describe_machine() -> dict[str, str | int]:
    return {"cpus": os.cpu_count() or 0, "python": platform.python_version(), "system": platform.platform()}


def measure_calibration_ms() -> float:
    """Return the duration of a fixed loop of pure Python in milliseconds: the median of five."""
    return median(_time_loop_ms() for _ in range(CALIBRATION_ROUNDS))


def measure_fdatasync_ms(folder: Path) -> float:
    """Return the median time of an fdatasync of one page on the folder's disk, in a preallocated file."""
    page = os.urandom(PAGE_BYTES)
    path = folder / "fdatasync"
    with path.open("wb", buffering=0) as file:
        file.write(page * PAGES)
        os.fsync(file.fileno())
        times = []
        for number in range(SYNCS):
            os.pwrite(file.fileno(), page, number % PAGES * PAGE_BYTES)
            begun_at = perf_counter()
            os.fdatasync(file.fileno())
            times.append(perf_counter() - begun_at)
    path.unlink()
    return median(times) * 1000


def _time_loop_ms() -> float:
    begun_at = perf_counter()
    total = 0
    for number in range(CALIBRATION_STEPS):
        total += number * number % 7
    return (perf_counter() - begun_at) * 1000
