"""Histograms of durations, filled by a database or by a process, and estimates of percentiles from their counts.

The buckets are logarithmic, four to a doubling, so that an estimate differs from the exact value by 10 % at most.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Mapping
from typing import Final, TypeAlias

from sqlalchemy import ColumnElement, Integer, literal_column

Histogram: TypeAlias = "Mapping[str, int]"
"""Number of durations by bucket; the keys are decimal numbers as text, since it is stored as JSON."""

BUCKETS_PER_DOUBLING: Final = 4
HALF_BUCKET: Final = 2.0 ** (1 / (2 * BUCKETS_PER_DOUBLING))
"""Factor from the least duration of a bucket to its middle."""
_BOUNDS: Final = [round(1_000 * 2 ** (number / BUCKETS_PER_DOUBLING)) for number in range(128)]
"""Largest durations of the buckets but the last, in microseconds: 1 ms to about 41 days."""


def bucket_of(microseconds: str) -> ColumnElement[int]:
    """Return the SQL expression for the bucket of a duration: a binary search of seven comparisons.

    `microseconds` is the SQL text of the duration. The expression is a single text, since an expression of 128
    conditions would take milliseconds to build and to look up in the cache of compiled statements.
    """
    return literal_column(_build_search(microseconds, 0, len(_BOUNDS)), Integer)


def find_bucket(milliseconds: int) -> int:
    """Return the bucket of a duration, the same number as `bucket_of` in the database."""
    return bisect_left(_BOUNDS, milliseconds * 1_000)


def _build_search(microseconds: str, first: int, last: int) -> str:
    """Return the SQL text that computes a duration's bucket, one of the numbers `first` to `last`, by a
    binary search.
    """
    if first == last:
        return str(first)
    middle = (first + last) // 2
    lower, upper = _build_search(microseconds, first, middle), _build_search(microseconds, middle + 1, last)
    return f"CASE WHEN {microseconds} <= {_BOUNDS[middle]} THEN {lower} ELSE {upper} END"


def merge_histograms(histograms: Iterable[Histogram]) -> dict[str, int]:
    """Return the counts of all histograms, added by bucket."""
    total: dict[str, int] = {}
    for one in histograms:
        for bucket, count in one.items():
            total[bucket] = total.get(bucket, 0) + count
    return total


def estimate_quantile(histogram: Histogram, percent: int) -> int | None:
    """Return a percentile of the durations in whole milliseconds, within 10 %; None for an empty histogram."""
    left = -(-sum(histogram.values()) * percent // 100)
    for bucket in sorted(map(int, histogram)):
        left -= histogram[str(bucket)]
        if left <= 0:
            return _middle_ms(bucket)
    return None


def _middle_ms(bucket: int) -> int:
    """Return the duration in the middle of a bucket in whole milliseconds: 0 for the first."""
    if bucket == 0:
        return 0
    return round(_BOUNDS[bucket - 1] * HALF_BUCKET / 1_000)
