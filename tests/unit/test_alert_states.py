"""States of the alerts: as the rules of Prometheus would see them, from facts of the stores."""

from __future__ import annotations

from typing import Final

import pytest
from msgspec.structs import replace

from deploy.monitoring import alert_rules
from doctor.alert_notices import NOTICES
from doctor.alert_states import AlertState, ProcessFacts, QueueFacts, evaluate
from doctor.findings import DriftClass

PROCESSES: Final = ProcessFacts(
    has_worker=True, has_leader=True, versions=frozenset({"1"}), longest_loop_lag_ms=3
)
QUEUE: Final = QueueFacts(drift=frozenset(), oldest_pending=1, schedule_lag=0, deferred_delay=0)


def firing(processes: ProcessFacts, queue: QueueFacts) -> set[str]:
    return {alert.notice.name for alert in evaluate(processes, queue) if alert.state is AlertState.FIRING}


def test_a_healthy_server_fires_nothing_and_shows_alerts_without_data_as_unknown() -> None:
    alerts = evaluate(PROCESSES, QUEUE)
    assert {alert.state for alert in alerts} == {AlertState.QUIET, AlertState.UNKNOWN}
    assert {alert.notice.name for alert in alerts} == {*NOTICES}
    unknown = {alert.notice.name for alert in alerts if alert.state is AlertState.UNKNOWN}
    assert unknown == {"TwoLeaders", "DeadLettersGrow", "LeasesLost", "CommitsSlow"}


@pytest.mark.parametrize(
    ("processes", "queue", "expected"),
    [
        (replace(PROCESSES, has_worker=False), replace(QUEUE, oldest_pending=70), {"NoWorker"}),
        (PROCESSES, replace(QUEUE, oldest_pending=70), {"OldestPendingOneMinute"}),
        (
            PROCESSES,
            replace(QUEUE, oldest_pending=301),
            {"OldestPendingOneMinute", "OldestPendingFiveMinutes"},
        ),
        (replace(PROCESSES, has_leader=False), QUEUE, {"NoLeader"}),
        (replace(PROCESSES, versions=frozenset({"1", None})), QUEUE, {"VersionsDiffer"}),
        (replace(PROCESSES, longest_loop_lag_ms=1_001), QUEUE, {"EventLoopBlocked"}),
        (PROCESSES, replace(QUEUE, schedule_lag=121), {"SchedulesLate"}),
        (PROCESSES, replace(QUEUE, deferred_delay=121), {"DeferredRunsLate"}),
        (
            PROCESSES,
            replace(QUEUE, drift=frozenset({DriftClass.ASLEEP_AGAINST_WINDOW})),
            {"AsleepAgainstWindow"},
        ),
    ],
)
def test_a_fact_fires_its_alert(processes: ProcessFacts, queue: QueueFacts, expected: set[str]) -> None:
    assert firing(processes, queue) == expected


def test_each_alert_has_a_rule_of_prometheus() -> None:
    assert {*NOTICES} <= {rule.name for rule in alert_rules.list_rules()}
