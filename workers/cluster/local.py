"""Deployments on this machine: a pod is a subprocess on a loopback port, for `pilotflame dev`.

It is no security boundary: a pod runs as the same user, and may read what that user may. What runs is kept in a
folder, so that it survives a restart of the deployer, which finds it again.
"""

from __future__ import annotations

import asyncio
import fcntl
import os
import shutil
from collections.abc import AsyncGenerator, Callable, Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from hashlib import blake2b
from pathlib import Path
from typing import Self

import aiohttp
import msgspec
import structlog

from json_text import decoding
from models import workflow_names as names
from workers.cluster.changes import Changes
from workers.cluster.driver import ClusterRefused, LogLine, NotDeployed, Observed, Wanted
from workers.cluster.files import replace_file
from workers.cluster.local_pod import RECORD, Limits, LocalPod, Record, new_name

KEPT = "deployment.json"
LOCK = "lock"
DELETE_SECONDS = 5.0

log = structlog.get_logger()


class Kept(msgspec.Struct, frozen=True):
    """What is kept of a deployment: all that was wanted of it, its token among that."""

    wanted: Wanted
    is_deleted: bool = False


@dataclass(frozen=True)
class Copy:
    """What a decision about a pod depends on."""

    name: str
    template: str
    is_ready: bool


@dataclass(frozen=True)
class Plan:
    """How many pods to start, and which to stop."""

    starts: int
    stops: tuple[str, ...]


def plan(copies: Sequence[Copy], *, template: str, replicas: int) -> Plan:
    """Decide what brings the pods that live to as many of one template.

    A pod of another template stays until one of this is ready in its place.
    """
    ready_first = sorted(copies, key=lambda copy: not copy.is_ready)
    current = [copy for copy in ready_first if copy.template == template]
    others = [copy for copy in ready_first if copy.template != template]
    replaced = sum(copy.is_ready for copy in current)
    surplus = current[replicas:] + others[max(0, replicas - replaced) :]
    return Plan(starts=max(0, replicas - len(current)), stops=tuple(copy.name for copy in surplus))


async def open_local(
    folder: Path, *, runs_without_isolation: bool, limits: Limits | None = None
) -> LocalDriver:
    """Return a driver whose pods live in a folder, with those that live there already.

    Raises `ClusterRefused` unless the caller knows that its pods are not isolated from each other, and when another
    deployer holds the folder.
    """
    if not runs_without_isolation:
        raise ClusterRefused(
            "Local pods are not isolated from each other nor from this user: only `dev` runs them"
        )
    driver = LocalDriver(folder, _lock(folder), limits or Limits())
    driver.adopt()
    return driver


class LocalDriver:
    """The pods of one folder."""

    def __init__(self, folder: Path, lock: int, limits: Limits) -> None:
        self._folder = folder.resolve()
        self._lock = lock
        self._limits = limits
        self._session = aiohttp.ClientSession()
        self._deployments: dict[str, LocalDeployment] = {}
        self._watchers: set[Changes] = set()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    def adopt(self) -> None:
        """Take over what an earlier deployer has left running."""
        for kept in sorted(self._folder.glob(f"*/{KEPT}")):
            try:
                found = decoding.decode(kept.read_bytes(), Kept)
            except msgspec.DecodeError as error:
                log.warning("local deployment not readable", path=str(kept), error=str(error))
                continue
            self._hold(found).adopt()

    async def close(self) -> None:
        """Leave the pods running for the next deployer."""
        for deployment in self._deployments.values():
            await deployment.close()
        await self._session.close()
        os.close(self._lock)

    async def end_pods(self, patience_seconds: float) -> None:
        """End all pods and close; whoever opens the folder next starts them again."""
        pods = [pod for deployment in self._deployments.values() for pod in deployment.pods.values()]
        await self.close()
        await asyncio.gather(*(pod.end(patience_seconds) for pod in pods))

    async def apply(self, wanted: Wanted) -> None:
        """Keep what is wanted, and begin to bring it about."""
        kept = Kept(wanted)
        deployment = self._deployments.get(wanted.workflow_id) or self._hold(kept)
        deployment.want(kept)

    async def scale(self, workflow_id: str, replicas: int) -> None:
        """Ask for so many pods; raises `NotDeployed`."""
        deployment = self._deployments.get(workflow_id)
        if deployment is None or deployment.kept.is_deleted:
            raise NotDeployed(f"{workflow_id} is not deployed on this machine")
        deployment.want(Kept(replace(deployment.kept.wanted, replicas=replicas)))

    async def observe(self, workflow_id: str) -> Observed:
        """Tell what there is."""
        deployment = self._deployments.get(workflow_id)
        return deployment.observed if deployment is not None else Observed(workflow_id, exists=False)

    async def observe_uncached(self, workflow_id: str) -> Observed:
        """Tell what there is."""
        return await self.observe(workflow_id)

    async def list(self) -> tuple[Observed, ...]:
        """Tell of every deployment."""
        every = (deployment.observed for deployment in self._deployments.values())
        return tuple(observed for observed in every if observed.exists)

    async def delete(self, workflow_id: str) -> bool:
        """Stop the pods, and forget the deployment once they have ended."""
        deployment = self._deployments.get(workflow_id)
        if deployment is None:
            return True
        deployment.want(Kept(replace(deployment.kept.wanted, replicas=0), is_deleted=True))
        with suppress(TimeoutError):
            async with asyncio.timeout(DELETE_SECONDS):
                await deployment.is_empty.wait()
        if not deployment.is_empty.is_set():
            return False
        if deployment.kept.is_deleted and self._deployments.pop(workflow_id, None) is not None:
            await deployment.close()
            shutil.rmtree(deployment.folder, ignore_errors=True)
            self._changed(workflow_id)
        return True

    async def replace(self, workflow_id: str, pods: Collection[str]) -> None:
        """Stop these pods; others are started in their places."""
        deployment = self._deployments.get(workflow_id)
        if deployment is not None:
            deployment.replace(pods)

    async def watch(self) -> AsyncGenerator[str, None]:
        """Yield what to observe, for as long as it is asked for."""
        changes = Changes()
        changes.add(self._deployments)
        self._watchers.add(changes)
        try:
            while True:
                yield await changes.next()
        finally:
            self._watchers.discard(changes)

    async def logs(self, workflow_id: str, *, limit: int) -> tuple[LogLine, ...]:
        """Return the last lines of its pods, one pod after the other."""
        deployment = self._deployments.get(workflow_id)
        if deployment is None:
            return ()
        lines = [
            LogLine(pod.folder.name, None, text)
            for pod in deployment.pods.values()
            for text in pod.log_lines(limit)
        ]
        return tuple(lines[-limit:])

    async def endpoint(self, workflow_id: str) -> tuple[str, ...]:
        """Return the addresses of the ready pods."""
        observed = await self.observe(workflow_id)
        return tuple(pod.address for pod in observed.ready_pods if pod.address is not None)

    def _hold(self, kept: Kept) -> LocalDeployment:
        workflow_id = kept.wanted.workflow_id
        deployment = LocalDeployment(
            self._folder / names.workflow_name(workflow_id),
            kept,
            self._session,
            self._limits,
            lambda: self._changed(workflow_id),
        )
        self._deployments[workflow_id] = deployment
        return deployment

    def _changed(self, workflow_id: str) -> None:
        for watcher in self._watchers:
            watcher.add((workflow_id,))


class LocalDeployment:
    """The pods of one workflow: as many as are wanted, all of one template in the end."""

    def __init__(
        self,
        folder: Path,
        kept: Kept,
        session: aiohttp.ClientSession,
        limits: Limits,
        changed: Callable[[], None],
    ) -> None:
        self.folder = folder
        self.kept = kept
        self.pods: dict[str, LocalPod] = {}
        self.is_empty = asyncio.Event()
        self._session = session
        self._limits = limits
        self._changed = changed
        self._lives: dict[str, asyncio.Task[None]] = {}

    @property
    def observed(self) -> Observed:
        wanted = self.kept.wanted
        pods = tuple(pod.shown for pod in self.pods.values())
        if self.kept.is_deleted:
            return Observed(wanted.workflow_id, exists=False, pods=pods)
        template = _template(wanted)
        updated = sum(
            pod.record.template == template and not pod.is_terminating for pod in self.pods.values()
        )
        troubles = (pod.trouble for pod in self.pods.values() if not pod.is_terminating)
        return Observed(
            wanted.workflow_id,
            exists=True,
            replicas=wanted.replicas,
            available=sum(pod.is_ready for pod in pods),
            generation=wanted.generation,
            definition_hash=wanted.definition_hash,
            is_current=True,
            updated=updated,
            pods=pods,
            trouble=next((trouble for trouble in troubles if trouble is not None), None),
        )

    def adopt(self) -> None:
        """Hold the pods that are recorded in the folder."""
        for path in sorted(self.folder.glob(f"*/{RECORD}")):
            with suppress(msgspec.DecodeError):
                self._add(path.parent, decoding.decode(path.read_bytes(), Record))
        self._bring_about()

    def want(self, kept: Kept) -> None:
        """Keep what is wanted now, and act on it."""
        if kept != self.kept or not (self.folder / KEPT).exists():
            self.kept = kept
            self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            replace_file(self.folder / KEPT, msgspec.json.encode(kept))
        self._bring_about()
        self._changed()

    def replace(self, names: Collection[str]) -> None:
        """Stop pods that are still there, and start others."""
        for name in self.pods.keys() & set(names):
            self.pods[name].stop()
        self._bring_about()
        self._changed()

    async def close(self) -> None:
        """Stop looking after the pods; they run on."""
        lives = tuple(self._lives.values())
        for life in lives:
            life.cancel()
        await asyncio.gather(*lives, return_exceptions=True)

    def _bring_about(self) -> None:
        wanted = self.kept.wanted
        template = _template(wanted)
        copies = [
            Copy(name, pod.record.template, pod.is_ready)
            for name, pod in self.pods.items()
            if not pod.is_terminating
        ]
        decided = plan(copies, template=template, replicas=wanted.replicas)
        for name in decided.stops:
            self.pods[name].stop()
        for _ in range(decided.starts):
            record = Record(template=template, definition_hash=wanted.definition_hash)
            self._add(self.folder / new_name(self.folder.name), record)
        if self.pods:
            self.is_empty.clear()
        else:
            self.is_empty.set()

    def _add(self, folder: Path, record: Record) -> None:
        pod = LocalPod(folder, record, self._session, self._limits, self._pod_changed)
        self.pods[folder.name] = pod
        self._lives[folder.name] = asyncio.create_task(pod.live(self.kept.wanted))

    def _pod_changed(self) -> None:
        for name in [name for name, pod in self.pods.items() if pod.is_gone]:
            del self.pods[name]
            del self._lives[name]
        self._bring_about()
        self._changed()


def _template(wanted: Wanted) -> str:
    """Return what differs when a pod has to be another one."""
    parts = (wanted.definition_hash, wanted.command, wanted.token, sorted(wanted.environment.items()))
    return blake2b(msgspec.json.encode(parts), digest_size=8).hexdigest()


def _lock(folder: Path) -> int:
    """Return a descriptor that holds the folder as long as it is open; raises `ClusterRefused`."""
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    descriptor = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(descriptor)
        raise ClusterRefused(f"Another process runs the pods of {folder}") from error
    return descriptor
