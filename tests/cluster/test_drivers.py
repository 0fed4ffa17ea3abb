"""Behavior of every cluster driver."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import aiohttp
import pytest

from tests.cluster.cluster_harness import GRACE_SECONDS, PROGRAM, DriverUnderTest
from workers.cluster.driver import TOKEN_VARIABLE, NotDeployed, ObservedDeployment, PodFailureReason


async def test_never_deployed_workflows_are_reported_as_absent(cluster: DriverUnderTest) -> None:
    assert await cluster.driver.observe("wf_none") == ObservedDeployment("wf_none", exists=False)
    assert await cluster.driver.delete("wf_none")
    assert await cluster.driver.list_endpoints("wf_none") == ()
    assert await cluster.driver.logs("wf_none", limit=10) == ()
    with pytest.raises(NotDeployed):
        await cluster.driver.scale("wf_none", 1)


async def test_an_applied_deployment_starts_and_is_reported_as_it_is(cluster: DriverUnderTest) -> None:
    desired = await cluster.start(definition_hash="d1", generation=7)
    observed = await cluster.driver.observe(desired.workflow_id)
    assert (observed.exists, observed.is_ready, observed.replicas, observed.available) == (True, True, 1, 1)
    assert (observed.generation, observed.definition_hash, observed.failure) == (7, "d1", None)
    assert await cluster.driver.list_endpoints(desired.workflow_id) == (observed.pods[0].address,)
    assert await cluster.driver.list() == (observed,)
    assert await cluster.get(f"{observed.pods[0].address}/readyz") == {}


async def test_a_second_equal_apply_changes_nothing(cluster: DriverUnderTest) -> None:
    desired = await cluster.start()
    before = await cluster.driver.observe(desired.workflow_id)
    await cluster.driver.apply(desired)
    assert await cluster.driver.observe(desired.workflow_id) == before


async def test_variables_and_arguments_arrive_as_they_are(cluster: DriverUnderTest) -> None:
    texts = {"A": "$(PATH)", "B": "$$(A) $A $", "C": "", TOKEN_VARIABLE: "not the token"}
    command = (cluster.python, "-S", "-c", PROGRAM, "$(HOME)", "two words", "$$")
    desired = await cluster.start(environment=texts, command=command)
    (url,) = await cluster.driver.list_endpoints(desired.workflow_id)
    state = await cluster.get(f"{url}/state")
    assert {name: state["environment"][name] for name in ("A", "B", "C")} == {
        name: texts[name] for name in ("A", "B", "C")
    }
    assert state["environment"][TOKEN_VARIABLE] == desired.token
    assert state["arguments"] == ["$(HOME)", "two words", "$$"]
    assert not {"SSH_AUTH_SOCK", "PYTEST_CURRENT_TEST", "USER"} & state["environment"].keys()


async def test_a_pod_is_ready_only_when_it_says_so(cluster: DriverUnderTest) -> None:
    desired = cluster.desired(environment={"POD_START_SECONDS": "0.5"})
    await cluster.driver.apply(desired)
    started = await cluster.until(
        desired.workflow_id, lambda observed: any(pod.address for pod in observed.pods)
    )
    assert not started.is_ready
    assert await cluster.driver.list_endpoints(desired.workflow_id) == ()
    await cluster.ready(desired.workflow_id)


async def test_a_stopped_deployment_stays_stopped_through_changes_and_starts_again(
    cluster: DriverUnderTest,
) -> None:
    desired = await cluster.start()
    for hash_, replicas in (("second", 2), ("third", 1)):
        await cluster.driver.scale(desired.workflow_id, 0)
        stopped = await cluster.until(desired.workflow_id, lambda observed: not observed.pods)
        assert (stopped.exists, stopped.replicas, stopped.is_ready) == (True, 0, False)
        await cluster.driver.apply(replace(desired, definition_hash=hash_, replicas=0))
        still = await cluster.until(desired.workflow_id, lambda observed: observed.is_current)
        assert (still.replicas, still.pods) == (0, ())
        await cluster.driver.scale(desired.workflow_id, replicas)
        up = await cluster.ready(desired.workflow_id)
        assert {pod.definition_hash for pod in up.pods} == {hash_}
        assert len(set(await cluster.driver.list_endpoints(desired.workflow_id))) == replicas


async def test_another_definition_replaces_the_pods_and_leaves_none_missing(cluster: DriverUnderTest) -> None:
    desired = await cluster.start()
    await cluster.driver.apply(replace(desired, definition_hash="second", generation=2))

    def is_replaced(observed: ObservedDeployment) -> bool:
        assert observed.ready_pods
        return observed.is_rolled_out

    replaced = await cluster.until(desired.workflow_id, is_replaced)
    assert [pod.definition_hash for pod in replaced.pods] == ["second"]
    assert replaced.generation == 2


async def test_a_wake_during_a_drain_starts_a_pod_beside_the_one_that_drains(
    cluster: DriverUnderTest,
) -> None:
    desired = await cluster.start(environment={"POD_DRAIN_SECONDS": str(GRACE_SECONDS)})
    (draining,) = await cluster.driver.list_endpoints(desired.workflow_id)
    await cluster.driver.scale(desired.workflow_id, 0)
    ends = await cluster.until(
        desired.workflow_id, lambda observed: all(pod.is_terminating for pod in observed.pods)
    )
    assert (len(ends.pods), ends.ready_pods) == (1, ())
    await cluster.driver.scale(desired.workflow_id, 1)
    awake = await cluster.until(desired.workflow_id, lambda observed: observed.is_ready)
    assert len(awake.pods) == 2
    urls = await cluster.driver.list_endpoints(desired.workflow_id)
    assert draining not in urls
    await cluster.end_drain(draining)
    await cluster.until(desired.workflow_id, lambda observed: len(observed.pods) == 1)
    await cluster.driver.scale(desired.workflow_id, 0)
    await cluster.until(desired.workflow_id, lambda observed: observed.pods[0].is_terminating)
    await cluster.end_drain(*urls)


async def test_a_program_that_can_not_start_is_trouble_until_another_is_applied(
    cluster: DriverUnderTest,
) -> None:
    desired = cluster.desired(environment={"POD_EXIT_CODE": "1"})
    await cluster.driver.apply(desired)
    failed = await cluster.until(desired.workflow_id, lambda observed: observed.failure is not None)
    assert failed.failure is not None
    assert failed.failure.reason is PodFailureReason.CRASH_LOOP
    assert "code 1" in failed.failure.message
    assert "the program cannot start" in failed.failure.message
    assert failed.failure in {pod.failure for pod in failed.pods}
    assert not failed.is_ready
    await cluster.driver.apply(replace(desired, environment={}, definition_hash="second"))
    mended = await cluster.ready(desired.workflow_id)
    assert mended.failure is None


async def test_a_pod_that_crashes_is_started_again(cluster: DriverUnderTest) -> None:
    desired = await cluster.start()
    (url,) = await cluster.driver.list_endpoints(desired.workflow_id)
    first = (await cluster.get(f"{url}/state"))["started_at"]
    await cluster.get(f"{url}/exit?code=3")

    async def has_started_again() -> bool:
        try:
            urls = await cluster.driver.list_endpoints(desired.workflow_id)
            started_at = [(await cluster.get(f"{url}/state"))["started_at"] for url in urls]
        except (OSError, aiohttp.ClientError):
            return False  # it was counted as ready slightly longer than it lived
        return bool(urls) and started_at != [first]

    await cluster.until_true(has_started_again)
    await cluster.ready(desired.workflow_id)


async def test_a_pod_that_is_replaced_ends_beside_the_one_that_takes_its_place(
    cluster: DriverUnderTest,
) -> None:
    desired = await cluster.start()
    (before,) = (await cluster.driver.observe(desired.workflow_id)).pods
    await cluster.driver.replace(desired.workflow_id, [before.name, "it-is-gone"])
    await cluster.driver.replace("wf_none", [before.name])
    replaced = await cluster.until(
        desired.workflow_id,
        lambda observed: {pod.name for pod in observed.ready_pods} - {before.name} != set(),
    )
    assert replaced.replicas == 1
    after = await cluster.ready(desired.workflow_id)
    assert before.name not in {pod.name for pod in after.pods}


async def test_a_deleted_object_is_gone_and_its_neighbor_is_not(cluster: DriverUnderTest) -> None:
    desired = cluster.desired(workflow_id="wf_A", environment={"POD_DRAIN_SECONDS": "0.3"})
    neighbour = cluster.desired(workflow_id="wf-a")
    await cluster.driver.apply(desired)
    await cluster.driver.apply(neighbour)
    await cluster.ready(desired.workflow_id)
    there = await cluster.ready(neighbour.workflow_id)
    await cluster.until_true(lambda: cluster.driver.delete(desired.workflow_id))
    assert await cluster.driver.observe_uncached(desired.workflow_id) == ObservedDeployment(
        desired.workflow_id, exists=False
    )

    async def is_alone() -> bool:
        return await cluster.driver.list() == (there,)

    # The list may come from the cache of a watch, which is moments old.
    await cluster.until_true(is_alone)
    with pytest.raises(NotDeployed):
        await cluster.driver.scale(desired.workflow_id, 1)
    await cluster.driver.apply(desired)
    await cluster.ready(desired.workflow_id)


async def test_a_watch_tells_of_all_at_first_and_then_of_each_change(cluster: DriverUnderTest) -> None:
    first, second = await cluster.start(), cluster.desired()
    changes = cluster.driver.watch()
    try:
        async with asyncio.timeout(cluster.patience_seconds):
            assert await anext(changes) == first.workflow_id
            await cluster.driver.apply(second)
            while await anext(changes) != second.workflow_id:
                pass
            while not (await cluster.driver.observe(second.workflow_id)).is_ready:
                await anext(changes)
            while not await cluster.driver.delete(first.workflow_id):
                pass
            while await anext(changes) != first.workflow_id:
                pass
    finally:
        await changes.aclose()


async def test_logs_are_the_last_lines_that_pods_wrote(cluster: DriverUnderTest) -> None:
    desired = await cluster.start()
    (url,) = await cluster.driver.list_endpoints(desired.workflow_id)
    for text in ("one", "two", "three"):
        await cluster.get(f"{url}/say?text={text}")

    async def are_told() -> bool:
        lines = await cluster.driver.logs(desired.workflow_id, limit=2)
        return [line.text for line in lines] == ["two", "three"]

    await cluster.until_true(are_told)
    (line,) = await cluster.driver.logs(desired.workflow_id, limit=1)
    (pod,) = (await cluster.driver.observe(desired.workflow_id)).pods
    assert line.pod == pod.name


async def test_pods_outlive_the_deployer_and_are_known_to_the_next(cluster: DriverUnderTest) -> None:
    desired = await cluster.start()
    before = await cluster.driver.observe(desired.workflow_id)
    await cluster.driver.close()
    cluster.driver = await cluster.reopen()
    assert (await cluster.ready(desired.workflow_id)) == before
    await cluster.driver.scale(desired.workflow_id, 0)
    await cluster.until(desired.workflow_id, lambda observed: not observed.pods)
