"""Activity of a process between two reports."""

import time

from telemetry.process_activity import ActivityMeter, DutyTick, ProcessActivity


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
    assert "duties" not in second
    activity.duties["count rows"] = DutyTick(5, 0.25, time.monotonic() - 60)
    idle = meter.take()
    assert (idle["duties"]["count rows"]["every"], idle["duties"]["count rows"]["seconds"]) == (5, 0.25)
    assert idle["duties"]["count rows"]["age"] >= 60
    assert (idle["claims"], idle["commits"]) == (0, 0)
    assert "commitSize" not in idle
