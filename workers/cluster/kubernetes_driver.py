"""Driver for Kubernetes: applies, scales, observes and deletes the objects of deployments.

Objects are applied by server-side apply with the deployer as field manager. The number of pods is a patch of
the Deployment's own `spec.replicas` with the scaler as field manager. A patch of `/scale` to 0 would leave
that field without a manager, since zero is absent there. The next apply would then start the stopped pods. A change
takes several requests: after a failure, the failed one is repeated alone before all are sent.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Collection, Mapping, Sequence
from contextlib import aclosing, asynccontextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, Self, TypeVar

from msgspec import Struct

from models import pod_identity as names
from workers.cluster import kubernetes_api, manifests, pod_status
from workers.cluster.driver import (
    ClusterError,
    ClusterForbidden,
    ClusterRefused,
    DesiredDeployment,
    NotDeployed,
    ObservedDeployment,
    PodLogLine,
)
from workers.cluster.kubernetes_api import (
    APPLY,
    MERGE,
    KubernetesApi,
    ObjectConflict,
    ObjectNotFound,
    RequestBudget,
)
from workers.cluster.manifests import ClusterLayout, Manifest
from workers.cluster.quota_watch import QuotaWatch
from workers.cluster.watch_cache import WatchCache, workflow_id_of

DEPLOYER = "pilotflame-deployer"
SCALER = "pilotflame-scaler"
MAX_LOG_BYTES = 1_000_000
RETRY_PAUSE_SECONDS = 0.1
"""Pause between two Deployments with refused pods, which leaves half of the request budget to others."""

_CORE = "/api/v1"
_APPS = "/apis/apps/v1"
_NETWORKING = "/apis/networking.k8s.io/v1"
_COLLECTIONS = {
    "Service": (_CORE, "services"),
    "NetworkPolicy": (_NETWORKING, "networkpolicies"),
    "Secret": (_CORE, "secrets"),
    "ServiceAccount": (_CORE, "serviceaccounts"),
    "Deployment": (_APPS, "deployments"),
}
"""Kinds of the objects of a deployment, in the order of deletion."""
_DELETED = "deleted"
"""Goal of a deletion."""
_MANAGED_SELECTOR = f"{manifests.MANAGED_BY_LABEL}={manifests.MANAGED_BY}"

T = TypeVar("T")
Send = Callable[[], Awaitable[object]]


async def connect_driver(
    layout: ClusterLayout, *, kubeconfig: Path | None = None, budget: RequestBudget | None = None
) -> KubernetesDriver:
    """Return a driver with the permissions of a kubeconfig, or of the pod's own service account.

    Raises `ClusterRefused` for a configuration without a cluster.
    """
    return KubernetesDriver(await kubernetes_api.connect_api(kubeconfig, budget=budget), layout)


class KubernetesDriver:
    """Driver for the deployments of one namespace."""

    def __init__(self, api: KubernetesApi, layout: ClusterLayout) -> None:
        self.cache = WatchCache(
            api,
            deployments=_object_path(layout, "Deployment"),
            pods=_pods_path(layout),
            label=_MANAGED_SELECTOR,
        )
        self._api = api
        self._layout = layout
        self._attempts = ChangeAttempts()
        quotas = f"{_CORE}/namespaces/{layout.namespace}/resourcequotas"
        self._quotas = QuotaWatch(api, quotas, self._retry_refused_pods)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """End the watches on the cluster and close the connections; the pods keep running."""
        await self.cache.close()
        await self._api.close()

    # ── desired state ───────────────────────────────────────────────────────────────────────────────────────

    async def apply(self, desired: DesiredDeployment) -> None:
        """Apply all objects of a deployment, and set the number of pods; raises `ClusterError`.

        Fields that another manager has set are overwritten: the deployer owns all fields that it applies. A
        request that failed last time is sent first.
        """
        async with self._attempts.begin(desired.workflow_id, desired) as attempt:
            for manifest in manifests.build_objects(desired, self._layout):
                await attempt.send(partial(self._apply_object, manifest))
            await attempt.send(partial(self.scale, desired.workflow_id, desired.replicas))

    async def _apply_object(self, manifest: Manifest) -> None:
        path = _object_path(self._layout, manifest["kind"], manifest["metadata"]["name"])
        query = {"fieldManager": DEPLOYER, "force": "true"}
        try:
            await self._api.patch(path, manifest, content_type=APPLY, query=query)
        except ObjectNotFound as error:  # the namespace is missing: an apply would create a missing object
            raise ClusterForbidden(f"The API server has no namespace for {path}: {error}") from error

    async def scale(self, workflow_id: str, replicas: int) -> None:
        """Set the number of pods of a deployment, 0 to stop it.

        Raises `NotDeployed` if it doesn't exist, and `ClusterError`.
        """
        path = _object_path(self._layout, "Deployment", names.workflow_name(workflow_id))
        change = {"spec": {"replicas": replicas}}
        try:
            scaled = await self._api.patch(path, change, content_type=MERGE, query={"fieldManager": SCALER})
        except ObjectNotFound as error:
            raise NotDeployed(f"{workflow_id} is not deployed in {self._layout.namespace}") from error
        if self.cache.is_open:
            self.cache.deployments.put(scaled)

    async def delete(self, workflow_id: str) -> bool:
        """Set the number of pods to 0, and once they have ended delete all objects with the workflow's label.

        Return True once none is left. The Deployment is deleted last: it exists as long as any other object
        is left. Raises `ClusterError`.
        """
        deployments, listed = await self._list_objects(workflow_id)
        if any(not pod_status.has_ended(pod) for pod in listed):
            if any(one["spec"].get("replicas") for one in deployments):
                with suppress(NotDeployed):
                    await self.scale(workflow_id, 0)
            return False
        async with self._attempts.begin(workflow_id, _DELETED) as attempt:
            return await self._remove_all(workflow_id, attempt)

    async def _remove_all(self, workflow_id: str, attempt: ChangeAttempt) -> bool:
        """Delete the objects that are left of a workflow by requests of `attempt`, the Deployment last; return whether
        none is left.

        Raises `ClusterError`.
        """
        label = _format_selector(manifests.workflow_labels(workflow_id))

        async def listed(path: str) -> Sequence[Manifest]:
            items, _ = await attempt.send(partial(self._api.list, path, label))
            return items

        for _ in range(2):  # the second pass checks that the first one has left nothing
            left = [
                (kind, one["metadata"])
                for kind in _COLLECTIONS
                for one in await listed(_object_path(self._layout, kind))
            ]
            if not left:
                return not await listed(_pods_path(self._layout))
            for kind, metadata in left:
                if "deletionTimestamp" not in metadata:
                    await attempt.send(partial(self._remove, kind, metadata))
        return False

    async def replace(self, workflow_id: str, pods: Collection[str]) -> None:
        """Delete pods by their names; missing ones are ignored. Raises `ClusterError`.

        Their ReplicaSet creates others at once, even while the old ones take long to end.
        """
        for name in pods:
            with suppress(ObjectNotFound, ObjectConflict):
                deleted = await self._api.request("DELETE", _pods_path(self._layout, name))
                known = {
                    pod["metadata"]["name"]
                    for pod in self.cache.pods.objects_of(names.workflow_name(workflow_id))
                }
                # A pod that the watch has already removed must not return.
                if name in known and deleted.get("kind") == "Pod":
                    self.cache.pods.put(deleted)

    async def _remove(self, kind: str, metadata: Mapping[str, Any]) -> None:
        """Delete the object with the name and uid of `metadata`; a missing one, or another one with its name, is
        ignored.
        """
        # An object that was created again under the same name has another uid and is not deleted.
        options = {"propagationPolicy": "Background", "preconditions": {"uid": metadata["uid"]}}
        with suppress(ObjectNotFound, ObjectConflict):
            await self._api.request(
                "DELETE", _object_path(self._layout, kind, metadata["name"]), body=options
            )

    # ── observed state ──────────────────────────────────────────────────────────────────────────────────────

    async def observe(self, workflow_id: str) -> ObservedDeployment:
        """Return the observed state from the Deployment and its pods, from the cache while a watch is open.

        Raises `ClusterError`.
        """
        return self._summarize(workflow_id, *await self._list_objects(workflow_id))

    async def observe_uncached(self, workflow_id: str) -> ObservedDeployment:
        """Return the observed state from the Deployment and its pods, read from the API server. Raises
        `ClusterError`.
        """
        return self._summarize(workflow_id, *await self._read_objects(workflow_id))

    async def list(self) -> tuple[ObservedDeployment, ...]:
        """Return the observed state of all Deployments that Pilotflame manages, with their pods; from the
        cache while a watch is open.

        Raises `ClusterError`.
        """
        if self.cache.is_open:
            await self.cache.wait_synced(self._api.request_seconds)
            deployments: Sequence[Manifest] = tuple(self.cache.deployments)
            all_pods: Sequence[Manifest] = tuple(self.cache.pods)
        else:
            deployments, _ = await self._api.list(_object_path(self._layout, "Deployment"), _MANAGED_SELECTOR)
            all_pods, _ = await self._api.list(_pods_path(self._layout), _MANAGED_SELECTOR)
        by_name: dict[str, list[Manifest]] = {}
        for pod in all_pods:
            by_name.setdefault(pod["metadata"]["labels"].get(manifests.WORKFLOW_LABEL, ""), []).append(pod)
        return tuple(
            self._summarize(workflow_id, [one], by_name.get(one["metadata"]["name"], []))
            for one in deployments
            if (workflow_id := workflow_id_of(one)) is not None
        )

    async def list_leftovers(self) -> tuple[str, ...]:
        """Return the ids of workflows with a Service, Secret or other object and without a Deployment, in order.

        Raises `ClusterError`.
        """
        left: set[str] = set()
        for kind in _COLLECTIONS:  # the Deployments last, so that a deploy meanwhile leaves nothing over
            items, _ = await self._api.list(_object_path(self._layout, kind), _MANAGED_SELECTOR)
            found = {workflow_id for one in items if (workflow_id := workflow_id_of(one)) is not None}
            left = left - found if kind == "Deployment" else left | found
        return tuple(sorted(left))

    async def _list_objects(self, workflow_id: str) -> tuple[Sequence[Manifest], Sequence[Manifest]]:
        """Return the Deployments and pods of a workflow, from the cache of the watch while that is open.

        Raises `ClusterError`.
        """
        if not self.cache.is_open:
            return await self._read_objects(workflow_id)
        await self.cache.wait_synced(self._api.request_seconds)
        name = names.workflow_name(workflow_id)
        return self.cache.deployments.objects_of(name), self.cache.pods.objects_of(name)

    async def _read_objects(self, workflow_id: str) -> tuple[Sequence[Manifest], Sequence[Manifest]]:
        label = _format_selector(manifests.workflow_labels(workflow_id))
        (deployments, _), (listed, _) = await asyncio.gather(
            self._api.list(_object_path(self._layout, "Deployment"), label),
            self._api.list(_pods_path(self._layout), label),
        )
        return deployments, listed

    def _summarize(
        self, workflow_id: str, deployments: Sequence[Manifest], listed: Sequence[Manifest]
    ) -> ObservedDeployment:
        name = names.workflow_name(workflow_id)
        deployment = next((one for one in deployments if one["metadata"]["name"] == name), None)
        return pod_status.summarize_deployment(workflow_id, deployment, listed, port=self._layout.port)

    async def list_endpoints(self, workflow_id: str) -> tuple[str, ...]:
        """Return the base URLs of a workflow's pods that can receive requests now; none for an unknown workflow.

        Raises `ClusterError`.
        """
        observed = await self.observe(workflow_id)
        return tuple(pod.address for pod in observed.ready_pods if pod.address is not None)

    async def logs(self, workflow_id: str, *, limit: int) -> tuple[PodLogLine, ...]:
        """Return the last `limit` lines of a workflow's pods together, in order of time; raises `ClusterError`.

        For a container that waits for a restart, they are those of its last run. Long logs are cut to a
        megabyte per pod.
        """
        label = _format_selector(manifests.workflow_labels(workflow_id))
        listed, _ = await self._api.list(_pods_path(self._layout), label)
        read = await asyncio.gather(*(self._read_pod_log(pod, limit) for pod in listed))
        lines = sorted((line for lines in read for line in lines), key=lambda line: line.at or "")
        return tuple(lines[-limit:])

    async def _read_pod_log(self, pod: Manifest, limit: int) -> Sequence[PodLogLine]:
        """Return up to `limit` last lines of a pod's log; none if the pod is gone or has no log yet."""
        name: str = pod["metadata"]["name"]
        query = {
            "container": manifests.CONTAINER,
            "tailLines": str(limit),
            "limitBytes": str(MAX_LOG_BYTES),
            "timestamps": "true",
        }
        if pod_status.is_between_crashes(pod):
            query["previous"] = "true"
        try:
            text = await self._api.read("GET", f"{_pods_path(self._layout, name)}/log", query=query)
        except (ObjectNotFound, ClusterRefused):
            return ()  # it is gone, or has no log yet because its container waits for its start
        return [
            PodLogLine(name, at, line)
            for at, _, line in (row.partition(" ") for row in text.decode(errors="replace").splitlines())
        ]

    # ── changes ─────────────────────────────────────────────────────────────────────────────────────────────

    async def watch(self) -> AsyncGenerator[str, None]:
        """Yield ids of workflows to observe, first all and then changed ones, until closed.

        Meanwhile it keeps the cache current, and watches quotas, so that refused pods are retried once there
        is room.
        """
        quotas = asyncio.create_task(self._quotas.follow())
        try:
            async with aclosing(self.cache.watch()) as changes:
                async for workflow_id in changes:
                    yield workflow_id
        finally:
            quotas.cancel()
            await asyncio.gather(quotas, return_exceptions=True)

    async def _retry_refused_pods(self) -> None:
        """Annotate Deployments whose pods a quota refused, since any change makes their ReplicaSets try again now.

        It pauses 0.1 s after each one, and ends once the quota is full again. Raises `ClusterError`.
        """
        refused = [one for one in self.cache.deployments if pod_status.is_over_quota(one)]
        for one in refused:
            if self._quotas.is_full:
                return
            path = _object_path(self._layout, "Deployment", one["metadata"]["name"])
            mark = {manifests.RETRIED_ANNOTATION: secrets.token_hex(4)}
            with suppress(ObjectNotFound):
                await self._api.patch(
                    path,
                    {"metadata": {"annotations": mark}},
                    content_type=MERGE,
                    query={"fieldManager": SCALER},
                )
            await asyncio.sleep(RETRY_PAUSE_SECONDS)


def _object_path(layout: ClusterLayout, kind: str, name: str | None = None) -> str:
    group, plural = _COLLECTIONS[kind]
    path = f"{group}/namespaces/{layout.namespace}/{plural}"
    return path if name is None else f"{path}/{name}"


def _pods_path(layout: ClusterLayout, name: str | None = None) -> str:
    path = f"{_CORE}/namespaces/{layout.namespace}/pods"
    return path if name is None else f"{path}/{name}"


def _format_selector(labels: Mapping[str, str]) -> str:
    return ",".join(f"{name}={value}" for name, value in labels.items())


class _FailedRequest(Struct, frozen=True):
    goal: object
    send: Send


class ChangeAttempt:
    """Attempt at a change; it counts its requests and remembers the last one."""

    def __init__(self) -> None:
        self.requests = 0
        self.last: Send | None = None

    async def send(self, request: Callable[[], Awaitable[T]]) -> T:
        """Send one request of the change, count it, and return its result.

        If it fails, it is repeated first at the next attempt.
        """
        self.requests += 1
        self.last = request
        return await request()


class ChangeAttempts:
    """Failed request of each workflow with a failed last change."""

    def __init__(self) -> None:
        self._failed: dict[str, _FailedRequest] = {}

    @asynccontextmanager
    async def begin(self, workflow_id: str, goal: object) -> AsyncIterator[ChangeAttempt]:
        """Begin an attempt at a change of a workflow to the state `goal`; the caller sends each of its requests by
        `send`.

        If the last attempt at an equal goal has failed, its failed request is repeated first, so that another failure
        costs one request. Each `ClusterError` that leaves the context says how many requests were sent.
        """
        attempt = ChangeAttempt()
        failed = self._failed.get(workflow_id)
        try:
            if failed is not None and failed.goal == goal:
                with suppress(NotDeployed):  # all requests together create the deployment again
                    await attempt.send(failed.send)
            yield attempt
        except ClusterError as error:
            error.requests = attempt.requests
            if attempt.last is not None:
                self._failed[workflow_id] = _FailedRequest(goal, attempt.last)
            raise
        self._failed.pop(workflow_id, None)
