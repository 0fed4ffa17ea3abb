"""Observations of drift in the last minute, for each organization."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from time import monotonic
from typing import TYPE_CHECKING, Final

from concurrency.ttl_cache import TTLCache

if TYPE_CHECKING:
    from doctor.findings import FindingKey

GRACE_SECONDS: Final = 1.0
"""Time between the two observations of a request, which a client waits for."""
REMEMBERED_SECONDS: Final = 60.0
"""Time for which an observation can be the first of two."""
REMEMBERED_ORGANIZATIONS: Final = 1_000


class RecentObservations:
    """Findings of the last observations for each organization, so that few requests wait for a second one.

    Of two, one is at least `GRACE_SECONDS` old even while requests follow each other quickly.
    """

    def __init__(self, clock: Callable[[], float] = monotonic) -> None:
        """Create an empty memory; `clock` returns seconds."""
        self._clock = clock
        self._kept: TTLCache[str, Sequence[tuple[float, frozenset[FindingKey]]]] = TTLCache(
            REMEMBERED_SECONDS, REMEMBERED_ORGANIZATIONS
        )

    def find(self, organization_id: str) -> frozenset[FindingKey] | None:
        """Return the findings of the newest observation that is at least one second and at most a minute old;
        None without one.
        """
        now = self._clock()
        return next((keys for at, keys in self._kept_of(organization_id) if now - at >= GRACE_SECONDS), None)

    def add(self, organization_id: str, observed: frozenset[FindingKey], at: float) -> None:
        """Remember the findings of an observation at `at`, a time of `now()`.

        Only the last two are kept. An observation less than a second after the last kept one is ignored.
        """
        kept = self._kept_of(organization_id)
        if not kept or at - kept[0][0] >= GRACE_SECONDS:
            self._kept.put(organization_id, [(at, observed), *kept[:1]])

    def now(self) -> float:
        """Return the time of the monotonic clock in seconds, by which observations are dated."""
        return self._clock()

    def _kept_of(self, organization_id: str) -> Sequence[tuple[float, frozenset[FindingKey]]]:
        return self._kept.get(organization_id) or ()
