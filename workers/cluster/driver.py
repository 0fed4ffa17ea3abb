"""What every cluster can do for a deployed workflow, and the values that go in and come out.

A driver holds no wishes of its own: what is wanted is handed in, what there is is read from the cluster each time.
Every operation may be repeated, by another process too, and is bounded in time.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Collection, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from enum import IntEnum, StrEnum
from typing import Protocol

HOST_VARIABLE = "PILOTFLAME_RUNNER_HOST"
"""The address that the program in a pod listens on; each driver sets these four itself."""
PORT_VARIABLE = "PILOTFLAME_RUNNER_PORT"
POD_VARIABLE = "PILOTFLAME_RUNNER_POD"
TOKEN_VARIABLE = "PILOTFLAME_RUNNER_TOKEN"  # noqa: S105 - the name of one
RUNNER_VARIABLES = frozenset({HOST_VARIABLE, PORT_VARIABLE, POD_VARIABLE, TOKEN_VARIABLE})
READINESS_PATH = "/readyz"
LIVENESS_PATH = "/healthz"


class ClusterError(Exception):
    """The cluster did not do what it was asked."""

    requests = 1
    """Requests that were sent for it, the one that failed included."""


class ClusterUnavailable(ClusterError):
    """The cluster did not answer, or not in time; the same call may succeed later."""


class ClusterBusy(ClusterError):
    """The cluster puts requests off: the same call succeeds later, and nothing is wrong with what runs there."""

    def __init__(self, message: str, *, retry_seconds: float) -> None:
        super().__init__(message)
        self.retry_seconds = retry_seconds
        """How long the cluster asks to be left alone."""


class ClusterForbidden(ClusterError):
    """Rights or an admission webhook are in the way, which says nothing about the pods that run."""


class ClusterRefused(ClusterError):
    """The cluster will not do it: the same call fails again until somebody changes something."""


class NotDeployed(ClusterError):
    """The cluster holds nothing for this workflow: apply it first."""


class PodFailureReason(StrEnum):
    """Why pods that are wanted do not come up."""

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


@dataclass(frozen=True)
class PodFailure:
    """A reason, and the cluster's own words."""

    reason: PodFailureReason
    message: str
    is_final: bool = False
    """It does not go away by itself: new pods meet it too, until somebody changes something."""


@dataclass(frozen=True)
class PodResourceLimits:
    """What one pod is granted, and may not exceed."""

    cpu_millicores: int = 500
    memory_mebibytes: int = 256


@dataclass(frozen=True)
class DesiredDeployment:
    """What a deployment is wanted to be."""

    workflow_id: str
    organization_id: str
    definition_hash: str
    """A pod is of one definition: another hash replaces the pods one by one."""
    generation: int
    """Rises whenever something else is wanted, and is told back as observed."""
    image: str
    command: tuple[str, ...]
    token: str = field(repr=False)
    """What the pod proves itself with; it reaches the pod by a secret, never by the specification."""
    replicas: int = 1
    environment: Mapping[str, str] = field(default_factory=dict)
    """Nothing secret: whoever may read the cluster reads it."""
    resources: PodResourceLimits = PodResourceLimits()


class PodStage(IntEnum):
    """Progress of a pod from its creation until it is ready."""

    CREATED = 0
    SCHEDULED = 1
    """A machine was chosen for it, which prepares it and pulls its image."""
    STARTED = 2
    """Its program was started, once at least."""
    READY = 3


@dataclass(frozen=True)
class ObservedPod:
    """One copy of the program, as it is now."""

    name: str
    definition_hash: str
    address: str | None
    """Base URL, such as `http://10.0.0.7:8080`, once it has one."""
    is_ready: bool
    """It has answered its readiness probe, and is not being stopped."""
    is_terminating: bool
    stage: PodStage = PodStage.READY
    """How far it has come."""
    ended_at: datetime | None = None
    """By its machine's clock, a moment between the last end of its program and the next start: no process from before
    runs any more.
    """
    is_out_of_memory: bool = False
    """Its program was ended last because it had used more memory than it is granted."""
    trouble: PodFailure | None = None
    """Why it is not ready, where the cluster says so."""


@dataclass(frozen=True)
class ObservedDeployment:
    """What the cluster holds for a workflow."""

    workflow_id: str
    exists: bool
    replicas: int = 0
    """How many pods the cluster was asked for last."""
    available: int = 0
    """How many of them it counts as available; stale as long as `is_current` is false."""
    generation: int | None = None
    """`Wanted.generation` of what was applied last."""
    definition_hash: str | None = None
    is_current: bool = False
    """The cluster has taken notice of what it was asked last."""
    updated: int = 0
    """How many of its pods are of what was applied last, as far as it has counted."""
    pods: tuple[ObservedPod, ...] = ()
    """Those that are being stopped too: they live until they are gone from here."""
    trouble: PodFailure | None = None

    @property
    def ready_pods(self) -> tuple[ObservedPod, ...]:
        return tuple(pod for pod in self.pods if pod.is_ready)

    @property
    def is_starting(self) -> bool:
        """Pods that are wanted are still to be made, or to become ready."""
        live = [pod for pod in self.pods if not pod.is_terminating]
        is_complete = (
            self.is_current
            and self.updated >= self.replicas == len(live)
            and all(pod.is_ready for pod in live)
        )
        return self.exists and self.replicas > 0 and not is_complete

    @property
    def is_ready(self) -> bool:
        """A pod may be sent a request now."""
        return self.is_current and self.available > 0 and bool(self.ready_pods)

    @property
    def is_rolled_out(self) -> bool:
        """As many pods as are wanted are ready, all of the definition applied last, and no other is left."""
        return (
            self.exists
            and self.is_current
            and len(self.pods) == len(self.ready_pods) == self.available == self.replicas
            and all(pod.definition_hash == self.definition_hash for pod in self.pods)
        )


@dataclass(frozen=True)
class PodLogLine:
    """What a pod has written; `at` is RFC 3339, or None where the cluster keeps no times."""

    pod: str
    at: str | None
    text: str


class ClusterDriver(Protocol):
    """One cluster.

    Every operation raises `ClusterUnavailable` when the cluster can't be reached in time, `ClusterBusy` when it puts
    requests off, `ClusterForbidden` when it lets nobody ask, and `ClusterRefused` when it says no.
    """

    async def apply(self, wanted: DesiredDeployment) -> None:
        """Make all that belongs to a deployment exist as wanted, and ask for its replicas; wait for no pod."""

    async def scale(self, workflow_id: str, replicas: int) -> None:
        """Ask for so many pods, and wait for none; raises `NotDeployed`."""

    async def observe(self, workflow_id: str) -> ObservedDeployment:
        """Tell what there is; what does not exist is an answer too.

        While a watch is open it may answer from what that has brought, moments late.
        """

    async def observe_uncached(self, workflow_id: str) -> ObservedDeployment:
        """Tell what there is now, by asking the cluster itself."""

    async def list(self) -> tuple[ObservedDeployment, ...]:
        """Tell of every deployment that was ever applied here and not deleted."""

    async def delete(self, workflow_id: str) -> bool:
        """Remove all that belongs to a deployment; True once nothing is left, False when pods still end: ask again.

        What pods need stays until they have ended.
        """

    async def replace(self, workflow_id: str, pods: Collection[str]) -> None:
        """Stop these pods, by their names, so that others take their places; wait for none."""

    def watch(self) -> AsyncGenerator[str, None]:
        """Yield ids of workflows to observe again: all of them at first, then each that changes, over all gaps.

        A cluster that is away only makes it silent. To give up waiting for the next one ends it.
        """

    async def logs(self, workflow_id: str, *, limit: int) -> tuple[PodLogLine, ...]:
        """Return the last lines of its pods, oldest first."""

    async def endpoint(self, workflow_id: str) -> tuple[str, ...]:
        """Return the base URL of each pod that may be sent a request now."""

    async def close(self) -> None:
        """Let go of the cluster; what runs there goes on."""
