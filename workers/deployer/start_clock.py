"""Clock of starts: the time since which the pods of a workflow have made no progress."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING

from models.deployment import BLOCKING_REASONS
from workers.cluster.driver import PodStage

if TYPE_CHECKING:
    from models.deployment import Deployment
    from workers.cluster.driver import ObservedDeployment


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
