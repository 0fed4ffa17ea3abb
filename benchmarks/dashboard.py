"""Dashboard in a browser: first paint on a slow processor, time from a change to its sight, and open streams.

A server of one process (`pilotflame dev`) on SQLite serves Chromium on the same machine.
"""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack
from pathlib import Path
from statistics import median
from time import perf_counter, time
from typing import TYPE_CHECKING, Any, Final

import aiohttp
import msgspec

from benchmarks import dashboard_cost, processes, usage
from benchmarks.authoring import TimedRequest, sample_requests
from tests.integration.browser import open_page

if TYPE_CHECKING:
    from benchmarks.processes import ServerUnderTest
    from tests.integration.browser import BrowserPage

NODES: Final = 100
LARGE: Final = 2_000
STREAMS: Final = 200
IDLE_SECONDS: Final = 10.0
CHANGES: Final = 30
PAINTS: Final = 5
REQUESTS: Final = 25
SLOWDOWN: Final = 4
"""Factor by which the browser's processor is slowed down for the page of a hundred nodes."""
READY: Final = "document.readyState === 'complete' && document.querySelector('h1') !== null"
FIRST_PAINT: Final = (
    "new Promise(resolve => new PerformanceObserver(list => resolve(list.getEntries()"
    ".find(one => one.name === 'first-contentful-paint')?.startTime))"
    ".observe({type: 'paint', buffered: true}))"
)
SHIFT: Final = (
    "new Promise(resolve => { let sum = 0; new PerformanceObserver(list => { for (const one of list.getEntries())"
    " sum += one.value }).observe({type: 'layout-shift', buffered: true});"
    " setTimeout(() => resolve(sum), 300) })"
)
SEEN: Final = (
    "new Promise(resolve => { const seen = () => document.querySelector('[data-shows-new]')?.textContent"
    " === '{count} new'; if (seen()) resolve(Date.now()); else new MutationObserver((_, observer) =>"
    " { if (seen()) { observer.disconnect(); resolve(Date.now()) } })"
    ".observe(document.body, {childList: true, subtree: true, characterData: true}) })"
)


async def measure(folder: Path) -> dict[str, float]:
    """Return first paint, layout shift, latency of updates, load of streams,
    and the cost of an idle dashboard, by name.
    """
    figures = await dashboard_cost.measure(folder)
    async with (
        processes.run_dev(folder) as server,
        open_page(folder / "profile") as page,
        aiohttp.ClientSession(
            f"http://127.0.0.1:{server.api.port}", headers={"X-API-Key": server.api.key}
        ) as client,
    ):
        await _sign_in(page, server)
        figures |= await _measure_streams(server, client)
        for nodes, slowdown in ((NODES, SLOWDOWN), (LARGE, 1)):
            run_id = await _run_workflow(client, nodes)
            await page.call("Emulation.setCPUThrottlingRate", rate=slowdown)
            figures |= await _measure_page(f"{nodes}_nodes", server, page, f"/dashboard/runs/{run_id}")
            map_path = f"/dashboard/runs/{run_id}?view=map"
            figures |= await _measure_page(f"map_of_{nodes}_nodes", server, page, map_path)
        await page.call("Emulation.setCPUThrottlingRate", rate=1)
        return figures | await _measure_updates(server, client, page)


async def _sign_in(page: BrowserPage, server: ServerUnderTest) -> None:
    base = f"http://127.0.0.1:{server.api.port}"
    await page.open(f"{base}/sign-in?next=%2Fdashboard%2Fruns", "document.querySelector('#key') !== null")
    await page.fill("#key", server.api.key)
    await page.click("button[type=submit]")
    await page.wait_for(f"location.pathname === '/dashboard/runs' && {READY}")


async def _post(client: aiohttp.ClientSession, path: str, sent: object) -> dict[str, Any]:
    async with client.post(path, json=sent) as answer:
        body = await answer.read()
        assert answer.ok, body
        found: dict[str, Any] = msgspec.json.decode(body)
        return found


async def _run_workflow(client: aiohttp.ClientSession, count: int) -> str:
    """Create a workflow of `count` nodes, each followed by three, run it, and return the id of the completed run."""
    nodes: list[dict[str, Any]] = [{"id": "n0", "nodeId": "manual"}]
    nodes += [
        {"id": f"n{number}", "nodeId": "set", "label": f"Step {number}", "config": {"values": {"a": number}}}
        for number in range(1, count)
    ]
    edges = [{"source": f"n{(number - 1) // 3}", "target": f"n{number}"} for number in range(1, count)]
    body = {"name": f"{count} nodes", "status": "active", "nodes": nodes, "connections": edges}
    created = await _post(client, "/api/v1/workflows", body)
    started = await _post(client, f"/api/v1/workflows/{created['workflowId']}/execute", {})
    run_id: str = started["executionId"]
    async with client.get(f"/api/v1/executions/{run_id}/progress", params={"wait": 30}) as answer:
        assert (await answer.json())["status"] == "completed"
    return run_id


async def _measure_page(name: str, server: ServerUnderTest, page: BrowserPage, path: str) -> dict[str, float]:
    """Return the p95 of a page's answers, its median first paint and readiness, and its largest layout shift."""
    sample = await sample_requests(server.api, [TimedRequest("GET", path)] * REQUESTS)
    paints, shifts, ready = [], [], []
    for _ in range(PAINTS):
        started_at = perf_counter()
        await page.open(f"http://127.0.0.1:{server.api.port}{path}", READY)
        ready.append((perf_counter() - started_at) * 1_000)
        paints.append(await page.evaluate(FIRST_PAINT))
        shifts.append(await page.evaluate(SHIFT))
    return {
        f"{name}_answer_p95_ms": sample.milliseconds(95),
        f"{name}_first_paint_ms": median(paints),
        f"{name}_ready_ms": median(ready),
        f"{name}_layout_shift": max(shifts),
    }


async def _measure_updates(
    server: ServerUnderTest, client: aiohttp.ClientSession, page: BrowserPage
) -> dict[str, float]:
    """Return p50 and p95 of the time between the answer to a request that
    starts a run and its display in the open list.
    """
    body = {"name": "Started often", "status": "active", "nodes": [{"id": "n0", "nodeId": "manual"}]}
    created = await _post(client, "/api/v1/workflows", body)
    await page.open(f"http://127.0.0.1:{server.api.port}/dashboard/runs", READY)
    await page.wait_for("document.querySelector('.live').dataset.state === 'live'")
    delays = []
    for number in range(1, CHANGES + 1):
        await _post(client, f"/api/v1/workflows/{created['workflowId']}/execute", {})
        accepted_at = time()  # the browser has the same clock
        seen_at = await page.evaluate(SEEN.replace("{count}", str(number)))
        delays.append(max(seen_at - accepted_at * 1_000, 0))
        await asyncio.sleep(0.37)  # another phase of the server's intervals each time
    ordered = sorted(delays)
    return {
        "change_visible_p50_ms": median(ordered),
        "change_visible_p95_ms": ordered[-(-len(ordered) * 95 // 100) - 1],
    }


async def _measure_streams(server: ServerUnderTest, client: aiohttp.ClientSession) -> dict[str, float]:
    """Return the percentages of a core that the server takes without streams,
    and in addition for idle streams of runs.
    """
    before = sum((await _read_idle_seconds(server)).values())
    connector = aiohttp.TCPConnector(limit=0)
    async with AsyncExitStack() as stack:
        session = await stack.enter_async_context(
            aiohttp.ClientSession(
                f"http://127.0.0.1:{server.api.port}",
                headers=client.headers,
                connector=connector,
                timeout=aiohttp.ClientTimeout(total=None),
            )
        )
        for _ in range(STREAMS):
            answer = await stack.enter_async_context(session.get("/live", params={"topics": "executions"}))
            assert await answer.content.readline() == b": open\n"
        with_streams = sum((await _read_idle_seconds(server)).values())
    return {
        f"streams_{STREAMS}_core_percent": 100 * max(with_streams - before, 0) / IDLE_SECONDS,
        "without_streams_core_percent": 100 * before / IDLE_SECONDS,
    }


async def _read_idle_seconds(server: ServerUnderTest) -> dict[str, float]:
    """Wait `IDLE_SECONDS` without requests, and return the CPU seconds of each process in them."""
    before = usage.cpu_seconds(server.process_ids)
    await asyncio.sleep(IDLE_SECONDS)
    after = usage.cpu_seconds(server.process_ids)
    return {name: after[name] - before[name] for name in after}
