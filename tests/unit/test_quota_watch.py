"""Remaining capacity of quotas, from the API server's status."""

from __future__ import annotations

from typing import Any

import pytest

from workers.cluster.quota_watch import has_grown, quota_headroom


def make_quota(hard: dict[str, str], used: dict[str, str]) -> dict[str, Any]:
    return {"spec": {"hard": hard}, "status": {"used": used}}


def test_remaining_quota_is_counted_in_one_unit() -> None:
    hard = {"pods": "200", "requests.cpu": "32", "limits.memory": "64Gi", "services.nodeports": "0"}
    used = {"pods": "3", "requests.cpu": "1500m", "limits.memory": "768Mi"}
    assert quota_headroom(make_quota(hard, used)) == {
        "pods": 197,
        "requests.cpu": 30.5,
        "limits.memory": 64 * 2**30 - 768 * 2**20,
        "services.nodeports": 0,
    }
    assert quota_headroom({"spec": {}}) == {}


@pytest.mark.parametrize(
    ("text", "expected"),
    [("2Ei", 2 * 2.0**60), ("3E", 3e18), ("2E3", 2_000), ("5e-1", 0.5), ("1.5Gi", 1.5 * 2**30), ("full", 0)],
)
def test_each_form_of_a_quantity_is_read(text: str, expected: float) -> None:
    assert quota_headroom(make_quota({"limits.memory": text}, {})) == {"limits.memory": expected}


@pytest.mark.parametrize(
    ("before", "after", "grows"),
    [
        ({"pods": 0}, {"pods": 1}, True),
        ({"pods": 1}, {"pods": 0}, False),
        ({"pods": 0}, {"pods": 0}, False),
        ({"pods": 0}, {}, True),
        ({}, {"pods": 5}, False),
        ({"pods": 1, "requests.cpu": 0}, {"pods": 0, "requests.cpu": 1}, True),
    ],
)
def test_room_has_grown_where_any_bound_has_more_left(
    before: dict[str, float],
    after: dict[str, float],
    grows: bool,  # noqa: FBT001 - a column of the table
) -> None:
    assert has_grown(before, after) is grows
