"""Memory that clients fill at their own pace, within one bound for all of them: request bodies and unsent answers.

Over the bound, the client that holds most gives up its slowest transfer: whoever is slow or greedy loses what it holds
before another client is refused anything.
"""

from __future__ import annotations

from collections.abc import Callable
from time import monotonic
from typing import Final

UNCOUNTED_BYTES: Final = 16_384
"""Bytes of one transfer that no budget counts: connections bound them, and small requests always pass."""
_SHORTEST_SECONDS: Final = 0.01


class ByteHolding:
    """Bytes of one transfer, counted against a budget until they are released."""

    __slots__ = ("_budget", "_evict", "bytes", "client", "is_evicted", "is_moving", "since")

    def __init__(self, budget: ByteBudget, client: str, evict: Callable[[], None]) -> None:
        """`evict` is called when the budget takes the bytes back: it lets go of them."""
        self._budget = budget
        self._evict = evict
        self.client = client
        self.since = monotonic()
        self.bytes = 0
        self.is_moving = True
        """The client has not sent, or taken, all of it: the transfer may be given up."""
        self.is_evicted = False

    def add(self, count: int) -> bool:
        """Count bytes that have come, and tell whether there is room for them."""
        if self.is_evicted:
            return False
        before, self.bytes = self.bytes, self.bytes + count
        if self.bytes > UNCOUNTED_BYTES:
            self._budget.count(self, self.bytes - (before if before > UNCOUNTED_BYTES else 0))
        return not self.is_evicted

    def lower(self, count: int) -> None:
        """Count what is left when a part has gone."""
        if UNCOUNTED_BYTES < count < self.bytes:
            self._budget.count(self, count - self.bytes)
            self.bytes = count

    def release(self) -> None:
        """Count nothing any longer."""
        self._budget.forget(self)
        self.bytes = 0

    def evict(self) -> None:
        """Give the transfer up for others."""
        self.is_evicted = True
        self.release()
        self._evict()

    def rate(self, now: float) -> float:
        """Return the bytes a second since the transfer began."""
        return self.bytes / max(now - self.since, _SHORTEST_SECONDS)


class ByteBudget:
    """One bound for the bytes of many transfers, of which one client may hold half."""

    def __init__(self, limit_bytes: int, *, share_bytes: int | None = None) -> None:
        """`share_bytes` is what one client may hold: half of the budget unless given."""
        self._limit = limit_bytes
        self._share = limit_bytes // 2 if share_bytes is None else share_bytes
        self._holdings: set[ByteHolding] = set()
        self._by_client: dict[str, int] = {}
        self.used = 0

    def count(self, holding: ByteHolding, change: int) -> None:
        """Count a change of one transfer; gives up the slowest ones of those who hold most while there are too many."""
        self._holdings.add(holding)
        self._add(holding.client, change)
        while change > 0 and not holding.is_evicted:
            is_over_share = self._by_client.get(holding.client, 0) > self._share
            if self.used <= self._limit and not is_over_share:
                return
            (self._slowest(holding.client if is_over_share else None) or holding).evict()

    def forget(self, holding: ByteHolding) -> None:
        """Take a transfer out of the count."""
        if holding in self._holdings:
            self._holdings.discard(holding)
            self._add(holding.client, -holding.bytes)

    def _add(self, client: str, change: int) -> None:
        self.used += change
        left = self._by_client.get(client, 0) + change
        if left > 0:
            self._by_client[client] = left
        else:
            self._by_client.pop(client, None)

    def _slowest(self, client: str | None) -> ByteHolding | None:
        """Return the slowest transfer that may be given up: of `client`, or else of whoever holds most."""
        now = monotonic()
        moving = [one for one in self._holdings if one.is_moving and client in {None, one.client}]
        return min(moving, key=lambda one: (-self._by_client[one.client], one.rate(now)), default=None)
