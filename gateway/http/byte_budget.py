"""Memory budget for transfers at the speed of clients: request bodies and unsent answers.

Over the budget, the client with the most bytes loses its slowest transfer. So a slow or greedy client loses
its own transfers before others are refused.
"""

from __future__ import annotations

from collections.abc import Callable
from time import monotonic
from typing import Final

UNCOUNTED_BYTES: Final = 16_384
"""Uncounted bytes per transfer, bounded by the limit of connections: small requests always pass."""
_SHORTEST_SECONDS: Final = 0.01


class ByteHolding:
    """Bytes of one transfer, counted against a budget until they are released."""

    __slots__ = ("_budget", "_evict", "bytes", "client", "is_evicted", "is_moving", "since")

    def __init__(self, budget: ByteBudget, client: str, evict: Callable[[], None]) -> None:
        """Create the count of a transfer with 0 bytes; `evict` is called when the budget drops the transfer."""
        self._budget = budget
        self._evict = evict
        self.client = client
        self.since = monotonic()
        self.bytes = 0
        self.is_moving = True
        """Whether the client still sends or receives the transfer, so that it may be evicted."""
        self.is_evicted = False

    def add(self, count: int) -> bool:
        """Count received bytes, which may evict (end) transfers for lack of memory; return whether this one
        may continue.

        A transfer counts only from 16 kB on, then with all of its bytes.
        """
        if self.is_evicted:
            return False
        before, self.bytes = self.bytes, self.bytes + count
        if self.bytes > UNCOUNTED_BYTES:
            self._budget.count(self, self.bytes - (before if before > UNCOUNTED_BYTES else 0))
        return not self.is_evicted

    def lower(self, count: int) -> None:
        """Lower the count to the `count` bytes that are left after a part was sent; if at most 16 kB are left, the
        count stays as it was.
        """
        if UNCOUNTED_BYTES < count < self.bytes:
            self._budget.count(self, count - self.bytes)
            self.bytes = count

    def release(self) -> None:
        """Remove the bytes of the transfer from the budget, because it has ended."""
        self._budget.forget(self)
        self.bytes = 0

    def evict(self) -> None:
        """End the transfer by the callback of its creation, and release its bytes for other clients."""
        self.is_evicted = True
        self.release()
        self._evict()

    def rate(self, now: float) -> float:
        """Return the average bytes per second from the begin of the transfer to `now`, a time by `monotonic`."""
        return self.bytes / max(now - self.since, _SHORTEST_SECONDS)


class ByteBudget:
    """Limit of the bytes of many transfers; one client may hold half of it."""

    def __init__(self, limit_bytes: int, *, share_bytes: int | None = None) -> None:
        """Set the limit; `share_bytes` is the limit per client, by default half of the budget."""
        self._limit = limit_bytes
        self._share = limit_bytes // 2 if share_bytes is None else share_bytes
        self._holdings: set[ByteHolding] = set()
        self._by_client: dict[str, int] = {}
        self.used = 0

    def count(self, holding: ByteHolding, change: int) -> None:
        """Add a change of one transfer's bytes; over a limit, evict the slowest transfers of the largest clients.

        A client over its share loses its own transfers. Only transfers with `is_moving` are chosen; without any,
        `holding` is evicted.
        """
        self._holdings.add(holding)
        self._add(holding.client, change)
        while change > 0 and not holding.is_evicted:
            is_over_share = self._by_client.get(holding.client, 0) > self._share
            if self.used <= self._limit and not is_over_share:
                return
            (self._slowest(holding.client if is_over_share else None) or holding).evict()

    def forget(self, holding: ByteHolding) -> None:
        """Remove a transfer and its bytes from the totals of the budget and of its client."""
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
        """Return the slowest transfer that may be evicted, of `client`, or for None of the client with the
        most bytes.

        None if there is no such transfer.
        """
        now = monotonic()
        moving = [one for one in self._holdings if one.is_moving and client in {None, one.client}]
        return min(moving, key=lambda one: (-self._by_client[one.client], one.rate(now)), default=None)
