"""A worker's process that is killed when an output is in the blob storage and before the row that names it is."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Sequence
from pathlib import Path

from engine.services import NodeServices
from execution.executor import RunExecutor
from journal.blobs.blob_store_factory import open_blobs
from journal.store import RunWrite
from journal.store_factory import open_store
from messages.local_broker import LocalBroker
from models.database import parse_url
from tests.integration.large_outputs import build_catalog
from tests.node_calls import NoNetwork
from workers.settings import WorkerSettings


def execute_runs(url: str, folder: Path) -> None:
    """Execute runs, and die by SIGKILL before the first commit that names an output in the blob storage."""
    asyncio.run(_execute_runs(url, folder))


async def _execute_runs(url: str, folder: Path) -> None:
    """Execute runs until the process dies before a commit with a blob, else forever."""
    store = await open_store(parse_url(url))
    settings = WorkerSettings(data_dir=folder, commit_seconds=0.02)
    record = store.record

    async def record_or_die(batch: Sequence[RunWrite], *, owner: str = "") -> frozenset[str]:
        if any(span.output_blob for write in batch for span in write.spans):
            os.kill(os.getpid(), signal.SIGKILL)
        return await record(batch, owner=owner)

    store.record = record_or_die  # type: ignore[method-assign]  # replaced for the test
    blobs = open_blobs(settings)
    services = NodeServices(http=NoNetwork())
    executor = RunExecutor(
        store, LocalBroker(channel="dies"), build_catalog(), services, settings, blobs=blobs
    )
    await executor.start()
    await asyncio.Event().wait()
