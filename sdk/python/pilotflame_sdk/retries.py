"""Rules about requests that are sent again: which, how often, and after which pauses."""

from __future__ import annotations

import random
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    import httpx2

RETRIED_STATUSES: Final = frozenset({408, 429, 502, 503, 504})
SAFE_METHODS: Final = frozenset({"GET", "HEAD"})


@dataclass(frozen=True)
class RetryPolicy:
    """Time for which a request is repeated, and the pauses between."""

    seconds: float = 30.0
    """Time after which the last failure is raised; 0 sends every request once."""
    first_pause: float = 0.25
    longest_pause: float = 8.0
    waits_for_start: bool = True
    """Whether requests are repeated too while the server has never answered."""


class RequestAttempts:
    """Decides after each failure of one request whether it is sent again."""

    def __init__(self, policy: RetryPolicy, method: str, *, is_keyed: bool) -> None:
        self._policy = policy
        self._is_repeatable = method in SAFE_METHODS or is_keyed
        self._give_up_at = time.monotonic() + policy.seconds
        self._count = 0

    def pause_after_error(self, *, was_sent: bool, has_answered: bool) -> float | None:
        """Return the seconds to wait before a repetition after a lost connection; None to give up.

        A request that was never sent can be repeated in any case; a sent one only if it is safe or has a
        key. `has_answered` is whether the server has answered before: else the policy decides.
        """
        if was_sent and not self._is_repeatable:
            return None
        if not has_answered and not self._policy.waits_for_start:
            return None
        return self._next_pause(None)

    def pause_after_answer(self, response: httpx2.Response) -> float | None:
        """Return the seconds to wait before a repetition after an answer; None to use the answer.

        Only 408, 429, 502, 503 and 504 are repeated, and only for safe or keyed requests.
        """
        if response.status_code not in RETRIED_STATUSES or not self._is_repeatable:
            return None
        return self._next_pause(response.headers.get("Retry-After"))

    def _next_pause(self, retry_after: str | None) -> float | None:
        """Return the seconds of the next pause, None if the time of the retry policy is over.

        Pauses grow, and last at least as long as a `Retry-After` header asks for.
        """
        growing = min(self._policy.first_pause * 2**self._count, self._policy.longest_pause)
        self._count += 1
        pause = growing * random.uniform(0.5, 1.0)  # noqa: S311 - spreads clients, protects nothing
        if retry_after is not None and retry_after.isdecimal():
            pause = max(pause, float(retry_after))
        return pause if time.monotonic() + pause <= self._give_up_at else None
