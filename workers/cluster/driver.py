"""Protocol of cluster drivers: operations on the deployment of a workflow, with their arguments and results.

A driver stores no desired state: callers pass it in, and the observed state is read from the cluster each
time. Every operation may be repeated, also by another process, and is bounded in time. A deployer opens its driver once
it is needed.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from enum import IntEnum, StrEnum
from typing import Protocol

import structlog
from msgspec import Struct

from telemetry.process_activity import ACTIVITY, CLUSTER_CONNECTIONS

HOST_VARIABLE = "PILOTFLAME_RUNNER_HOST"
"""Address that the program in a pod listens on. Drivers set this and the next three variables themselves."""
PORT_VARIABLE = "PILOTFLAME_RUNNER_PORT"
METRICS_PORT_VARIABLE = "PILOTFLAME_RUNNER_METRICS_PORT"
POD_VARIABLE = "PILOTFLAME_RUNNER_POD"
TOKEN_VARIABLE = "PILOTFLAME_RUNNER_TOKEN"  # noqa: S105 - the name of a variable
RUNNER_VARIABLES = frozenset({HOST_VARIABLE, PORT_VARIABLE, POD_VARIABLE, TOKEN_VARIABLE})
READINESS_PATH = "/readyz"
LIVENESS_PATH = "/healthz"

log = structlog.get_logger()

OpenDriver = Callable[[], Awaitable["ClusterDriver"]]


class ClusterError(Exception):
    """Failure of an operation on the cluster."""

    requests = 1
    """Requests that were sent for the operation, including the failed one."""


class ClusterUnavailable(ClusterError):
    """The cluster did not answer, or not in time; the same call may succeed later."""


class ClusterBusy(ClusterError):
    """The cluster defers requests: the same call succeeds later, and running pods are unaffected."""

    def __init__(self, message: str, *, retry_seconds: float) -> None:
        super().__init__(message)
        self.retry_seconds = retry_seconds
        """Seconds for which the cluster asks for no requests."""


class ClusterForbidden(ClusterError):
    """Permissions or an admission webhook prevent the call, which says nothing about running pods."""


class ClusterRefused(ClusterError):
    """The cluster refuses the call: it fails again until somebody changes the configuration."""


class NotDeployed(ClusterError):
    """The cluster has no objects of this workflow: apply it first."""


class PodFailureReason(StrEnum):
    """Reason why desired pods don't become ready."""

    IMAGE_PULL = "image-pull"
    INVALID_CONFIG = "invalid-config"
    CRASH_LOOP = "crash-loop"
    OUT_OF_MEMORY = "out-of-memory"
    UNSCHEDULABLE = "unschedulable"
    QUOTA = "quota"
    NODE_NOT_READY = "node-not-ready"
    FORBIDDEN = "forbidden"
    EVICTED = "evicted"
    NOT_CREATED = "not-created"


class PodFailure(Struct, frozen=True):
    """Failure of pods, with the cluster's own message."""

    reason: PodFailureReason
    message: str
    is_final: bool = False
    """It is permanent: new pods fail too, until somebody changes the configuration."""


class PodResourceLimits(Struct, frozen=True):
    """Resource requests and limits of one pod."""

    cpu_millicores: int = 500
    memory_mebibytes: int = 256


@dataclass(frozen=True)
class DesiredDeployment:
    """Desired state of a deployment."""

    workflow_id: str
    organization_id: str
    definition_hash: str
    """Pods run one definition: another hash replaces the pods one by one."""
    generation: int
    """Increases with each change of the desired state; observations return the applied one."""
    image: str
    command: tuple[str, ...]
    token: str = field(repr=False)
    """Token with which the pod authenticates to the gateway. It reaches the pod by a Secret, never by the
    specification.
    """
    replicas: int = 1
    environment: Mapping[str, str] = field(default_factory=dict)
    """Environment variables without secrets: everyone with read access to the cluster can read them."""
    resources: PodResourceLimits = field(default_factory=PodResourceLimits)


class PodStage(IntEnum):
    """Progress of a pod from its creation until it is ready."""

    CREATED = 0
    SCHEDULED = 1
    """Its node is chosen, prepares the pod and pulls its image."""
    STARTED = 2
    """Its program was started at least once."""
    READY = 3


class ObservedPod(Struct, frozen=True):
    """Observed state of a pod."""

    name: str
    definition_hash: str
    address: str | None
    """Base URL, such as `http://10.0.0.7:8080`; None before the pod has an address."""
    is_ready: bool
    """It has answered its readiness probe, and is not terminating."""
    is_terminating: bool
    stage: PodStage = PodStage.READY
    """Progress of its start."""
    ended_at: datetime | None = None
    """Time by its node's clock between the last end of its program and the next start: no earlier process
    still runs.
    """
    is_out_of_memory: bool = False
    """Its program was last killed because it exceeded its memory limit."""
    failure: PodFailure | None = None
    """Reason why it is not ready, if the cluster gives one."""


class ObservedDeployment(Struct, frozen=True):
    """Observed state of a workflow's deployment."""

    workflow_id: str
    exists: bool
    replicas: int = 0
    """Number of pods that was last requested from the cluster."""
    available: int = 0
    """Number of available pods by the cluster's count; stale while `is_current` is false."""
    generation: int | None = None
    """`DesiredDeployment.generation` of the last apply."""
    definition_hash: str | None = None
    is_current: bool = False
    """The cluster has observed the last change of the specification."""
    updated: int = 0
    """Number of pods of the last apply, by the cluster's count."""
    pods: tuple[ObservedPod, ...] = ()
    """All pods, including terminating ones: they live until they disappear from this list."""
    failure: PodFailure | None = None

    @property
    def ready_pods(self) -> tuple[ObservedPod, ...]:
        return tuple(pod for pod in self.pods if pod.is_ready)

    @property
    def is_starting(self) -> bool:
        """Whether desired pods are missing, not ready, or of an earlier apply."""
        live = [pod for pod in self.pods if not pod.is_terminating]
        is_complete = (
            self.is_current
            and self.updated >= self.replicas == len(live)
            and all(pod.is_ready for pod in live)
        )
        return self.exists and self.replicas > 0 and not is_complete

    @property
    def is_ready(self) -> bool:
        """Whether a pod can receive requests now, by a status that covers the last change."""
        return self.is_current and self.available > 0 and bool(self.ready_pods)

    @property
    def is_rolled_out(self) -> bool:
        """Whether the desired number of pods is ready, all of the last applied definition, and no other pod
        is left.
        """
        return (
            self.exists
            and self.is_current
            and len(self.pods) == len(self.ready_pods) == self.available == self.replicas
            and all(pod.definition_hash == self.definition_hash for pod in self.pods)
        )


class PodLogLine(Struct, frozen=True):
    """Line of a pod's log; `at` is in RFC 3339, or None if the cluster records no times."""

    pod: str
    at: str | None
    text: str


class ClusterDriver(Protocol):
    """Driver of one cluster.

    Every operation raises `ClusterUnavailable` if the cluster can't be reached in time, `ClusterBusy` if it
    defers requests, `ClusterForbidden` if permissions are missing, and `ClusterRefused` if it rejects the
    request.
    """

    async def apply(self, desired: DesiredDeployment) -> None:
        """Create or update all objects of a deployment, and set its number of pods; don't wait for pods.
        Raises `ClusterError`.
        """

    async def scale(self, workflow_id: str, replicas: int) -> None:
        """Set the desired number of pods, 0 to stop; don't wait for them. Raises `NotDeployed` and `ClusterError`."""

    async def observe(self, workflow_id: str) -> ObservedDeployment:
        """Return the observed state of a deployment, also of one that doesn't exist. Raises `ClusterError`.

        While a watch is open it may answer from the watch's cache, which is moments old.
        """

    async def observe_uncached(self, workflow_id: str) -> ObservedDeployment:
        """Return the current state of a deployment by requests to the cluster itself, never from a cache.
        Raises `ClusterError`.
        """

    async def list(self) -> tuple[ObservedDeployment, ...]:
        """Return the observed state of each deployment that was applied to this cluster and not deleted.
        Raises `ClusterError`.
        """

    async def list_leftovers(self) -> tuple[str, ...]:
        """Return the ids of workflows with other objects in the cluster and without a deployment, as after the
        deletion of one by hand. Raises `ClusterError`.
        """

    async def delete(self, workflow_id: str) -> bool:
        """Stop the pods and delete all objects of a deployment; return True once none is left. Raises
        `ClusterError`.

        Return False while pods still end: call it again. Objects that pods need remain until the pods have
        ended.
        """

    async def replace(self, workflow_id: str, pods: Collection[str]) -> None:
        """Stop pods by their names, so that the cluster starts others in their place; don't wait. Raises
        `ClusterError`.

        Missing pods are ignored.
        """

    def watch(self) -> AsyncGenerator[str, None]:
        """Yield the id of each workflow to observe again: first all of them, then each that changes, without gaps.

        It is silent while the cluster is unreachable. Canceling the wait for the next id ends the watch.
        """

    async def logs(self, workflow_id: str, *, limit: int) -> tuple[PodLogLine, ...]:
        """Return up to `limit` last log lines of a workflow's pods, oldest first. Raises `ClusterError`."""

    async def list_endpoints(self, workflow_id: str) -> tuple[str, ...]:
        """Return the base URL of each pod of a workflow that can receive requests now; none for an unknown workflow.

        Raises `ClusterError`.
        """

    async def close(self) -> None:
        """Close the connections to the cluster; the pods keep running and are found again by the next driver."""


class ChangedWorkflows:
    """IDs of workflows to observe; several changes before an observation count as one."""

    def __init__(self) -> None:
        self._ids: dict[str, None] = {}
        self._is_there = asyncio.Event()

    def add(self, ids: Iterable[str]) -> None:
        """Add ids of workflows whose deployments changed; one that already waits keeps its place and is not
        added twice.
        """
        self._ids.update(dict.fromkeys(ids))
        if self._ids:
            self._is_there.set()

    async def take_oldest(self) -> str:
        """Wait for a change; remove and return the workflow that has waited longest."""
        await self._is_there.wait()
        workflow_id = next(iter(self._ids))
        del self._ids[workflow_id]
        if not self._ids:
            self._is_there.clear()
        return workflow_id


class ClusterConnection:
    """Driver of one cluster, shared by all tasks of a deployer."""

    def __init__(
        self, open_driver: OpenDriver, *, cluster: str, on_open: Callable[[ClusterDriver], None]
    ) -> None:
        self.current: ClusterDriver | None = None
        """Open driver, or None before the first call that opens it."""
        self._open_driver = open_driver
        self._cluster = cluster
        self._on_open = on_open
        self._opening = asyncio.Lock()

    async def driver(self) -> ClusterDriver:
        """Return the driver of the cluster; the first call that succeeds opens it, and calls `on_open` with it.

        Raises `ClusterError`; the next call tries again.
        """
        async with self._opening:
            if self.current is None:
                try:
                    self.current = await self._open_driver()
                except ClusterError as error:
                    ACTIVITY.note_failure(CLUSTER_CONNECTIONS[self._cluster], error)
                    raise
                log.info("cluster opened", cluster=self._cluster)
                self._on_open(self.current)
                await asyncio.sleep(0)  # the watch that starts now answers all reads from the first one on
            return self.current
