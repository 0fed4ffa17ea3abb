"""Token buckets: how often something may happen, as so many times a second in the long run and a burst at once.

A bucket is one number, the time at which it is full again: one that nobody takes from is gone by itself. What asks for
more than a bucket holds gets it from a full one, and leaves a debt.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

SPARE: Final = 8
"""Of what is left in a bucket, this part may be taken ahead: near its end nobody is refused for what others hold."""
MAX_BUCKETS: Final = 1_000
"""Above this, full ones are looked for and dropped."""
_ROUNDING: Final = 1e-6


@dataclass(frozen=True, slots=True)
class BucketRate:
    """How fast a bucket fills, and what it holds."""

    per_second: float
    burst: int


@dataclass(frozen=True, slots=True)
class TokenDemand:
    """What is to be taken from one bucket."""

    bucket: str
    rate: BucketRate
    needed: int
    """At least this, or nothing."""
    wanted: int
    """As much of this as there is."""
    ahead: int = 0
    """So much besides, of what may be taken ahead."""


@dataclass(frozen=True, slots=True)
class TokenGrant:
    """The answer to a demand."""

    tokens: int
    """0: there are too few."""
    left: int
    """In the bucket now; less than 0 where it is in debt."""
    wait_seconds: float = 0.0
    """Until there is what was needed, where that was too much."""


class LocalTokenBuckets:
    """The buckets of one process."""

    def __init__(self) -> None:
        self._full_at: dict[str, float] = {}
        self._swept_above = MAX_BUCKETS

    def take(self, demand: TokenDemand, now: float) -> TokenGrant:
        """Take tokens, by a clock of seconds that never goes back."""
        rate = demand.rate
        full_at = max(self._full_at.get(demand.bucket, now), now)
        held = rate.burst - (full_at - now) * rate.per_second + _ROUNDING
        enough = min(demand.needed, rate.burst)
        if held < enough:
            return TokenGrant(0, math.floor(held), (enough - held) / rate.per_second)
        tokens = max(demand.needed, min(demand.wanted, math.floor(held)))
        tokens += min(demand.ahead, max(math.floor(held) - tokens, 0) // SPARE)
        self._full_at[demand.bucket] = full_at + tokens / rate.per_second
        self._drop_full(now)
        return TokenGrant(tokens, math.floor(held) - tokens)

    def _drop_full(self, now: float) -> None:
        if len(self._full_at) > self._swept_above:
            self._full_at = {bucket: full_at for bucket, full_at in self._full_at.items() if full_at > now}
            self._swept_above = max(MAX_BUCKETS, 2 * len(self._full_at))
