"""Every class of the doctor, made by hand: found, named with a remedy or a fix, and mended by its fix."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from copy import copy
from datetime import UTC, datetime, timedelta
from hashlib import sha256
from pathlib import Path
from typing import Any, TypeAlias

import pytest
from sqlalchemy import text

from doctor import alert_states
from doctor.findings import FIXES, DriftClass
from journal.blobs.blob_reference import BlobReference
from messages import wakeups
from messages.broker_connection import connect_broker
from models.database import is_sqlite
from models.deployment import ObservedState
from models.settings import ServerSettings
from pilotflame import doctor_command
from pilotflame.doctor_command import DoctorExit, DoctorRequest, DoctorResult
from scheduler.row_metrics import RowMetrics
from telemetry import instruments
from tests.integration.run_database import MigratedDatabase, RunDatabase, open_run_database
from tests.integration.test_doctor import add_deployment, add_worker, classes, make_overdue_schedule
from workers.cluster.driver import ObservedDeployment

Examine: TypeAlias = Callable[..., Awaitable[DoctorResult]]
PATIENCE_SECONDS = 60.0
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
        await database.query(
            "INSERT INTO leadership (name, owner, epoch, lease_until) VALUES ('scheduler', 'a', 1, :until)",
            until=4_000_000_000_000_000,
        )
        await add_worker(database)
        yield database
        await database.query("DELETE FROM leadership")


@pytest.fixture
def examine(runs: RunDatabase, tmp_path: Path) -> Examine:
    settings = ServerSettings(
        database_url=runs.url.render_as_string(hide_password=False), data_dir=tmp_path, secret_key=None
    )

    async def run(*fixes: DriftClass, **changes: Any) -> DoctorResult:  # noqa: ANN401 - any field of a request
        return await doctor_command.examine_installation(
            settings, DoctorRequest(fixes, grace_seconds=0, **changes)
        )

    return run


class SimulatedDriver:
    """Cluster with deployments that somebody else has made, and with `leftovers` of other workflows."""

    def __init__(self, *deployments: ObservedDeployment, leftovers: tuple[str, ...] = ()) -> None:
        self.deployments = list(deployments)
        self.leftovers = leftovers

    async def list(self) -> list[ObservedDeployment]:
        return self.deployments

    async def list_leftovers(self) -> tuple[str, ...]:
        return self.leftovers

    async def delete(self, workflow_id: str) -> bool:
        self.deployments = [one for one in self.deployments if one.workflow_id != workflow_id]
        self.leftovers = tuple(one for one in self.leftovers if one != workflow_id)
        return True

    async def close(self) -> None:
        pass


async def test_workers_are_woken_for_a_run_that_none_has_claimed(examine: Examine, runs: RunDatabase) -> None:
    if is_sqlite(runs.url):
        pytest.skip("the only worker of SQLite is in the process of the gateway, and looks by itself")
    key = await runs.accept(await runs.workflow())
    await runs.query("UPDATE execution SET updated_at = :at, rank = :at", at=LONG_AGO)
    woken = asyncio.Event()
    worker = await connect_broker(runs.url.render_as_string(hide_password=False))
    worker.start_worker(lambda _shard: woken.set())
    try:
        (finding,) = (await examine()).report.findings
        assert (finding.drift_class, finding.subject.id) == (
            DriftClass.PENDING_UNCLAIMED,
            key.execution_id,
        )
        woken.clear()
        assert (await examine(DriftClass.PENDING_UNCLAIMED)).fixed == {DriftClass.PENDING_UNCLAIMED: 1}
        async with asyncio.timeout(PATIENCE_SECONDS):
            await woken.wait()
        assert [run.execution_id for run in await runs.claim()] == [key.execution_id]
        assert (await examine()).exit_code is DoctorExit.CLEAN
    finally:
        await worker.stop_worker()
        await worker.close()


async def test_a_change_that_was_not_applied_is_given_to_the_deployer(
    examine: Examine, runs: RunDatabase, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = await runs.workflow()
    await add_deployment(runs, place, replicas=1, observed_generation=0, started_by_hand_at=datetime.now(UTC))
    asked = _simulate_cluster(monkeypatch, None)
    assert classes((await examine()).report) == {DriftClass.CHANGE_NOT_APPLIED}
    assert (await examine(DriftClass.CHANGE_NOT_APPLIED)).fixed == {DriftClass.CHANGE_NOT_APPLIED: 1}
    assert asked == [place.workflow_id]


async def test_a_due_schedule_is_decided(examine: Examine, runs: RunDatabase) -> None:
    place = await runs.workflow()
    config = '{"intervalSeconds":3600}'
    trigger = f'[{{"id":"start","type":"schedule-trigger","label":"Start","config":{config}}}]'
    await runs.query("UPDATE workflow SET status = 'active'")
    await runs.query(
        "INSERT INTO workflow_graph (workflow_id, shard, nodes, connections) VALUES (:id, 0, :nodes, '[]')",
        id=place.workflow_id,
        nodes=trigger,
    )
    await make_overdue_schedule(runs, place)
    assert classes((await examine()).report) == {DriftClass.SCHEDULE_OVERDUE}
    after = await examine(DriftClass.SCHEDULE_OVERDUE)
    assert after.fixed == {DriftClass.SCHEDULE_OVERDUE: 1}
    assert after.exit_code is DoctorExit.CLEAN
    (schedule,) = await runs.query("SELECT due_at FROM schedule")
    assert schedule["due_at"] is None or schedule["due_at"] > time.time() * 1_000_000


async def test_a_deferred_run_wakes_its_deployment(examine: Examine, runs: RunDatabase) -> None:
    place = await runs.workflow()
    long_ago = datetime.now(UTC) - timedelta(hours=1)
    await add_deployment(
        runs, place, replicas=0, observed="stopped", stopped_reason="schedule", stopped_at=long_ago
    )
    await runs.query("UPDATE workflow SET lifecycle = :policy", policy='{"type":"always-on"}')
    key = await runs.accept(place)
    await runs.query(
        "UPDATE execution SET status = 'waiting', target = :target, due_at = :due WHERE id = :id",
        target=place.workflow_id,
        due=LONG_AGO,
        id=key.execution_id,
    )
    found = classes((await examine()).report)
    assert DriftClass.DEFERRED_OVERDUE in found
    after = await examine(DriftClass.DEFERRED_OVERDUE)
    assert DriftClass.DEFERRED_OVERDUE not in classes(after.report)


async def test_a_deployment_that_sleeps_in_its_window_is_started(examine: Examine, runs: RunDatabase) -> None:
    place = await runs.workflow()
    await add_deployment(runs, place, replicas=0, observed="stopped", stopped_reason="idle")
    await runs.query("UPDATE workflow SET lifecycle = :policy", policy='{"type":"always-on"}')
    assert classes((await examine()).report) == {DriftClass.ASLEEP_AGAINST_WINDOW}
    async with runs.database.read() as connection:
        assert (await alert_states.read_queue_facts(connection)).drift == {DriftClass.ASLEEP_AGAINST_WINDOW}
    await RowMetrics(runs.database).count_rows()
    shown = instruments.gauge("drift", DriftClass.ASLEEP_AGAINST_WINDOW.value)
    assert isinstance(shown, instruments.Gauge)
    assert shown.value == 1
    after = await examine(DriftClass.ASLEEP_AGAINST_WINDOW)
    assert DriftClass.ASLEEP_AGAINST_WINDOW not in classes(after.report)


async def test_a_lost_blob_is_named_and_only_a_person_can_restore_it(
    examine: Examine, runs: RunDatabase
) -> None:
    await runs.begun()
    reference = BlobReference(sha256(b"lost").hexdigest(), 4)
    await runs.query("UPDATE span SET output_blob = :blob", blob=reference.as_text().decode())
    (finding,) = (await examine()).report.findings
    assert finding.drift_class is DriftClass.ROW_WITHOUT_BLOB
    assert finding.remedy


async def test_older_and_newer_tables_are_named(examine: Examine, runs: RunDatabase) -> None:
    (row,) = await runs.query("SELECT version_num FROM alembic_version")
    await runs.query("UPDATE alembic_version SET version_num = '0001'")
    try:
        report = (await examine()).report
    finally:
        await runs.query("UPDATE alembic_version SET version_num = :version", version=row["version_num"])
    assert classes(report) == {DriftClass.MIGRATION_BEHIND}
    assert "pilotflame migrate" in (report.findings[0].remedy or "")


async def test_an_invalid_index_is_named_with_its_statement(examine: Examine, runs: RunDatabase) -> None:
    if is_sqlite(runs.url):
        pytest.skip("SQLite has no invalid indexes")
    mark = "UPDATE pg_index SET indisvalid = {} WHERE indexrelid = 'ix_schedule_due'::regclass"
    await _run_alone(runs, mark.format("false"))
    try:
        (finding,) = (await examine()).report.findings
    finally:
        await _run_alone(runs, mark.format("true"))
    assert (finding.drift_class, finding.subject.id) == (DriftClass.INVALID_INDEX, "ix_schedule_due")
    assert finding.remedy == "Run REINDEX INDEX CONCURRENTLY ix_schedule_due"


async def _run_alone(runs: RunDatabase, statement: str) -> None:
    async with runs.database.engine.begin() as connection:
        await connection.execute(text(statement))


async def test_a_wrong_clock_of_this_host_is_named(
    examine: Examine, runs: RunDatabase, monkeypatch: pytest.MonkeyPatch
) -> None:
    if is_sqlite(runs.url):
        pytest.skip("SQLite has the clock of the host")
    true_time = time.time
    monkeypatch.setattr("doctor.store_checks.time.time", lambda: true_time() + 90)
    (finding,) = (await examine()).report.findings
    assert finding.drift_class is DriftClass.CLOCK_SKEW
    assert finding.evidence["seconds"] == pytest.approx(90, abs=30)


@pytest.mark.parametrize(
    ("drift_class", "observed"),
    [
        (DriftClass.WORKFLOW_WITHOUT_DEPLOYMENT, None),
        (DriftClass.MANIFEST_DIFFERS, {"generation": 7}),
        (DriftClass.REPLICAS_DIFFER, {"replicas": 3}),
        (DriftClass.STATUS_DIFFERS, {}),
    ],
)
async def test_a_deployment_that_the_cluster_has_otherwise_is_given_to_the_deployer(
    examine: Examine,
    runs: RunDatabase,
    monkeypatch: pytest.MonkeyPatch,
    drift_class: DriftClass,
    observed: dict[str, Any] | None,
) -> None:
    place = await runs.workflow()
    await add_deployment(runs, place, replicas=1, started_by_hand_at=datetime.now(UTC))
    await runs.query("UPDATE workflow SET lifecycle = :policy", policy='{"type":"always-on"}')
    same: dict[str, Any] = {"exists": True, "replicas": 1, "generation": 1, "definition_hash": "0" * 64}
    given = [] if observed is None else [ObservedDeployment(place.workflow_id, **same | observed)]
    asked = _simulate_cluster(monkeypatch, SimulatedDriver(*given))
    (finding,) = (await examine(looks_into_cluster=True)).report.findings
    assert (finding.drift_class, finding.subject.id) == (drift_class, place.workflow_id)
    after = await examine(drift_class, looks_into_cluster=True)
    assert after.fixed == {drift_class: 1}
    assert asked == [place.workflow_id]
    assert FIXES[drift_class].id == "reconcile"


@pytest.mark.parametrize(
    "driver",
    [
        SimulatedDriver(ObservedDeployment("wf_gone", exists=True, replicas=1)),
        SimulatedDriver(leftovers=("wf_gone",)),
    ],
    ids=["deployment", "service or secret"],
)
async def test_objects_without_a_workflow_are_deleted_on_request(
    examine: Examine, runs: RunDatabase, monkeypatch: pytest.MonkeyPatch, driver: SimulatedDriver
) -> None:
    assert runs.url
    _simulate_cluster(monkeypatch, copy(driver))
    assert classes((await examine(looks_into_cluster=True)).report) == {
        DriftClass.DEPLOYMENT_WITHOUT_WORKFLOW
    }
    after = await examine(DriftClass.DEPLOYMENT_WITHOUT_WORKFLOW, looks_into_cluster=True)
    assert (after.fixed, after.exit_code) == (
        {DriftClass.DEPLOYMENT_WITHOUT_WORKFLOW: 1},
        DoctorExit.CLEAN,
    )


async def test_a_workflow_that_is_deployed_before_the_fix_keeps_its_objects(
    examine: Examine, runs: RunDatabase, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = await runs.workflow()
    await add_deployment(runs, place, replicas=1, is_deployed=False)
    driver = SimulatedDriver(
        ObservedDeployment("wf_0", exists=True, replicas=1),
        ObservedDeployment(place.workflow_id, exists=True, replicas=1),
    )
    _simulate_cluster(monkeypatch, driver)
    delete = driver.delete

    async def deploy_meanwhile(workflow_id: str) -> bool:
        """Delete the objects of `wf_0`, which are found first, while somebody deploys the other workflow."""
        await runs.query("UPDATE deployment SET is_deployed = true")
        return await delete(workflow_id)

    monkeypatch.setattr(driver, "delete", deploy_meanwhile)
    await examine(DriftClass.DEPLOYMENT_WITHOUT_WORKFLOW, looks_into_cluster=True)
    assert [one.workflow_id for one in driver.deployments] == [place.workflow_id]


async def test_pods_that_end_after_an_undeploy_are_no_finding_for_ten_minutes(
    examine: Examine, runs: RunDatabase, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = await runs.workflow()
    await add_deployment(runs, place, replicas=0, is_deployed=False, observed=ObservedState.STOPPING)
    ending = ObservedDeployment(place.workflow_id, exists=True, replicas=0)
    _simulate_cluster(monkeypatch, SimulatedDriver(ending))
    assert classes((await examine(looks_into_cluster=True)).report) == {
        DriftClass.DEPLOYMENT_WITHOUT_WORKFLOW
    }
    now = round(time.time() * 1_000_000)
    await runs.query("UPDATE deployment SET updated_at = :now", now=now)
    assert (await examine(looks_into_cluster=True)).exit_code is DoctorExit.CLEAN


async def test_a_cluster_that_does_not_answer_is_never_clean(
    examine: Examine, monkeypatch: pytest.MonkeyPatch
) -> None:
    _simulate_cluster(monkeypatch, None)
    assert (await examine(looks_into_cluster=True)).exit_code is DoctorExit.COULD_NOT_LOOK


def _simulate_cluster(monkeypatch: pytest.MonkeyPatch, driver: SimulatedDriver | None) -> list[str]:
    """Let the doctor meet a simulated cluster; return the list of workflows that the deployer is woken for."""
    asked: list[str] = []

    async def open_driver() -> SimulatedDriver | None:
        return driver

    async def wake_deployer(_broker: object, workflow_id: str) -> None:
        asked.append(workflow_id)

    monkeypatch.setattr(doctor_command, "_open_driver", open_driver)
    monkeypatch.setattr(wakeups, "wake_deployer", wake_deployer)
    return asked
