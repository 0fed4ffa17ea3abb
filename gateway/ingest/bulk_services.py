"""Services that bulk operations of a gateway use."""

from __future__ import annotations

from typing import TYPE_CHECKING

from msgspec import Struct

if TYPE_CHECKING:
    from gateway.executions.acceptance import RunAcceptor
    from gateway.executions.long_poll import ExecutionAccess
    from gateway.executions.replay_planning import ReplayPlanner
    from gateway.executions.request_limits import BacklogLimits
    from gateway.ingest.redrive_runs import RunRedriver
    from journal.store import JournalStore
    from messages.broker import Broker
    from models.database import Database


class BulkServices(Struct, frozen=True):
    """Stores, limits and clients with which a gateway performs bulk operations."""

    database: Database
    store: JournalStore
    broker: Broker
    acceptances: RunAcceptor
    access: ExecutionAccess
    backlog: BacklogLimits
    replays: ReplayPlanner
    redriver: RunRedriver
