"""Command `pilotflame doctor`: examine every store of an installation, and fix findings."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from enum import IntEnum
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final
from uuid import uuid4

import msgspec
from msgspec import Struct
from sqlalchemy import select
from sqlalchemy.dialects import postgresql, sqlite
from sqlmodel import col

from doctor import connection_checks, examination
from doctor.connection_checks import ServerAddresses
from doctor.examination import AuditScope, ClusterUnreadable, ExaminedStores
from doctor.findings import FIXES, DriftClass
from doctor.setting_checks import ServerFacts
from engine.values import encode_canonical
from execution import due_runs
from gateway.access import audit_log
from gateway.access.audit_log import ServerOperator
from gateway.drift import drift
from gateway.settings import GatewaySettings
from journal.blobs import orphan_blobs
from journal.blobs.blob_store_factory import open_blobs
from journal.store_factory import open_store
from messages import wakeups
from messages.broker import RedisMayEvict
from messages.broker_connection import connect_broker
from messages.redis_broker import RedisBroker
from models import database as databases
from models.access import Organization
from models.audit import AuditAction
from models.database import Database
from models.deployment import Deployment
from models.drift_fix_count import DriftFixCount
from nodes import catalog as catalogs
from pilotflame.command_error import CommandError
from scheduler import lifecycle_policies, recovery
from scheduler.schedules import ScheduleRunner
from workers.cluster.driver import ClusterError, ObservedDeployment
from workers.deployer import main as deployer
from workers.deployer.settings import DeployerSettings

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncConnection

    from doctor.examination import ExaminationReport
    from doctor.findings import DriftFinding
    from engine.values import Json
    from journal.blobs.blob_store import BlobStore
    from journal.store import JournalStore
    from messages.broker import Broker
    from models.settings import ServerSettings
    from workers.cluster.driver import ClusterDriver


class DoctorExit(IntEnum):
    """Exit code of the command."""

    CLEAN = 0
    DRIFT = 1
    COULD_NOT_LOOK = 2


class DoctorRequest(Struct, frozen=True):
    """Parsed command line."""

    fixes: Collection[DriftClass] = ()
    looks_into_cluster: bool = False
    grace_seconds: float = examination.GRACE_SECONDS
    """Time between the two observations."""


class DoctorResult(Struct, frozen=True):
    """Report after all fixes, and the number of findings of each class that were fixed."""

    report: ExaminationReport
    fixed: Mapping[DriftClass, int]

    @property
    def exit_code(self) -> DoctorExit:
        """Exit code of the command: an unreachable store comes before findings."""
        if self.report.has_unreachable_store:
            return DoctorExit.COULD_NOT_LOOK
        return DoctorExit.DRIFT if self.report.findings else DoctorExit.CLEAN


class _OpenStores(Struct, frozen=True):
    """Stores of the installation, open."""

    database: Database
    broker: Broker
    blobs: BlobStore
    journal: JournalStore
    driver: ClusterDriver | None
    examined: ExaminedStores


_Fix = Callable[[_OpenStores, Sequence["DriftFinding"]], Awaitable[None]]


async def examine_installation(settings: ServerSettings, request: DoctorRequest) -> DoctorResult:
    """Examine every store, fix the findings of the requested classes with audit entries, and return the report.

    A finding is a contradiction between stores; after a fix, all is examined again. Requested classes without a fix or
    a finding are skipped. Raises `CommandError`, `InvalidSettings`, and `DatabaseUnavailable` in a fix.
    """
    _require_file(settings)
    async with _open_stores(settings, request) as stores:
        report = await examination.examine(stores.examined, grace_seconds=request.grace_seconds)
        fixed: dict[DriftClass, int] = {}
        for drift_class in request.fixes:
            found = [finding for finding in report.findings if finding.drift_class is drift_class]
            if not found or drift_class not in FIXES:
                continue
            await _FIXES[FIXES[drift_class].id](stores, found)
            await _record_fix(stores.database, drift_class, found)
            fixed[drift_class] = len(found)
        if fixed:
            report = await examination.examine(stores.examined, grace_seconds=request.grace_seconds)
        return DoctorResult(report, fixed)


def _require_file(settings: ServerSettings) -> None:
    """Raise `CommandError` if the database is an SQLite file that doesn't exist: opening it would create it."""
    url = databases.parse_url(settings.database_url)
    if databases.is_sqlite(url) and not Path(url.database or "").exists():
        raise CommandError(
            f"There is no database at {url.database}: start `pilotflame dev`, or set PILOTFLAME_DATABASE_URL"
        )


def encode_result(result: DoctorResult) -> bytes:
    """Return the result as JSON, with the fields of `GET /api/v1/admin/drift` and `fixed`."""
    shown: dict[str, Json] = msgspec.to_builtins(drift.build_report(result.report))
    return msgspec.json.encode({**shown, "fixed": dict(result.fixed)})


def describe_result(result: DoctorResult) -> Sequence[str]:
    """Return the result of a check of the stores as lines of text: fixes,
    states of the stores, findings, and their number.
    """
    lines = [f"fixed {count} of {drift_class}" for drift_class, count in result.fixed.items()]
    lines += [f"{name}: {state}" for name, state in result.report.stores.items()]
    for finding in result.report.findings:
        subject = f"{finding.subject.type} {finding.subject.id}"
        lines.append(f"{finding.severity} {finding.drift_class} {subject}: {finding.message}")
        evidence = ", ".join(
            f"{name} {value}" for name, value in finding.evidence.items() if value is not None
        )
        lines += [f"    {evidence}"] if evidence else []
        if fix := FIXES.get(finding.drift_class):
            lines.append(f"    pilotflame doctor --fix {finding.drift_class}  # {fix.description}")
        elif finding.remedy:
            lines.append(f"    {finding.remedy}")
    count = len(result.report.findings)
    if result.report.has_unreachable_store:
        lines.append(f"{count} findings; a store could not be examined, so there may be more")
    else:
        lines.append(f"{count} findings" if count else "Nothing found")
    return lines


@asynccontextmanager
async def _open_stores(settings: ServerSettings, request: DoctorRequest) -> AsyncIterator[_OpenStores]:
    """Open the stores to examine, and those that fixes need, during the block.

    The cluster is opened only if it is to be examined; an unreachable one is examined as unreachable.
    """
    async with AsyncExitStack() as stack:
        database = Database(databases.parse_url(settings.database_url))
        stack.push_async_callback(database.close)
        broker = await _open_broker(settings.broker_url)
        stack.push_async_callback(broker.close)
        blobs = open_blobs(settings)
        stack.push_async_callback(blobs.close)
        journal = await open_store(database.url, clock=database.clock, connections=1)
        stack.push_async_callback(journal.close)
        driver: ClusterDriver | None = None
        list_cluster: Callable[[], Awaitable[Sequence[ObservedDeployment]]] | None = None
        if request.looks_into_cluster:
            driver = await _open_driver()
            if driver is not None:
                stack.push_async_callback(driver.close)
            list_cluster = _cluster_lister(driver)
        examined = ExaminedStores(
            database,
            broker if settings.broker_url else None,
            blobs,
            read_facts(settings, GatewaySettings()),
            partial(connection_checks.check_connections, ServerAddresses(database.url, settings.broker_url)),
            AuditScope(),
            list_cluster,
        )
        yield _OpenStores(database, broker, blobs, journal, driver, examined)


async def _open_broker(url: str | None) -> Broker:
    """Return the broker at a URL, or for None one inside this process.

    A Redis that may evict keys, which other processes refuse to use, is opened too: a check reports it as a finding.
    """
    try:
        return await connect_broker(url)
    except RedisMayEvict:
        return RedisBroker(url or "", channel=uuid4().hex)


def read_facts(settings: ServerSettings, gateway: GatewaySettings) -> ServerFacts:
    """Return the settings that the checks of an installation examine, with the server's secret ("" without one)."""
    return ServerFacts(
        host=gateway.host,
        public_url=gateway.public_url,
        trusted_proxies=gateway.trusted_proxies,
        secret=settings.secret_key.get_secret_value() if settings.secret_key else "",
        outbound_allowed_networks=settings.outbound_allowed_networks,
        data_dir=settings.data_dir,
        database_url=databases.parse_url(settings.database_url),
        bootstrap_api_key=gateway.bootstrap_api_key.get_secret_value() if gateway.bootstrap_api_key else "",
    )


async def _open_driver() -> ClusterDriver | None:
    """Return the driver of the cluster by the deployer's settings; None if the cluster can't be reached."""
    try:
        return await deployer.open_driver(DeployerSettings())
    except ClusterError:
        return None


def _cluster_lister(
    driver: ClusterDriver | None,
) -> Callable[[], Awaitable[Sequence[ObservedDeployment]]]:
    """Return a function that lists the deployments of a cluster, and workflows with
    other objects as deployments that don't exist.

    It raises `ClusterUnreadable` without a driver, or if the cluster doesn't answer.
    """

    async def list_deployments() -> Sequence[ObservedDeployment]:
        if driver is None:
            raise ClusterUnreadable
        try:
            left = [ObservedDeployment(one, exists=False) for one in await driver.list_leftovers()]
            return [*await driver.list(), *left]
        except ClusterError as error:
            raise ClusterUnreadable from error

    return list_deployments


# ── fixes ───────────────────────────────────────────────────────────────────────────────────────────────────


async def _reclaim_leases(stores: _OpenStores, _found: Sequence[DriftFinding]) -> None:
    await recovery.recover_runs(stores.journal, stores.broker)


async def _wake_workers(stores: _OpenStores, _found: Sequence[DriftFinding]) -> None:
    await wakeups.wake_workers(stores.broker)


async def _admit_waiting(stores: _OpenStores, _found: Sequence[DriftFinding]) -> None:
    await recovery.admit_waiting(stores.database, stores.broker)


async def _start_schedules(stores: _OpenStores, _found: Sequence[DriftFinding]) -> None:
    await ScheduleRunner(stores.database, stores.broker, catalogs.load_catalog()).start_due()


async def _promote_runs(stores: _OpenStores, _found: Sequence[DriftFinding]) -> None:
    await recovery.promote_due_runs(stores.journal, stores.broker)


async def _wake_deployments(stores: _OpenStores, _found: Sequence[DriftFinding]) -> None:
    await due_runs.wake_due_deployments(stores.database, stores.broker)


async def _keep_policies(stores: _OpenStores, _found: Sequence[DriftFinding]) -> None:
    await lifecycle_policies.keep_policies(stores.database, stores.broker)


async def _delete_blobs(stores: _OpenStores, _found: Sequence[DriftFinding]) -> None:
    await orphan_blobs.delete_orphans(stores.blobs, stores.database)


async def _reconcile(stores: _OpenStores, found: Sequence[DriftFinding]) -> None:
    """Wake a deployer for the workflow of each finding; an unavailable broker is ignored."""
    for finding in found:
        await wakeups.wake_deployer(stores.broker, finding.subject.id)


async def _delete_deployments(stores: _OpenStores, found: Sequence[DriftFinding]) -> None:
    """Delete the objects of the found workflows from the cluster, except of those that are deployed by now.

    Does nothing without a driver of the cluster.
    """
    if stores.driver is None:
        return
    for finding in found:
        async with stores.database.read() as connection:
            is_deployed = await connection.scalar(
                select(col(Deployment.is_deployed)).where(col(Deployment.workflow_id) == finding.subject.id)
            )
        if not is_deployed:
            await stores.driver.delete(finding.subject.id)


_FIXES: Final[Mapping[str, _Fix]] = {
    "reclaim-leases": _reclaim_leases,
    "wake-workers": _wake_workers,
    "admit-waiting-runs": _admit_waiting,
    "start-due-schedules": _start_schedules,
    "promote-due-runs": _promote_runs,
    "wake-deployments": _wake_deployments,
    "keep-policies": _keep_policies,
    "delete-orphaned-blobs": _delete_blobs,
    "reconcile": _reconcile,
    "delete-deployment": _delete_deployments,
}


async def _record_fix(database: Database, drift_class: DriftClass, found: Sequence[DriftFinding]) -> None:
    """Add the number of fixed findings to the count of their class, and an audit
    entry to each organization with a fixed object.
    """
    concerned = {finding.subject.organization_id for finding in found}

    async def record(connection: AsyncConnection) -> None:
        dialect: Any = postgresql if connection.dialect.name == "postgresql" else sqlite
        added = dialect.insert(DriftFixCount).values(drift_class=drift_class.value, fixed=len(found))
        sum_of_both = col(DriftFixCount.fixed) + added.excluded.fixed
        await connection.execute(
            added.on_conflict_do_update(index_elements=["drift_class"], set_={"fixed": sum_of_both})
        )
        rows = await connection.execute(
            select(col(Organization.id), col(Organization.shard)).where(col(Organization.id).in_(concerned))
        )
        for organization_id, shard in rows.all():
            subjects: Sequence[Json] = sorted(
                each.subject.id for each in found if each.subject.organization_id == organization_id
            )
            await audit_log.record_change(
                connection,
                ServerOperator(organization_id, shard),
                AuditAction.DRIFT_FIXED,
                FIXES[drift_class].id,
                before=None,
                after=sha256(encode_canonical(subjects)).hexdigest(),
            )

    await database.transaction(record)
