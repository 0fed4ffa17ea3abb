"""CPU time and memory of processes, children included."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path

import psutil


def cpu_seconds(process_ids: Mapping[str, int]) -> dict[str, float]:
    """Return the CPU seconds that each process and its children have used so far, by name."""
    return {
        name: sum(map(_cpu_seconds, _process_tree(process_id))) for name, process_id in process_ids.items()
    }


def memory_megabytes(process_ids: Mapping[str, int]) -> dict[str, float]:
    """Return the PSS of each process and its children in MB, by name: private memory and the share of shared memory."""
    return {name: sum(map(_megabytes, _process_tree(process_id))) for name, process_id in process_ids.items()}


def started_at(process_id: int) -> float:
    """Return the Unix time at which a process began; psutil knows that to the second only."""
    # After the name, which may contain spaces, it is the 20th field (proc(5) counts it as the 22nd).
    fields = Path(f"/proc/{process_id}/stat").read_text().rpartition(") ")[2].split()
    since_boot = int(fields[19]) / os.sysconf("SC_CLK_TCK")
    return time.time() - (time.clock_gettime(time.CLOCK_BOOTTIME) - since_boot)


def _process_tree(process_id: int) -> Iterator[psutil.Process]:
    process = psutil.Process(process_id)
    yield process
    yield from process.children(recursive=True)


def _cpu_seconds(process: psutil.Process) -> float:
    with suppress(psutil.NoSuchProcess):
        times = process.cpu_times()
        return float(times.user + times.system + times.children_user + times.children_system)
    return 0.0


def _megabytes(process: psutil.Process) -> float:
    with suppress(psutil.NoSuchProcess):
        return float(process.memory_full_info().pss) / 1e6
    return 0.0
