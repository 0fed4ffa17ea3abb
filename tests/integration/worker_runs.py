"""Workers of the SDK for tests: on the loop of the test or in a process, with workflows of one custom node."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

from pilotflame_sdk import Client, Worker

from docs.tables import ROOT
from tests import command_runs
from tests.forks import ForkedProgram
from tests.integration.command_shell import CommandShell


def put_workflow(client: Client, node_type: str, config: dict[str, Any], **fields: Any) -> str:  # noqa: ANN401 - any JSON
    """Create or update a workflow with one node `work` of a type, and return its id."""
    node = {"id": "work", "type": node_type, "config": config, **fields}
    return client.workflows.put(
        {
            "name": f"With {node_type}",
            "nodes": [{"id": "start", "type": "manual"}, node],
            "connections": [{"source": "start", "target": "work"}],
        }
    )


@asynccontextmanager
async def serving(worker: Worker) -> AsyncIterator[None]:
    """Register the node types of a worker, and run it on this event loop during the block."""
    await asyncio.to_thread(worker.register)
    running = asyncio.create_task(worker.serve())
    try:
        yield
    finally:
        worker.stop()
        await running


def wait_until(holds: Callable[[], object]) -> None:
    """Wait until a condition holds; fails after a minute."""
    give_up_at = time.monotonic() + command_runs.PATIENCE_SECONDS
    while not holds():
        assert time.monotonic() < give_up_at
        time.sleep(0.02)


@contextmanager
def run_worker(
    shell: CommandShell, file: str, variables: Mapping[str, str], *, anew: bool = False
) -> Iterator[ForkedProgram | subprocess.Popen[bytes]]:
    """Run the Python file of a worker, with further variables, in a process of its own during the block.

    With `anew` it is a fresh process, which functions with a process of their own need.
    """
    environment = {**shell.given, "PYTHONPATH": str(ROOT / "sdk/python"), **variables}
    log = shell.folder / "worker.log"
    process: ForkedProgram | subprocess.Popen[bytes]
    if anew:
        process = subprocess.Popen([sys.executable, file], env=environment)
    else:
        process = ForkedProgram(Path(file), environment, (log, log))
    try:
        yield process
    finally:
        process.kill()
        process.wait()
