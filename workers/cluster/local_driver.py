"""Driver for this machine: a pod is a subprocess on a loopback port, for `pilotflame dev`.

It is no security boundary: a pod runs as the same user with all of its permissions. Deployments are recorded
in a folder, so that a restarted deployer finds their pods again.
"""

from __future__ import annotations

import asyncio
import fcntl
import os
import shutil
import time
from collections.abc import AsyncGenerator, Callable, Collection, Sequence
from contextlib import suppress
from dataclasses import replace
from hashlib import blake2b
from pathlib import Path
from typing import Self

import aiohttp
import msgspec
import structlog
from msgspec import Struct

from json_text import decoding
from models import pod_identity as names
from telemetry.process_activity import ACTIVITY, LOCAL_PODS, ServerAnswer
from workers.cluster.atomic_files import replace_file
from workers.cluster.driver import (
    ChangedWorkflows,
    ClusterRefused,
    DesiredDeployment,
    NotDeployed,
    ObservedDeployment,
    PodLogLine,
)
from workers.cluster.local_pod import POD_FILE, LocalPod, LocalPodLimits, LocalPodRecord, new_pod_name

DEPLOYMENT_FILE = "deployment.json"
LOCK_FILE = "lock"
DELETE_SECONDS = 5.0

log = structlog.get_logger()


class LocalDeploymentRecord(msgspec.Struct, frozen=True):
    """Record of a deployment: its desired state, including its token."""

    desired: DesiredDeployment = msgspec.field(name="wanted")
    """Called `wanted` in the files of earlier deployers."""
    is_deleted: bool = False


class PodCopy(Struct, frozen=True):
    """Facts about a pod on which scaling depends."""

    name: str
    template: str
    is_ready: bool


class ScalePlan(Struct, frozen=True):
    """Number of pods to start, and the pods to stop."""

    starts: int
    stops: tuple[str, ...]


def plan_scaling(copies: Sequence[PodCopy], *, template: str, replicas: int) -> ScalePlan:
    """Return the number of pods to start and the pods to stop, on the way to `replicas` pods of one template.

    A template is a hash of all that a pod starts with. A pod of another template remains until a pod of this template
    is ready in its place.
    """
    ready_first = sorted(copies, key=lambda copy: not copy.is_ready)
    current = [copy for copy in ready_first if copy.template == template]
    others = [copy for copy in ready_first if copy.template != template]
    replaced = sum(copy.is_ready for copy in current)
    surplus = current[replicas:] + others[max(0, replicas - replaced) :]
    return ScalePlan(starts=max(0, replicas - len(current)), stops=tuple(copy.name for copy in surplus))


async def open_local(
    folder: Path, *, runs_without_isolation: bool, limits: LocalPodLimits | None = None
) -> LocalDriver:
    """Return a driver for the pods of a folder, and supervise those that already run.

    Raises `ClusterRefused` if another deployer holds the folder, or unless `runs_without_isolation`: the
    caller accepts that pods are isolated neither from each other nor from this user.
    """
    if not runs_without_isolation:
        raise ClusterRefused(
            "Local pods are not isolated from each other nor from this user: only `dev` runs them"
        )
    driver = LocalDriver(folder, _lock_folder(folder), limits or LocalPodLimits())
    driver.adopt()
    return driver


class LocalDriver:
    """Driver for the pods of one folder."""

    def __init__(self, folder: Path, lock: int, limits: LocalPodLimits) -> None:
        self._folder = folder.resolve()
        self._lock = lock
        self._limits = limits
        self._session = aiohttp.ClientSession()
        self._deployments: dict[str, LocalDeployment] = {}
        self._watchers: set[ChangedWorkflows] = set()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    def adopt(self) -> None:
        """Supervise the pods that an earlier deployer left running, by the records in its folder; unreadable
        ones are logged.
        """
        for path in sorted(self._folder.glob(f"*/{DEPLOYMENT_FILE}")):
            try:
                found = decoding.decode(path.read_bytes(), LocalDeploymentRecord)
            except msgspec.DecodeError as error:
                log.warning("local deployment not readable", path=str(path), error=str(error))
                continue
            self._add_deployment(found).adopt()

    async def close(self) -> None:
        """Stop supervising and release the folder; the pods keep running for the next deployer."""
        for deployment in self._deployments.values():
            await deployment.close()
        await self._session.close()
        os.close(self._lock)

    async def end_pods(self, patience_seconds: float) -> None:
        """End all pods by SIGTERM, then SIGKILL after `patience_seconds`, and close the driver.

        Their records stay: the next driver of the folder starts them again.
        """
        pods = [pod for deployment in self._deployments.values() for pod in deployment.pods.values()]
        await self.close()
        await asyncio.gather(*(pod.end(patience_seconds) for pod in pods))

    async def apply(self, desired: DesiredDeployment) -> None:
        """Store the desired state of a deployment in its folder, and begin to start and stop pods accordingly."""
        record = LocalDeploymentRecord(desired)
        deployment = self._deployments.get(desired.workflow_id) or self._add_deployment(record)
        deployment.apply(record)

    async def scale(self, workflow_id: str, replicas: int) -> None:
        """Set the number of pods of a deployment, 0 to stop it; raises `NotDeployed` if it doesn't exist."""
        deployment = self._deployments.get(workflow_id)
        if deployment is None or deployment.record.is_deleted:
            raise NotDeployed(f"{workflow_id} is not deployed on this machine")
        deployment.apply(LocalDeploymentRecord(replace(deployment.record.desired, replicas=replicas)))

    async def observe(self, workflow_id: str) -> ObservedDeployment:
        """Return the observed state of a deployment; one that doesn't exist is reported as such."""
        begun_at = time.monotonic()
        deployment = self._deployments.get(workflow_id)
        observed = (
            deployment.observed if deployment is not None else ObservedDeployment(workflow_id, exists=False)
        )
        now = time.monotonic()
        ACTIVITY.connections[LOCAL_PODS].answer = ServerAnswer(now, now - begun_at)
        return observed

    async def observe_uncached(self, workflow_id: str) -> ObservedDeployment:
        """Return the observed state as `observe` does: this driver has no cache that could be outdated."""
        return await self.observe(workflow_id)

    async def list(self) -> tuple[ObservedDeployment, ...]:
        """Return the observed state of all deployments on this machine."""
        every = (deployment.observed for deployment in self._deployments.values())
        return tuple(observed for observed in every if observed.exists)

    async def list_leftovers(self) -> tuple[str, ...]:
        """Return no workflow: local deployments consist of their pods and a folder."""
        return ()

    async def delete(self, workflow_id: str) -> bool:
        """Stop the pods, wait up to five seconds for their end, and remove the deployment; return whether it
        is gone.

        If it is not, call it again.
        """
        deployment = self._deployments.get(workflow_id)
        if deployment is None:
            return True
        deployment.apply(
            LocalDeploymentRecord(replace(deployment.record.desired, replicas=0), is_deleted=True)
        )
        with suppress(TimeoutError):
            async with asyncio.timeout(DELETE_SECONDS):
                await deployment.is_empty.wait()
        if not deployment.is_empty.is_set():
            return False
        if deployment.record.is_deleted and self._deployments.pop(workflow_id, None) is not None:
            await deployment.close()
            shutil.rmtree(deployment.folder, ignore_errors=True)
            self._notify_changed(workflow_id)
        return True

    async def replace(self, workflow_id: str, pods: Collection[str]) -> None:
        """Stop pods by their names (SIGTERM, then SIGKILL after the grace period), and start as many as are missing
        from the desired number of replicas; don't wait.

        Nothing happens for an unknown workflow.
        """
        deployment = self._deployments.get(workflow_id)
        if deployment is not None:
            deployment.replace(pods)

    async def watch(self) -> AsyncGenerator[str, None]:
        """Yield the id of each workflow whose pods have changed, first of all that exist, until closed."""
        changes = ChangedWorkflows()
        changes.add(self._deployments)
        self._watchers.add(changes)
        try:
            while True:
                yield await changes.take_oldest()
        finally:
            self._watchers.discard(changes)

    async def logs(self, workflow_id: str, *, limit: int) -> tuple[PodLogLine, ...]:
        """Return up to `limit` last lines of a workflow's pods, those of one pod after the other; none for an unknown
        workflow.

        The lines have no times.
        """
        deployment = self._deployments.get(workflow_id)
        if deployment is None:
            return ()
        lines = [
            PodLogLine(pod.folder.name, None, text)
            for pod in deployment.pods.values()
            for text in pod.log_lines(limit)
        ]
        return tuple(lines[-limit:])

    async def list_endpoints(self, workflow_id: str) -> tuple[str, ...]:
        """Return the base URLs of a workflow's pods that can receive requests now; none for an unknown workflow."""
        observed = await self.observe(workflow_id)
        return tuple(pod.address for pod in observed.ready_pods if pod.address is not None)

    def _add_deployment(self, record: LocalDeploymentRecord) -> LocalDeployment:
        workflow_id = record.desired.workflow_id
        deployment = LocalDeployment(
            self._folder / names.workflow_name(workflow_id),
            record,
            self._session,
            self._limits,
            lambda: self._notify_changed(workflow_id),
        )
        self._deployments[workflow_id] = deployment
        return deployment

    def _notify_changed(self, workflow_id: str) -> None:
        for watcher in self._watchers:
            watcher.add((workflow_id,))


class LocalDeployment:
    """Pods of one workflow, reconciled to the desired number and template."""

    def __init__(
        self,
        folder: Path,
        record: LocalDeploymentRecord,
        session: aiohttp.ClientSession,
        limits: LocalPodLimits,
        changed: Callable[[], None],
    ) -> None:
        self.folder = folder
        self.record = record
        self.pods: dict[str, LocalPod] = {}
        self.is_empty = asyncio.Event()
        self._session = session
        self._limits = limits
        self._changed = changed
        self._lives: dict[str, asyncio.Task[None]] = {}

    @property
    def observed(self) -> ObservedDeployment:
        """State of the deployment and its pods, as the driver reports it."""
        desired = self.record.desired
        pods = tuple(pod.observed for pod in self.pods.values())
        if self.record.is_deleted:
            return ObservedDeployment(desired.workflow_id, exists=False, pods=pods)
        template = _pod_template_hash(desired)
        updated = sum(
            pod.record.template == template and not pod.is_terminating for pod in self.pods.values()
        )
        failures = (pod.failure for pod in self.pods.values() if not pod.is_terminating)
        return ObservedDeployment(
            desired.workflow_id,
            exists=True,
            replicas=desired.replicas,
            available=sum(pod.is_ready for pod in pods),
            generation=desired.generation,
            definition_hash=desired.definition_hash,
            is_current=True,
            updated=updated,
            pods=pods,
            failure=next((failure for failure in failures if failure is not None), None),
        )

    def adopt(self) -> None:
        """Supervise the pods that are recorded in the folder, then start and stop pods as desired; unreadable
        records are skipped.
        """
        for path in sorted(self.folder.glob(f"*/{POD_FILE}")):
            with suppress(msgspec.DecodeError):
                self._add(path.parent, decoding.decode(path.read_bytes(), LocalPodRecord))
        self._reconcile()

    def apply(self, record: LocalDeploymentRecord) -> None:
        """Store the desired state in a file if it has changed, then begin to start and stop pods as it says."""
        if record != self.record or not (self.folder / DEPLOYMENT_FILE).exists():
            self.record = record
            self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            replace_file(self.folder / DEPLOYMENT_FILE, msgspec.json.encode(record))
        self._reconcile()
        self._changed()

    def replace(self, names: Collection[str]) -> None:
        """Stop the pods with these names that exist, and start new ones up to the desired number of replicas."""
        for name in self.pods.keys() & set(names):
            self.pods[name].stop()
        self._reconcile()
        self._changed()

    async def close(self) -> None:
        """Stop supervising the pods; they keep running for the next deployer."""
        lives = tuple(self._lives.values())
        for life in lives:
            life.cancel()
        await asyncio.gather(*lives, return_exceptions=True)

    def _reconcile(self) -> None:
        """Take the next step toward the desired number and template of pods: begin to start and stop pods."""
        desired = self.record.desired
        template = _pod_template_hash(desired)
        copies = [
            PodCopy(name, pod.record.template, pod.is_ready)
            for name, pod in self.pods.items()
            if not pod.is_terminating
        ]
        decided = plan_scaling(copies, template=template, replicas=desired.replicas)
        for name in decided.stops:
            self.pods[name].stop()
        for _ in range(decided.starts):
            record = LocalPodRecord(template=template, definition_hash=desired.definition_hash)
            self._add(self.folder / new_pod_name(self.folder.name), record)
        if self.pods:
            self.is_empty.clear()
        else:
            self.is_empty.set()

    def _add(self, folder: Path, record: LocalPodRecord) -> None:
        """Record a pod in this deployment, and supervise it in a task."""
        pod = LocalPod(folder, record, self._session, self._limits, self._on_pod_change)
        self.pods[folder.name] = pod
        self._lives[folder.name] = asyncio.create_task(pod.supervise(self.record.desired))

    def _on_pod_change(self) -> None:
        for name in [name for name, pod in self.pods.items() if pod.is_gone]:
            del self.pods[name]
            del self._lives[name]
        self._reconcile()
        self._changed()


def _pod_template_hash(desired: DesiredDeployment) -> str:
    """Return a hash of all that a pod is started with; a different one requires another pod."""
    parts = (desired.definition_hash, desired.command, desired.token, sorted(desired.environment.items()))
    return blake2b(msgspec.json.encode(parts), digest_size=8).hexdigest()


def _lock_folder(folder: Path) -> int:
    """Return a file descriptor that locks the folder until it is closed.

    The folder is created if it is missing. Raises `ClusterRefused` if another process holds the lock.
    """
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    descriptor = os.open(folder / LOCK_FILE, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(descriptor)
        raise ClusterRefused(f"Another process runs the pods of {folder}") from error
    return descriptor
