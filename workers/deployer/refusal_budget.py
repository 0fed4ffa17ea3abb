"""Budget of changes that the cluster refuses: at most six requests a minute for one workflow."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Final

from workers.cluster.driver import ClusterForbidden, ClusterRefused

SECONDS_PER_REQUEST: Final = 10.0
"""Time without another attempt for each request that a refused attempt has cost."""

Refusal = ClusterForbidden | ClusterRefused


class AttemptDeferred(Exception):
    """The budget does not allow another attempt yet."""

    def __init__(self, refusal: Refusal, seconds: float) -> None:
        super().__init__(str(refusal))
        self.refusal = refusal
        self.seconds = seconds
        """Time until another attempt is allowed."""


@dataclass(frozen=True, slots=True)
class _ChargedRefusal:
    generation: int | None
    refusal: Refusal
    paid_at: float
    """Time of the event loop from which another attempt is allowed."""


class RefusalBudget:
    """Last refusal of each workflow with refused changes."""

    def __init__(self) -> None:
        self._charged: dict[str, _ChargedRefusal] = {}

    def require(self, workflow_id: str, generation: int | None) -> None:
        """Raise `AttemptDeferred`, unless the last refusal is paid for, or was of another generation of the row."""
        charged = self._charged.get(workflow_id)
        if charged is None or charged.generation != generation:
            return
        seconds = charged.paid_at - asyncio.get_running_loop().time()
        if seconds > 0:
            raise AttemptDeferred(charged.refusal, seconds)

    def charge(self, workflow_id: str, generation: int | None, refusal: Refusal) -> None:
        """Charge the requests of a refused attempt."""
        paid_at = asyncio.get_running_loop().time() + refusal.requests * SECONDS_PER_REQUEST
        self._charged[workflow_id] = _ChargedRefusal(generation, refusal, paid_at)

    def forget(self, workflow_id: str) -> None:
        """Forget the refusal of a workflow that needs no change."""
        self._charged.pop(workflow_id, None)
