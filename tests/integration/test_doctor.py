"""The doctor finds drift that is made by hand, mends it, and finds nothing where nothing is wrong."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Callable
from datetime import UTC, datetime, timedelta
from functools import partial
from hashlib import sha256
from ipaddress import ip_network
from pathlib import Path
from typing import Any

import msgspec
import pytest
from sqlalchemy import insert
from sqlalchemy.ext.asyncio import AsyncConnection

from doctor import deployment_checks, setting_checks
from doctor.examination import ExaminationReport, StoreState
from doctor.findings import FIXES, DriftClass
from doctor.setting_checks import ServerFacts
from gateway.access import audit_log
from gateway.access.audit_log import ServerOperator
from journal import audit_chain, process_presence
from journal.blobs.blob_storage import BlobOwner
from journal.blobs.blob_store_factory import open_blobs
from journal.blobs.orphan_blobs import MIN_AGE_HOURS
from journal.presence_reports import program_version
from models import ids
from models.access import Organization
from models.audit import AuditAction
from models.database import parse_url
from models.deployment import Deployment, ObservedState
from models.schedule import Schedule
from models.settings import ServerSettings
from models.timestamps import to_microseconds
from pilotflame import doctor_command
from pilotflame.doctor_command import DoctorExit, DoctorRequest, DoctorResult
from tests.integration.run_database import MigratedDatabase, OwnedWorkflow, RunDatabase, open_run_database
from tests.system.wait_conditions import wait_until
from workers.cluster.driver import ObservedDeployment, ObservedPod

LONG_AGO = 1_000_000
"""A time in 1970, in microseconds."""


@pytest.fixture(params=["on_sqlite", "on_postgres"])
def migrated(request: pytest.FixtureRequest) -> MigratedDatabase:
    database: MigratedDatabase = request.getfixturevalue(request.param)
    return database


@pytest.fixture
async def runs(migrated: MigratedDatabase) -> AsyncIterator[RunDatabase]:
    async with open_run_database(migrated) as database:
        await database.query("DELETE FROM leadership")
        await database.query("DELETE FROM drift_fix_count")
        await database.query(
            "INSERT INTO leadership (name, owner, epoch, lease_until) VALUES ('scheduler', 'a', 1, :until)",
            until=4_000_000_000_000_000,
        )
        await add_worker(database)
        yield database
        await database.query("DELETE FROM leadership")


async def add_worker(database: RunDatabase) -> None:
    await database.query(
        "INSERT INTO worker_presence (owner, concurrency, held_runs, started_at, seen_at, version)"
        " VALUES ('a', 4, 0, 1, :seen, :version)",
        seen=4_000_000_000_000_000,
        version=program_version(),
    )


@pytest.fixture
def examine(runs: RunDatabase, tmp_path: Path) -> Callable[..., Any]:
    settings = ServerSettings(
        database_url=runs.url.render_as_string(hide_password=False), data_dir=tmp_path, secret_key=None
    )

    async def run(*fixes: DriftClass) -> DoctorResult:
        request = DoctorRequest(fixes, grace_seconds=0)
        return await doctor_command.examine_installation(settings, request)

    return run


def classes(report: ExaminationReport) -> set[DriftClass]:
    return {finding.drift_class for finding in report.findings}


async def test_a_healthy_installation_is_clean(examine: Callable[..., Any], runs: RunDatabase) -> None:
    place = await runs.workflow()
    await runs.accept_and_claim(place)
    await runs.accept(place)
    result = await examine()
    assert result.report.findings == []
    assert result.exit_code is DoctorExit.CLEAN
    assert result.report.stores == {
        "database": StoreState.OK,
        "cluster": StoreState.NOT_EXAMINED,
        "redis": StoreState.NOT_EXAMINED,
        "blobs": StoreState.OK,
    }


async def make_expired_lease(runs: RunDatabase, place: OwnedWorkflow) -> str:
    claimed = await runs.accept_and_claim(place)
    await runs.expire(claimed)
    return claimed.execution_id


async def make_overdue_wait(runs: RunDatabase, place: OwnedWorkflow) -> str:
    key = await runs.begun(place)
    await runs.query(
        "UPDATE execution SET status = 'waiting', target = 'shared', due_at = :due WHERE id = :id",
        due=LONG_AGO,
        id=key.execution_id,
    )
    return key.execution_id


async def make_unused_slot(runs: RunDatabase, place: OwnedWorkflow) -> str:
    """Two runs wait for the slot of a limit that none holds; the first of them is next."""
    keys = [await runs.accept(place) for _ in range(2)]
    await runs.query(
        "UPDATE execution SET target = 'limited', concurrency_key = 'key', concurrency_limit = 1,"
        " updated_at = :at, rank = :at",
        at=LONG_AGO,
    )
    return keys[0].execution_id


async def make_overdue_schedule(runs: RunDatabase, place: OwnedWorkflow) -> str:
    long_ago = datetime(2026, 1, 1, tzinfo=UTC)
    row = Schedule(
        workflow_id=place.workflow_id,
        organization_id=place.organization.id,
        shard=place.organization.shard,
        node_id="start",
        timing_hash="0",
        anchor_at=long_ago,
        planned_at=long_ago,
        next_run_at=long_ago,
        due_at=long_ago,
    )

    async def add(connection: AsyncConnection) -> None:
        await connection.execute(insert(Schedule).values(row.model_dump()))

    await runs.database.transaction(add)
    return place.workflow_id


@pytest.mark.parametrize(
    ("make", "drift_class"),
    [
        (make_expired_lease, DriftClass.LEASE_EXPIRED),
        (make_overdue_wait, DriftClass.WAIT_OVERDUE),
        (make_unused_slot, DriftClass.SLOT_UNUSED),
    ],
)
async def test_overdue_rows_are_found_and_mended(
    examine: Callable[..., Any], runs: RunDatabase, make: Callable[..., Any], drift_class: DriftClass
) -> None:
    place = await runs.workflow()
    subject = await make(runs, place)
    before = await examine()
    (finding,) = before.report.findings
    assert (finding.drift_class, finding.subject.id) == (drift_class, subject)
    assert finding.subject.organization_id == place.organization.id
    assert before.exit_code is DoctorExit.DRIFT

    after = await examine(drift_class)
    assert after.fixed == {drift_class: 1}
    assert after.exit_code is DoctorExit.CLEAN
    counted = await runs.query("SELECT drift_class, fixed FROM drift_fix_count")
    assert counted == [{"drift_class": drift_class.value, "fixed": 1}]
    (entry,) = await runs.query("SELECT action, user_id, object_id FROM audit_entry")
    assert entry == {"action": "drift.fixed", "user_id": "operator", "object_id": FIXES[drift_class].id}


async def test_a_ready_run_counts_only_while_workers_have_free_places(
    examine: Callable[..., Any], runs: RunDatabase
) -> None:
    key = await runs.accept(await runs.workflow())
    await runs.query("UPDATE execution SET updated_at = :at, rank = :at", at=LONG_AGO)
    assert [each.subject.id for each in (await examine()).report.findings] == [key.execution_id]
    await runs.query("UPDATE worker_presence SET held_runs = concurrency")
    assert (await examine()).exit_code is DoctorExit.CLEAN


async def test_an_overdue_schedule_is_found(examine: Callable[..., Any], runs: RunDatabase) -> None:
    workflow_id = await make_overdue_schedule(runs, await runs.workflow())
    (finding,) = (await examine()).report.findings
    assert (finding.drift_class, finding.subject.id) == (DriftClass.SCHEDULE_OVERDUE, workflow_id)


async def test_absent_processes_are_found(examine: Callable[..., Any], runs: RunDatabase) -> None:
    await runs.query("DELETE FROM leadership")
    await runs.query("UPDATE worker_presence SET seen_at = 1")
    report = (await examine()).report
    assert classes(report) == {DriftClass.NO_LEADER, DriftClass.NO_WORKER}
    assert all(finding.remedy for finding in report.findings)


async def test_a_slot_that_a_run_holds_is_not_unused(examine: Callable[..., Any], runs: RunDatabase) -> None:
    place = await runs.workflow()
    await make_unused_slot(runs, place)
    key = await runs.accept(place)
    await runs.query(
        "UPDATE execution SET concurrency_key = 'key', concurrency_limit = 1 WHERE id = :id",
        id=key.execution_id,
    )
    assert (await examine()).exit_code is DoctorExit.CLEAN


async def test_other_processes_of_another_version_are_found(
    examine: Callable[..., Any], runs: RunDatabase
) -> None:
    async with process_presence.report_process(runs.database, "gateway"):
        await wait_until(partial(runs.query, "SELECT owner FROM process_presence"))
        assert (await examine()).exit_code is DoctorExit.CLEAN
        await runs.query("UPDATE process_presence SET version = '0.0.1'")
        (finding,) = (await examine()).report.findings
        assert finding.drift_class is DriftClass.VERSIONS_DIFFER
        assert finding.evidence == {"gateway": "0.0.1", "here": program_version()}
    assert (await examine()).exit_code is DoctorExit.CLEAN


@pytest.mark.parametrize("version", ["0.0.1", None])
async def test_a_worker_of_another_version_is_found(
    examine: Callable[..., Any], runs: RunDatabase, version: str | None
) -> None:
    await runs.query("UPDATE worker_presence SET version = :version", version=version)
    (finding,) = (await examine()).report.findings
    assert (finding.drift_class, finding.subject.id) == (DriftClass.VERSIONS_DIFFER, "a")
    assert finding.evidence == {"worker": version, "here": program_version()}
    await runs.query("UPDATE worker_presence SET ended_at = 1")
    assert DriftClass.VERSIONS_DIFFER not in classes((await examine()).report)


async def make_audit_trail(runs: RunDatabase, entries: int) -> Organization:
    """Make an audit trail in two turns of the scheduler; the second entry of each turn has changes."""
    organization = await runs.organization()
    author = ServerOperator(organization.id, organization.shard)
    for turn in range(2):
        for number in range(entries // 2):

            async def add(connection: AsyncConnection, after: str = f"{turn}-{number}") -> None:
                await audit_log.record_change(
                    connection,
                    author,
                    AuditAction.KEY_CREATED,
                    "key_1",
                    before=None,
                    after=after,
                    changes=[{"path": "name", "before": None, "after": after}]
                    if after.endswith("-1")
                    else None,
                )

            await runs.database.transaction(add)
        await audit_chain.chain_entries(runs.database)
    return organization


CHAINED = "(SELECT id FROM audit_entry WHERE organization_id = :id AND sequence = 3)"


TAMPERINGS = {
    "author": (f"UPDATE audit_entry SET user_id = 'user_2' WHERE id = {CHAINED}", 3),
    "hash": (f"UPDATE audit_entry SET after_hash = NULL WHERE id = {CHAINED}", 3),
    "time": (f"UPDATE audit_entry SET created_at = created_at + 1 WHERE id = {CHAINED}", 3),
    "chain": (f"UPDATE audit_entry SET chain_hash = 'f' WHERE id = {CHAINED}", 3),
    "request added": (f"UPDATE audit_entry SET request_id = 'req_2' WHERE id = {CHAINED}", 3),
    "address added": (f"UPDATE audit_entry SET address_hash = 'f' WHERE id = {CHAINED}", 3),
    "changes added": (f"UPDATE audit_entry SET changes = '[]' WHERE id = {CHAINED}", 3),
    "changes removed": (
        "UPDATE audit_entry SET changes = NULL WHERE organization_id = :id AND sequence = 2",
        2,
    ),
    "removed": (f"DELETE FROM audit_entry WHERE id = {CHAINED}", 3),
    "chained anew": (
        f"UPDATE audit_entry SET sequence = NULL, chain_hash = NULL, user_id = 'user_2' WHERE id = {CHAINED}",
        3,
    ),
    "first removed": ("DELETE FROM audit_entry WHERE organization_id = :id AND sequence = 1", 1),
}
"""Statement that changes a trail, and the sequence of its first changed entry."""
SOME_TAMPERINGS = ("time", "changes removed", "removed")
"""Those of each kind of value, and a lost entry: the hashes are computed alike from the rows of both databases."""


@pytest.mark.parametrize(
    ("migrated", "kind"),
    [
        *(("on_sqlite", kind) for kind in TAMPERINGS),
        *(("on_postgres", kind) for kind in SOME_TAMPERINGS),
    ],
    indirect=["migrated"],
)
async def test_a_changed_audit_trail_is_found_at_its_first_changed_entry(
    examine: Callable[..., Any], runs: RunDatabase, kind: str
) -> None:
    tampering, sequence = TAMPERINGS[kind]
    organization, other = await make_audit_trail(runs, 6), await make_audit_trail(runs, 2)
    assert (await examine()).exit_code is DoctorExit.CLEAN
    await runs.query(tampering, id=organization.id)
    await audit_chain.chain_entries(runs.database)
    (finding,) = (await examine()).report.findings
    assert finding.drift_class is DriftClass.AUDIT_CHAIN_BROKEN
    assert (finding.subject.organization_id, finding.evidence["sequence"]) == (organization.id, sequence)
    async with runs.database.read() as connection:
        assert not await audit_chain.find_breaks(connection, organization_id=other.id)
        newest = await audit_chain.find_breaks(connection, organization_id=organization.id, newest=2)
        assert not newest, "of a long trail, a request verifies the end alone"


async def test_entries_that_an_earlier_release_has_chained_stay_valid(
    examine: Callable[..., Any], runs: RunDatabase, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as earlier:
        earlier.setattr(audit_chain, "hash_entry", hash_as_earlier_releases)
        organization = await make_audit_trail(runs, 4)
    assert (await examine()).exit_code is DoctorExit.CLEAN
    await runs.query("UPDATE audit_entry SET user_id = 'user_2' WHERE sequence = 2")
    (finding,) = (await examine()).report.findings
    assert finding.subject.organization_id == organization.id


def hash_as_earlier_releases(previous: str, sequence: int, entry: Any) -> str:  # noqa: ANN401 - a row
    """Return the chain hash of an entry as releases without requests and changes have computed it."""
    content = [
        *(previous, sequence, entry.id, entry.organization_id, entry.user_id, entry.key_id, entry.action),
        *(entry.object_id, entry.before_hash, entry.after_hash, to_microseconds(entry.created_at)),
    ]
    return sha256(msgspec.json.encode(content)).hexdigest()


async def test_concurrent_schedulers_make_one_chain(examine: Callable[..., Any], runs: RunDatabase) -> None:
    organization = await runs.organization()
    author = ServerOperator(organization.id, organization.shard)

    async def add(connection: AsyncConnection) -> None:
        for number in range(20):
            await audit_log.record_change(
                connection, author, AuditAction.KEY_CREATED, "key_1", before=None, after=str(number)
            )

    await runs.database.transaction(add)
    await asyncio.gather(*(audit_chain.chain_entries(runs.database) for _ in range(3)))
    rows = await runs.query("SELECT sequence FROM audit_entry ORDER BY sequence")
    assert [row["sequence"] for row in rows] == list(range(1, 21))
    assert (await examine()).exit_code is DoctorExit.CLEAN


async def test_one_process_with_all_roles_needs_no_leader(
    examine: Callable[..., Any], runs: RunDatabase
) -> None:
    await runs.query("DELETE FROM leadership")
    await runs.query("UPDATE worker_presence SET owner = 'dev_1'")
    assert (await examine()).exit_code is DoctorExit.CLEAN


async def test_blobs_of_no_run_are_found_and_deleted(
    examine: Callable[..., Any], runs: RunDatabase, tmp_path: Path
) -> None:
    settings = ServerSettings(data_dir=tmp_path)
    blobs = open_blobs(settings)
    owner = BlobOwner((await runs.organization()).id, ids.new_id("exec"))
    await blobs.put(owner, b"content", media_type="text/plain")
    await blobs.close()
    old = datetime.now(UTC).timestamp() - (MIN_AGE_HOURS + 2) * 3600
    for path in (tmp_path / "blobs").rglob("*"):
        os.utime(path, (old, old))
    assert classes((await examine()).report) == {DriftClass.BLOB_WITHOUT_ROW}
    assert (await examine(DriftClass.BLOB_WITHOUT_ROW)).exit_code is DoctorExit.CLEAN


async def test_an_unreachable_store_is_never_clean(tmp_path: Path) -> None:
    settings = ServerSettings(database_url="postgresql://nobody@127.0.0.1:1/none", data_dir=tmp_path)
    result = await doctor_command.examine_installation(settings, DoctorRequest(grace_seconds=0))
    assert result.report.stores["database"] is StoreState.UNREACHABLE
    assert result.exit_code is DoctorExit.COULD_NOT_LOOK


async def test_deployments_are_compared_with_the_cluster(runs: RunDatabase) -> None:
    place, absent, other, unseen, healthy = [await runs.workflow() for _ in range(5)]
    for workflow in (place, absent, other, unseen, healthy):
        await add_deployment(runs, workflow, replicas=1)
    async with runs.database.read() as connection:
        seen = await deployment_checks.read_deployments(connection)
    pod = ObservedPod("pod", "0" * 64, "http://127.0.0.1:1", is_ready=True, is_terminating=False)
    same: dict[str, Any] = {"exists": True, "replicas": 1, "generation": 1, "definition_hash": "0" * 64}
    listed = [
        ObservedDeployment(place.workflow_id, pods=(pod,), **same | {"replicas": 3}),
        ObservedDeployment(other.workflow_id, pods=(pod,), **same | {"definition_hash": "1" * 64}),
        ObservedDeployment(unseen.workflow_id, **same),
        ObservedDeployment(healthy.workflow_id, pods=(pod,), **same),
        ObservedDeployment("wf_unknown", exists=True, replicas=1),
    ]
    found = {(each.drift_class, each.subject.id) for each in deployment_checks.compare_cluster(seen, listed)}
    assert found == {
        (DriftClass.REPLICAS_DIFFER, place.workflow_id),
        (DriftClass.MANIFEST_DIFFERS, other.workflow_id),
        (DriftClass.STATUS_DIFFERS, unseen.workflow_id),
        (DriftClass.WORKFLOW_WITHOUT_DEPLOYMENT, absent.workflow_id),
        (DriftClass.DEPLOYMENT_WITHOUT_WORKFLOW, "wf_unknown"),
    }


async def test_a_policy_that_is_not_kept_is_found_and_kept(
    examine: Callable[..., Any], runs: RunDatabase
) -> None:
    place = await runs.workflow()
    await add_deployment(runs, place, replicas=1, last_activity_at=datetime(2026, 1, 1, tzinfo=UTC))
    await runs.query("UPDATE workflow SET lifecycle = :policy", policy='{"type":"on-demand"}')
    before = await examine()
    assert classes(before.report) == {DriftClass.AWAKE_AGAINST_POLICY}
    after = await examine(DriftClass.AWAKE_AGAINST_POLICY)
    assert DriftClass.AWAKE_AGAINST_POLICY not in classes(after.report)


async def test_a_change_that_the_deployer_does_not_apply_is_found(
    examine: Callable[..., Any], runs: RunDatabase
) -> None:
    place = await runs.workflow()
    await add_deployment(runs, place, replicas=1, observed_generation=0)
    (finding,) = (await examine()).report.findings
    assert finding.drift_class is DriftClass.CHANGE_NOT_APPLIED
    assert finding.evidence == {"generation": 1, "appliedGeneration": 0}


async def add_deployment(runs: RunDatabase, place: OwnedWorkflow, **columns: Any) -> None:  # noqa: ANN401 - any column
    long_ago = datetime.now(UTC) - timedelta(hours=1)
    given: dict[str, Any] = {"observed_generation": 1, "observed": ObservedState.RUNNING} | columns
    row = Deployment(
        workflow_id=place.workflow_id,
        organization_id=place.organization.id,
        shard=place.organization.shard,
        definition_hash="0" * 64,
        observed_definition_hash="0" * 64,
        version=1,
        ready_replicas=1,
        created_at=long_ago,
        updated_at=long_ago,
        **given,
    )

    async def add(connection: AsyncConnection) -> None:
        await connection.execute(insert(Deployment).values(row.model_dump()))

    await runs.database.transaction(add)


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({}, []),
        ({"host": "0.0.0.0"}, ["PILOTFLAME_PUBLIC_URL"]),
        ({"public_url": "http://flows.example.com"}, ["PILOTFLAME_PUBLIC_URL"]),
        ({"public_url": "https://flows.example.com"}, ["PILOTFLAME_TRUSTED_PROXIES"]),
        ({"public_url": "https://flows.example.com", "trusted_proxies": "10.0.0.1"}, []),
        ({"secret": "a" * 40}, ["PILOTFLAME_SECRET_KEY"]),
        ({"secret": "Please-CHANGE-ME-before-you-go-online-1x"}, ["PILOTFLAME_SECRET_KEY"]),
        ({"bootstrap_api_key": "sk-your-key-here"}, ["PILOTFLAME_BOOTSTRAP_API_KEY"]),
        ({"bootstrap_api_key": "sk-V0mG7cB1xQ9zLwT4"}, []),
        ({"database_url": parse_url("postgresql://flows:flows@db/flows")}, ["PILOTFLAME_DATABASE_URL"]),
        ({"database_url": parse_url("postgresql://flows:password1@db/flows")}, ["PILOTFLAME_DATABASE_URL"]),
        ({"database_url": parse_url("postgresql://flows:flows@localhost/flows")}, []),
        ({"database_url": parse_url("postgresql://flows:V0mG7cB1xQ9z@db/flows")}, []),
        ({"outbound_allowed_networks": [ip_network("0.0.0.0/0")]}, ["PILOTFLAME_OUTBOUND_ALLOWED_NETWORKS"]),
        ({"outbound_allowed_networks": [ip_network("10.0.0.0/8")]}, []),
    ],
)
def test_settings_that_a_first_start_gets_wrong_are_named(
    changes: dict[str, Any], names: list[str], tmp_path: Path
) -> None:
    given: dict[str, Any] = {
        "host": "127.0.0.1",
        "public_url": "",
        "trusted_proxies": "",
        "secret": "k3J9x-Qw7_zLm2Pv8RtYc1Bn5Dg4Hf6S",
        "outbound_allowed_networks": [],
        "data_dir": tmp_path,
        "database_url": parse_url(f"sqlite:///{tmp_path}/pilotflame.db"),
    }
    found = [*setting_checks.check_settings(ServerFacts(**given | changes))]
    assert [finding.subject.id for finding in found] == names
    assert all(finding.remedy for finding in found)


def test_files_that_others_may_read_are_named(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir(mode=0o755)
    folder.chmod(0o755)
    (folder / "secret.key").touch(mode=0o644)
    (folder / "secret.key").chmod(0o644)
    facts = ServerFacts("127.0.0.1", "", "", "", [], folder, parse_url(f"sqlite:///{folder}/pilotflame.db"))
    (finding,) = setting_checks.check_settings(facts)
    assert finding.evidence == {"mode": "-rw-r--r--"}
    (folder / "secret.key").chmod(0o600)
    assert not [*setting_checks.check_settings(facts)]
