"""Behavior of the local driver alone, which runs subprocesses."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import psutil
import pytest

from tests.cluster.cluster_harness import DriverUnderTest, desired_deployment, turn_until
from workers.cluster import local_driver
from workers.cluster.driver import RUNNER_VARIABLES, ClusterDriver, ClusterRefused, DesiredDeployment
from workers.cluster.local_driver import PodCopy, ScalePlan, plan_scaling
from workers.cluster.local_pod import LocalPodLimits

ROOT = Path(__file__).parents[2]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "pods"


def find_files(folder: Path, pattern: str) -> list[Path]:
    return sorted(folder.glob(pattern))


async def fail_to_open() -> ClusterDriver:
    raise AssertionError


def deploy_and_die(folder: Path) -> DesiredDeployment:
    """Deploy by another process, and kill that when the pod is up."""
    desired = desired_deployment()
    with subprocess.Popen(
        [sys.executable, "-m", "tests.cluster.deployer", str(folder)],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as deployer:
        assert deployer.stdin is not None
        assert deployer.stdout is not None
        deployer.stdin.write(msgspec.json.encode(desired) + b"\n")
        deployer.stdin.flush()
        assert deployer.stdout.readline() == b"ready\n"
        deployer.kill()
    return desired


def is_running(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


async def read_state(cluster: DriverUnderTest, workflow_id: str) -> dict[str, Any]:
    (url,) = await cluster.driver.list_endpoints(workflow_id)
    state: dict[str, Any] = await cluster.get(f"{url}/state")
    return state


async def test_a_pod_has_a_folder_a_session_and_an_environment_of_its_own_and_inherits_no_file(
    local_cluster: DriverUnderTest, folder: Path, tmp_path: Path
) -> None:
    with (tmp_path / "lock").open("w") as lock:
        # As a shell does with `exec 9>lock`.
        os.set_inheritable(lock.fileno(), True)  # noqa: FBT003 - the function takes no keyword
        desired = await local_cluster.start(environment={"A": "1"})
    state = await read_state(local_cluster, desired.workflow_id)
    assert state["environment"].keys() - {"PWD", "OLDPWD", "SHLVL", "_"} == {
        "A", "HOME", "LANG", "PATH", "TMPDIR", *RUNNER_VARIABLES
    }  # fmt: skip
    assert Path(state["folder"]).is_relative_to(folder)
    assert state["session"] == state["pid"]
    assert os.getsid(0) != state["session"]
    assert str(tmp_path / "lock") not in {one.path for one in psutil.Process(state["pid"]).open_files()}
    for kept in find_files(folder, "**/*.json"):
        assert kept.stat().st_mode & 0o077 == 0


async def test_it_must_be_asked_for_and_by_one_deployer_only(
    local_cluster: DriverUnderTest, folder: Path
) -> None:
    with pytest.raises(ClusterRefused, match="only `dev`"):
        await local_driver.open_local(folder, runs_without_isolation=False)
    with pytest.raises(ClusterRefused, match="Another process"):
        await local_cluster.reopen()


async def test_pods_survive_a_deployer_that_is_killed(folder: Path) -> None:
    desired = await asyncio.to_thread(deploy_and_die, folder)
    (record,) = find_files(folder, "*/*/pod.json")
    async with await local_driver.open_local(folder, runs_without_isolation=True) as driver:
        cluster = DriverUnderTest(driver, fail_to_open)
        observed = await cluster.ready(desired.workflow_id)
        assert [pod.name for pod in observed.pods] == [record.parent.name]
        state = await read_state(cluster, desired.workflow_id)
        os.kill(state["pid"], signal.SIGKILL)  # a pod that was adopted is looked after like any other
        await cluster.until(desired.workflow_id, lambda observed: not observed.is_ready)
        await cluster.ready(desired.workflow_id)
        await cluster.until_true(lambda: driver.delete(desired.workflow_id))
    assert [path.name for path in find_files(folder, "*")] == ["lock"]


async def test_a_process_that_bears_the_number_of_a_pod_is_not_taken_for_it(
    local_cluster: DriverUnderTest, folder: Path
) -> None:
    desired = await local_cluster.start()
    pid = (await read_state(local_cluster, desired.workflow_id))["pid"]
    await local_cluster.driver.close()
    os.kill(pid, signal.SIGKILL)
    bystander = await asyncio.create_subprocess_exec("sleep", "60", start_new_session=True)
    (certificate,) = find_files(folder, "*/*/process")
    text = certificate.read_text()
    certificate.write_text(text.replace(f"{pid} ", f"{bystander.pid} ", 1))
    local_cluster.driver = await local_cluster.reopen()
    await local_cluster.ready(desired.workflow_id)
    assert (await read_state(local_cluster, desired.workflow_id))["pid"] != bystander.pid
    await local_cluster.until_true(lambda: local_cluster.driver.delete(desired.workflow_id))
    assert bystander.returncode is None
    bystander.kill()
    await bystander.wait()


async def test_a_pod_that_does_not_end_is_killed_after_its_grace_by_the_next_deployer_too(
    folder: Path,
) -> None:
    limits = LocalPodLimits(grace_seconds=0.6)
    driver = await local_driver.open_local(folder, runs_without_isolation=True, limits=limits)
    cluster = DriverUnderTest(driver, fail_to_open)
    desired = await cluster.start(environment={"POD_IGNORES_TERM": "1"})
    pid = (await read_state(cluster, desired.workflow_id))["pid"]
    await driver.scale(desired.workflow_id, 0)
    await driver.close()
    async with await local_driver.open_local(folder, runs_without_isolation=True, limits=limits) as driver:
        (pod,) = (await driver.observe(desired.workflow_id)).pods
        assert pod.is_terminating
        assert is_running(pid)
        await turn_until(lambda: not is_running(pid))
        await DriverUnderTest(driver, fail_to_open).until_true(lambda: driver.delete(desired.workflow_id))


async def test_logs_are_bounded_and_keep_the_end(local_cluster: DriverUnderTest, folder: Path) -> None:
    desired = await local_cluster.start()
    (url,) = await local_cluster.driver.list_endpoints(desired.workflow_id)
    for number in range(3):
        await local_cluster.get(f"{url}/say?text={'x' * 99}&times=300")
        await local_cluster.get(f"{url}/say?text=end-{number}")
    (log,) = find_files(folder, "*/*/log")
    await turn_until(lambda: log.stat().st_size < 20_000)
    assert sum(path.stat().st_size for path in find_files(log.parent, "log*")) <= 40_000
    (last,) = await local_cluster.driver.logs(desired.workflow_id, limit=1)
    assert last.text == "end-2"


async def test_an_unreadable_row_does_not_prevent_a_start(
    local_cluster: DriverUnderTest, folder: Path
) -> None:
    desired = await local_cluster.start()
    await local_cluster.driver.close()
    (folder / "torn").mkdir()
    (folder / "torn" / local_driver.DEPLOYMENT_FILE).write_text("{")
    local_cluster.driver = await local_cluster.reopen()
    await local_cluster.ready(desired.workflow_id)
    assert len(await local_cluster.driver.list()) == 1


async def test_a_pod_killed_with_its_children_leaves_none(local_cluster: DriverUnderTest) -> None:
    command = ("/bin/sh", "-c", 'sleep 60 & echo "$!"; exec "$@"', "pod", *desired_deployment().command)
    desired = await local_cluster.start(command=command)
    (child, *_) = await local_cluster.driver.logs(desired.workflow_id, limit=9)
    await local_cluster.until_true(lambda: local_cluster.driver.delete(desired.workflow_id))
    with suppress(TimeoutError):
        await turn_until(lambda: not is_running(int(child.text)), patience_seconds=60)
    assert not is_running(int(child.text))


async def test_another_token_needs_another_pod(local_cluster: DriverUnderTest) -> None:
    desired = await local_cluster.start()
    (before,) = (await local_cluster.driver.observe(desired.workflow_id)).pods
    await local_cluster.driver.apply(replace(desired, token="another"))
    await local_cluster.until(
        desired.workflow_id,
        lambda observed: observed.is_rolled_out and before.name not in {pod.name for pod in observed.pods},
    )


@pytest.mark.parametrize(
    ("copies", "replicas", "expected"),
    [
        ([], 2, ScalePlan(2, ())),
        ([PodCopy("a", "new", is_ready=False), PodCopy("b", "new", is_ready=True)], 1, ScalePlan(0, ("a",))),
        ([PodCopy("a", "new", is_ready=True)], 0, ScalePlan(0, ("a",))),
        ([PodCopy("a", "old", is_ready=True)], 1, ScalePlan(1, ())),
        ([PodCopy("a", "old", is_ready=True), PodCopy("b", "new", is_ready=False)], 1, ScalePlan(0, ())),
        ([PodCopy("a", "old", is_ready=True), PodCopy("b", "new", is_ready=True)], 1, ScalePlan(0, ("a",))),
        ([PodCopy("a", "old", is_ready=False), PodCopy("b", "old", is_ready=True)], 1, ScalePlan(1, ("a",))),
        (
            [PodCopy("a", "old", is_ready=True), PodCopy("b", "new", is_ready=True)],
            0,
            ScalePlan(0, ("b", "a")),
        ),
    ],
)
def test_pods_of_another_kind_stay_until_there_is_one_in_their_place(
    copies: list[PodCopy], replicas: int, expected: ScalePlan
) -> None:
    assert plan_scaling(copies, template="new", replicas=replicas) == expected
