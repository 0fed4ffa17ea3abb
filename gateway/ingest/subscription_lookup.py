"""Subscriptions of events, looked up in groups: concurrent events share one query."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import TYPE_CHECKING, Final, TypeAlias

from msgspec import Struct
from sqlalchemy import select
from sqlmodel import col

from gateway.ingest import event_subscriptions
from journal.group_commit import GroupCommit
from models.deployment import Deployment

if TYPE_CHECKING:
    from collections.abc import Iterable

    from sqlalchemy.ext.asyncio import AsyncConnection

    from gateway.ingest.event_subscriptions import EventSubscription
    from models.database import Database

BATCH_IDS: Final = 1_000

OfType: TypeAlias = tuple[str, str]
"""Organization and event type."""


class SubscribedWorkflows(Struct, frozen=True):
    """Workflows that subscribe to an event."""

    found: Sequence[EventSubscription]
    deployed: Sequence[str]
    """Ids of the deployed ones."""


class SubscriptionLookup:
    """Lookup of subscriptions for one gateway, in groups; nothing is cached beyond a query."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._lookups: GroupCommit[OfType, SubscribedWorkflows] = GroupCommit(self._look_up)

    async def find(self, organization_id: str, event_type: str) -> SubscribedWorkflows:
        """Return the workflows that subscribe to an event type, and those of them that are deployed.

        Concurrent lookups share a query; each sees everything that was committed before the call. Raises
        `DatabaseUnavailable`.
        """
        return await self._lookups.submit((organization_id, event_type))

    async def drain(self) -> None:
        """Wait for lookups of subscriptions in progress, before the process stops."""
        await self._lookups.drain()

    async def _look_up(self, batch: Sequence[OfType]) -> Sequence[SubscribedWorkflows]:
        """Return the subscribed workflows for each organization and event type of a batch, in its order, by
        one transaction.
        """
        async with self._database.read() as connection:
            found = {
                one: await event_subscriptions.match_subscriptions(connection, *one)
                for one in dict.fromkeys(batch)
            }
            deployed = await _find_deployed(connection, chain.from_iterable(found.values()))
        answers = {
            one: SubscribedWorkflows(
                some, [each.workflow_id for each in some if each.workflow_id in deployed]
            )
            for one, some in found.items()
        }
        return [answers[one] for one in batch]


async def _find_deployed(connection: AsyncConnection, found: Iterable[EventSubscription]) -> frozenset[str]:
    """Return the ids of the deployed ones of the subscribing workflows."""
    workflow_ids = [*{one.workflow_id for one in found}]
    deployed: set[str] = set()
    for start in range(0, len(workflow_ids), BATCH_IDS):
        statement = select(col(Deployment.workflow_id)).where(
            col(Deployment.workflow_id).in_(workflow_ids[start : start + BATCH_IDS]),
            col(Deployment.is_deployed),
        )
        deployed |= {*(await connection.scalars(statement))}
    return frozenset(deployed)
