"""Small cache with an expiry."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable
from time import monotonic
from typing import Generic, TypeVar

Key = TypeVar("Key", bound=Hashable)
Value = TypeVar("Value")


class TTLCache(Generic[Key, Value]):
    """Cache that keeps each value for a number of seconds, and evicts the oldest values beyond its capacity."""

    def __init__(self, seconds: float, max_items: int) -> None:
        self._seconds = seconds
        self._max_items = max_items
        self._items: OrderedDict[Key, tuple[float, Value]] = OrderedDict()

    def get(self, key: Key) -> Value | None:
        """Return the cached value of a key; None if it is absent or has expired."""
        item = self._items.get(key)
        return None if item is None or item[0] <= monotonic() else item[1]

    def put(self, key: Key, value: Value) -> None:
        """Store a value under a key for the cache's number of seconds, in place of an earlier one.

        The oldest values beyond the cache's capacity are evicted.
        """
        now = monotonic()
        self._items[key] = (now + self._seconds, value)
        # All values live equally long, so those at the front expire next.
        self._items.move_to_end(key)
        while self._items and (
            len(self._items) > self._max_items or next(iter(self._items.values()))[0] <= now
        ):
            self._items.popitem(last=False)

    def drop(self, key: Key) -> None:
        """Remove the value of a key before it expires; do nothing without one."""
        self._items.pop(key, None)
