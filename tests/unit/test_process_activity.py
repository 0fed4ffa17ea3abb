"""Activity of a process between two reports."""

from telemetry.process_activity import ActivityMeter, ProcessActivity


def test_a_report_has_the_activity_since_the_last_one() -> None:
    activity = ProcessActivity(claims=5, commits=1, committed_runs=5)
    meter = ActivityMeter(activity)
    first = meter.take()
    assert first["claims"] > 0
    assert first["commitSize"] == 5
    activity.claims += 12
    activity.commits += 4
    activity.committed_runs += 12
    activity.count_streams = lambda: 3
    activity.retention = {"executions": 14}
    second = meter.take()
    assert (second["commitSize"], second["streams"], second["retention"]) == (3, 3, {"executions": 14})
    idle = meter.take()
    assert (idle["claims"], idle["commits"]) == (0, 0)
    assert "commitSize" not in idle
