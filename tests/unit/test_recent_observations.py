"""Memory of observations for drift: one that is old enough serves as the first of two."""

from __future__ import annotations

from doctor.findings import DriftClass, FindingKey
from gateway.drift.recent_observations import RecentObservations

GONE: FindingKey = (DriftClass.NO_LEADER, "leader", "scheduler")


def test_one_observation_is_old_enough_while_requests_follow_each_other_quickly() -> None:
    now = 0.0
    recent = RecentObservations(lambda: now)
    assert recent.find("org_1") is None
    found = []
    for step in range(20):
        now = step * 0.3
        found.append(recent.find("org_1"))
        recent.add("org_1", frozenset([GONE]), recent.now())
    assert found[:4] == [None] * 4, "the first is not a second old yet"
    assert found[4:] == [frozenset([GONE])] * 16
    assert recent.find("org_2") is None
