"""Limit of concurrent starts, shared by organizations in turn."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping


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
