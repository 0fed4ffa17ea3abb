"""How often addresses have tried what opens nothing: whoever tries too often is refused for a while."""

from __future__ import annotations

import math
from collections import OrderedDict
from dataclasses import dataclass
from time import monotonic

from gateway.errors import ApiError

MAX_FAILURES = 50
"""Failures of one address within a window; after that, what was not seen before gets 429."""
FAILURE_WINDOW_SECONDS = 60.0
MAX_REMEMBERED_ADDRESSES = 10_000


@dataclass(slots=True)
class Failures:
    """What an address has tried in the window that began at `since`."""

    since: float
    count: int = 0


class FailedAttempts:
    """Those of one process, by address."""

    def __init__(self, message: str) -> None:
        """`message` is what whoever is refused is told."""
        self._message = message
        self._failures: OrderedDict[str, Failures] = OrderedDict()

    def refuse_too_many(self, address: str) -> None:
        """Raise 429 where an address has failed too often."""
        failures = self._failures.get(address)
        if failures is None or failures.count < MAX_FAILURES:
            return
        left = failures.since + FAILURE_WINDOW_SECONDS - monotonic()
        if left <= 0:
            del self._failures[address]
            return
        raise ApiError(429, "rate-limited", self._message, retry_after_seconds=math.ceil(left))

    def count(self, address: str) -> None:
        """Remember a failure."""
        failures = self._failures.get(address)
        if failures is None or failures.since + FAILURE_WINDOW_SECONDS < monotonic():
            failures = Failures(since=monotonic())
            self._failures[address] = failures
            self._failures.move_to_end(address)
        failures.count += 1
        if len(self._failures) > MAX_REMEMBERED_ADDRESSES:
            self._failures.popitem(last=False)
