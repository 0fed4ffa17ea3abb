"""Behavior that only a Kubernetes API server shows its clients."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import pytest

from models import pod_identity as names
from telemetry.process_activity import ACTIVITY, KUBERNETES
from tests.cluster.cluster_harness import NAMESPACE, DriverUnderTest, cluster_layout, turn_until
from tests.cluster.fake_api import FakeApiServer
from tests.cluster.fake_api.api_errors import KubernetesError, forbidden_error, too_many_requests_error
from tests.cluster.fake_api.ownership import FieldManager
from tests.cluster.fake_api.schema import KINDS
from workers.cluster import kubernetes_api, kubernetes_driver, pod_status
from workers.cluster.driver import (
    ClusterBusy,
    ClusterForbidden,
    ClusterRefused,
    ClusterUnavailable,
    DesiredDeployment,
    ObservedDeployment,
    PodFailure,
    PodFailureReason,
    PodResourceLimits,
)
from workers.cluster.kubernetes_api import RequestBudget
from workers.cluster.kubernetes_driver import DEPLOYER, SCALER, KubernetesDriver

Fake = tuple[DriverUnderTest, FakeApiServer]
CONFLICT = KubernetesError(409, "Conflict", "the object has been modified")
EXPIRED = KubernetesError(410, "Expired", "too old")


def read_deployment(api: FakeApiServer, workflow_id: str) -> dict[str, Any]:
    return api.store.get(KINDS["deployments"], NAMESPACE, names.workflow_name(workflow_id))


def list_objects(api: FakeApiServer) -> list[tuple[str, str]]:
    return [
        (kind.name, found["metadata"]["name"])
        for kind in KINDS.values()
        if kind.is_namespaced
        for found in api.store.every(kind.plural, NAMESPACE)
    ]


def managed_fields_of(found: dict[str, Any], manager: str) -> list[dict[str, Any]]:
    return [entry["fieldsV1"] for entry in found["metadata"]["managedFields"] if entry["manager"] == manager]


# ── ownership of the number of pods ─────────────────────────────────────────────────────────────────────────


async def test_the_scaler_owns_the_replicas_and_the_deployer_never_does(fake_cluster: Fake) -> None:
    cluster, api = fake_cluster
    desired = await cluster.start()
    for replicas in (0, 1, 0, 3):
        await cluster.driver.scale(desired.workflow_id, replicas)
        await cluster.driver.apply(replace(desired, definition_hash=f"after {replicas}", replicas=replicas))
        found = read_deployment(api, desired.workflow_id)
        assert found["spec"]["replicas"] == replicas
        assert [fields["f:spec"] for fields in managed_fields_of(found, SCALER)] == [{"f:replicas": {}}]
        assert all("f:replicas" not in fields["f:spec"] for fields in managed_fields_of(found, DEPLOYER))


async def test_nothing_is_written_when_nothing_has_changed(fake_cluster: Fake) -> None:
    cluster, api = fake_cluster
    desired = await cluster.start()
    before = api.store.version
    await cluster.driver.apply(desired)
    assert api.store.version == before


async def test_a_status_of_before_the_last_change_makes_nothing_ready(fake_cluster: Fake) -> None:
    cluster, api = fake_cluster
    api.node.delay_seconds = 0.3
    desired = await cluster.start()
    await cluster.driver.scale(desired.workflow_id, 0)
    stale = await cluster.driver.observe(desired.workflow_id)
    assert (stale.available, stale.is_current, stale.is_ready) == (1, False, False)


# ── reasons of pods that don't start ────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("changes", "reason", "words"),
    [
        ({"image": "registry.invalid/runner:1"}, PodFailureReason.IMAGE_PULL, "registry.invalid/runner:1"),
        (
            {"resources": PodResourceLimits(cpu_millicores=64_000)},
            PodFailureReason.UNSCHEDULABLE,
            "Insufficient cpu",
        ),
        ({"environment": {"POD_EXIT_CODE": "137"}}, PodFailureReason.OUT_OF_MEMORY, "memory"),
    ],
)
async def test_a_pod_that_does_not_come_up_says_why(
    fake_cluster: Fake, changes: dict[str, Any], reason: PodFailureReason, words: str
) -> None:
    cluster, _ = fake_cluster
    desired = cluster.desired(**changes)
    await cluster.driver.apply(desired)
    observed = await cluster.until(desired.workflow_id, lambda observed: observed.failure is not None)
    assert observed.failure is not None
    assert observed.failure.reason is reason
    assert words in observed.failure.message
    assert not observed.is_ready


@pytest.mark.parametrize(
    ("waiting", "words", "is_final"),
    [
        ("ErrImagePull", 'rpc error: code = NotFound: "runner:9": not found', True),
        ("ErrImagePull", "failed to pull image: unexpected status code 429 Too Many Requests", False),
        ("ErrImagePull", "failed to do request: dial tcp: i/o timeout", False),
        ("ImagePullBackOff", 'Back-off pulling image "runner:9"', True),
        ("ImagePullBackOff", 'Back-off pulling image "runner:9": ErrImagePull: connection refused', False),
        ("InvalidImageName", "couldn't parse image name", True),
        ("CreateContainerConfigError", 'secret "wf-1" not found', True),
        ("CreateContainerConfigError", "failed to sync secret cache: timed out waiting", False),
        ("CreateContainerError", "context deadline exceeded", False),
    ],
)
def test_waiting_reasons_that_need_a_person_are_final(
    waiting: str,
    words: str,
    is_final: bool,  # noqa: FBT001 - a column of the table
) -> None:
    container = {"state": {"waiting": {"reason": waiting, "message": words}}}
    pod = {"metadata": {"name": "pod"}, "spec": {}, "status": {"containerStatuses": [container]}}
    (found,) = pod_status.summarize_deployment("wf_1", None, [pod], port=1).pods
    assert found.failure is not None
    assert found.failure.is_final is is_final
    assert words in found.failure.message


async def test_a_full_quota_is_told_by_a_wake(fake_cluster: Fake) -> None:
    cluster, _ = fake_cluster
    desired = await cluster.start()
    await cluster.set_quota({"pods": "1"})
    await cluster.driver.scale(desired.workflow_id, 2)
    observed = await cluster.until(desired.workflow_id, lambda observed: observed.failure is not None)
    assert observed.failure is not None
    assert observed.failure.reason is PodFailureReason.QUOTA


async def test_a_pod_without_its_secret_says_so(fake_cluster: Fake) -> None:
    cluster, api = fake_cluster
    desired = await cluster.start(replicas=1)
    api.store.delete(KINDS["secrets"], NAMESPACE, names.workflow_name(desired.workflow_id), {})
    await cluster.driver.scale(desired.workflow_id, 2)
    observed = await cluster.until(desired.workflow_id, lambda observed: observed.failure is not None)
    assert observed.failure is not None
    assert observed.failure.reason is PodFailureReason.INVALID_CONFIG


async def test_a_pod_that_was_evicted_says_why_until_another_is_there(fake_cluster: Fake) -> None:
    cluster, api = fake_cluster
    desired = await cluster.start()
    (deployment,) = api.store.every("deployments", NAMESPACE)
    (pod,) = api.store.every("pods", NAMESPACE)
    message = "The node was low on resource: memory."
    evicted = {
        **pod,
        "metadata": {**pod["metadata"], "name": "evicted"},
        "status": {"phase": "Failed", "reason": "Evicted", "message": message},
    }
    alone = pod_status.summarize_deployment(desired.workflow_id, deployment, [evicted], port=1)
    beside = pod_status.summarize_deployment(desired.workflow_id, deployment, [evicted, pod], port=1)
    assert (alone.failure, alone.pods) == (PodFailure(PodFailureReason.EVICTED, message), ())
    assert (beside.failure, beside.is_rolled_out) == (None, True)


# ── half-done work, and foreign objects ─────────────────────────────────────────────────────────────────────


async def test_a_deployment_that_was_begun_and_left_is_finished_or_removed_without_a_trace(
    fake_cluster: Fake,
) -> None:
    cluster, api = fake_cluster
    desired = cluster.desired()
    for done in range(7):
        await _cut_off(api, done, cluster.driver.apply(desired))
    await cluster.until_true(lambda: cluster.driver.delete(desired.workflow_id))
    assert list_objects(api) == []
    await cluster.driver.apply(desired)
    await cluster.ready(desired.workflow_id)
    for done in range(8, 14):  # it lists by label before it deletes
        await _cut_off(api, done, cluster.driver.delete(desired.workflow_id))
    await cluster.until_true(lambda: cluster.driver.delete(desired.workflow_id))
    assert list_objects(api) == []


async def _cut_off(api: FakeApiServer, requests: int, work: Any) -> None:  # noqa: ANN401 - a coroutine
    """Interrupt a deployer after a number of requests, as a kill does."""
    seen = len(api.requests)
    task = asyncio.ensure_future(work)
    await turn_until(lambda: len(api.requests) >= seen + requests or task.done())
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def test_foreign_objects_in_the_namespace_are_left_alone(fake_cluster: Fake) -> None:
    cluster, api = fake_cluster
    desired = await cluster.start()
    service = {"metadata": {"name": "theirs"}, "spec": {"ports": [{"port": 80}]}}
    api.store.create(KINDS["services"], NAMESPACE, service, FieldManager("kubectl", "Update"))
    await cluster.until_true(lambda: cluster.driver.delete(desired.workflow_id))
    assert list_objects(api) == [("Service", "theirs")]


async def test_objects_left_after_a_deployment_was_deleted_by_hand_are_listed_and_deleted(
    fake_cluster: Fake,
) -> None:
    cluster, api = fake_cluster
    desired = await cluster.start()
    assert await cluster.driver.list_leftovers() == ()
    name = names.workflow_name(desired.workflow_id)
    api.store.delete(KINDS["deployments"], NAMESPACE, name, {"propagationPolicy": "Background"})
    await cluster.until(desired.workflow_id, lambda observed: not observed.exists and not observed.pods)
    assert await cluster.driver.list_leftovers() == (desired.workflow_id,)
    await cluster.until_true(lambda: cluster.driver.delete(desired.workflow_id))
    assert await cluster.driver.list_leftovers() == ()
    assert list_objects(api) == []


# ── an API server that is slow, busy, or away ─────────────────────────────────────────────────────────────────


async def test_an_api_server_that_is_away_is_unavailable_and_its_pods_go_on(fake_cluster: Fake) -> None:
    cluster, api = fake_cluster
    desired = await cluster.start()
    (url,) = await cluster.driver.list_endpoints(desired.workflow_id)
    await api.go_down()
    for work in (
        cluster.driver.apply(desired),
        cluster.driver.scale(desired.workflow_id, 0),
        cluster.driver.observe(desired.workflow_id),
        cluster.driver.list(),
        cluster.driver.delete(desired.workflow_id),
        cluster.driver.logs(desired.workflow_id, limit=1),
    ):
        with pytest.raises(ClusterUnavailable):
            await work
    assert await cluster.get(f"{url}/readyz") == {}
    await api.listen()
    assert (await cluster.driver.observe(desired.workflow_id)).is_ready


async def test_an_api_server_that_says_nothing_is_given_up(fake_cluster: Fake) -> None:
    cluster, api = fake_cluster
    assert isinstance(cluster.driver, KubernetesDriver)
    cluster.driver._api.request_seconds = 0.2  # noqa: SLF001 - ten seconds are too long for a test
    ACTIVITY.connections.pop(KUBERNETES, None)
    assert not (await cluster.driver.observe_uncached("wf_1")).exists
    noted = ACTIVITY.connections[KUBERNETES]
    assert (noted.answer is not None, noted.failed_at) == (True, None)
    api.is_silent = True
    with pytest.raises(ClusterUnavailable):
        await cluster.driver.observe("wf_1")
    assert noted.failure == "TimeoutError"


async def test_busy_and_failing_answers_may_be_asked_again_and_refusals_may_not(fake_cluster: Fake) -> None:
    cluster, api = fake_cluster
    webhook = 'admission webhook "policy.example.com" denied the request: no'
    for status, words, error in (
        (500, "not now", ClusterUnavailable),
        (503, "not now", ClusterUnavailable),
        (401, "Unauthorized", ClusterForbidden),
        (403, "pods is forbidden", ClusterForbidden),
        (400, webhook, ClusterForbidden),
        (500, 'Internal error occurred: failed calling webhook "policy.example.com": EOF', ClusterForbidden),
        (403, "exceeded quota: services", ClusterRefused),
        (422, "never", ClusterRefused),
    ):
        api.failures.append(KubernetesError(status, "", words))
        with pytest.raises(error, match=words):
            await cluster.driver.list()


async def test_an_api_server_that_is_busy_is_left_alone_as_long_as_it_asks_and_then_asked_again(
    fake_cluster: Fake, monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster, api = fake_cluster
    desired = await cluster.start()
    seen = len(api.requests)
    api.failures += [too_many_requests_error(1)]
    began_at = asyncio.get_running_loop().time()
    assert (await cluster.driver.observe(desired.workflow_id)).is_ready
    await cluster.driver.scale(desired.workflow_id, 1)
    assert asyncio.get_running_loop().time() - began_at >= 1
    assert len(api.requests) - seen == 4
    monkeypatch.setattr(kubernetes_api, "BUSY_SECONDS", 0)
    api.failures += [too_many_requests_error(1)]
    with pytest.raises(ClusterBusy) as busy:
        await cluster.driver.scale(desired.workflow_id, 2)
    assert busy.value.retry_seconds == 1


async def test_requests_beyond_the_budget_wait_their_turn() -> None:
    budget = RequestBudget(per_second=100, burst_seconds=0.05)
    loop = asyncio.get_running_loop()
    began_at = loop.time()
    await asyncio.gather(*(budget.acquire() for _ in range(5)))
    burst_seconds = loop.time() - began_at
    await asyncio.gather(*(budget.acquire() for _ in range(20)))
    assert burst_seconds < 0.19 <= loop.time() - began_at


async def test_a_watched_cluster_is_observed_for_nothing_and_scaled_by_one_request(
    fake_cluster: Fake,
) -> None:
    cluster, api = fake_cluster
    api.node.runs_commands = False
    desired = await cluster.start()
    async with open_watch(cluster, api) as changes:
        seen = len(api.requests)
        for replicas in (0, 1):
            await cluster.driver.scale(desired.workflow_id, replicas)
            written = await cluster.driver.observe(desired.workflow_id)
            assert written.replicas == replicas
            while not _is_done(await cluster.driver.observe(desired.workflow_id), replicas):
                await anext(changes)
            assert [one.replicas for one in await cluster.driver.list()] == [replicas]
        assert len(api.requests) - seen == 2


def _is_done(observed: ObservedDeployment, replicas: int) -> bool:
    return observed.is_current and len(observed.pods) == len(observed.ready_pods) == replicas


async def test_a_watched_cluster_that_is_out_of_reach_says_so_until_it_is_back(fake_cluster: Fake) -> None:
    cluster, api = fake_cluster
    api.node.runs_commands = False
    desired = await cluster.start()

    async def is_refused() -> bool:
        try:
            await cluster.driver.observe(desired.workflow_id)
        except ClusterForbidden as error:
            return "cannot list" in str(error)
        return False

    async def is_back() -> bool:
        return not await is_refused() and (await cluster.driver.observe(desired.workflow_id)).is_ready

    async with open_watch(cluster, api):
        api.refuses = lambda _, path: forbidden_error("list", "pods") if "/pods" in path else None
        api.cut_watches()
        await cluster.until_true(is_refused)
        api.refuses = lambda *_: None
        await cluster.until_true(is_back)


async def test_a_list_that_is_forbidden_after_a_stream_has_ended_is_told_at_once(fake_cluster: Fake) -> None:
    cluster, api = fake_cluster
    assert isinstance(cluster.driver, KubernetesDriver)
    api.node.runs_commands = False
    desired = await cluster.start()
    async with open_watch(cluster, api):
        cluster.driver.cache.probe_seconds = 600
        api.refuses = lambda *_: forbidden_error("list", "pods")
        api.end_watches()
        cache = cluster.driver.cache
        await turn_until(lambda: not (cache.pods.is_synced or cache.deployments.is_synced))
        with pytest.raises(ClusterForbidden):
            await cluster.driver.observe(desired.workflow_id)


async def test_lists_that_are_forbidden_are_asked_for_one_after_the_other(fake_cluster: Fake) -> None:
    cluster, api = fake_cluster
    assert isinstance(cluster.driver, KubernetesDriver)
    cache = cluster.driver.cache
    api.node.runs_commands = False
    await cluster.start()
    loop = asyncio.get_running_loop()
    times: list[float] = []

    def refuse(_: str, path: str) -> KubernetesError | None:
        if "/resourcequotas" not in path:
            times.append(loop.time())
        return forbidden_error("list", "pods")

    async with open_watch(cluster, api):
        cache.first_pause_seconds = 0.001
        api.refuses = refuse
        api.cut_watches()
        await turn_until(lambda: len(times) >= 8)
        assert times[7] - times[0] >= 6 * cache.probe_seconds, "two at once, and then one at a time"


async def test_a_refused_apply_is_tried_again_by_the_refused_request_alone(fake_cluster: Fake) -> None:
    cluster, api = fake_cluster
    api.node.runs_commands = False
    desired = cluster.desired()

    async def requests_of_refused(desired: DesiredDeployment) -> int:
        seen = len(api.requests)
        with pytest.raises(ClusterForbidden) as refused:
            await cluster.driver.apply(desired)
        assert refused.value.requests == len(api.requests) - seen
        return refused.value.requests

    api.refuses = lambda _, path: forbidden_error("patch", "deployments") if "/deployments/" in path else None
    assert [await requests_of_refused(desired) for _ in range(3)] == [6, 1, 1]
    desired = replace(desired, token="another-token")
    assert [await requests_of_refused(desired) for _ in range(2)] == [6, 1]
    api.refuses = lambda _, path: forbidden_error("patch", "deployments") if SCALER in path else None
    assert [await requests_of_refused(desired) for _ in range(2)] == [8, 1]
    # Objects may have been removed since the first attempt.
    for kind in ("deployments", "secrets"):
        api.store.remove((kind, NAMESPACE, names.workflow_name(desired.workflow_id)))
    api.refuses = lambda *_: None
    await cluster.driver.apply(desired)
    await cluster.ready(desired.workflow_id)


async def test_a_write_that_meets_another_is_done_again(fake_cluster: Fake) -> None:
    cluster, api = fake_cluster
    desired = await cluster.start()
    api.failures += [CONFLICT, CONFLICT]
    await cluster.driver.scale(desired.workflow_id, 2)
    assert read_deployment(api, desired.workflow_id)["spec"]["replicas"] == 2


async def test_lists_are_whole_over_pages_that_expire(fake_cluster: Fake) -> None:
    cluster, api = fake_cluster
    api.node.runs_commands = False
    desired = [cluster.desired() for _ in range(5)]
    for one in desired:
        await cluster.driver.apply(one)
    api.page_size = 2
    assert {one.workflow_id for one in await cluster.driver.list()} == {one.workflow_id for one in desired}
    seen = len(api.requests)
    listing = asyncio.ensure_future(cluster.driver.list())
    await turn_until(lambda: len(api.requests) > seen)
    api.store.forget()
    assert {one.workflow_id for one in await listing} == {one.workflow_id for one in desired}


# ── watches that end ──────────────────────────────────────────────────────────────────────────────────────────


@asynccontextmanager
async def open_watch(cluster: DriverUnderTest, api: FakeApiServer) -> AsyncIterator[AsyncIterator[str]]:
    """Watch deployments, with all earlier events consumed."""
    assert isinstance(cluster.driver, KubernetesDriver)
    cache = cluster.driver.cache
    cache.first_pause_seconds, cache.probe_seconds = 0.02, 0.05  # the defaults are too long for a test
    changes = cluster.driver.watch()
    try:
        async with asyncio.timeout(cluster.patience_seconds):
            await anext(changes)
            await turn_until(lambda: api.watches == 3)
            yield changes
    finally:
        await changes.aclose()


@pytest.mark.parametrize(
    "interrupt",
    [
        FakeApiServer.end_watches,
        FakeApiServer.cut_watches,
        lambda api: (api.store.forget(), api.cut_watches()),
    ],
    ids=["ended", "cut off", "expired"],
)
async def test_a_watch_goes_on_after_its_stream(
    fake_cluster: Fake, interrupt: Callable[[FakeApiServer], None]
) -> None:
    cluster, api = fake_cluster
    api.node.runs_commands = False
    await cluster.start()
    async with open_watch(cluster, api) as changes:
        interrupt(api)
        later = cluster.desired()
        await cluster.driver.apply(later)
        while await anext(changes) != later.workflow_id:
            pass


async def test_a_version_that_is_forgotten_between_list_and_watch_is_listed_again(fake_cluster: Fake) -> None:
    cluster, api = fake_cluster
    api.node.runs_commands = False
    desired = await cluster.start()
    changes = cluster.driver.watch()
    first = asyncio.ensure_future(anext(changes))
    await turn_until(lambda: any("/pods?labelSelector" in request for request in api.requests[-2:]))
    api.store.forget()
    assert await first == desired.workflow_id
    later = cluster.desired()
    await cluster.driver.apply(later)
    async with asyncio.timeout(cluster.patience_seconds):
        while await anext(changes) != later.workflow_id:
            pass
    await changes.aclose()


async def test_a_watch_survives_an_absent_api_server_and_reports_missed_changes(
    fake_cluster: Fake,
) -> None:
    cluster, api = fake_cluster
    api.node.runs_commands = False
    desired = await cluster.start()
    async with open_watch(cluster, api) as changes:
        await api.go_down()
        api.store.delete(KINDS["deployments"], NAMESPACE, names.workflow_name(desired.workflow_id), {})
        await api.listen()
        while await anext(changes) != desired.workflow_id:
            pass
        await cluster.until(desired.workflow_id, lambda observed: not observed.exists)


async def test_a_kubeconfig_that_is_none_is_refused_in_words() -> None:
    with pytest.raises(ClusterRefused, match="No Kubernetes API server is configured"):
        await kubernetes_driver.connect_driver(cluster_layout())
