"""Starts of pods in progress: their limit, shared by organizations in turn, and the time since their last progress."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING

from models.deployment import BLOCKING_REASONS
from workers.cluster.driver import PodStage

if TYPE_CHECKING:
    from models.deployment import Deployment
    from workers.cluster.driver import ObservedDeployment


def choose_next_start(waiting: Mapping[str, str], starting: Mapping[str, str], limit: int) -> str | None:
    """Return the workflow that may start next; None if all have to wait.

    Both map workflows to their organizations, `waiting` in the order of requests. The organization with the
    fewest starts goes first. Up to twice the limit may start while an organization has less than its share of
    it. So slow starts of one organization delay no other.
    """
    if not waiting:
        return None
    counts = Counter(starting.values())
    organizations = {*counts, *waiting.values()}
    share = max(1, limit // len(organizations))
    chosen = min(waiting, key=lambda workflow_id: counts[waiting[workflow_id]])
    is_below_share = counts[waiting[chosen]] < share and len(starting) < 2 * limit
    return chosen if len(starting) < limit or is_below_share else None


class StartGate:
    """Waiting starts of this deployer, and all starts that it sees, including those of other deployers."""

    def __init__(self, limit: int, on_admit: Callable[[str], None]) -> None:
        self._limit = limit
        self._on_admit = on_admit
        self._waiting: dict[str, str] = {}
        self._starting: dict[str, str] = {}

    def admit(self, workflow_id: str, organization_id: str) -> bool:
        """Return whether a workflow may start now; if not, `on_admit` is called with it once it may."""
        if workflow_id in self._starting:
            return True
        self._waiting.setdefault(workflow_id, organization_id)
        self._admit_more(but=workflow_id)
        return workflow_id in self._starting

    def mark_starting(self, workflow_id: str, organization_id: str) -> None:
        """Count an observed start."""
        self._waiting.pop(workflow_id, None)
        self._starting[workflow_id] = organization_id

    def release(self, workflow_id: str) -> None:
        """Free the place of a start that has ended or is stuck, for other starts."""
        self._waiting.pop(workflow_id, None)
        if self._starting.pop(workflow_id, None) is not None:
            self._admit_more()

    def _admit_more(self, *, but: str | None = None) -> None:
        while (chosen := choose_next_start(self._waiting, self._starting, self._limit)) is not None:
            self._starting[chosen] = self._waiting.pop(chosen)
            if chosen != but:
                self._on_admit(chosen)


@dataclass(slots=True)
class _StartProgress:
    generation: int
    stage: PodStage
    """Furthest stage of any of its pods."""
    since: datetime


class StartClock:
    """Progress of all starts that this deployer has seen, by the database's time of the observation.

    A restarted deployer gives each start its full time again, so a restart fails no start.
    """

    def __init__(self) -> None:
        self._starts: dict[str, _StartProgress] = {}

    def stalled_since(
        self, deployment: Deployment, observed: ObservedDeployment, now: datetime
    ) -> datetime | None:
        """Return the time of the last progress of a start; None if its pods are not to blame.

        Pods are not to blame while the cluster has not scheduled them and gives no reason.
        """
        coming = [pod for pod in observed.pods if not pod.is_terminating and not pod.is_ready]
        if not observed.is_starting:
            self.forget(deployment.workflow_id)
            return None
        stage = max((pod.stage for pod in coming), default=PodStage.CREATED)
        start = self._starts.get(deployment.workflow_id)
        is_blocked = observed.trouble is not None and observed.trouble.reason in BLOCKING_REASONS
        if start is None or start.generation != deployment.generation or is_blocked:
            start = self._starts[deployment.workflow_id] = _StartProgress(deployment.generation, stage, now)
        elif stage > start.stage:
            # Lower stages don't count: a program that crashes and is restarted makes no progress.
            start.stage, start.since = stage, now
        is_timed = start.stage >= PodStage.SCHEDULED or observed.trouble is not None
        return start.since if is_timed else None

    def waiting_since(self, workflow_id: str) -> datetime | None:
        """Return the time of the last progress of a start, for any reason; None if no start is in progress."""
        start = self._starts.get(workflow_id)
        return None if start is None else start.since

    def forget(self, workflow_id: str) -> None:
        """Forget a workflow without starting pods."""
        self._starts.pop(workflow_id, None)
