"""Page of the overview: problems that need a person, reasons of waits in words, and the next starts and stops."""

from __future__ import annotations

import time
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from gateway.dashboard.pages import overview

NOW = datetime(2026, 11, 28, 12, tzinfo=UTC)


def at(hours: float) -> str:
    return (NOW + timedelta(hours=hours)).isoformat().replace("+00:00", "Z")


def reason(code: str, kind: str = "wait", **fields: Any) -> dict[str, Any]:  # noqa: ANN401 - any JSON value
    return {"code": code, "kind": kind, "count": 1, "oldestSince": at(-1), "until": None, **fields}


def data(**fields: Any) -> dict[str, Any]:  # noqa: ANN401 - any JSON value
    return {
        "why": {"reasons": [], "workers": {"state": "free"}},
        "drift": None,
        "dead": None,
        "deployments": {"states": {}, "failed": [], "upcoming": []},
        **fields,
    }


def schedule(name: str, starts_at: str) -> dict[str, Any]:
    return {
        "workflowId": f"wf_{name}",
        "workflowName": name,
        "isActive": True,
        "nextRuns": [{"startsAt": starts_at, "localTime": "2026-11-29T19:00:00+01:00"}],
        "policy": {"timezone": "Europe/Berlin"},
    }


def list_needs(**fields: Any) -> dict[str, Any]:  # noqa: ANN401 - any JSON value
    return {name: found for name, found in overview.find_needs(data(**fields), [], NOW).items() if found}


def test_nothing_needs_a_person_while_runs_wait_for_a_reason_that_ends() -> None:
    reasons = [reason("window-closed"), reason("queued-behind", oldestSince=at(-0.05)), reason("timer")]
    assert list_needs(why={"reasons": reasons, "workers": {"state": "full"}}) == {}


def test_the_oldest_pending_run_needs_a_person_after_five_minutes() -> None:
    reasons = [
        reason("queued-behind", oldestSince=at(-0.2)),
        reason("waiting-for-slot", oldestSince=at(-0.5)),
    ]
    (oldest,) = list_needs(why={"reasons": reasons, "workers": {"state": "full"}})["oldest"]
    assert (oldest["code"], oldest["words"]) == ("waiting-for-slot", "for a free slot")


def test_findings_are_told_once_and_minor_ones_together() -> None:
    critical = {"class": "no-worker", "severity": "critical"}
    minor = [{"class": "status-differs", "severity": "warning"}] * 2
    findings = {"findings": [critical, *minor]}
    absent = {"reasons": [], "workers": {"state": "absent"}}
    assert list_needs(why=absent, drift=findings) == {"workers": [True], "drift": [minor]}
    assert list_needs(drift=findings) == {"findings": [critical], "drift": [minor]}


def failure(workflow: str, count: int, runs: int, **fields: Any) -> dict[str, Any]:  # noqa: ANN401 - any JSON value
    times = {"firstAt": at(-1), "lastAt": at(-0.1), "completedSuccessorId": None}
    cause = {"workflowId": workflow, "nodeId": "call", "code": "http-status", "count": count}
    return {**cause, "workflowRuns": runs, **times, **fields}


def test_failures_that_go_on_are_ranked_by_their_share_times_their_count() -> None:
    groups = [
        failure("rare", 4, 400),
        failure("always", 5, 5, message="the latest"),
        failure("often", 90, 9_000),
        failure("always", 3, 8, firstAt=at(-3)),
        failure("other-code", 2, 4, code="timeout"),
        failure("once", 1, 1),
        failure("mended", 50, 50, completedSuccessorId="exec_1"),
    ]
    failing = overview.find_needs(data(), groups, NOW)["failing"]
    order = [(cause["workflowId"], cause["count"]) for cause in failing]
    assert order == [("always", 8), ("other-code", 2), ("once", 1), ("often", 90), ("rare", 4)]
    assert (failing[0]["message"], failing[0]["firstAt"]) == ("the latest", at(-3))


def test_pod_time_is_never_zero_while_pods_are_up() -> None:
    usage = {"podSeconds": 100, "alwaysOnPodSeconds": 86_400}
    assert overview.describe_pod_time(usage) == "2 min today, of 24.0 h always on"
    assert overview.describe_pod_time({**usage, "podSeconds": 1}).startswith("under 1 min")


def test_reasons_of_waits_tell_their_known_end() -> None:
    reasons = [
        reason("window-closed", count=180, until=at(20)),
        reason("node-running"),
        reason("no-worker", "escalate"),
    ]
    waits = overview.list_waits(reasons, NOW)
    words = ["for the window to open (opens Sun 08:00)", "for a worker to be present"]
    assert [one["words"] for one in waits] == words


def test_starts_and_stops_are_shown_beside_runs_of_schedules_with_their_causes() -> None:
    def deployment(hours: float, **fields: Any) -> dict[str, Any]:  # noqa: ANN401 - any JSON value
        return {
            "nextTransition": "stop",
            "nextTransitionAt": at(hours),
            "workflowId": "wf",
            "workflowName": f"at {hours:02}",
            "policyType": "idle-shutdown",
            "lastActivityAt": at(-1),
            "startFailures": 0,
            **fields,
        }

    failed = deployment(1, nextTransition="start", startFailures=3)
    window = deployment(2, policyType="scheduled-window")
    others = [deployment(number) for number in range(3, 11)]
    found = overview.list_upcoming([*others, window, failed], [schedule("nightly", at(30))], NOW)
    assert [one["cause"] for one in found][:3] == [
        "again after 3 failed starts",
        "its window closes",
        "idle since 11:00",
    ]
    assert [one["verb"] for one in found] == ["starts", *["stops"] * 9, "runs"]
    assert (found[-1]["cause"], found[-1]["day"]) == ("19:00 in Europe/Berlin", "Sun 29 Nov")


def test_a_scheduled_run_of_another_day_has_its_day() -> None:
    late = NOW.replace(hour=23, minute=50)
    schedules = [
        schedule("Weekly", "2026-11-30T02:00:00.000Z"),
        schedule("Soon", "2026-11-28T23:55:00.000Z"),
        schedule("Night", "2026-11-29T00:05:00.000Z"),
    ]
    shown = [(one["name"], one["day"]) for one in overview.list_upcoming((), schedules, late)]
    assert shown == [("Soon", ""), ("Night", "Sun 29 Nov"), ("Weekly", "Mon 30 Nov")]


def test_questions_for_the_visitor_tell_which_expires_first() -> None:
    questions = [
        {"assignment": "caller", "expiresAt": at(4), "title": "Set 12 prices?"},
        {"assignment": "caller", "expiresAt": None, "title": "Go on?"},
        {"assignment": "anyone", "expiresAt": at(1), "title": "Other?"},
    ]
    assert overview.describe_questions({"inputs": questions}, NOW) == (
        "2 of them for you. “Set 12 prices?” expires 16:00."
    )
    assert overview.describe_questions({"inputs": questions[2:]}, NOW) == ""
    assert overview.describe_questions(None, NOW) == ""


def test_pod_time_of_today_is_compared_with_pods_that_never_stop() -> None:
    usage = {"podSeconds": 51_120, "alwaysOnPodSeconds": 248_400}
    assert overview.describe_pod_time(usage) == "14.2 h today, of 69.0 h always on"
    assert overview.describe_pod_time({"podSeconds": 0, "alwaysOnPodSeconds": 0}) == ""
    assert overview.describe_pod_time(None) == ""


def test_a_time_range_shades_the_hours_that_it_touches() -> None:
    hours = [{"startsAt": at(number)} for number in range(-23, 1)]
    shown = overview.read_range({"since": at(-2), "until": at(0)})
    assert overview.find_shade(hours, shown) == (21, 2)
    assert shown == {"since": "2026-11-28T10:00:00.000Z", "until": "2026-11-28T12:00:00.000Z"}
    assert overview.find_shade(hours, overview.read_range({"since": at(-99), "until": at(-98)})) is None
    for wrong in ({"since": at(0), "until": at(-1)}, {"since": at(0)}, {"since": "x", "until": "y"}):
        assert overview.read_range(wrong) == {}


def test_a_time_range_without_a_zone_is_in_utc_wherever_the_server_is(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with monkeypatch.context() as patch:
        patch.setenv("TZ", "XXX-05:30")
        time.tzset()
        shown = overview.read_range({"since": "2026-11-28T10:00", "until": "2026-11-28T14:00+02:00"})
    time.tzset()
    assert shown == {"since": "2026-11-28T10:00:00.000Z", "until": "2026-11-28T12:00:00.000Z"}
