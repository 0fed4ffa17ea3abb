"""A worker's process that calls models, and is killed before or after one of its commits."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from engine.services import NodeServices
from execution.child_runs import ChildRunStarter
from execution.executor import ExecutorHooks, RunExecutor
from execution.message_signer import MessageSigner
from execution.stored_model_ledger import StoredModelLedger
from journal.blobs.blob_store import BlobStore
from journal.blobs.folder_storage import FolderBlobStorage
from journal.store import RunWrite
from journal.store_factory import open_store
from journal.waits import node_answers
from messages.local_broker import LocalBroker
from models.database import Database, parse_url
from models.encryption import SecretVault
from nodes import catalog
from nodes.lazy_models import LazyModels
from nodes.outbound_http import OutboundClient, OutboundPolicy
from tests.fakes.model_lookup import LOOPBACK, ChargedModels, ServedModels
from workers.completion_actions import CompletionActions
from workers.settings import WorkerSettings
from workers.webhook_delivery import WebhookSender


def execute_runs(url: str, folder: Path, model_url: str, last_commit: int) -> None:
    """Execute runs; die by SIGKILL before commit N if `last_commit` is `-N`,
    and after it if it is `N`; with 0 never.
    """
    asyncio.run(_execute_runs(url, folder, model_url, last_commit))


async def _execute_runs(url: str, folder: Path, model_url: str, last_commit: int) -> None:
    """Execute runs until the process dies at the chosen commit, else forever."""
    store = await open_store(parse_url(url))
    settings = WorkerSettings(data_dir=folder, commit_seconds=0.02)
    record = store.record
    commits = 0

    async def record_or_die(batch: Sequence[RunWrite], *, owner: str = "") -> frozenset[str]:
        nonlocal commits
        commits += 1
        if commits == -last_commit:
            os.kill(os.getpid(), signal.SIGKILL)
        held = await record(batch, owner=owner)
        if commits == last_commit:
            os.kill(os.getpid(), signal.SIGKILL)
        return held

    store.record = record_or_die  # type: ignore[method-assign]  # replaced for the test
    database, broker, types = Database(parse_url(url)), LocalBroker(channel="dies"), catalog.load_catalog()
    runs = ChildRunStarter(database, store, broker, types, settings)
    client = OutboundClient(OutboundPolicy(allowed_networks=LOOPBACK))
    charged = ChargedModels(
        ServedModels({"first": model_url}), StoredModelLedger(database, is_deferring=True)
    )
    models = LazyModels(lambda: charged, LOOPBACK, ())
    services = NodeServices(http=client, models=models, runs=runs)
    webhooks = WebhookSender(
        MessageSigner(database, SecretVault(b"a secret of more than thirty-two characters")), client
    )
    blobs = BlobStore(FolderBlobStorage(folder))
    after = CompletionActions(database, store, broker, blobs, webhooks, runs, sweep_seconds=0.1)
    after.start()
    hooks = ExecutorHooks(answers=partial(node_answers.read_answers, database), on_left=after.handle_end)
    executor = RunExecutor(store, broker, types, services, settings, hooks=hooks)
    await executor.start()
    await asyncio.Event().wait()
