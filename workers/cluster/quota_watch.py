"""Watch of the quotas of one namespace, which notices when they have more capacity than before.

A ReplicaSet with pods over quota retries with longer and longer delays, up to a quarter of an hour. No change
of a quota wakes it.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Awaitable, Callable, Mapping
from typing import Final

import structlog

from workers.cluster.driver import ClusterError, ClusterForbidden
from workers.cluster.kubernetes_api import KubernetesApi, ObjectConflict, ObjectNotFound, VersionExpired
from workers.cluster.manifests import Manifest

WATCH_SECONDS: Final = 240
PAUSE_SECONDS: Final = 2.0
"""Pause before quotas are listed again after the end of a stream; doubled by each consecutive failure."""
MAX_DOUBLINGS: Final = 5
_QUANTITY: Final = re.compile(r"([+-]?[0-9.]+(?:[eE][+-]?[0-9]+)?)([A-Za-z]{0,2})\Z")
_QUANTITY_UNITS: Final[Mapping[str, float]] = {
    "": 1.0,
    "n": 1e-9,
    "u": 1e-6,
    "m": 1e-3,
    "k": 1e3,
    "M": 1e6,
    "G": 1e9,
    "T": 1e12,
    "P": 1e15,
    "E": 1e18,
    "Ki": 2.0**10,
    "Mi": 2.0**20,
    "Gi": 2.0**30,
    "Ti": 2.0**40,
    "Pi": 2.0**50,
    "Ei": 2.0**60,
}
_POD_RESOURCES: Final = frozenset(
    {
        "pods",
        "cpu",
        "memory",
        *(f"{kind}.{name}" for kind in ("requests", "limits") for name in ("cpu", "memory")),
    }
)
"""Resources that a pod consumes; others, such as those of Services, don't limit pods."""
QuotaHeadroom = dict[str, float]
"""Unused quantity of each resource, by its name."""

log = structlog.get_logger()


def quota_headroom(quota: Manifest) -> QuotaHeadroom:
    """Return what is left of each resource that a quota limits, in units such as cores or bytes; negative if
    it is exceeded.
    """
    status = quota.get("status") or {}
    used = status.get("used") or {}
    return {
        name: _parse_quantity(bound) - _parse_quantity(used.get(name, "0"))
        for name, bound in (quota["spec"].get("hard") or {}).items()
    }


def has_grown(before: QuotaHeadroom, after: QuotaHeadroom) -> bool:
    """Return whether any resource has more left than before, or is not limited any more."""
    return any(after.get(name, float("inf")) > left for name, left in before.items())


class QuotaWatch:
    """Quotas of a namespace, kept by list and watch."""

    def __init__(self, api: KubernetesApi, path: str, on_room: Callable[[], Awaitable[None]]) -> None:
        self.pause_seconds = PAUSE_SECONDS
        self._api = api
        self._path = path
        self._on_room = on_room
        self._known: dict[str, QuotaHeadroom] = {}
        self._has_grown = asyncio.Event()

    @property
    def is_full(self) -> bool:
        """Whether some quota has nothing left of a resource that every pod needs."""
        return any(
            left <= 0
            for known in self._known.values()
            for name, left in known.items()
            if name in _POD_RESOURCES
        )

    async def follow(self) -> None:
        """Watch the resource quotas of the namespace until canceled, and call `on_room` whenever more of a resource
        is left than before.

        Failures are logged, and the watch is repeated after a pause, which doubles at each failure in a row. If the
        API server forbids the watch, the pause is the longest one at once.
        """
        notifying = asyncio.create_task(self._notify())
        failures = 0
        try:
            while True:  # each stream ends without an event
                try:
                    failures = 0 if await self._listen() else min(failures + 1, MAX_DOUBLINGS)
                except ClusterForbidden as error:
                    log.info("quotas not watched", path=self._path, error=str(error))
                    failures = MAX_DOUBLINGS
                # Back-off while nobody answers, and the longest pause at once without permission.
                await asyncio.sleep(self.pause_seconds * 2**failures)
        finally:
            notifying.cancel()
            await asyncio.gather(notifying, return_exceptions=True)

    async def _listen(self) -> bool:
        """List the quotas, then apply events until the stream ends; return False if an error other than an expired
        version ended it.

        A growth since the last list counts. Raises `ClusterForbidden`.
        """
        try:
            items, version = await self._api.list(self._path, "")
            listed = {item["metadata"]["name"]: quota_headroom(item) for item in items}
            for name, before in self._known.items():
                self._compare(before, listed.get(name, {}))
            self._known = listed
            query = {"resourceVersion": version}
            await self._api.watch(self._path, query, seconds=WATCH_SECONDS, on_event=self._apply_event)
        except VersionExpired:
            return True
        except ClusterForbidden:
            raise
        except (ClusterError, ObjectNotFound, ObjectConflict) as error:
            log.info("quotas not watched", path=self._path, error=str(error))
            return False
        return True

    def _apply_event(self, event: Manifest) -> None:
        """Store the headroom after an event of the watch, and compare it with the one before."""
        if event["type"] == "BOOKMARK":
            return
        name = event["object"]["metadata"]["name"]
        before = self._known.pop(name, {})
        after = {} if event["type"] == "DELETED" else quota_headroom(event["object"])
        if event["type"] != "DELETED":
            self._known[name] = after
        self._compare(before, after)

    def _compare(self, before: QuotaHeadroom, after: QuotaHeadroom) -> None:
        """Wake the notifier if any resource has more left."""
        if has_grown(before, after):
            self._has_grown.set()

    async def _notify(self) -> None:
        """Call `on_room` after each growth, until canceled; failures are logged."""
        while True:
            await self._has_grown.wait()
            self._has_grown.clear()
            try:
                await self._on_room()
            except (ClusterError, ObjectNotFound, ObjectConflict) as error:
                log.warning("pods over quota not retried", error=str(error))


def _parse_quantity(text: str) -> float:
    """Return a Kubernetes quantity such as `500m` or `2Gi` in base units (0.5, or bytes); 0 if it is unreadable.

    An unknown unit counts as 1.
    """
    match = _QUANTITY.match(str(text))
    return float(match[1]) * _QUANTITY_UNITS.get(match[2], 1.0) if match is not None else 0.0
