"""Failed attempts of clients to authenticate: those of a client with too many are answered 429 for a while.

Keys and tokens have 260 random bits, which nobody guesses: each is looked up whatever its client has tried, and a
valid one is let in. Passwords are chosen by people: a client with too many failures can't go on trying them.
"""

from __future__ import annotations

import math
import secrets
from collections import OrderedDict
from dataclasses import dataclass
from hashlib import blake2b
from time import monotonic

from concurrency.ttl_cache import TTLCache
from gateway.http.errors import ApiError

MAX_FAILURES = 50
"""Failures of one client within a window that are answered as such."""
FAILURE_WINDOW_SECONDS = 60.0
MAX_REMEMBERED_CLIENTS = 10_000
RIGHT_SECONDS = 86_400.0


@dataclass(slots=True)
class ClientFailures:
    """What a client has tried in the window that began at `since`."""

    since: float
    count: int = 0


class FailedAttempts:
    """Those of one process, by client."""

    def __init__(self, message: str) -> None:
        """`message` is what a refused client is told."""
        self._message = message
        self._failures: OrderedDict[str, ClientFailures] = OrderedDict()

    def fail(self, client: str, otherwise: ApiError) -> ApiError:
        """Count a failure and return its answer: `otherwise`, or 429 where there are too many."""
        refusal = self.refusal(client)
        if refusal is None:
            self.count(client)
        return refusal or otherwise

    def refusal(self, client: str) -> ApiError | None:
        """Return 429 where a client has failed too often, or None."""
        failures = self._failures.get(client)
        if failures is None or failures.count < MAX_FAILURES:
            return None
        left = failures.since + FAILURE_WINDOW_SECONDS - monotonic()
        if left <= 0:
            del self._failures[client]
            return None
        return ApiError(429, "rate-limited", self._message, retry_after_seconds=math.ceil(left))

    def count(self, client: str) -> None:
        """Remember a failure."""
        failures = self._failures.get(client)
        if failures is None or failures.since + FAILURE_WINDOW_SECONDS < monotonic():
            failures = ClientFailures(since=monotonic())
            self._failures[client] = failures
            self._failures.move_to_end(client)
        failures.count += 1
        if len(self._failures) > MAX_REMEMBERED_CLIENTS:
            self._failures.popitem(last=False)


class PasswordAttempts:
    """Failed attempts at passwords, and those that were right: whoever has one shares an address with others."""

    def __init__(self, message: str) -> None:
        """`message` is what a refused client is told."""
        self._failures = FailedAttempts(message)
        self._right: TTLCache[bytes, bool] = TTLCache(RIGHT_SECONDS, MAX_REMEMBERED_CLIENTS)
        self._hashing_key = secrets.token_bytes(32)

    def require_allowed(self, client: str, offered: str) -> None:
        """Raise 429 where a client has failed too often, unless what it offers was right before."""
        refusal = self._failures.refusal(client)
        if refusal is not None and self._right.get(self._digest(offered)) is None:
            raise refusal

    def note(self, client: str, offered: str, *, is_right: bool) -> None:
        """Remember what came of an attempt."""
        if is_right:
            self._right.put(self._digest(offered), value=True)
        else:
            self._right.drop(self._digest(offered))
            self._failures.count(client)

    def _digest(self, offered: str) -> bytes:
        return blake2b(offered.encode(), key=self._hashing_key, digest_size=32).digest()
