"""Walks through the code: the files that a reader opens to follow a request from the edge to its end.

`pytest -s` prints them.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

import pytest

from gateway.executions import long_poll
from messages.broker import ChangedExecutions, Notification
from models import ids, timestamps
from telemetry import instruments, loop_lag
from tests.cluster.cluster_harness import open_fake_cluster
from tests.file_walks import ignore_other_tasks, record_walk
from tests.integration.deployers import run_test_deployer
from tests.integration.gateway_harness import EDGE, STEP, TRIGGER, OrganizationUsers, create_gateway
from tests.integration.mail_harness import MailHarness, run_mail_harness
from tests.provider_requests import BY_NAME, CONFIG
from tests.services import PostgresServer
from workers.main import run_worker
from workers.settings import WorkerSettings

QUIET_SECONDS: Final = 3_600.0
"""Interval of periodic work, which belongs to no walk."""
LAST: Final = {"id": "last", "nodeId": "set", "label": "Last", "config": {"values": {"b": "{{ data.a }}"}}}
GRAPH: Final[dict[str, Any]] = {
    "nodes": [TRIGGER, STEP, LAST],
    "connections": [EDGE, {"sourceNodeId": "step", "targetNodeId": "last"}],
}
ATTEMPTS: Final = 8


@pytest.fixture
async def mails(postgres: PostgresServer, tmp_path: Path) -> AsyncIterator[MailHarness]:
    """Yield a gateway on SQLite that waits for deployments."""
    ignore_other_tasks()
    async with (
        create_gateway("sqlite", postgres, tmp_path, settle_seconds=60) as harness,
        run_mail_harness(harness) as mails,
    ):
        yield mails


@pytest.fixture(autouse=True)
def _without_work_of_each_second(monkeypatch: pytest.MonkeyPatch) -> None:
    """Put off the work that would fall into each walk on a machine that takes a second for one."""
    monkeypatch.setattr(loop_lag, "LAG_INTERVAL_SECONDS", QUIET_SECONDS)
    monkeypatch.setattr(long_poll, "LOOK_SECONDS", QUIET_SECONDS)


@pytest.fixture(autouse=True)
def _without_metrics(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Count no metrics, as processes by default: they have no port to serve them."""
    lookups = (instruments.counter, instruments.gauge, instruments.histogram)
    with monkeypatch.context() as patch:
        patch.setattr(instruments, "is_exposed", False)
        for lookup in lookups:
            lookup.cache_clear()
        yield
    for lookup in lookups:
        lookup.cache_clear()


@pytest.fixture
async def people(mails: MailHarness) -> OrganizationUsers:
    return await mails.harness.people()


@pytest.fixture
async def ended(mails: MailHarness) -> AsyncIterator[asyncio.Queue[str]]:
    """Run a worker in the process of the gateway; yield the ids of ended runs."""
    gateway, queue = mails.gateway, asyncio.Queue[str]()

    def add(notification: Notification) -> None:
        if isinstance(notification, ChangedExecutions):
            for execution_id in notification.execution_ids:
                queue.put_nowait(execution_id)

    shared = gateway.settings.model_dump(include={"data_dir", "database_url", "secret_key"})
    settings = WorkerSettings(**shared, sweep_seconds=QUIET_SECONDS, lease_seconds=QUIET_SECONDS)
    async with run_worker(settings, gateway.store, gateway.broker, gateway.database):
        await gateway.broker.listen(add)
        yield queue


async def assert_walks(attempt: Callable[[], Awaitable[None]], *, through: str, at_most: int) -> None:
    """Check that each of some alike walks passes a file, which shows that it is whole, and few files in all.

    Only files of every walk count: the first one fills caches, and on a busy machine each later one may find some that
    have expired, or periodic work between its steps.
    """
    files: dict[str, str] = {}
    for number in range(ATTEMPTS):
        with record_walk() as walk:
            await attempt()
        assert through in walk.files, walk
        files = {path: name for path, name in walk.files.items() if not number or path in files}
        if len(files) <= at_most:
            break
    walk.files = files
    print(walk)  # noqa: T201 - asked for with `pytest -s`
    assert len(files) <= at_most, walk


async def wait_for_end(ended: asyncio.Queue[str], execution_id: str) -> None:
    async with asyncio.timeout(60):
        while execution_id != await ended.get():
            pass


async def test_background_work_of_another_test_belongs_to_no_walk() -> None:
    may_go_on = asyncio.Event()

    async def watch() -> None:
        await may_go_on.wait()
        await asyncio.create_task(probe())

    async def probe() -> None:
        ids.new_id("probe")

    async def request() -> None:
        await may_go_on.wait()
        await asyncio.create_task(answer())

    async def answer() -> None:
        timestamps.to_microseconds(datetime.now(UTC))

    of_another_test = asyncio.create_task(watch())
    ignore_other_tasks()
    of_this_one = asyncio.create_task(request())
    with record_walk() as walk:
        may_go_on.set()
        await asyncio.gather(of_another_test, of_this_one)
    assert list(walk.files) == ["models/timestamps.py"]


async def test_an_execution_walks_through_few_files(
    people: OrganizationUsers, ended: asyncio.Queue[str]
) -> None:
    workflow_id = await people.owner.create(**GRAPH)

    async def execute() -> None:
        answer = await people.owner.api.post(f"/api/v1/workflows/{workflow_id}/execute", json={})
        await wait_for_end(ended, answer.json()["executionId"])

    await assert_walks(execute, through="nodes/library/set.py", at_most=50)


async def test_a_mail_of_sendgrid_walks_through_few_files(
    mails: MailHarness, people: OrganizationUsers, ended: asyncio.Queue[str]
) -> None:
    config = {"sendgrid": {"publicKey": CONFIG["sendgrid"]["public_key"]}}
    workflow_ids = [await mails.workflow(people.owner, **config) for _ in range(ATTEMPTS)]

    async def send(workflow_id: str, mail: str) -> None:
        answer = await mails.post(workflow_id, BY_NAME[mail].steps[0])
        assert answer.status_code == 201, answer.text
        await wait_for_end(ended, answer.json()["executionId"])

    for workflow_id in workflow_ids:
        await send(workflow_id, "sg_parsed_basic")
    left = iter(workflow_ids)
    await assert_walks(
        lambda: send(next(left), "sg_parsed_latin1"), through="nodes/library/email_trigger.py", at_most=65
    )


async def test_a_deploy_walks_through_few_files(
    mails: MailHarness, people: OrganizationUsers, tmp_path: Path
) -> None:
    async with (
        open_fake_cluster(tmp_path) as (cluster, _),
        run_test_deployer(
            mails.harness, cluster.reopen, cluster="kubernetes", deployer_sweep_seconds=QUIET_SECONDS
        ),
    ):
        workflow_ids = iter([await people.owner.create(**GRAPH) for _ in range(ATTEMPTS)])

        async def deploy() -> None:
            path = f"/api/v1/workflows/{next(workflow_ids)}/deploy"
            answer = await people.owner.api.post(path, json={})
            assert answer.json()["deploymentStatus"] == "running", answer.text

        await assert_walks(deploy, through="workers/cluster/manifests.py", at_most=60)
