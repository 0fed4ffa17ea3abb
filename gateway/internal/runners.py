"""What the gateway holds for the pods of deployments."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from execution.awaited_events import AwaitedEvents
from execution.child_runs import ChildRuns
from execution.data_sources import StoredSources
from execution.pace import SharedPace
from gateway.internal.desk import Desk
from gateway.internal.endpoint import RunnerAuthenticator

if TYPE_CHECKING:
    from gateway.settings import GatewaySettings
    from journal.store import JournalStore
    from messages.broker import Broker
    from models.database import Database
    from models.encryption import SecretVault
    from nodes.catalog import NodeCatalog


@dataclass(frozen=True, slots=True)
class Runners:
    """The parts that the internal API uses; what nodes are lent here, workers lend by the same code."""

    authenticator: RunnerAuthenticator
    desk: Desk
    sources: StoredSources
    runs: ChildRuns
    pace: SharedPace
    events: AwaitedEvents


@asynccontextmanager
async def opened(
    settings: GatewaySettings,
    database: Database,
    store: JournalStore,
    broker: Broker,
    catalog: NodeCatalog,
    vault: SecretVault,
    desk: Desk,
) -> AsyncIterator[Runners]:
    """Make them, and have pods wait at the desk as long as the context lasts."""
    await desk.start()
    try:
        yield Runners(
            authenticator=RunnerAuthenticator(database),
            desk=desk,
            sources=StoredSources(database, vault),
            runs=ChildRuns(database, store, broker, catalog, settings),
            pace=SharedPace(database),
            events=AwaitedEvents(database, broker),
        )
    finally:
        await desk.close()
