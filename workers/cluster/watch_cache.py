"""Cache of the Deployments and pods of one namespace, kept by list and watch."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncGenerator, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Final

import structlog

from workers.cluster.driver import (
    ChangedWorkflows,
    ClusterBusy,
    ClusterError,
    ClusterForbidden,
    ClusterUnavailable,
)
from workers.cluster.kubernetes_api import KubernetesApi, ObjectConflict, ObjectNotFound, VersionExpired
from workers.cluster.manifests import WORKFLOW_ANNOTATION, WORKFLOW_LABEL, Manifest

WATCH_SECONDS: Final = 120
"""Time after which the API server ends a watch. The following list shows missed events."""
FIRST_PAUSE_SECONDS: Final = 0.5
MAX_PAUSE_SECONDS: Final = 10.0
MAX_DOUBLINGS: Final = 16
PROBE_SECONDS: Final = 15.0
"""Pause between two lists while the API server forbids them, for all collections together."""
STEADY_SECONDS: Final = 30.0
"""A stream that lasted so long is opened again at once; shorter ones after longer and longer pauses."""
_UNUSED_FIELDS: Final[Mapping[str, Sequence[str]]] = {
    "metadata": ("managedFields",),
    "spec": ("template", "containers", "volumes"),
}
"""Large parts that no reader needs."""

log = structlog.get_logger()


def workflow_id_of(item: Manifest) -> str | None:
    """Return the workflow id in the annotations of an object; None for a foreign object with the same labels."""
    annotations = item.get("metadata", {}).get("annotations") or {}
    workflow_id: str | None = annotations.get(WORKFLOW_ANNOTATION)
    return workflow_id


@dataclass
class WatchedCollection:
    """Objects of one kind by the name of their workflow, then by their own."""

    path: str
    is_synced: bool = False
    error: ClusterError | None = None
    """Failure that prevents its list, or None."""
    listed_version: int = 0
    """Version of the last list."""
    _objects: dict[str, dict[str, Manifest]] = field(default_factory=dict)

    def objects_of(self, name: str) -> tuple[Manifest, ...]:
        """Return the cached objects with this workflow name in their labels; none for an unknown name."""
        return tuple(self._objects.get(name, {}).values())

    def __iter__(self) -> Iterator[Manifest]:
        for objects in self._objects.values():
            yield from objects.values()

    def replace(self, items: Sequence[Manifest], version: str) -> set[str]:
        """Replace all objects by a list of the API server; return the ids of workflows with changed objects.

        Objects stay that this process has written after the list was made. A list older than the last one
        means a restored API server: cached versions are void then.
        """
        if _parse_version(version) < self.listed_version:
            # The API server was restored from a backup: its versions count from an earlier one, and cached
            # versions are void.
            for one in self:
                one["metadata"]["resourceVersion"] = ""
        self.listed_version = _parse_version(version)
        listed = {item["metadata"]["uid"] for item in items}
        gone = [
            one
            for one in self
            # Keep objects that this process has written after the list was made.
            if one["metadata"]["uid"] not in listed
            and _resource_version(one["metadata"]) <= _parse_version(version)
        ]
        changed = [*(one for one in gone if self.remove(one)), *(one for one in items if self.put(one))]
        return {workflow_id for one in changed if (workflow_id := workflow_id_of(one)) is not None}

    def put(self, item: Manifest) -> bool:
        """Store the state of an object, without unused fields; return False, and change nothing, if it is not
        newer than the known one.
        """
        metadata = item["metadata"]
        objects = self._objects.setdefault(_owner_name(item), {})
        known = objects.get(metadata["name"])
        is_same = known is not None and known["metadata"]["uid"] == metadata["uid"]
        if (
            known is not None
            and is_same
            and 0 < _resource_version(metadata) <= _resource_version(known["metadata"])
        ):
            return False
        objects[metadata["name"]] = _strip_unused(item)
        return True

    def remove(self, item: Manifest) -> bool:
        """Remove an object; return False if it is unknown, or another object has its name by now."""
        objects = self._objects.get(_owner_name(item), {})
        known = objects.get(item["metadata"]["name"])
        if known is None or known["metadata"]["uid"] != item["metadata"]["uid"]:
            return False
        del objects[item["metadata"]["name"]]
        if not objects:
            del self._objects[_owner_name(item)]
        return True

    def clear(self) -> None:
        self._objects.clear()
        self.is_synced, self.error, self.listed_version = False, None, 0


class WatchCache:
    """Deployments and pods that Pilotflame manages, cached while they are watched."""

    def __init__(
        self,
        api: KubernetesApi,
        *,
        deployments: str,
        pods: str,
        label: str,
        first_pause_seconds: float = FIRST_PAUSE_SECONDS,
    ) -> None:
        self.deployments = WatchedCollection(deployments)
        self.pods = WatchedCollection(pods)
        self.first_pause_seconds = first_pause_seconds
        self._api = api
        self._label = label
        self._watchers: set[ChangedWorkflows] = set()
        self._followers: set[asyncio.Task[Any]] = set()
        self._outcome = asyncio.Event()
        """Set when a list has succeeded or failed."""
        self.probe_seconds = PROBE_SECONDS
        self._probe_at = 0.0
        self._listed = asyncio.Event()

    @property
    def is_open(self) -> bool:
        """Whether a watch is open, so that the cache is kept."""
        return bool(self._followers)

    async def watch(self) -> AsyncGenerator[str, None]:
        """Yield the ids of all cached workflows, and then of each workflow with changed objects.

        The first watch begins to follow the API server; the end of the last watch closes the cache.
        """
        changes = ChangedWorkflows()
        self._watchers.add(changes)
        changes.add(
            workflow_id
            for collection in (self.deployments, self.pods)
            for one in collection
            if (workflow_id := workflow_id_of(one)) is not None
        )
        if not self._followers:
            for collection in (self.deployments, self.pods):
                self._followers.add(asyncio.create_task(self._follow(collection)))
        upcoming: asyncio.Task[str] | None = None
        try:
            while True:
                upcoming = asyncio.create_task(changes.take_oldest())
                done, _ = await asyncio.wait(
                    {upcoming, *self._followers}, return_when=asyncio.FIRST_COMPLETED
                )
                for task in done - {upcoming}:
                    task.result()  # a follower ends only by an unforeseen error
                yield upcoming.result()
        finally:
            if upcoming is not None:
                upcoming.cancel()
            self._watchers.discard(changes)
            if not self._watchers:
                await self.close()

    async def close(self) -> None:
        """Stop following the API server, and clear the cache."""
        followers, self._followers = self._followers, set()
        for follower in followers:
            follower.cancel()
        await asyncio.gather(*followers, return_exceptions=True)
        for collection in (self.deployments, self.pods):
            collection.clear()

    async def wait_synced(self, seconds: float) -> None:
        """Wait until both collections, Deployments and pods, are listed; raise the `ClusterError` that prevents it.

        Raises `ClusterUnavailable` after `seconds`.
        """
        await asyncio.sleep(0)  # a caller that reads in a loop lets events be processed
        try:
            async with asyncio.timeout(seconds):
                for collection in (self.deployments, self.pods):
                    while not collection.is_synced:
                        if collection.error is not None:
                            raise collection.error
                        self._outcome.clear()
                        await self._outcome.wait()
        except TimeoutError as error:
            message = f"The API server has not listed all objects within {seconds:g} s"
            raise ClusterUnavailable(message) from error

    async def _follow(self, collection: WatchedCollection) -> None:
        """List a collection and apply its events, again and again: each list makes up for events lost in a gap.

        Errors are logged, noted for `wait_synced`, and followed by a pause that doubles up to ten seconds.
        """
        loop = asyncio.get_running_loop()
        pauses = 0
        while True:
            began_at = loop.time()
            is_forbidden, is_listed = False, False
            try:
                items, version = await self._api.list(collection.path, self._label)
                self._notify(collection.replace(items, version))
                self._set_outcome(collection, None)
                is_listed = True
                await self._take_events(collection, version)
            except VersionExpired:
                log.info("cluster watch expired", path=collection.path)
            except ClusterBusy as error:
                log.info("cluster busy", path=collection.path, seconds=error.retry_seconds)
            except (ClusterError, ObjectNotFound, ObjectConflict) as error:
                log.warning("cluster not watched", path=collection.path, error=str(error))
                is_forbidden = isinstance(error, ClusterForbidden)
                if collection.is_synced and not is_forbidden:
                    collection.is_synced = False  # the next list shows whether the API server is unreachable
                elif isinstance(error, ClusterError):
                    self._set_outcome(collection, error)
            if loop.time() - began_at > STEADY_SECONDS:
                pauses = 0
                continue
            if is_forbidden:
                await self._pause_probe(requests=2 if is_listed else 1)
                continue
            pause_seconds = min(self.first_pause_seconds * 2**pauses, MAX_PAUSE_SECONDS)
            pauses = min(pauses + 1, MAX_DOUBLINGS)
            # Randomized, so that not all interrupted clients return at once.
            await asyncio.sleep(pause_seconds * random.uniform(0.5, 1.0))  # noqa: S311 - no secret

    async def _pause_probe(self, *, requests: int) -> None:
        """Wait until a collection may be requested again after its last attempt, of `requests` requests, was forbidden.

        The collections take turns, one request per 15 s. Permissions are usually granted for all of them at
        once: a successful list ends the pauses of forbidden lists. A list that succeeded before its watch was
        forbidden proves nothing.
        """
        loop = asyncio.get_running_loop()
        probe_at = self._probe_at = max(self._probe_at, loop.time()) + requests * self.probe_seconds
        if requests > 1:
            await asyncio.sleep(probe_at - loop.time())
            return
        self._listed.clear()
        with suppress(TimeoutError):
            async with asyncio.timeout_at(probe_at):
                await self._listed.wait()

    async def _take_events(self, collection: WatchedCollection, version: str) -> None:
        """Apply the events of a watch to a collection of Deployments or pods until its stream ends.

        Ids of Pilotflame workflows whose objects have changed are passed to the watchers of the cache. The watch
        begins behind the resource version `version`. Raises `VersionExpired` and the `ClusterError` of the API server.
        """

        def take(event: Manifest) -> None:
            if event["type"] == "BOOKMARK":
                return
            item = event["object"]
            is_news = collection.remove(item) if event["type"] == "DELETED" else collection.put(item)
            workflow_id = workflow_id_of(item)
            if is_news and workflow_id is not None:
                self._notify({workflow_id})

        query = {"labelSelector": self._label, "resourceVersion": version}
        await self._api.watch(collection.path, query, seconds=WATCH_SECONDS, on_event=take)

    def _set_outcome(self, collection: WatchedCollection, error: ClusterError | None) -> None:
        collection.is_synced, collection.error = error is None, error
        if error is None:
            self._listed.set()
        self._outcome.set()

    def _notify(self, workflow_ids: set[str]) -> None:
        for watcher in self._watchers:
            watcher.add(workflow_ids)


def _owner_name(item: Manifest) -> str:
    owner: str = (item["metadata"].get("labels") or {}).get(WORKFLOW_LABEL, "")
    return owner


def _resource_version(metadata: Manifest) -> int:
    return _parse_version(metadata.get("resourceVersion", ""))


def _parse_version(version: str) -> int:
    """Return a resource version as a number that orders two states of an object; 0 for a version that is no
    integer.

    Versions are integers, documented so since Kubernetes 1.35.
    """
    return int(version) if version.isdecimal() else 0


def _strip_unused(item: Manifest) -> Manifest:
    return {
        part: {name: one for name, one in value.items() if name not in _UNUSED_FIELDS[part]}
        if part in _UNUSED_FIELDS
        else value
        for part, value in item.items()
    }
