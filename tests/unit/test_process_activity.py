"""Activity of a process between two reports."""

import time
from urllib.error import URLError

import pytest
from sqlalchemy.exc import OperationalError

from telemetry.failure_texts import LONGEST_TEXT, describe_failure
from telemetry.process_activity import ActivityMeter, DutyTick, Lead, ProcessActivity, ServerAnswer


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
    assert not second.keys() & {"duties", "queues", "renewalAge", "lead", "connections"}
    activity.duties["count rows"] = DutyTick(5, 0.25, time.monotonic() - 60)
    idle = meter.take()
    assert (idle["duties"]["count rows"]["every"], idle["duties"]["count rows"]["seconds"]) == (5, 0.25)
    assert idle["duties"]["count rows"]["age"] >= 60
    assert (idle["claims"], idle["commits"]) == (0, 0)
    assert "commitSize" not in idle


def test_a_report_has_queues_leases_and_the_servers_that_the_process_uses() -> None:
    activity = ProcessActivity(queues={"workers": None, "deployments": lambda: 3})
    activity.renewed_at, activity.lead = time.monotonic() - 4, Lead("scheduler_1", time.monotonic() - 90)
    activity.note_failure("kubernetes", ConnectionRefusedError("no route"))
    activity.connections["database"].answer = ServerAnswer(time.monotonic(), 0.0125)
    shown = ActivityMeter(activity).take()
    assert shown["queues"] == {"workers": None, "deployments": 3}
    assert (shown["renewalAge"] >= 4, shown["lead"]["owner"], shown["lead"]["age"] >= 90) == (
        True,
        "scheduler_1",
        True,
    )
    assert shown["connections"]["database"] == {"ms": 12.5, "age": pytest.approx(0, abs=5)}
    failed = shown["connections"]["kubernetes"]
    assert failed == {
        "failure": "ConnectionRefusedError: no route",
        "failureAge": pytest.approx(0, abs=5),
    }


@pytest.mark.parametrize(
    "text",
    [
        "cannot reach postgresql://flame:hunter2@db:5432/flame",
        "cannot reach redis://:hunter2@redis:6379",
        "cannot reach redis://:one/hunter2@two@redis:6379",
        'refused: {"password": "hunter2 and more"}',
        "refused: host=db password=hunter2 user=flame",
        "refused: Authorization: Bearer hunter2",
        "refused: Authorization: Token hunter2",
        "the token Bearer hunter2 has expired",
        'Secret "x" is invalid: data[key]: Invalid value: "hunter2": must be base64',
        r'Secret "x" is invalid: data[key]: Invalid value: "a \"hunter2\"": must be base64',
        'Pod "x" is invalid: spec: Invalid value: {"name":"A","value":"hunter2"}: may not change',
        "refused: client_secret=hunter2&grant_type=code",
        "refused: PGPASSWORD=hunter2 access_token: hunter2 tokenValue=hunter2",
        r'refused: {"db_password": "a \"hunter2"}',
        r'refused: "{\"password\": \"one hunter2\"}"',
    ],
)
def test_texts_of_failures_have_no_credentials(text: str) -> None:
    shown = describe_failure(ConnectionError(text))
    assert shown.startswith("ConnectionError: ")
    assert "[hidden]" in shown
    assert "hunter2" not in shown


def test_the_text_of_a_failure_is_that_of_the_driver_in_one_line() -> None:
    error = OperationalError("SELECT secret", {"id": "value"}, URLError("gone\n\taway " + "x" * 400))
    shown = describe_failure(error)
    assert shown.startswith("URLError: <urlopen error gone away")
    assert len(shown) == LONGEST_TEXT
    assert describe_failure(TimeoutError()) == "TimeoutError"
