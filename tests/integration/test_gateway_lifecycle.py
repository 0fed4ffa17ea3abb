"""Lifecycle policies over HTTP: update, read, refusal, preview, and history of decisions."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from typing import Any

import pytest
from sqlalchemy import insert, update
from sqlmodel import col

from gateway.deployments import deployment_list, lifecycle_calendar, lifecycle_rows
from gateway.deployments.lifecycle_rows import DAY, TimeRange
from models import ids, weekly_windows
from models.deployment import Deployment, LifecycleDecision, ObservedState
from models.execution_status import ExecutionStatus
from models.lifecycle_policy import (
    LifecycleAction,
    LifecycleReason,
    ScheduledWindowPolicy,
    StoppedReason,
)
from models.weekly_windows import WindowSchedule
from models.workflow import Workflow
from tests.integration.deployed_workflows import deploy_with_pod, run
from tests.integration.gateway_harness import (
    GRAPH,
    GatewayHarness,
    OrganizationUsers,
    UserClient,
    assert_refused,
)
from tests.integration.query_plans import explain_statement

DEFAULT = {"type": "idle-shutdown", "idleTimeoutMinutes": 30}
OFFICE_HOURS = {"days": [1, 2, 3, 4, 5], "startTime": "09:00", "endTime": "17:00"}
SCHEDULED: dict[str, Any] = {
    "type": "scheduled-window",
    "schedule": {"timezone": "America/Los_Angeles", "windows": [OFFICE_HOURS]},
}
HOUR = timedelta(hours=1)


def lifecycle_path(workflow_id: str, below: str = "") -> str:
    return f"/api/v1/workflows/{workflow_id}/lifecycle{below}"


def scheduled_policy(**window: Any) -> dict[str, Any]:  # noqa: ANN401 - any JSON value
    """Return a policy with one window, changed."""
    return {**SCHEDULED, "schedule": {**SCHEDULED["schedule"], "windows": [{**OFFICE_HOURS, **window}]}}


async def get_lifecycle(person: UserClient, workflow_id: str, below: str = "") -> dict[str, Any]:
    response = await person.api.get(lifecycle_path(workflow_id, below))
    assert response.status_code == 200, response.text
    body: dict[str, Any] = response.json()
    return body


# ── set and shown ───────────────────────────────────────────────────────────────────────────────────────────


async def test_a_workflow_sleeps_after_half_an_hour_unless_somebody_chooses_otherwise(
    people: OrganizationUsers,
) -> None:
    workflow_id = await people.owner.create(**GRAPH)
    assert await get_lifecycle(people.owner, workflow_id) == {
        "workflowId": workflow_id,
        "lifecyclePolicy": DEFAULT,
        "deploymentStatus": "not-deployed",
        "stoppedReason": None,
        "lastActivityAt": None,
        "nextTransition": None,
        "nextTransitionAt": None,
        "usage": None,
    }


KEPT: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"type": "always-on"}, {"type": "always-on"}),
    ({"type": "on-demand"}, {"type": "on-demand"}),
    ({"type": "idle-shutdown"}, DEFAULT),
    ({"type": "idle-shutdown", "idleTimeoutMinutes": None}, DEFAULT),
    ({"type": "idle-shutdown", "idleTimeoutMinutes": 5}, {**DEFAULT, "idleTimeoutMinutes": 5}),
    ({"type": "idle-shutdown", "idleTimeoutMinutes": 1440}, {**DEFAULT, "idleTimeoutMinutes": 1440}),
    (SCHEDULED, SCHEDULED),
    (scheduled_policy(endTime="24:00"), scheduled_policy(endTime="24:00")),
    (
        scheduled_policy(startTime="00:00", endTime="00:00"),
        scheduled_policy(startTime="00:00", endTime="00:00"),
    ),
    ({**SCHEDULED, "idleTimeoutMinutes": 10}, SCHEDULED),
]


async def test_a_policy_is_stored_as_sent_with_the_fields_of_its_type(
    people: OrganizationUsers,
) -> None:
    workflow_id = await people.owner.create(**GRAPH)
    for sent, kept in KEPT:
        response = await people.owner.api.put(lifecycle_path(workflow_id), json=sent)
        assert response.status_code == 200, response.text
        assert response.json() == {"workflowId": workflow_id, "lifecyclePolicy": kept}
        assert (await get_lifecycle(people.owner, workflow_id))["lifecyclePolicy"] == kept


WRONG: list[tuple[dict[str, Any], dict[str, str]]] = [
    ({}, {"type": "required"}),
    ({"type": "sometimes"}, {"type": "invalid-value"}),
    ({**DEFAULT, "idleTimeoutMinutes": 4}, {"idleTimeoutMinutes": "invalid-value"}),
    ({**DEFAULT, "idleTimeoutMinutes": 1441}, {"idleTimeoutMinutes": "invalid-value"}),
    ({**DEFAULT, "idleTimeoutMinutes": 7.5}, {"idleTimeoutMinutes": "invalid-type"}),
    ({"type": "always-on", "idleTimeoutMinutes": 4}, {"idleTimeoutMinutes": "invalid-value"}),
    ({"type": "scheduled-window"}, {"schedule": "required"}),
    ({"type": "scheduled-window", "schedule": None}, {"schedule": "required"}),
    (
        {"type": "scheduled-window", "schedule": {}},
        {"schedule.timezone": "required", "schedule.windows": "required"},
    ),
    (
        {**SCHEDULED, "schedule": {"timezone": "UTC", "windows": []}},
        {"schedule.windows": "invalid-value"},
    ),
    (scheduled_policy(days=[]), {"schedule.windows.0.days": "invalid-value"}),
    (scheduled_policy(days=[7]), {"schedule.windows.0.days.0": "invalid-value"}),
    (scheduled_policy(days=["monday"]), {"schedule.windows.0.days.0": "invalid-type"}),
    (scheduled_policy(startTime="9:00"), {"schedule.windows.0.startTime": "invalid-value"}),
    (scheduled_policy(startTime="24:00"), {"schedule.windows.0.startTime": "invalid-value"}),
    (scheduled_policy(startTime="09:00\n"), {"schedule.windows.0.startTime": "invalid-value"}),
    (
        scheduled_policy(startTime="\u0660\u0669:\u0660\u0660"),
        {"schedule.windows.0.startTime": "invalid-value"},
    ),
    (scheduled_policy(endTime="24:01"), {"schedule.windows.0.endTime": "invalid-value"}),
    (scheduled_policy(endTime="17:60"), {"schedule.windows.0.endTime": "invalid-value"}),
    (scheduled_policy(endTime="09:00"), {"schedule.windows.0.endTime": "empty-window"}),
]


async def test_a_policy_that_is_none_is_refused_field_by_field_and_so_is_its_preview(
    people: OrganizationUsers,
) -> None:
    workflow_id = await people.owner.create(**GRAPH)
    for body, wrong in WRONG:
        for response in (
            await people.owner.api.put(lifecycle_path(workflow_id), json=body),
            await people.owner.api.post(lifecycle_path(workflow_id, "/preview"), json=body),
        ):
            assert_refused(response, 422, "validation-failed")
            assert {one["path"]: one["code"] for one in response.json()["error"]["details"]} == wrong
    assert (await get_lifecycle(people.owner, workflow_id))["lifecyclePolicy"] == DEFAULT


async def test_a_zone_is_one_of_those_that_are_known(people: OrganizationUsers) -> None:
    workflow_id = await people.owner.create(**GRAPH)
    for zone in (
        "",
        "PST",
        "america/los_angeles",
        "localtime",
        "../../etc/passwd",
        "/etc/localtime",
        "+01:00",
    ):
        body = {**SCHEDULED, "schedule": {**SCHEDULED["schedule"], "timezone": zone}}
        response = await people.owner.api.put(lifecycle_path(workflow_id), json=body)
        (detail,) = response.json()["error"]["details"]
        assert (detail["path"], detail["code"]) == ("schedule.timezone", "unknown-timezone")


async def test_a_policy_is_set_for_the_state_that_was_seen_and_leaves_a_trace(
    people: OrganizationUsers,
) -> None:
    owner = people.owner
    workflow_id = await owner.create(**GRAPH)
    tag = (await owner.api.get(lifecycle_path(workflow_id))).headers["ETag"]
    first = await owner.api.put(lifecycle_path(workflow_id), json=SCHEDULED, headers={"If-Match": tag})
    assert first.headers["ETag"] != tag
    late = await owner.api.put(
        lifecycle_path(workflow_id), json={"type": "on-demand"}, headers={"If-Match": tag}
    )
    assert_refused(late, 412, "precondition-failed")
    again = await owner.api.put(lifecycle_path(workflow_id), json=SCHEDULED)
    assert again.headers["ETag"] == first.headers["ETag"]
    found = await people.admin.api.get("/api/v1/audit", params={"objectId": workflow_id})
    actions = [one["action"] for one in found.json()["entries"]]
    assert actions == ["workflow.lifecycle-set", "workflow.created"]


async def test_a_copy_has_the_usual_policy(people: OrganizationUsers) -> None:
    workflow_id = await people.owner.create(**GRAPH)
    await people.owner.api.put(lifecycle_path(workflow_id), json=SCHEDULED)
    copied = await people.owner.api.post(f"/api/v1/workflows/{workflow_id}/duplicate")
    assert (await get_lifecycle(people.owner, copied.json()["workflowId"]))["lifecyclePolicy"] == DEFAULT


# ── state of a deployment ───────────────────────────────────────────────────────────────────────────────────


async def test_a_deployment_is_shown_with_its_next_transition(
    harness: GatewayHarness, people: OrganizationUsers
) -> None:
    workflow_id = await people.owner.create(**GRAPH)
    seen_at = datetime.now(UTC).replace(microsecond=0) - timedelta(minutes=1)
    await deploy_with_pod(harness, people.owner, workflow_id, last_activity_at=seen_at)
    body = await get_lifecycle(people.owner, workflow_id)
    assert (body["deploymentStatus"], body["stoppedReason"]) == ("running", None)
    assert datetime.fromisoformat(body["lastActivityAt"]) == seen_at
    assert body["nextTransition"] == "stop"
    assert datetime.fromisoformat(body["nextTransitionAt"]) == seen_at + timedelta(minutes=30)
    ended_at = seen_at + timedelta(seconds=30)
    await run(harness, people.owner, workflow_id, status=ExecutionStatus.COMPLETED, ended_at=ended_at)
    assert (
        datetime.fromisoformat((await get_lifecycle(people.owner, workflow_id))["lastActivityAt"]) == ended_at
    )


async def test_an_idle_time_shorter_than_may_be_chosen_is_shown_as_it_is(
    harness: GatewayHarness, people: OrganizationUsers
) -> None:
    workflow_id = await people.owner.create(**GRAPH)
    policy = {"type": "idle-shutdown", "idleTimeoutMinutes": 2 / 60}
    row = update(Workflow).where(col(Workflow.id) == workflow_id).values(lifecycle=policy)
    await harness.gateway.database.transaction(lambda connection: connection.execute(row))
    assert (await get_lifecycle(people.owner, workflow_id))["lifecyclePolicy"] == policy


STATUSES: list[tuple[dict[str, Any], str]] = [
    ({"observed": ObservedState.ABSENT}, "deploying"),
    ({"observed_definition_hash": "1" * 64}, "deploying"),
    ({"observed": ObservedState.STARTING}, "starting"),
    ({"observed": ObservedState.FAILED}, "failed"),
    ({"observed": ObservedState.FAILED, "generation": 2}, "starting"),
    ({"observed": ObservedState.OUTDATED, "observed_definition_hash": "1" * 64}, "failed"),
    (
        {"observed": ObservedState.OUTDATED, "observed_definition_hash": "1" * 64, "generation": 2},
        "deploying",
    ),
    ({"observed": ObservedState.UNKNOWN}, "unknown"),
    ({"replicas": 0, "stopped_reason": StoppedReason.MANUAL}, "stopping"),
    ({"replicas": 0, "observed": ObservedState.STOPPED, "stopped_reason": "idle"}, "stopped"),
    ({"is_deployed": False}, "undeploying"),
    ({"is_deployed": False, "observed": ObservedState.ABSENT}, "not-deployed"),
]


async def test_a_status_shows_the_desired_and_the_observed_state(
    harness: GatewayHarness, people: OrganizationUsers
) -> None:
    workflow_id = await people.owner.create(**GRAPH)
    usual = (await deploy_with_pod(harness, people.owner, workflow_id)).model_dump()
    for columns, status in STATUSES:
        await change_deployment(harness, workflow_id, {**usual, **columns})
        body = await get_lifecycle(people.owner, workflow_id)
        assert body["deploymentStatus"] == status
        assert body["stoppedReason"] == columns.get("stopped_reason")


async def change_deployment(harness: GatewayHarness, workflow_id: str, columns: dict[str, Any]) -> None:
    row = update(Deployment).where(col(Deployment.workflow_id) == workflow_id).values(columns)
    await harness.gateway.database.transaction(lambda connection: connection.execute(row))


async def test_the_use_of_pods_is_told_next_to_that_of_pods_that_never_sleep(
    harness: GatewayHarness, people: OrganizationUsers
) -> None:
    workflow_id = await people.owner.create(**GRAPH)
    await deploy_with_pod(harness, people.owner, workflow_id, last_replicas=2)
    await record_replicas(harness, people.owner, workflow_id, {240: 2, 160: 0, 100: 2, 76: 1, 52: 0})
    body = (await get_lifecycle(people.owner, workflow_id))["usage"]
    hours = 8 * 2 + 24 * 2 + 24 * 1  # of 168
    assert body["podSecondsPerDay"] == pytest.approx(hours * 3600 / 7, rel=0.001)
    assert body["alwaysOnPodSecondsPerDay"] == 2 * 86_400
    since, until = (datetime.fromisoformat(body[name]) for name in ("since", "until"))
    assert until - since == timedelta(days=7)


async def test_the_use_of_pods_counts_from_the_first_deployment(
    harness: GatewayHarness, people: OrganizationUsers
) -> None:
    workflow_id = await people.owner.create(**GRAPH)
    await deploy_with_pod(harness, people.owner, workflow_id)
    await record_replicas(harness, people.owner, workflow_id, {2: 1, 1: 0})
    body = (await get_lifecycle(people.owner, workflow_id))["usage"]
    assert body["podSecondsPerDay"] == pytest.approx(43_200, rel=0.001)


async def test_pod_time_is_summed_over_several_workflows_and_times(
    harness: GatewayHarness, people: OrganizationUsers
) -> None:
    now, workflow_ids = datetime.now(UTC), []
    for replicas in ({10: 2, 9: 0, 5: 1}, {8: 3, 6: 1, 4: 0}):
        workflow_ids.append(await people.owner.create(**GRAPH))
        await deploy_with_pod(harness, people.owner, workflow_ids[-1])
        await record_replicas(harness, people.owner, workflow_ids[-1], replicas, now=now)
    times = [now - HOUR * hours for hours in (9.5, 7.5, 6, 4.5, 0)]
    ranges = [TimeRange(*one) for one in pairwise(times)]
    async with harness.gateway.database.read() as connection:
        found = await lifecycle_rows.sum_pod_time(connection, workflow_ids, ranges)
        assert await lifecycle_rows.sum_pod_time(connection, [], ranges) == [0, 0, 0, 0]
    # The first one had two pods up to nine hours ago, and one since five; the other three, then one for two hours, from
    # the begin of one of the times on.
    assert found == pytest.approx([one * 3600 for one in (1 + 1.5, 4.5, 0.5 + 1.5, 4.5 + 0.5)])


async def test_the_pod_time_of_a_day_is_read_anew_until_it_is_over_for_an_hour(
    harness: GatewayHarness, people: OrganizationUsers
) -> None:
    workflow_id, midnight = await people.owner.create(**GRAPH), datetime(2026, 11, 28, tzinfo=UTC)
    await deploy_with_pod(harness, people.owner, workflow_id)

    async def sum_after_decision(hour: int, replicas: int, *, passed: timedelta) -> Sequence[float]:
        await record_replicas(harness, people.owner, workflow_id, {hour: replicas}, now=midnight)
        async with harness.gateway.database.read() as connection:
            return await lifecycle_rows.sum_pod_time_by_day(
                connection, workflow_id, midnight - DAY, midnight + passed
            )

    assert await sum_after_decision(3, 1, passed=HOUR / 2) == [3 * 3_600, 1_800]
    assert await sum_after_decision(1, 0, passed=HOUR / 2) == [2 * 3_600, 0]
    assert await sum_after_decision(0, 2, passed=HOUR) == [2 * 3_600, 2 * 3_600]
    # All decisions are made at present: those about an earlier day are not looked for again.
    assert await sum_after_decision(2, 0, passed=2 * HOUR) == [2 * 3_600, 4 * 3_600]


async def test_a_calendar_has_windows_and_the_times_with_pods_past_and_to_come(
    harness: GatewayHarness, people: OrganizationUsers
) -> None:
    workflow_id = await people.owner.create(**GRAPH)
    opens_at = datetime.now(UTC) + 12 * HOUR
    window = {
        "days": [*range(7)],
        "startTime": f"{opens_at:%H}:00",
        "endTime": f"{opens_at + HOUR:%H}:00",
    }
    policy = {"type": "scheduled-window", "schedule": {"timezone": "UTC", "windows": [window]}}
    put = await people.owner.api.put(lifecycle_path(workflow_id), json=policy)
    assert put.status_code == 200, put.text
    asleep = {"replicas": 0, "observed": ObservedState.STOPPED, "stopped_reason": StoppedReason.SCHEDULE}
    created_at = datetime.now(UTC) - 30 * DAY
    await deploy_with_pod(
        harness, people.owner, workflow_id, last_replicas=2, created_at=created_at, **asleep
    )
    await record_replicas(harness, people.owner, workflow_id, {240: 2, 160: 0, 100: 2, 76: 1, 52: 0})
    shown = await get_lifecycle(people.owner, workflow_id, "/calendar")
    since, now, until = (datetime.fromisoformat(shown[name]) for name in ("since", "now", "until"))
    assert (len(shown["days"]), until - since) == (14, 14 * DAY)
    assert [(one["reason"], one["isOpen"]) for one in shown["awake"]] == [(None, False), ("run-due", False)]
    used = (now - 160 * HOUR - since) * 2 + 48 * HOUR + 24 * HOUR
    assert sum(day["podSeconds"] for day in shown["days"]) == pytest.approx(used.total_seconds(), rel=0.001)
    whole = sum(day["alwaysOnPodSeconds"] for day in shown["days"])
    assert whole == pytest.approx(2 * (now - since).total_seconds(), rel=0.001)
    assert len(shown["windows"]) == 14
    coming = [one for one in shown["windows"] if one["start"] > shown["now"]]
    assert shown["planned"] == coming
    assert sum(day["plannedPodSeconds"] for day in shown["days"]) == pytest.approx(
        2 * 3600 * len(coming), rel=0.1
    )
    assert (shown["hold"], shown["failedStarts"]) == (None, [])

    by_hand = {"replicas": 1, "observed": ObservedState.RUNNING, "stopped_reason": None}
    await change_deployment(harness, workflow_id, {**by_hand, "started_by_hand_at": datetime.now(UTC)})
    held = await get_lifecycle(people.owner, workflow_id, "/calendar")
    assert held["planned"][0] == {"start": held["now"], "end": held["hold"]["until"]}
    assert held["hold"]["until"] == coming[0]["end"]
    why = (await people.owner.api.get(f"/api/v1/workflows/{workflow_id}/why")).json()
    assert why["message"].startswith("A user has started it outside its window, until ")
    assert_refused(await people.stranger.api.get(lifecycle_path(workflow_id, "/calendar")), 404, "not-found")


async def test_a_user_keeps_a_deployment_awake_until_a_time_and_releases_it(
    harness: GatewayHarness, people: OrganizationUsers
) -> None:
    owner, workflow_id = people.owner, await people.owner.create(**GRAPH)
    hold = lifecycle_path(workflow_id, "/hold")
    body = {"expiresInSeconds": 7200}
    assert_refused(await owner.api.post(hold, json=body), 409, "not-deployed")
    asleep = {"replicas": 0, "observed": ObservedState.STOPPED, "stopped_reason": StoppedReason.IDLE}
    await deploy_with_pod(harness, owner, workflow_id, **asleep)
    why = (await owner.api.get(f"/api/v1/workflows/{workflow_id}/why")).json()
    assert why["message"] == "It is asleep: a trigger starts it, and POST /execute uses the shared workers"
    run = (await owner.api.post(f"/api/v1/workflows/{workflow_id}/execute", json={})).json()["executionId"]
    (blocker,) = (await owner.api.get(f"/api/v1/executions/{run}/why")).json()["blockers"]
    assert (blocker["code"], blocker["details"]["queue"]) == ("no-worker", "shared")
    for seconds in (59, 8 * 86_400):
        wrong = await owner.api.post(hold, json={"expiresInSeconds": seconds})
        assert_refused(wrong, 422, "validation-failed")
    assert_refused(await people.stranger.api.post(hold, json=body), 404, "not-found")

    held = (await owner.api.post(hold, json=body)).json()
    since, until = (datetime.fromisoformat(held[name]) for name in ("since", "until"))
    assert until - since == 2 * HOUR
    shown = await get_lifecycle(owner, workflow_id)
    assert shown["stoppedReason"] is None
    calendar = (await get_lifecycle(owner, workflow_id, "/calendar"))["hold"]
    assert calendar == {
        "kind": "kept-awake",
        "since": held["since"],
        "userId": owner.user.id,
        "until": held["until"],
    }
    history = await get_lifecycle(owner, workflow_id, "/history")
    started = history["decisions"][0]
    assert (started["action"], started["reason"], started["userId"]) == (
        "start",
        "kept-awake",
        owner.user.id,
    )
    # Its pods are ready and idle for longer than its policy allows: it stops at the end of the time.
    ready = {"observed": ObservedState.RUNNING, "ready_replicas": 1, "observed_generation": 99}
    idle = {"last_activity_at": datetime.now(UTC) - 3 * HOUR}
    await change_deployment(harness, workflow_id, {**ready, **idle})
    shown = await get_lifecycle(owner, workflow_id)
    assert (shown["nextTransition"], shown["nextTransitionAt"]) == ("stop", held["until"])
    why = (await owner.api.get(f"/api/v1/workflows/{workflow_id}/why")).json()
    assert why["message"].startswith("A user keeps it awake, until ")

    assert (await owner.api.put(lifecycle_path(workflow_id), json={"type": "on-demand"})).is_success
    for _ in range(2):
        assert (await owner.api.delete(hold)).status_code == 204
    assert (await get_lifecycle(owner, workflow_id, "/calendar"))["hold"] is None
    shown = await get_lifecycle(owner, workflow_id)
    assert shown["nextTransition"] == "stop"
    assert shown["nextTransitionAt"] < held["until"]
    changes = (await get_lifecycle(owner, workflow_id, "/history"))["changes"]
    assert [one["action"] for one in changes] == [
        "workflow.hold-ended",
        "workflow.lifecycle-set",
        "workflow.kept-awake",
    ]
    assert {"path": "lifecyclePolicy.type", "before": '"idle-shutdown"', "after": '"on-demand"'} in changes[
        1
    ]["changes"]
    assert changes[2]["changes"][0]["path"] == "keptAwakeUntil"
    assert {one["userId"] for one in changes} == {owner.user.id}


async def test_a_stop_by_hand_ends_the_time_for_which_a_deployment_is_kept_awake(
    harness: GatewayHarness, people: OrganizationUsers
) -> None:
    owner, workflow_id = people.owner, await people.owner.create(**GRAPH)
    await deploy_with_pod(harness, owner, workflow_id)
    held = await owner.api.post(lifecycle_path(workflow_id, "/hold"), json={"expiresInSeconds": 600})
    assert held.status_code == 200, held.text
    stopped = await owner.api.post(f"/api/v1/workflows/{workflow_id}/stop")
    assert stopped.is_success
    assert (await get_lifecycle(owner, workflow_id, "/calendar"))["hold"] is None


async def test_changes_among_decisions_are_found_by_an_index(
    harness: GatewayHarness, people: OrganizationUsers
) -> None:
    organization_id = people.owner.user.organization_id
    span = TimeRange(datetime(2026, 1, 1, tzinfo=UTC), datetime(2026, 2, 1, tzinfo=UTC))
    plan = await explain_statement(
        harness.gateway.database, lifecycle_rows.changes_statement(organization_id, "wf_1", span)
    )
    assert "ix_audit_entry_object" in plan


def test_windows_of_whole_days_are_one_a_day_wherever_they_begin() -> None:
    since = datetime(2026, 11, 22, tzinfo=UTC)
    for start, end in (("00:00", "01:00"), ("23:00", "24:00"), ("23:00", "01:00")):
        daily = weekly_windows.parse_window(range(7), start, end)
        policy = ScheduledWindowPolicy(WindowSchedule("UTC", (daily,)))
        windows = [*lifecycle_calendar.list_windows(policy, TimeRange(since, since + 14 * DAY))]
        assert all(one.since < one.until for one in windows)
        assert len(windows) == (15 if end < start else 14)


async def test_a_calendar_shows_the_next_start_by_its_policy(
    harness: GatewayHarness, people: OrganizationUsers
) -> None:
    workflow_id = await people.owner.create(**GRAPH)
    now = datetime.now(UTC)
    failed = {"replicas": 0, "stopped_reason": StoppedReason.FAILED, "stopped_at": now, "start_failures": 5}
    await deploy_with_pod(harness, people.owner, workflow_id, **failed)
    never_closed = {"days": [*range(7)], "startTime": "00:00", "endTime": "24:00"}
    scheduled = {"type": "scheduled-window", "schedule": {"timezone": "UTC", "windows": [never_closed]}}
    for policy in ({"type": "always-on"}, scheduled):
        put = await people.owner.api.put(lifecycle_path(workflow_id), json=policy)
        assert put.status_code == 200, put.text
        shown = await get_lifecycle(people.owner, workflow_id, "/calendar")
        again = (await get_lifecycle(people.owner, workflow_id))["nextTransitionAt"]
        assert shown["planned"] == [{"start": again, "end": shown["until"]}]
    await change_deployment(harness, workflow_id, {"stopped_reason": StoppedReason.ARCHIVED})
    archived = await get_lifecycle(people.owner, workflow_id, "/calendar")
    assert (len(archived["windows"]), archived["planned"]) == (1, [])


@pytest.mark.every_database
async def test_a_calendar_of_too_many_decisions_begins_with_those_that_it_has(
    harness: GatewayHarness, people: OrganizationUsers, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lifecycle_rows, "LISTED_DECISIONS", 2)
    workflow_id = await people.owner.create(**GRAPH)
    await deploy_with_pod(harness, people.owner, workflow_id)
    now = datetime.now(UTC)
    await record_replicas(harness, people.owner, workflow_id, {240: 1, 100: 0, 80: 1, 70: 0, 60: 1}, now=now)
    spans = (await get_lifecycle(people.owner, workflow_id, "/calendar"))["awake"]
    shown = [now - timedelta(hours=hours) for hours in (80, 70, 60)]
    times = [datetime.fromisoformat(one) for one in (spans[0]["start"], spans[0]["end"], spans[1]["start"])]
    assert len(spans) == 2
    assert [abs(one - other) < timedelta(seconds=1) for one, other in zip(times, shown, strict=True)] == [
        True
    ] * 3


@pytest.mark.every_database
async def test_pod_time_of_today_counts_the_deployments_that_the_caller_may_read(
    harness: GatewayHarness, people: OrganizationUsers, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(deployment_list, "BATCH_DEPLOYMENTS", 1)
    created_at = datetime.now(UTC) - 30 * DAY
    for _ in range(2):
        workflow_id = await people.owner.create(**GRAPH)
        await deploy_with_pod(harness, people.owner, workflow_id, last_replicas=2, created_at=created_at)
        await record_replicas(harness, people.owner, workflow_id, {48: 1})
    shown = (await people.owner.api.get("/api/v1/deployments/usage")).json()
    assert shown["alwaysOnPodSeconds"] == pytest.approx(2 * shown["podSeconds"], abs=1)
    length = datetime.fromisoformat(shown["asOf"]) - datetime.fromisoformat(shown["since"])
    assert shown["podSeconds"] == pytest.approx(2 * length.total_seconds(), abs=1)
    for person in (people.colleague, people.stranger):
        unseen = (await person.api.get("/api/v1/deployments/usage")).json()
        assert (unseen["podSeconds"], unseen["alwaysOnPodSeconds"]) == (0, 0)


async def record_replicas(
    harness: GatewayHarness,
    person: UserClient,
    workflow_id: str,
    replicas: dict[int, int],
    *,
    now: datetime | None = None,
) -> None:
    """Have had so many pods from so many hours ago on."""
    now = now or datetime.now(UTC)
    rows = [
        LifecycleDecision(
            id=ids.new_id("decision"),
            organization_id=person.user.organization_id,
            shard=person.user.shard,
            workflow_id=workflow_id,
            at=now - HOUR * hours,
            action=LifecycleAction.START if count else LifecycleAction.STOP,
            reason=LifecycleReason.RUN_DUE if count else LifecycleReason.IDLE,
            stopped_reason=None if count else StoppedReason.IDLE,
            replicas=count,
            inputs={"hasDue": bool(count)},
        ).model_dump()
        for hours, count in replicas.items()
    ]
    await harness.gateway.database.transaction(
        lambda connection: connection.execute(insert(LifecycleDecision), rows)
    )


# ── history ─────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.every_database
async def test_decisions_are_listed_page_by_page_the_newest_first(
    harness: GatewayHarness, people: OrganizationUsers
) -> None:
    workflow_id = await people.owner.create(**GRAPH)
    await record_replicas(harness, people.owner, workflow_id, {4: 1, 3: 0, 2: 1, 1: 0})
    whole = await get_lifecycle(people.owner, workflow_id, "/history")
    assert (whole["count"], whole["limit"], whole["offset"]) == (4, 20, 0)
    moments = [one["at"] for one in whole["decisions"]]
    assert all(later > earlier for later, earlier in pairwise(moments))
    newest = whole["decisions"][0]
    assert (newest["action"], newest["reason"], newest["stoppedReason"]) == ("stop", "idle", "idle")
    assert (newest["replicas"], newest["userId"], newest["inputs"]) == (0, None, {"hasDue": False})
    part = await get_lifecycle(people.owner, workflow_id, "/history?limit=2&offset=1")
    assert part["decisions"] == whole["decisions"][1:3]
    assert_refused(
        await people.owner.api.get(lifecycle_path(workflow_id, "/history?limit=0")), 400, "invalid-query"
    )


# ── preview ─────────────────────────────────────────────────────────────────────────────────────────────────


async def test_a_preview_tells_when_a_schedule_starts_and_stops_and_changes_nothing(
    people: OrganizationUsers,
) -> None:
    workflow_id = await people.owner.create(**GRAPH)
    response = await people.owner.api.post(lifecycle_path(workflow_id, "/preview"), json=SCHEDULED)
    assert response.status_code == 200, response.text
    body = response.json()
    assert body["lifecyclePolicy"] == SCHEDULED
    assert len(body["transitions"]) == 20  # ten working days
    actions = [one["action"] for one in body["transitions"]]
    assert all(before != after for before, after in pairwise(actions))
    for one in body["transitions"]:
        hour = {"start": 9, "stop": 17}[one["action"]]
        assert datetime.fromisoformat(one["localTime"]).hour == hour
        assert datetime.fromisoformat(one["localTime"]) == datetime.fromisoformat(one["at"])
        assert not one["isClockChange"]
    assert (await get_lifecycle(people.owner, workflow_id))["lifecyclePolicy"] == DEFAULT


async def test_a_preview_replays_past_runs_under_both_policies(
    harness: GatewayHarness, people: OrganizationUsers
) -> None:
    workflow_id = await people.owner.create(**GRAPH)
    await backdate_workflow(harness, workflow_id, timedelta(days=20))
    now = datetime.now(UTC)
    for hours in (100, 50, 49):
        accepted_at = now - HOUR * hours
        await run(
            harness,
            people.owner,
            workflow_id,
            status=ExecutionStatus.COMPLETED,
            created_at=accepted_at,
            ended_at=accepted_at + HOUR / 4,
        )
    response = await people.owner.api.post(
        lifecycle_path(workflow_id, "/preview"), json={"type": "always-on"}
    )
    body = response.json()
    assert (body["transitions"], body["clockChanges"]) == ([], [])
    replay = body["replay"]
    assert replay["runs"] == 3
    assert replay["current"] == {
        "podHours": 2.25,
        "coldStarts": 3,
        "waits": 3,
        "totalWaitSeconds": 30.0,
        "p95WaitSeconds": 10.0,
        "longestWaitSeconds": 10.0,
    }
    assert replay["candidate"] == {
        "podHours": 14 * 24,
        "coldStarts": 0,
        "waits": 0,
        "totalWaitSeconds": 0.0,
        "p95WaitSeconds": 0.0,
        "longestWaitSeconds": 0.0,
    }


async def backdate_workflow(harness: GatewayHarness, workflow_id: str, age: timedelta) -> None:
    """Move the creation of a workflow far into the past."""
    row = update(Workflow).where(col(Workflow.id) == workflow_id)
    made = row.values(created_at=datetime.now(UTC) - age)
    await harness.gateway.database.transaction(lambda connection: connection.execute(made))
