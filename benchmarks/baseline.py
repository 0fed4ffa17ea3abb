"""Stock Dramatiq on the same machine: how many chains of three empty actors it ends in a second."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path

from dramatiq.brokers.redis import RedisBroker
from dramatiq.message import Message

from benchmarks.machine import measure_calibration_ms, measure_fdatasync_ms
from benchmarks.processes import require_running, run_commands

QUEUE = "default"
THREADS = 8
PROCESS_COUNTS = (1, 2)
"""As many as the Procfile has workers, and as many as there are processes on the path of a run."""
BACKLOG = 1_000
REFILL_SECONDS = 0.01
WARM_UP_SECONDS = 2
PATIENCE_SECONDS = 60


def measure(redis_url: str, folder: Path, seconds: float) -> dict[str, float]:
    """Return chains per second of stock Dramatiq, by number of its processes and at best,
    and the speed of machine and disk.
    """
    figures = {"calibration_ms": measure_calibration_ms(), "fdatasync_ms": measure_fdatasync_ms(folder)}
    for count in PROCESS_COUNTS:
        figures[f"chains_per_second_of_{count}"] = _measure_chains(redis_url, folder, count, seconds)
    figures["chains_per_second"] = max(figures[f"chains_per_second_of_{count}"] for count in PROCESS_COUNTS)
    return figures


class _ChainBacklog:
    """Chains that wait or run: each has one message, which Redis drops when an actor has ended."""

    def __init__(self, redis_url: str) -> None:
        self._broker = RedisBroker(url=redis_url)  # type: ignore[no-untyped-call]  # Dramatiq's
        self._broker.declare_queue(QUEUE)
        self._sent = 0

    @property
    def finished(self) -> int:
        return self._sent - self._unfinished()

    def fill(self, chains: int) -> None:
        for _ in range(chains - self._unfinished()):
            self._broker.enqueue(Message(QUEUE, "first", (), {}, {}))
            self._sent += 1

    def is_empty(self) -> bool:
        return self._unfinished() == 0

    def _unfinished(self) -> int:
        return int(self._broker.client.hlen(f"dramatiq:{QUEUE}.msgs"))


def _measure_chains(redis_url: str, folder: Path, process_count: int, seconds: float) -> float:
    """Run Dramatiq with so many processes on a full queue, and return the chains that end per second."""
    command = [sys.executable, "-m", "dramatiq", "benchmarks.chain"]
    options = ["--processes", str(process_count), "--threads", str(THREADS)]
    variables: Mapping[str, str] = os.environ | {"CHAIN_REDIS_URL": redis_url}
    backlog = _ChainBacklog(redis_url)
    with run_commands({"dramatiq": [*command, *options]}, variables, folder) as processes:

        def wait_until_empty() -> None:
            deadline = time.monotonic() + PATIENCE_SECONDS
            while not backlog.is_empty():
                require_running(processes, folder)
                if time.monotonic() > deadline:
                    raise TimeoutError("Dramatiq does not end its chains")
                time.sleep(REFILL_SECONDS)

        def keep_busy_until(deadline: float) -> None:
            while time.perf_counter() < deadline:
                require_running(processes, folder)
                backlog.fill(BACKLOG)
                time.sleep(REFILL_SECONDS)

        # The first messages of a full queue all begin chains, so a while passes before as many end as begin.
        backlog.fill(process_count * THREADS)
        wait_until_empty()
        keep_busy_until(time.perf_counter() + WARM_UP_SECONDS)
        finished_before, begun_at = backlog.finished, time.perf_counter()
        keep_busy_until(begun_at + seconds)
        rate = (backlog.finished - finished_before) / (time.perf_counter() - begun_at)
        wait_until_empty()
    return rate
