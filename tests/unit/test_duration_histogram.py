"""Histograms of durations: estimates near the exact percentiles."""

from __future__ import annotations

import random
import sqlite3
from contextlib import closing

import pytest
from sqlalchemy import select
from sqlalchemy.dialects import sqlite

from models.duration_histogram import bucket_of, estimate_quantile, find_bucket, merge_histograms


def fill(microseconds: list[int]) -> dict[str, int]:
    """Return the histogram that a database makes of durations."""
    statement = select(bucket_of("taken").label("bucket"))
    text = f"{statement.compile(dialect=sqlite.dialect())} FROM durations"
    with closing(sqlite3.connect(":memory:")) as connection:
        connection.execute("CREATE TABLE durations (taken integer)")
        connection.executemany("INSERT INTO durations VALUES (?)", [(one,) for one in microseconds])
        rows = connection.execute(f"SELECT bucket, count(*) FROM ({text}) GROUP BY bucket").fetchall()
    return {str(bucket): count for bucket, count in rows}


@pytest.mark.parametrize("least", [2, 80, 5_000, 40_000_000])
def test_percentiles_of_a_histogram_are_within_ten_percent(least: int) -> None:
    draw = random.Random(least)
    durations = sorted(int(1_000 * least * draw.uniform(1, 9)) for _ in range(999))
    histogram = fill(durations)
    for percent in (50, 95):
        exact = durations[-(-999 * percent // 100) - 1] / 1_000
        assert estimate_quantile(histogram, percent) == pytest.approx(exact, rel=0.1, abs=0.5)


def test_the_least_and_the_greatest_durations_have_buckets_of_their_own() -> None:
    year = 365 * 86_400_000_000
    assert estimate_quantile(fill([-5, 0, 999]), 95) == 0
    assert (estimate_quantile(fill([year]), 50) or 0) > 86_400_000 * 40
    assert estimate_quantile({}, 50) is None


def test_the_database_and_python_put_durations_into_the_same_buckets() -> None:
    for milliseconds in (0, 1, 2, 3, 4, 1_024, 86_400_000):  # powers of two are the largest of their buckets
        assert fill([milliseconds * 1_000]) == {str(find_bucket(milliseconds)): 1}


def test_histograms_add_up() -> None:
    total = merge_histograms([{"3": 1, "4": 2}, {}, {"4": 5}])
    assert total == {"3": 1, "4": 7}
