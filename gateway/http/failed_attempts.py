"""Failed authentication attempts: clients with too many get 429 for a while.

Keys and tokens have 260 random bits, which nobody guesses, so a valid one is accepted even from such a
client. Passwords are chosen by people: a client with too many failures can't try any other.
"""

from __future__ import annotations

import math
import secrets
from collections import OrderedDict
from hashlib import blake2b
from time import monotonic

from msgspec import Struct

from concurrency.ttl_cache import TTLCache
from gateway.http.errors import ApiError

MAX_FAILURES = 50
"""Failures of one client within a window that get the ordinary answer."""
FAILURE_WINDOW_SECONDS = 60.0
MAX_REMEMBERED_CLIENTS = 10_000
RIGHT_SECONDS = 86_400.0


class ClientFailures(Struct):
    """Failures of one client in the window that began at `since`."""

    since: float
    count: int = 0


class FailedAttempts:
    """Failed attempts of one process, by client."""

    def __init__(self, message: str, *, max_failures: int | None = None) -> None:
        """Set the message of refusals, and the failures within a minute that get the ordinary answer (default:
        `MAX_FAILURES`).
        """
        self._message = message
        self._max_failures = max_failures
        self._failures: OrderedDict[str, ClientFailures] = OrderedDict()

    def fail(self, client: str, otherwise: ApiError) -> ApiError:
        """Count a failure of a client, and return the error to answer: `otherwise`, or 429 if it had too many
        before.

        Refused attempts are not counted.
        """
        refusal = self.refusal(client)
        if refusal is None:
            self.count(client)
        return refusal or otherwise

    def refusal(self, client: str) -> ApiError | None:
        """Return the 429 error for a client with too many failures within a minute; None for others.

        The limit is 50 or as configured.
        """
        failures = self._failures.get(client)
        max_failures = MAX_FAILURES if self._max_failures is None else self._max_failures
        if failures is None or failures.count < max_failures:
            return None
        left = failures.since + FAILURE_WINDOW_SECONDS - monotonic()
        if left <= 0:
            del self._failures[client]
            return None
        return ApiError(429, "rate-limited", self._message, retry_after_seconds=math.ceil(left))

    def count(self, client: str) -> None:
        """Count a failure of a client; too many within a minute lead to refusals. The last 10,000 clients are
        remembered.
        """
        failures = self._failures.get(client)
        if failures is None or failures.since + FAILURE_WINDOW_SECONDS < monotonic():
            failures = ClientFailures(since=monotonic())
            self._failures[client] = failures
            self._failures.move_to_end(client)
        failures.count += 1
        if len(self._failures) > MAX_REMEMBERED_CLIENTS:
            self._failures.popitem(last=False)


class PasswordAttempts:
    """Failed attempts at passwords, and recent valid passwords.

    A user with a valid password may share an address with a failing client.
    """

    def __init__(self, message: str) -> None:
        """Set the message of the refusals that clients get after too many wrong passwords."""
        self._failures = FailedAttempts(message)
        self._right: TTLCache[bytes, bool] = TTLCache(RIGHT_SECONDS, MAX_REMEMBERED_CLIENTS)
        self._hashing_key = secrets.token_bytes(32)

    def require_allowed(self, client: str, offered: str) -> None:
        """Raise a 429 error if a client has failed too often, unless the same credentials `offered` were right within a
        day, from any client.

        So others behind one address can't lock out a sender.
        """
        refusal = self._failures.refusal(client)
        if refusal is not None and self._right.get(self._digest(offered)) is None:
            raise refusal

    def note(self, client: str, offered: str, *, is_right: bool) -> None:
        """Record the outcome of a password check: right credentials are remembered for a day, wrong ones
        count against the client.
        """
        if is_right:
            self._right.put(self._digest(offered), value=True)
        else:
            self._right.drop(self._digest(offered))
            self._failures.count(client)

    def _digest(self, offered: str) -> bytes:
        return blake2b(offered.encode(), key=self._hashing_key, digest_size=32).digest()
