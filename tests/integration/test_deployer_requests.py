"""Requests of a deployer to its cluster, and its reaction to refusals."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest
from sqlalchemy import select
from sqlmodel import col

from models.deployment import (
    Deployment,
    DeploymentStatus,
    LifecycleDecision,
    ObservedState,
    is_ready,
    status_of,
)
from scheduler import lifecycle_policies
from tests.cluster.cluster_harness import DriverUnderTest, open_fake_cluster, turn_until
from tests.cluster.fake_api import FakeApiServer
from tests.cluster.fake_api.api_errors import KubernetesError, forbidden_error, too_many_requests_error
from tests.integration.deployers import (
    POD,
    forget_deployments,
    read_deployment,
    read_deployments,
    request_lifecycle,
    run_local_deployer,
    run_test_deployer,
    wait_for_deployment,
    wait_for_deployments,
)
from tests.integration.gateway_harness import GRAPH, GatewayHarness, OrganizationUsers, create_gateway
from tests.integration.test_deployer import is_running
from tests.services import PostgresServer
from workers.cluster import quota_watch, watch_cache
from workers.cluster.kubernetes_driver import KubernetesDriver
from workers.cluster.manifests import WORKFLOW_LABEL
from workers.deployer import deployment_rows, reconcile_queue, reconciler
from workers.deployer.reconcile_queue import RetryBackoff, ScheduledRetry

OFTEN = RetryBackoff(0.02, 0.02)
SWEEP_SECONDS = 0.05
DENIED = KubernetesError(
    400, "BadRequest", 'admission webhook "policy.example.com" denied the request: not here'
)
NO_RIGHT = forbidden_error("patch", "deployments")
MINUTE_SECONDS = 0.3
"""A minute of `shorten_minute`."""
REQUESTS_PER_MINUTE = 6
WAITING_PROGRAM = """
import pathlib, time
while not pathlib.Path({path!r}).exists():
    time.sleep(0.01)
"""
"""Beginning of a pod's program that becomes ready once a file exists."""
WATCH_REQUESTS = 4
"""Two lists and two watches, of Deployments and of pods, for any number of these. Those of quotas follow a
moment later.
"""


class CallCounter:
    """Calls of a function, counted."""

    def __init__(self) -> None:
        self.count = 0

    def counted(self, function: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
        def call(*values: Any, **named: Any) -> Awaitable[Any]:  # noqa: ANN401 - as they are
            self.count += 1
            return function(*values, **named)

        return call

    async def happen(self, count: int) -> None:
        """Wait for `count` more calls."""
        before = self.count
        async with asyncio.timeout(30):
            while self.count - before < count:  # noqa: ASYNC110 - of a function that sets no event
                await asyncio.sleep(0.01)


class RequestTimes:
    """When requests arrive that are refused or about one workflow."""

    def __init__(
        self, api: FakeApiServer, refusal: KubernetesError, is_refused: Callable[[str, str], bool]
    ) -> None:
        self._times: list[float] = []
        self._refusal = refusal
        self._is_refused = is_refused
        api.refuses = self._answer

    async def happen(self, count: int, meanwhile: Callable[[], None]) -> None:
        """Wait for `count` more requests, and call `meanwhile` repeatedly."""
        async with asyncio.timeout(30):
            while len(self._times) < count:
                meanwhile()
                await asyncio.sleep(0.01)

    def most_in_a_minute(self) -> int:
        """Return the most requests that arrived within a minute, however it is laid."""
        return max(sum(since <= at < since + MINUTE_SECONDS for at in self._times) for since in self._times)

    def _answer(self, method: str, path: str) -> KubernetesError | None:
        refusal = self._refusal if self._is_refused(method, path) else None
        is_of_one_workflow = method != "GET" or f"{WORKFLOW_LABEL}=" in unquote(path)
        if refusal is not None or is_of_one_workflow:
            self._times.append(asyncio.get_running_loop().time())
        return refusal


@pytest.fixture
def shorten_minute(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shorten the pauses after refusals, so that a minute of them takes a moment."""
    share = MINUTE_SECONDS / 60
    for module, name in (
        (reconcile_queue, "SECONDS_PER_REQUEST"),
        (watch_cache, "PROBE_SECONDS"),
        (quota_watch, "PAUSE_SECONDS"),
    ):
        monkeypatch.setattr(module, name, getattr(module, name) * share)
    pauses = reconciler.REFUSED_BACKOFF
    brief = RetryBackoff(pauses.first_seconds * share, pauses.longest_seconds * share)
    monkeypatch.setattr(reconciler, "REFUSED_BACKOFF", brief)


def is_write_of_deployment(method: str, path: str) -> bool:
    return method == "PATCH" and "/deployments/" in path


@pytest.fixture(scope="module")
async def harness(
    postgres: PostgresServer, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[GatewayHarness]:
    """Yield a gateway on one database, since cluster requests don't depend on the database."""
    async with create_gateway("sqlite", postgres, tmp_path_factory.mktemp("gateway")) as harness:
        yield harness


@pytest.fixture
async def fake_cluster(tmp_path: Path) -> AsyncIterator[tuple[DriverUnderTest, FakeApiServer]]:
    async with open_fake_cluster(tmp_path) as (cluster, api):
        api.node.runs_commands = False
        yield cluster, api


@pytest.fixture(autouse=True)
async def _nothing_is_left_deployed(harness: GatewayHarness) -> AsyncIterator[None]:
    yield
    await forget_deployments(harness)


@pytest.fixture
def sweeps(monkeypatch: pytest.MonkeyPatch) -> CallCounter:
    calls = CallCounter()
    monkeypatch.setattr(deployment_rows, "list_unsettled", calls.counted(deployment_rows.list_unsettled))
    return calls


@pytest.fixture
def looks(monkeypatch: pytest.MonkeyPatch) -> CallCounter:
    calls = CallCounter()
    monkeypatch.setattr(KubernetesDriver, "observe", calls.counted(KubernetesDriver.observe))
    return calls


async def deploy_many(people: OrganizationUsers, count: int = 1) -> list[str]:
    workflow_ids = [await people.owner.create(**GRAPH) for _ in range(count)]
    for workflow_id in workflow_ids:
        await request_lifecycle(people.owner, "deploy", workflow_id, 202)
    return workflow_ids


def is_stopped(deployment: Deployment) -> bool:
    return status_of(deployment) is DeploymentStatus.STOPPED


def is_unknown(deployment: Deployment) -> bool:
    return status_of(deployment) is DeploymentStatus.UNKNOWN


async def test_stops_and_starts_cost_a_request_each_and_rest_costs_none(
    harness: GatewayHarness,
    people: OrganizationUsers,
    fake_cluster: tuple[DriverUnderTest, FakeApiServer],
    sweeps: CallCounter,
) -> None:
    cluster, api = fake_cluster
    workflow_ids = await deploy_many(people, 3)
    async with run_test_deployer(
        harness, cluster.reopen, cluster="kubernetes", deployer_sweep_seconds=SWEEP_SECONDS
    ):
        for workflow_id in workflow_ids:
            await wait_for_deployment(harness, workflow_id, is_running)
        seen = len(api.requests)
        for _ in range(3):
            await request_lifecycle(people.owner, "stop", workflow_ids[0], 202)
            await wait_for_deployment(harness, workflow_ids[0], is_stopped)
            await request_lifecycle(people.owner, "start", workflow_ids[0], 202)
            await wait_for_deployment(harness, workflow_ids[0], is_running)
        assert [one.split(" ")[0] for one in api.requests[seen:]] == ["PATCH"] * 6
        seen = len(api.requests)
        await sweeps.happen(14)  # of which one at least looks at everything that there is
        assert api.requests[seen:] == []
        api.end_watches()

        def asked_anew() -> list[str]:
            return [one for one in api.requests[seen:] if "/resourcequotas" not in one]

        await turn_until(lambda: api.watches >= 2 and len(asked_anew()) >= WATCH_REQUESTS)
        assert len(asked_anew()) == WATCH_REQUESTS


async def test_a_workflow_that_waits_for_room_is_looked_at_for_nothing_and_starts_when_there_is_some(
    harness: GatewayHarness,
    people: OrganizationUsers,
    fake_cluster: tuple[DriverUnderTest, FakeApiServer],
    looks: CallCounter,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cluster, api = fake_cluster
    monkeypatch.setattr(reconciler, "CHANGING_BACKOFF", OFTEN)
    monkeypatch.setattr(reconciler, "RETRY_LATER", ScheduledRetry(OFTEN))
    await cluster.set_quota({"pods": "0"})
    (workflow_id,) = await deploy_many(people)
    async with run_test_deployer(
        harness, cluster.reopen, cluster="kubernetes", deployer_sweep_seconds=SWEEP_SECONDS
    ):
        await wait_for_deployment(harness, workflow_id, lambda one: "quota" in (one.observed_reason or ""))
        seen = len(api.requests)
        await looks.happen(20)
        assert api.requests[seen:] == []
        await cluster.set_quota(None)
        await wait_for_deployment(harness, workflow_id, is_running)


@pytest.mark.usefixtures("shorten_minute")
async def test_a_change_that_is_denied_is_unknown_with_the_reason_and_starts_after_the_cure(
    harness: GatewayHarness,
    people: OrganizationUsers,
    fake_cluster: tuple[DriverUnderTest, FakeApiServer],
    sweeps: CallCounter,
) -> None:
    cluster, api = fake_cluster
    api.refuses = lambda method, path: DENIED if is_write_of_deployment(method, path) else None
    (workflow_id,) = await deploy_many(people)
    async with run_test_deployer(
        harness, cluster.reopen, cluster="kubernetes", deployer_sweep_seconds=SWEEP_SECONDS
    ):
        denied = await wait_for_deployment(harness, workflow_id, is_unknown)
        assert "policy.example.com" in (denied.observed_reason or "")
        await sweeps.happen(8)
        await lifecycle_policies.keep_policies(harness.gateway.database, harness.gateway.broker)
        assert (await read_deployment(harness, workflow_id)).replicas == 1
        api.refuses = lambda *_: None
        await wait_for_deployment(harness, workflow_id, is_running)


@pytest.mark.usefixtures("shorten_minute")
@pytest.mark.parametrize(
    ("refusal", "is_refused"),
    [
        pytest.param(DENIED, is_write_of_deployment, id="webhook"),
        pytest.param(NO_RIGHT, is_write_of_deployment, id="no right to Deployments"),
        pytest.param(NO_RIGHT, lambda method, _: method == "PATCH", id="no right to write"),
        pytest.param(NO_RIGHT, lambda *_: True, id="no right at all"),
    ],
)
async def test_a_deploy_that_is_refused_costs_six_requests_a_minute_however_often_it_is_asked_for(
    harness: GatewayHarness,
    people: OrganizationUsers,
    fake_cluster: tuple[DriverUnderTest, FakeApiServer],
    refusal: KubernetesError,
    is_refused: Callable[[str, str], bool],
) -> None:
    cluster, api = fake_cluster
    times = RequestTimes(api, refusal, is_refused)
    (workflow_id,) = await deploy_many(people)
    async with run_test_deployer(
        harness, cluster.reopen, cluster="kubernetes", deployer_sweep_seconds=SWEEP_SECONDS
    ) as found:
        await times.happen(11, lambda: found.request_reconcile(workflow_id))
        assert times.most_in_a_minute() <= REQUESTS_PER_MINUTE
        assert str(refusal) in (
            (await wait_for_deployment(harness, workflow_id, is_unknown)).observed_reason or ""
        )
        api.refuses = lambda *_: None
        await wait_for_deployment(harness, workflow_id, is_running)


@pytest.mark.usefixtures("shorten_minute")
async def test_a_removal_that_is_refused_costs_six_requests_a_minute_too(
    harness: GatewayHarness, people: OrganizationUsers, fake_cluster: tuple[DriverUnderTest, FakeApiServer]
) -> None:
    cluster, api = fake_cluster
    (workflow_id,) = await deploy_many(people)
    async with run_test_deployer(
        harness, cluster.reopen, cluster="kubernetes", deployer_sweep_seconds=SWEEP_SECONDS
    ) as found:
        await wait_for_deployment(harness, workflow_id, is_running)
        await request_lifecycle(people.owner, "stop", workflow_id, 202)
        await wait_for_deployment(harness, workflow_id, is_stopped)
        times = RequestTimes(api, NO_RIGHT, lambda method, _: method == "DELETE")
        await request_lifecycle(people.owner, "undeploy", workflow_id, 202)
        await times.happen(11, lambda: found.request_reconcile(workflow_id))
        assert times.most_in_a_minute() <= REQUESTS_PER_MINUTE
        api.refuses = lambda *_: None
        await wait_for_deployment(harness, workflow_id, lambda one: one.observed == ObservedState.ABSENT)


@pytest.mark.usefixtures("shorten_minute")
@pytest.mark.parametrize("status", [401, 403])
async def test_a_deployer_without_permissions_stops_no_serving_pods(
    harness: GatewayHarness,
    people: OrganizationUsers,
    fake_cluster: tuple[DriverUnderTest, FakeApiServer],
    status: int,
) -> None:
    cluster, api = fake_cluster
    refusal = (
        forbidden_error("list", "pods")
        if status == 403
        else KubernetesError(401, "Unauthorized", "Unauthorized")
    )
    (workflow_id,) = await deploy_many(people)
    async with run_test_deployer(
        harness, cluster.reopen, cluster="kubernetes", deployer_sweep_seconds=SWEEP_SECONDS
    ):
        before = await wait_for_deployment(harness, workflow_id, is_running)
        seen = len(api.requests)
        api.refuses = lambda *_: refusal
        api.cut_watches()
        unknown = await wait_for_deployment(harness, workflow_id, is_unknown)
        assert str(refusal) in (unknown.observed_reason or "")
        assert (unknown.ready_addresses, is_ready(unknown)) == (before.ready_addresses, True)
        await lifecycle_policies.keep_policies(harness.gateway.database, harness.gateway.broker)
        kept = await read_deployment(harness, workflow_id)
        assert (kept.replicas, kept.generation) == (1, before.generation)
        api.refuses = lambda *_: None
        healed = await wait_for_deployment(harness, workflow_id, is_running)
        assert (healed.generation, healed.observed_reason) == (before.generation, None)
        assert all(request.startswith("GET ") for request in api.requests[seen:])


async def test_a_busy_api_server_makes_nothing_unknown(
    harness: GatewayHarness,
    people: OrganizationUsers,
    fake_cluster: tuple[DriverUnderTest, FakeApiServer],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cluster, api = fake_cluster
    monkeypatch.setattr("workers.cluster.kubernetes_api.BUSY_SECONDS", 0)
    monkeypatch.setattr(reconciler.CHANGING_BACKOFF.__class__, "delay", lambda *_: 0.05)
    (workflow_id,) = await deploy_many(people)
    seen: set[str] = set()
    async with run_test_deployer(
        harness, cluster.reopen, cluster="kubernetes", deployer_sweep_seconds=SWEEP_SECONDS
    ):
        await wait_for_deployment(harness, workflow_id, is_running)
        api.refuses = lambda method, _: too_many_requests_error(0) if method == "PATCH" else None
        await request_lifecycle(people.owner, "start", workflow_id, 202, replicas=2)
        requests = len(api.requests)
        async with asyncio.timeout(30):
            while len(api.requests) - requests < 5:
                seen.add((await read_deployment(harness, workflow_id)).observed)
                await asyncio.sleep(0.01)
        api.refuses = lambda *_: None
        await wait_for_deployment(
            harness, workflow_id, lambda one: is_running(one) and one.ready_replicas == 2
        )
    assert seen == {ObservedState.RUNNING}


async def test_mass_starts_are_limited_and_none_is_given_up(
    harness: GatewayHarness,
    people: OrganizationUsers,
    fake_cluster: tuple[DriverUnderTest, FakeApiServer],
    sweeps: CallCounter,
) -> None:
    cluster, api = fake_cluster
    api.node.starts_at_once = 0
    workflow_ids = await deploy_many(people, 12)
    async with run_test_deployer(
        harness, cluster.reopen, cluster="kubernetes", starts_at_once=3, deployer_sweep_seconds=SWEEP_SECONDS
    ):
        await turn_until(lambda: len(api.node.preparing) >= 3)
        await sweeps.happen(4)  # none starts more
        api.node.starts_at_once = 2
        await wait_for_deployments(harness, workflow_ids, lambda found: all(map(is_running, found)))
    assert api.node.most_preparing == 3
    async with harness.gateway.database.read() as connection:
        reasons = select(col(LifecycleDecision.reason)).where(
            col(LifecycleDecision.workflow_id).in_(workflow_ids)
        )
        assert set(await connection.scalars(reasons)) == {"deployed"}


async def test_mass_starts_of_local_pods_are_limited_too(
    harness: GatewayHarness, people: OrganizationUsers, tmp_path: Path, sweeps: CallCounter
) -> None:
    may_start = tmp_path / "may_start"
    command = (*POD[:-1], WAITING_PROGRAM.format(path=str(may_start)) + POD[-1])
    workflow_ids = await deploy_many(people, 6)
    most_starting = 0

    def all_run(found: list[Deployment]) -> bool:
        nonlocal most_starting
        most_starting = max(most_starting, sum(one.observed == ObservedState.STARTING for one in found))
        return all(map(is_running, found))

    async with run_local_deployer(
        harness, tmp_path / "pods", command=command, starts_at_once=2, deployer_sweep_seconds=SWEEP_SECONDS
    ):
        await wait_for_deployments(harness, workflow_ids, lambda found: all_run(found) or most_starting >= 2)
        await sweeps.happen(4)  # none starts more
        all_run(await read_deployments(harness, workflow_ids))
        may_start.touch()
        await wait_for_deployments(harness, workflow_ids, all_run)
    assert most_starting == 2
