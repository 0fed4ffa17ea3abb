"""Token buckets: rate limits with a number per second in the long run, and a burst at once.

A bucket is one number, the time at which it is full again, so an unused bucket expires by itself. A demand
for more than a bucket can hold is granted by a full bucket, and leaves a debt.
"""

from __future__ import annotations

import math
from typing import Final

from msgspec import Struct

SPARE: Final = 8
"""Divisor of the remaining tokens that limits tokens ahead, so that a nearly empty bucket refuses no demand
for them.
"""
MAX_BUCKETS: Final = 1_000
"""Number of buckets above which full ones are dropped."""
_ROUNDING: Final = 1e-6


class BucketRate(Struct, frozen=True):
    """Refill rate and capacity of a bucket."""

    per_second: float
    burst: int


class TokenDemand(Struct, frozen=True):
    """Demand for tokens of one bucket."""

    bucket: str
    rate: BucketRate
    needed: int
    """Minimum; with fewer tokens in the bucket, none are granted."""
    wanted: int
    """Maximum, as far as the bucket has tokens."""
    ahead: int = 0
    """Additional tokens for later demands, as far as they may be taken ahead."""


class TokenGrant(Struct, frozen=True):
    """Answer to a demand."""

    tokens: int
    """0 if the bucket has too few."""
    left: int
    """Tokens left in the bucket; negative if it is in debt."""
    wait_seconds: float = 0.0
    """Time until the bucket has the needed tokens, if it has too few."""


def grant_tokens(demand: TokenDemand, full_at: float, now: float) -> tuple[TokenGrant, float]:
    """Return the grant for a demand from a bucket that is full again at `full_at`,
    and the time at which it is full then.

    Times are in seconds of one clock. With the needed tokens, it grants up to the wanted ones, and of `ahead` at most
    an eighth of the rest. Without them it grants 0, with the seconds to wait. A demand that needs more than the bucket
    can hold is granted by a full bucket, which is then in debt.
    """
    rate = demand.rate
    full_at = max(full_at, now)
    held = rate.burst - (full_at - now) * rate.per_second + _ROUNDING
    enough = min(demand.needed, rate.burst)
    if held < enough:
        return TokenGrant(0, math.floor(held), (enough - held) / rate.per_second), full_at
    tokens = max(demand.needed, min(demand.wanted, math.floor(held)))
    tokens += min(demand.ahead, max(math.floor(held) - tokens, 0) // SPARE)
    return TokenGrant(tokens, math.floor(held) - tokens), full_at + tokens / rate.per_second


class LocalTokenBuckets:
    """Token buckets of one process."""

    def __init__(self) -> None:
        self._full_at: dict[str, float] = {}
        self._swept_above = MAX_BUCKETS

    def take(self, demand: TokenDemand, now: float) -> TokenGrant:
        """Take tokens from a bucket of this process; `now` is in seconds of a monotonic clock.

        A bucket with too few tokens keeps them: the grant has 0 tokens, and the seconds to wait. A bucket of a new name
        is full.
        """
        grant, full_at = grant_tokens(demand, self._full_at.get(demand.bucket, now), now)
        if grant.tokens:
            self._full_at[demand.bucket] = full_at
            self._drop_full(now)
        return grant

    def _drop_full(self, now: float) -> None:
        """Drop buckets that are full again, if there are over 1,000."""
        if len(self._full_at) > self._swept_above:
            self._full_at = {bucket: full_at for bucket, full_at in self._full_at.items() if full_at > now}
            self._swept_above = max(MAX_BUCKETS, 2 * len(self._full_at))
