"""Idle, slow and greedy clients beside one that works: `python -m benchmarks.crowds [--descriptors 400]`.

Prints the memory of `pilotflame dev`, and the times of `execute`, with and without the crowd.
"""

from __future__ import annotations

import argparse
import asyncio
import resource
import statistics
import tempfile
from contextlib import AsyncExitStack
from pathlib import Path
from time import perf_counter
from typing import Final

import msgspec

from benchmarks import processes, usage
from benchmarks.http1 import BenchmarkApi, KeptConnection
from benchmarks.processes import ServerUnderTest
from gateway.http.connection_budget import connections_for

CROWD: Final = "127.0.0.2"
"""Source address of the crowd. It is not a trusted proxy."""
MAIL_BYTES: Final = 39_000_000
IDLE: Final = 400
RUNS: Final = 50
GRAPH: Final = {
    "name": "Crowded",
    "nodes": [
        {"id": "start", "type": "manual"},
        {"id": "step", "type": "set", "config": {"values": {"a": 1}}},
    ],
    "connections": [{"source": "start", "target": "step"}],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--descriptors", type=int, default=400, help="limit of the server's open files")
    parser.add_argument("--mails", type=int, default=15, help="unfinished mails at once")
    request = parser.parse_args()
    asyncio.run(_measure(request.descriptors, request.mails))


async def _measure(descriptors: int, mails: int) -> None:
    """Print the server's figures alone, then beside unfinished mails, then beside idle connections too."""
    with tempfile.TemporaryDirectory(prefix="pilotflame-crowds-") as folder:
        async with AsyncExitStack() as stack:
            connections = str(connections_for(descriptors))
            server = await stack.enter_async_context(
                processes.run_dev(Path(folder), {"MAX_CONNECTIONS": connections})
            )
            resource.prlimit(server.process_ids["dev"], resource.RLIMIT_NOFILE, (descriptors, descriptors))
            workflow_id = await _create_workflow(server.api)
            await _report("alone", server, workflow_id)
            crowd = await asyncio.gather(*[_hold_mail_open(server.api, workflow_id) for _ in range(mails)])
            await _report(f"{mails} unfinished mails of {MAIL_BYTES:,} bytes", server, workflow_id)
            crowd += await asyncio.gather(*[_open_idle(server.api) for _ in range(IDLE)])
            await _report(f"and {IDLE} idle connections", server, workflow_id)
            for writer in crowd:
                writer.transport.abort()


async def _create_workflow(api: BenchmarkApi) -> str:
    answer = await _request(api, api.post("/api/v1/workflows", msgspec.json.encode(GRAPH)))
    workflow_id: str = msgspec.json.decode(answer)["workflowId"]
    await _request(
        api, api.request("PUT", f"/api/v1/workflows/{workflow_id}/status", b'{"status": "active"}')
    )
    return workflow_id


async def _request(api: BenchmarkApi, request: bytes) -> bytes:
    connection = await KeptConnection.open(api.port)
    try:
        answer = await connection.send(request)
    finally:
        connection.close()
    if answer.status >= 300:
        raise SystemExit(f"{answer.status}: {answer.body.decode()}")
    return answer.body


async def _hold_mail_open(api: BenchmarkApi, workflow_id: str) -> asyncio.StreamWriter:
    """Send all of a large mail but its last byte, as far as the server accepts it, and return the open connection."""
    writer = await _open_idle(api)
    writer.write(api.request("POST", f"/api/v1/workflows/{workflow_id}/email-trigger")[:-2])
    writer.write(f"Content-Type: message/rfc822\r\nContent-Length: {MAIL_BYTES + 1}\r\n\r\n".encode())
    piece = b" " * 1_000_000
    try:
        async with asyncio.timeout(20):
            for _ in range(MAIL_BYTES // len(piece)):
                writer.write(piece)
                await writer.drain()
    except (ConnectionError, TimeoutError):
        pass  # the server has given it up, as it should some of them
    return writer


async def _open_idle(api: BenchmarkApi) -> asyncio.StreamWriter:
    _, writer = await asyncio.open_connection("127.0.0.1", api.port, local_addr=(CROWD, 0))
    return writer


async def _report(name: str, server: ServerUnderTest, workflow_id: str) -> None:
    """Run a workflow repeatedly, and print the server's memory and the latency of `execute`."""
    execute = server.api.post(f"/api/v1/workflows/{workflow_id}/execute", b"{}")
    milliseconds = []
    for _ in range(RUNS):
        began = perf_counter()
        await _request(server.api, execute)
        milliseconds.append((perf_counter() - began) * 1_000)
    memory = usage.memory_megabytes(server.process_ids)["dev"]
    print(
        f"{name}: {memory:.0f} MB, execute p50 {statistics.median(milliseconds):.1f} ms,"
        f" longest {max(milliseconds):.1f} ms, none of {RUNS} refused",
        flush=True,
    )


if __name__ == "__main__":
    main()
