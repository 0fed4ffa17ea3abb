"""Examination: every check, made twice, so that work in progress is no finding."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from datetime import datetime
from enum import StrEnum
from typing import TYPE_CHECKING, Final

from msgspec import Struct, field

from doctor import deployment_checks, row_checks, setting_checks, store_checks
from doctor.findings import DriftFinding, DriftSeverity, FindingKey
from journal.blobs.blob_storage import BlobsUnavailable
from messages.broker import BrokerUnavailable
from models.database_time import read_database_time
from models.errors import DatabaseUnavailable

if TYPE_CHECKING:
    from doctor.deployment_checks import ClusterDeployment
    from doctor.setting_checks import ServerFacts
    from journal.blobs.blob_store import BlobStore
    from messages.broker import Broker
    from models.database import Database

GRACE_SECONDS: Final = 3.0
"""Time between the two observations: longer than a sweep of the server takes."""


class StoreState(StrEnum):
    """Outcome of the examination of a store."""

    OK = "ok"
    UNREACHABLE = "unreachable"
    """Nothing is known about it, so the examination is not clean."""
    NOT_EXAMINED = "not-examined"


class ClusterUnreadable(Exception):
    """The cluster did not answer."""


class AuditScope(Struct, frozen=True):
    """Part of the audit trail: everything, or the newest entries of one organization."""

    organization_id: str | None = None
    newest: int | None = None


class ExaminedStores(Struct, frozen=True):
    """Stores to look into; a store that is None is not examined."""

    database: Database
    broker: Broker | None = None
    blobs: BlobStore | None = None
    facts: ServerFacts | None = None
    check_connections: Callable[[], Awaitable[Sequence[DriftFinding]]] | None = None
    """Checks of the ways to PostgreSQL and Redis, which load the clients of both."""
    audit: AuditScope | None = None
    """Part of the audit trail to verify."""
    list_cluster: Callable[[], Awaitable[Sequence[ClusterDeployment]]] | None = None
    """Lists the deployments in the cluster; raises `ClusterUnreadable`."""


class ExaminationReport(Struct, frozen=True):
    """Findings that both observations have, and the stores that could be read."""

    as_of: datetime | None
    """Time of the second observation by the database's clock; None if it can't be reached."""
    stores: Mapping[str, StoreState]
    findings: Sequence[DriftFinding]
    observed: frozenset[FindingKey] = frozenset()
    """Keys of all findings of the first observation that this examination has made."""

    @property
    def has_unreachable_store(self) -> bool:
        """Whether at least one examined store did not answer."""
        return StoreState.UNREACHABLE in self.stores.values()

    @property
    def is_clean(self) -> bool:
        """Whether every examined store was read and nothing was found."""
        return not self.findings and not self.has_unreachable_store


class _Observation(Struct):
    """Findings of all stores at one time, and the state of each store."""

    as_of: datetime | None = None
    stores: dict[str, StoreState] = field(default_factory=dict)
    findings: list[DriftFinding] = field(default_factory=list)


async def examine(
    stores: ExaminedStores,
    *,
    grace_seconds: float = GRACE_SECONDS,
    seen_before: frozenset[FindingKey] | None = None,
) -> ExaminationReport:
    """Examine all stores twice, `grace_seconds` apart; return the findings seen both times, critical ones first.

    So states that pass by themselves are not reported. Without findings the second observation is left out, and also if
    `seen_before`, the keys of an earlier observation, has all of them. An unreachable store is reported, never taken
    for clean.
    """
    second = await _observe(stores)
    observed = frozenset(finding.key for finding in second.findings)
    if seen_before is None or not observed <= seen_before:
        seen_before = observed
        if observed:
            await asyncio.sleep(grace_seconds)
            second = await _observe(stores)
    kept = [finding for finding in second.findings if finding.key in seen_before]
    kept.sort(key=lambda finding: (finding.severity is not DriftSeverity.CRITICAL, *finding.key))
    return ExaminationReport(second.as_of, second.stores, kept, observed)


async def _observe(stores: ExaminedStores) -> _Observation:
    """Examine the settings and all stores once, and return the findings and the state of each store."""
    seen = _Observation()
    if stores.facts is not None:
        seen.findings += setting_checks.check_settings(stores.facts)
    if stores.check_connections is not None:
        seen.findings += await stores.check_connections()
    await _observe_database(stores, seen)
    await _observe_broker(stores, seen)
    await _observe_blobs(stores, seen)
    return seen


async def _observe_database(stores: ExaminedStores, seen: _Observation) -> None:
    """Add the findings of the database, read on one connection, and of the cluster if it is examined.

    Stores that don't answer are marked as unreachable. If the tables are of another version, or the database doesn't
    answer, the cluster is marked as not examined.
    """
    seen.stores["database"] = StoreState.OK
    seen.stores["cluster"] = StoreState.NOT_EXAMINED
    try:
        if outdated := await store_checks.check_tables(stores.database):
            seen.findings += outdated
            return
        # Rows that change between two statements would look like drift.
        async with stores.database.read_snapshot() as connection:
            seen.as_of = await read_database_time(connection)
            seen.findings += await store_checks.check_database(connection)
            seen.findings += await row_checks.find_overdue_rows(connection)
            if (audit := stores.audit) is not None:
                seen.findings += await store_checks.check_audit_chain(
                    connection, organization_id=audit.organization_id, newest=audit.newest
                )
            deployments = await deployment_checks.read_deployments(connection)
            undeploying = await deployment_checks.read_undeploying(connection)
    except DatabaseUnavailable:
        seen.stores["database"] = StoreState.UNREACHABLE
        return
    seen.findings += deployment_checks.check_deployments(deployments)
    if stores.list_cluster is None:
        return
    try:
        listed = await stores.list_cluster()
    except ClusterUnreadable:
        seen.stores["cluster"] = StoreState.UNREACHABLE
        return
    seen.stores["cluster"] = StoreState.OK
    seen.findings += deployment_checks.compare_cluster(deployments, listed, undeploying)


async def _observe_broker(stores: ExaminedStores, seen: _Observation) -> None:
    """Note whether Redis answers, if it is the broker; no findings are added."""
    if stores.broker is None or not stores.broker.uses_redis:
        seen.stores["redis"] = StoreState.NOT_EXAMINED
        return
    try:
        await stores.broker.ping()
        seen.stores["redis"] = StoreState.OK
    except BrokerUnavailable:
        seen.stores["redis"] = StoreState.UNREACHABLE


async def _observe_blobs(stores: ExaminedStores, seen: _Observation) -> None:
    """Add the findings about stored blobs (large outputs of nodes); an unreachable store is only marked.

    It is marked as not examined if it isn't to be examined, or if the database does not answer.
    """
    if stores.blobs is None:
        seen.stores["blobs"] = StoreState.NOT_EXAMINED
        return
    try:
        seen.findings += await store_checks.check_blobs(stores.database, stores.blobs)
        seen.stores["blobs"] = StoreState.OK
    except BlobsUnavailable:
        seen.stores["blobs"] = StoreState.UNREACHABLE
    except DatabaseUnavailable:
        seen.stores["blobs"] = StoreState.NOT_EXAMINED
