"""Cost of the dashboard on the path of a run: a server with `PILOTFLAME_DASHBOARD=off`, one whose dashboard nobody
looks at any more, and one with an open overview, which loads itself again after hints as its script does.

Each has stored as many runs as the others: a server with more of them takes longer for the next one.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import TYPE_CHECKING, Final

import aiohttp

from benchmarks import load, processes, usage, workflows

if TYPE_CHECKING:
    from benchmarks.processes import ServerUnderTest

ROUNDS: Final = 8
SECONDS: Final = 2.0
CLIENTS: Final = 20
WARM_UP_RUNS: Final = 200
PAGE: Final = "/dashboard/overview"
COALESCE_SECONDS: Final = 0.25
LOADING_SHARE: Final = 5
"""As in `live.js`: the least time between two loads, and as a multiple of the last one's duration."""


async def measure(folder: Path) -> dict[str, float]:
    """Return the figures of servers with an idle and with an open dashboard, as multiples of those of one without it.

    Each is the median of the ratios of loads that followed each other.
    """
    async with AsyncExitStack() as stack:
        servers = {}
        for name in ("off", "idle", "open"):
            own = folder / name
            own.mkdir()
            settings = {"DASHBOARD": "off"} if name == "off" else {}
            servers[name] = await stack.enter_async_context(processes.run_dev(own, settings))
        installed = {
            name: await load.install_workflow(server.api, workflows.pure_workflow())
            for name, server in servers.items()
        }
        for workflow in installed.values():
            await load.run_sequentially(workflow, WARM_UP_RUNS)
        async with _visit(servers["idle"], is_open=True) as visit:
            await visit.has_loaded.wait()
        ratios: dict[str, list[float]] = {}
        loads = 0
        for number in range(ROUNDS):
            found: dict[str, dict[str, float]] = {}
            # The order alternates too, so that neither always follows the other's load.
            for name in list(servers)[:: -1 if number % 2 else 1]:
                async with _visit(servers[name], is_open=name == "open") as visit:
                    found[name] = await _measure_load(servers[name], installed[name])
                loads += visit.loads
            for name in ("idle", "open"):
                for figure, value in found[name].items():
                    ratio = value / found["off"][figure]
                    ratios.setdefault(f"{name}_times_off_{figure}", []).append(ratio)
    figures = {figure: median(values) for figure, values in ratios.items()}
    return figures | {"open_page_loads_per_second": loads / (ROUNDS * SECONDS)}


async def _measure_load(server: ServerUnderTest, workflow: load.LoadTarget) -> dict[str, float]:
    """Return throughput, latencies and CPU seconds per run of a closed loop."""
    before = sum(usage.cpu_seconds(server.process_ids).values())
    sample = await load.run_closed_loop(workflow, CLIENTS, SECONDS)
    spent = sum(usage.cpu_seconds(server.process_ids).values()) - before
    return {
        "executions_per_second": sample.per_second,
        "p50": sample.milliseconds(50),
        "p99": sample.milliseconds(99),
        "cpu_per_run": spent / max(sample.count, 1),
    }


class PageVisit:
    """Page in an open tab, which loads itself again after hints."""

    def __init__(self) -> None:
        self.loads = 0
        self.has_loaded = asyncio.Event()
        self._tag = ""

    async def follow(self, session: aiohttp.ClientSession) -> None:
        """Load the page, then again after each hint, until canceled."""
        took = await self._load(session)
        ready_at = perf_counter()
        async with session.get("/live", params={"topics": "executions"}) as stream:
            async for line in stream.content:
                # Hints that have waited in the stream meanwhile are followed by one load.
                if not line.startswith(b"data:") or perf_counter() < ready_at:
                    continue
                begun_at = perf_counter()
                took = await self._load(session)
                ready_at = begun_at + max(COALESCE_SECONDS, LOADING_SHARE * took)

    async def _load(self, session: aiohttp.ClientSession) -> float:
        """Load the page, which may be unchanged (304); return the seconds that it took."""
        begun_at = perf_counter()
        headers = {"If-None-Match": self._tag} if self._tag else {}
        async with session.get(PAGE, headers=headers) as answer:
            assert answer.status in {200, 304}, answer.status
            await answer.read()
            self._tag = answer.headers.get("ETag", self._tag)
        self.loads += 1
        self.has_loaded.set()
        return perf_counter() - begun_at


@asynccontextmanager
async def _visit(server: ServerUnderTest, *, is_open: bool) -> AsyncIterator[PageVisit]:
    """Keep the page open during the block; load nothing unless `is_open`."""
    visit = PageVisit()
    if not is_open:
        yield visit
        return
    async with aiohttp.ClientSession(
        f"http://127.0.0.1:{server.api.port}",
        headers={"X-API-Key": server.api.key},
        timeout=aiohttp.ClientTimeout(total=None),
    ) as session:
        following = asyncio.create_task(visit.follow(session))
        try:
            yield visit
        finally:
            following.cancel()
            await asyncio.gather(following, return_exceptions=True)
