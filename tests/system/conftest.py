"""Both ways to run Pilotflame, each started once and mended after every test; a client and a ledger for each test."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Generator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from tests import services
from tests.system import harness, workflow_shapes
from tests.system import ledger as ledgers
from tests.system.client import RetryingClient
from tests.system.harness import ManyProcesses, SystemUnderTest
from tests.system.ledger import EffectLedger

LIVELY_SECONDS = 60.0
"""Within this time a fresh run has ended, however bad the time before it was."""


@pytest.fixture(scope="session", params=["sqlite", "postgresql"])
def shared_deployment(request: pytest.FixtureRequest) -> SystemUnderTest:
    """Return the deployment of a kind that all tests share.

    It lives until the end of the session: pytest would end it at the first test of another kind, and start it again.
    """
    deployment: SystemUnderTest = request.getfixturevalue(_name_fixture(request.param))
    return deployment


def _share_deployment(kind: str) -> object:
    """Return a fixture of a deployment, which checks at the end that its runs took the expected path."""

    @pytest.fixture(scope="session", name=_name_fixture(kind))
    async def share(
        request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
    ) -> AsyncIterator[SystemUnderTest]:
        is_claiming = kind.endswith(harness.CLAIMING)
        folder = tmp_path_factory.mktemp(kind)
        async with _run_deployment(request, kind, folder, is_claiming=is_claiming) as deployment:
            yield deployment
            if kind not in {harness.WITHOUT_REDIS, harness.TWO_GATEWAYS}:
                await _require_run_path(deployment, is_claiming=is_claiming)

    return share


def _name_fixture(kind: str) -> str:
    return f"deployment {kind}"


_on_sqlite = _share_deployment("sqlite")
_on_postgresql = _share_deployment("postgresql")
_on_postgresql_claiming = _share_deployment(f"postgresql{harness.CLAIMING}")
_with_two_gateways = _share_deployment(harness.TWO_GATEWAYS)
_without_redis = _share_deployment(harness.WITHOUT_REDIS)


@asynccontextmanager
async def _run_deployment(
    request: pytest.FixtureRequest, kind: str, folder: Path, *, is_claiming: bool
) -> AsyncIterator[SystemUnderTest]:
    """Run a deployment of a kind."""
    settings = {"DIRECT_RUNS": "false"} if is_claiming else {}
    if kind.startswith("sqlite"):
        async with harness.run_one_process(folder, **settings) as deployment:
            yield deployment
        return
    postgres = request.getfixturevalue("postgres")
    if kind == harness.WITHOUT_REDIS:
        async with harness.run_on_postgresql(folder, postgres, None, gateways=1) as deployment:
            yield deployment
        return
    # Processes of several deployments live at a time, and would take each other's wakeups on a common Redis.
    with services.run_redis() as redis:
        if kind == harness.TWO_GATEWAYS:
            async with harness.run_on_postgresql(folder, postgres, redis, gateways=2) as deployment:
                yield deployment
            return
        async with harness.run_many_processes(folder, postgres, redis, **settings) as deployment:
            yield deployment


@pytest.fixture
async def ledger() -> AsyncIterator[EffectLedger]:
    """Yield an empty ledger for effects of runs."""
    async with ledgers.run_ledger() as ledger:
        yield ledger


@pytest.fixture
async def client(shared_deployment: SystemUnderTest) -> AsyncIterator[RetryingClient]:
    """Yield a client of the shared deployment."""
    client = RetryingClient(shared_deployment.url, other_urls=shared_deployment.other_urls)
    yield client
    await client.close()


@pytest.fixture
async def deployment(
    shared_deployment: SystemUnderTest, client: RetryingClient
) -> AsyncIterator[SystemUnderTest]:
    """Yield the shared deployment with all processes at work; afterwards mend it,
    and fail if it has errors or runs nothing.

    Until the next test that needs it, its processes are paused: idle, they poll their database, which would cost more
    than the tests.
    """
    await shared_deployment.revive()
    yield shared_deployment
    if isinstance(shared_deployment, ManyProcesses):
        shared_deployment.ways.mend()
    await shared_deployment.revive()
    complaints = [line for process in shared_deployment.processes for line in process.complaints()]
    execution_id = await client.execute(
        await client.create(workflow_shapes.chain_workflow(workflow_shapes.set_node("done")))
    )
    ended = await client.end(execution_id, within=LIVELY_SECONDS)
    assert ended.status == "completed"
    assert not complaints
    shared_deployment.pause()


async def _require_run_path(deployment: SystemUnderTest, *, is_claiming: bool) -> None:
    """Check that the runs of a deployment took its path: inserted as claimed by a worker, or claimed later."""
    count = "SELECT count(*) FROM execution WHERE started_at = created_at"
    if is_claiming:
        assert await deployment.records.fetch(count) == [(0,)]
        return
    if await deployment.records.fetch(count) != [(0,)]:
        return
    await deployment.revive()
    client = RetryingClient(deployment.url)
    workflow_id = await client.create(workflow_shapes.chain_workflow(workflow_shapes.set_node("done")))
    async with asyncio.timeout(LIVELY_SECONDS):
        while await deployment.records.fetch(count) == [(0,)]:
            await client.end(await client.execute(workflow_id), within=LIVELY_SECONDS)
    await client.close()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    deployment = getattr(item, "funcargs", {}).get("shared_deployment")
    if report.failed and isinstance(deployment, SystemUnderTest):
        report.sections += [(f"Log of {process.name}", process.log()) for process in deployment.processes]
    return report
