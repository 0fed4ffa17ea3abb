"""What processes use, their children included."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import suppress

import psutil


def cpu_seconds(process_ids: Mapping[str, int]) -> dict[str, float]:
    """Return the CPU time that each process has used; a child that has ended counts with its parent."""
    return {name: sum(map(_cpu_seconds, _family(process_id))) for name, process_id in process_ids.items()}


def memory_megabytes(process_ids: Mapping[str, int]) -> dict[str, float]:
    """Return each process's PSS: its own memory, and its share of what it has in common with others."""
    return {name: sum(map(_megabytes, _family(process_id))) for name, process_id in process_ids.items()}


def _family(process_id: int) -> Iterator[psutil.Process]:
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
