"""A cluster to test a driver on: this machine, the fake API server, or a real one."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from models import ids
from tests.cluster.fake_api import FakeApiServer
from tests.cluster.fake_api.server import serve_fake_api
from workers.cluster import kubernetes_api, kubernetes_driver, local_driver
from workers.cluster.driver import ClusterDriver, DesiredDeployment, ObservedDeployment, PodResourceLimits
from workers.cluster.kubernetes_api import KubernetesApi, ObjectNotFound, RequestBudget
from workers.cluster.local_pod import LocalPodLimits
from workers.cluster.manifests import ClusterLayout

PROGRAM = (Path(__file__).parent / "pod.py").read_text()
NAMESPACE = "user-workflows"
POLL_SECONDS = 0.02
GRACE_SECONDS = 20
FAKE_REQUESTS_PER_SECOND = 1_000.0
"""Budget so large that no test waits for it."""
DEFAULT_IMAGE = "python:3.13-slim"
NAMESPACES = "/api/v1/namespaces"
RESTRICTED = {"pod-security.kubernetes.io/enforce": "restricted"}
TEST_KUBECONFIG = os.environ.get("TEST_KUBECONFIG")


def cluster_layout(namespace: str = NAMESPACE, grace_seconds: int = GRACE_SECONDS) -> ClusterLayout:
    return ClusterLayout(
        namespace=namespace,
        gateway_host="pilotflame-gateway.pilotflame.svc.cluster.local",
        gateway_namespace="pilotflame",
        grace_seconds=grace_seconds,
    )


def desired_deployment(python: str = sys.executable, **changes: Any) -> DesiredDeployment:  # noqa: ANN401 - the fields of Wanted
    """Return the desired state of a deployment that runs the program of these tests, with fields changed."""
    given: dict[str, Any] = {
        "workflow_id": ids.new_id("wf"),
        "organization_id": "org_1",
        "definition_hash": "first",
        "generation": 1,
        "image": "example.com/runner:1",
        "command": (python, "-S", "-c", PROGRAM),
        "token": "token-canary",
        "resources": PodResourceLimits(cpu_millicores=100, memory_mebibytes=64),
    }
    return DesiredDeployment(**{**given, **changes})


@dataclass
class Administrator:
    """Administrator of an API server.

    It uses the driver's own client: the typed one of the Kubernetes library loads hundreds of modules.
    """

    api: KubernetesApi

    async def create_namespace(self, name: str) -> None:
        await self._create("Namespace", NAMESPACES, {"metadata": {"name": name, "labels": RESTRICTED}})

    async def delete_namespace(self, name: str) -> None:
        """Begin to delete a namespace with all that is in it."""
        await self.api.request("DELETE", f"{NAMESPACES}/{name}")

    async def list_namespaces(self) -> list[str]:
        """Return the names of all namespaces."""
        items, _ = await self.api.list(NAMESPACES, "")
        return [one["metadata"]["name"] for one in items]

    async def set_quota(self, namespace: str, hard: dict[str, str] | None) -> None:
        """Set the quota of a namespace in place of an earlier one; None removes it."""
        quotas = f"{NAMESPACES}/{namespace}/resourcequotas"
        with suppress(ObjectNotFound):  # there was none before
            await self.api.request("DELETE", f"{quotas}/quota")
        if hard is not None:
            await self._create(
                "ResourceQuota", quotas, {"metadata": {"name": "quota"}, "spec": {"hard": hard}}
            )

    async def list_images(self) -> list[str]:
        """Return the names of all images that nodes have."""
        nodes, _ = await self.api.list("/api/v1/nodes", "")
        images = [image for node in nodes for image in node["status"].get("images", ())]
        return [name for image in images for name in image.get("names") or ()]

    async def _create(self, kind: str, path: str, body: dict[str, Any]) -> None:
        await self.api.request("POST", path, body={"apiVersion": "v1", "kind": kind, **body})


@dataclass
class DriverUnderTest:
    """Cluster driver, and the parts of its cluster that tests need."""

    driver: ClusterDriver
    reopen: Callable[[], Awaitable[ClusterDriver]]
    image: str = "example.com/runner:1"
    python: str = sys.executable
    patience_seconds: float = 60.0
    is_real: bool = False
    used: list[str] = field(default_factory=list)
    administrator: Administrator | None = None
    """An administrator of the API server, where there is one."""
    namespace: str = NAMESPACE

    async def set_quota(self, hard: dict[str, str] | None) -> None:
        """Set the quota of the namespace in place of an earlier one; None removes it."""
        assert self.administrator is not None
        await self.administrator.set_quota(self.namespace, hard)

    def desired(self, **changes: Any) -> DesiredDeployment:  # noqa: ANN401 - the fields of Wanted
        """Return a new desired deployment for this cluster, which `clean` deletes."""
        desired = desired_deployment(self.python, **{"image": self.image, **changes})
        self.used.append(desired.workflow_id)
        return desired

    async def delete_namespace(self) -> None:
        """Delete the namespace with all that is in it, and wait until it is gone."""
        administrator = self.administrator
        assert administrator is not None
        await administrator.delete_namespace(self.namespace)

        async def is_gone() -> bool:
            return self.namespace not in await administrator.list_namespaces()

        await self.until_true(is_gone)

    async def create_namespace(self) -> None:
        """Create the namespace, after `delete_namespace`."""
        assert self.administrator is not None
        await self.administrator.create_namespace(self.namespace)

    async def until(
        self, workflow_id: str, holds: Callable[[ObservedDeployment], bool]
    ) -> ObservedDeployment:
        """Observe a deployment until the condition holds, and return the observation; fails after the patience."""
        observed = await self.driver.observe(workflow_id)
        try:
            async with asyncio.timeout(self.patience_seconds):
                while not holds(observed):
                    await asyncio.sleep(POLL_SECONDS)
                    observed = await self.driver.observe(workflow_id)
        except TimeoutError:
            pytest.fail(f"It never came to be so: {observed}")
        return observed

    async def until_true(self, holds: Callable[[], Awaitable[bool]]) -> None:
        """Poll an asynchronous condition until it holds; raises TimeoutError after the patience."""
        async with asyncio.timeout(self.patience_seconds):
            while not await holds():  # noqa: ASYNC110 - of another process, which sets no event of ours
                await asyncio.sleep(POLL_SECONDS)

    async def ready(self, workflow_id: str) -> ObservedDeployment:
        """Wait until all wanted pods of a deployment are rolled out and ready; return the observation."""
        return await self.until(
            workflow_id, lambda observed: observed.replicas > 0 and observed.is_rolled_out
        )

    async def start(self, **changes: Any) -> DesiredDeployment:  # noqa: ANN401 - the fields of Wanted
        """Deploy a new desired deployment, wait until it is ready, and return it."""
        desired = self.desired(**changes)
        await self.driver.apply(desired)
        await self.ready(desired.workflow_id)
        return desired

    async def get(self, url: str) -> Any:  # noqa: ANN401 - JSON
        """Return the JSON that a pod answers to a GET request; skips the test if
        a real cluster's network can't be reached.
        """
        try:
            async with (
                aiohttp.ClientSession() as session,
                session.get(url, timeout=aiohttp.ClientTimeout(5)) as answer,
            ):
                assert answer.status == 200
                return await answer.json(content_type=None)
        except (aiohttp.ClientError, TimeoutError):
            if self.is_real:
                pytest.skip("the network of the pods can't be reached from here")
            raise

    async def end_drain(self, *urls: str) -> None:
        """End draining pods at these URLs before their grace is over; do nothing on a real cluster,
        whose network may be out of reach.
        """
        if not self.is_real:
            for url in urls:
                await self.get(f"{url}/exit?code=0")

    async def clean(self) -> None:
        """Delete all deployments that `desired` has returned."""
        async with asyncio.timeout(self.patience_seconds + GRACE_SECONDS):
            for workflow_id in self.used:
                while not await self.driver.delete(workflow_id):
                    pass


async def turn_until(holds: Callable[[], bool], *, patience_seconds: float = 60.0) -> None:
    """Let other tasks of the event loop run until the condition holds; raises TimeoutError after the patience."""
    async with asyncio.timeout(patience_seconds):
        while not holds():  # noqa: ASYNC110 - nothing signals the change
            await asyncio.sleep(0)


@asynccontextmanager
async def open_local_cluster(folder: Path) -> AsyncIterator[DriverUnderTest]:
    """Open the local driver with pods as processes of this machine during the block."""
    limits = LocalPodLimits(grace_seconds=GRACE_SECONDS, log_bytes=20_000)

    async def open_driver() -> ClusterDriver:
        return await local_driver.open_local(folder, runs_without_isolation=True, limits=limits)

    cluster = DriverUnderTest(await open_driver(), open_driver)
    try:
        yield cluster
    finally:
        await cluster.clean()
        await cluster.driver.close()


@asynccontextmanager
async def open_fake_cluster(
    folder: Path,
    **settings: Any,  # noqa: ANN401 - any setting
) -> AsyncIterator[tuple[DriverUnderTest, FakeApiServer]]:
    """Open the Kubernetes driver on a fake API server during the block; yield both.

    `settings` are fields of the server.
    """
    async with serve_fake_api(**{"second": 0.05, **settings}) as api:
        api.node.runs_commands = True
        path = folder / "kubeconfig"
        path.write_text(build_kubeconfig(api))
        admin_budget = RequestBudget(FAKE_REQUESTS_PER_SECOND)
        administrator = Administrator(await kubernetes_api.connect_api(path, budget=admin_budget))
        await administrator.create_namespace(NAMESPACE)

        async def open_driver() -> ClusterDriver:
            budget = RequestBudget(FAKE_REQUESTS_PER_SECOND)
            # A pod that drains is killed after this many seconds of the fake's own, shorter clock.
            grace_seconds = int(GRACE_SECONDS / api.second)
            return await kubernetes_driver.connect_driver(
                cluster_layout(grace_seconds=grace_seconds), kubeconfig=path, budget=budget
            )

        cluster = DriverUnderTest(await open_driver(), open_driver, administrator=administrator)
        try:
            yield cluster, api
        finally:
            await cluster.driver.close()
            await administrator.api.close()


@asynccontextmanager
async def keep_watch_open(cluster: DriverUnderTest) -> AsyncIterator[DriverUnderTest]:
    """Keep a watch open on each driver of a cluster, as a deployer does, so that it answers from its cache."""
    watches: list[asyncio.Task[None]] = []
    reopen = cluster.reopen

    async def watch(driver: ClusterDriver) -> None:
        async for _ in driver.watch():
            pass

    async def reopen_watched() -> ClusterDriver:
        driver = await reopen()
        watches.append(asyncio.create_task(watch(driver)))
        return driver

    cluster.reopen = reopen_watched
    watches.append(asyncio.create_task(watch(cluster.driver)))
    try:
        yield cluster
    finally:
        for task in watches:
            task.cancel()
        await asyncio.gather(*watches, return_exceptions=True)


def build_kubeconfig(api: FakeApiServer) -> str:
    return json.dumps(
        {
            "apiVersion": "v1",
            "kind": "Config",
            "current-context": "fake",
            "contexts": [{"name": "fake", "context": {"cluster": "fake", "user": "deployer"}}],
            "clusters": [{"name": "fake", "cluster": {"server": api.url}}],
            "users": [{"name": "deployer", "user": {"token": api.token}}],
        }
    )


@asynccontextmanager
async def open_real_cluster(path: Path) -> AsyncIterator[DriverUnderTest]:
    """Use a new namespace on the cluster of a kubeconfig, and an image that its nodes have."""
    namespace = ids.new_id("test").replace("_", "-")
    async with AsyncExitStack() as stack:
        administrator = Administrator(await kubernetes_api.connect_api(path))
        stack.push_async_callback(administrator.api.close)
        await administrator.create_namespace(namespace)
        stack.push_async_callback(administrator.delete_namespace, namespace)
        image = os.environ.get("TEST_POD_IMAGE") or await _find_python_image(administrator)

        async def open_driver() -> ClusterDriver:
            return await kubernetes_driver.connect_driver(cluster_layout(namespace), kubeconfig=path)

        cluster = DriverUnderTest(
            await open_driver(),
            open_driver,
            image=image,
            python="python3",
            patience_seconds=90,
            is_real=True,
            administrator=administrator,
            namespace=namespace,
        )
        yield cluster
        await cluster.driver.close()


async def _find_python_image(administrator: Administrator) -> str:
    names = await administrator.list_images()
    return next((name for name in names if "python" in name and "@" not in name), DEFAULT_IMAGE)
