"""A small memory: what was learnt a moment ago and may be used again without asking."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable
from time import monotonic
from typing import Generic, TypeVar

Key = TypeVar("Key", bound=Hashable)
Value = TypeVar("Value")


class TTLCache(Generic[Key, Value]):
    """Remembers each value for so many seconds; of more than it may hold, the oldest go first."""

    def __init__(self, seconds: float, max_items: int) -> None:
        self._seconds = seconds
        self._max_items = max_items
        self._items: OrderedDict[Key, tuple[float, Value]] = OrderedDict()

    def get(self, key: Key) -> Value | None:
        """Return what is remembered, or None."""
        item = self._items.get(key)
        return None if item is None or item[0] <= monotonic() else item[1]

    def put(self, key: Key, value: Value) -> None:
        """Remember a value, anew where it was remembered before."""
        now = monotonic()
        self._items[key] = (now + self._seconds, value)
        # All last equally long, so those at the front are the next to run out.
        self._items.move_to_end(key)
        while len(self._items) > self._max_items or next(iter(self._items.values()))[0] <= now:
            self._items.popitem(last=False)

    def drop(self, key: Key) -> None:
        """Forget a value, if there is one."""
        self._items.pop(key, None)
