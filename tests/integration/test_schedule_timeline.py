"""Timeline of schedules and pods: coming times, windows, wakes with their reasons, for those who may see them."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from sqlalchemy import delete, insert, select, update
from sqlalchemy.ext.asyncio import AsyncConnection
from sqlmodel import col

from gateway.dashboard.page import PageFrame, render
from gateway.dashboard.pages import schedule_list
from gateway.ingest import schedule_timeline
from models import ids
from models.blocked_interval import BlockedInterval
from models.deployment import Deployment, LifecycleDecision
from models.execution import Execution, Leadership
from models.schedule import Schedule
from tests.integration.deployed_workflows import run
from tests.integration.gateway_harness import GRAPH, GatewayHarness, OrganizationUsers, assert_refused
from tests.integration.test_dashboard import sign_in
from tests.integration.test_gateway_deliveries import get_json
from tests.integration.test_gateway_enqueue import WORKFLOWS
from tests.integration.test_schedules import create_active_workflow

TIMELINE = "/api/v1/schedules/timeline"
NIGHTLY = {
    "type": "scheduled-window",
    "schedule": {
        "timezone": "Europe/Berlin",
        "windows": [{"days": [0, 1, 2, 3, 4, 5, 6], "startTime": "22:00", "endTime": "06:00"}],
    },
}


async def deploy(
    harness: GatewayHarness,
    people: OrganizationUsers,
    workflow_id: str,
    decisions: list[tuple[float, str, str, int]],
) -> None:
    """Insert a deployment with decisions: the hours since, action, reason and pods of each."""
    now, owner = harness.gateway.clock(), people.owner.user

    async def make(connection: AsyncConnection) -> None:
        of_owner: dict[str, Any] = {
            "organization_id": owner.organization_id,
            "shard": owner.shard,
            "workflow_id": workflow_id,
        }
        row = Deployment(definition_hash="hash", version=1, created_at=now, updated_at=now, **of_owner)
        await connection.execute(insert(Deployment).values(row.model_dump()))
        for hours, action, reason, replicas in decisions:
            one = LifecycleDecision(
                id=ids.new_id("decision"),
                at=now - timedelta(hours=hours),
                action=action,
                reason=reason,
                replicas=replicas,
                user_id=owner.id if reason == "by-hand" else None,
                inputs={},
                **of_owner,
            )
            await connection.execute(insert(LifecycleDecision).values(one.model_dump()))

    await harness.gateway.database.transaction(make)


async def test_a_timeline_has_coming_times_windows_and_the_time_with_pods(
    harness: GatewayHarness, people: OrganizationUsers
) -> None:
    hourly = await create_active_workflow(people.owner, {"cron": "0 * * * *", "timezone": "Asia/Kolkata"})
    dense = await create_active_workflow(people.owner, {"intervalSeconds": 1})
    await people.owner.api.put(f"{WORKFLOWS}/{hourly}/lifecycle", json=NIGHTLY)
    ledger = [
        (20.0, "start", "window-open", 1),
        (5.0, "drain", "window-closed", 1),
        (4.5, "stop", "drained", 0),
        (3.0, "start", "by-hand", 1),
        (2.0, "stop", "idle", 0),
        (0.5, "wake", "run-due", 2),
    ]
    await deploy(harness, people, hourly, ledger)
    shown = await get_json(people.owner, TIMELINE)
    now = datetime.fromisoformat(shown["now"])
    assert datetime.fromisoformat(shown["since"]) == now - timedelta(hours=6)
    assert datetime.fromisoformat(shown["until"]) == now + timedelta(hours=24)
    assert shown["count"] == 2
    lanes = {one["workflowId"]: one for one in shown["workflows"]}
    lane = lanes[hourly]
    assert (len(lane["ticks"]), lane["ticksAreCut"]) == (24, False)
    assert all(one["at"] > shown["now"] and one["localTime"].endswith("+05:30") for one in lane["ticks"])
    assert [one["at"][14:16] for one in lane["ticks"]] == ["30"] * 24
    assert (len(lanes[dense]["ticks"]), lanes[dense]["ticksAreCut"]) == (48, True)
    windows = [[datetime.fromisoformat(one[name]) for name in ("start", "end")] for one in lane["windows"]]
    assert sum((end - start for start, end in windows), timedelta()) <= timedelta(hours=16)
    assert all(shown["since"] <= one["start"] < one["end"] <= shown["until"] for one in lane["windows"])
    spans = [(one["reason"], one["isByHand"], one["isOpen"]) for one in lane["awake"]]
    assert spans == [(None, False, False), ("by-hand", True, False), ("run-due", False, True)]
    assert lane["awake"][0]["start"] == shown["since"]
    assert lane["awake"][2]["end"] == shown["now"]
    reasons = [one["reason"] for one in shown["decisions"]]
    assert reasons == ["run-due", "idle", "by-hand", "drained", "window-closed"]
    assert shown["decisions"][2]["userId"] == people.owner.user.id


async def test_a_timeline_needs_read_access_to_the_workflows(
    harness: GatewayHarness, people: OrganizationUsers
) -> None:
    workflow_id = await create_active_workflow(people.owner, {"intervalSeconds": 60})
    await deploy(harness, people, workflow_id, [(1.0, "wake", "run-due", 1)])
    for person, count in ((people.admin, 1), (people.colleague, 0), (people.stranger, 0)):
        shown = await get_json(person, TIMELINE)
        assert (shown["count"], len(shown["decisions"])) == (count, count)
    await people.owner.api.put(f"{WORKFLOWS}/{workflow_id}/status", json={"status": "paused"})
    [paused] = (await get_json(people.owner, TIMELINE))["workflows"]
    assert (paused["ticks"], paused["isDeployed"]) == ([], True)
    for query in ("hours=0", "hours=337", "limit=51", "until=now"):
        assert_refused(await people.owner.api.get(f"{TIMELINE}?{query}"), 400, "invalid-query")


async def test_the_page_draws_ghosts_of_coming_times_and_the_ledger(
    harness: GatewayHarness, people: OrganizationUsers
) -> None:
    workflow_id = await create_active_workflow(people.owner, {"cron": "0 * * * *"})
    await deploy(
        harness, people, workflow_id, [(1.0, "wake", "run-due", 1), (0.5, "stop", "no-more-runs", 0)]
    )
    browser = await sign_in(harness, people.owner.key)
    page = await browser.get("/dashboard/schedule")
    assert page.text.count('class="tick"') == 24
    assert 'class="awake"' in page.text
    assert "a run was due" in page.text
    assert "no run was left" in page.text
    week = await browser.get("/dashboard/schedule?hours=168")
    assert 'class="dense"' in week.text  # 168 times are more than 48
    assert (await browser.get("/dashboard/schedule?hours=nonsense")).status_code == 200


def test_changes_of_the_clocks_are_listed_for_each_zone() -> None:
    since = datetime(2026, 3, 28, tzinfo=UTC)
    march = schedule_timeline.TimelineRange(since, since, since + timedelta(days=2))
    (change,) = schedule_timeline.list_clock_changes({"Europe/Berlin", "Asia/Kolkata", "UTC"}, march)
    assert (change.at, change.timezone) == ("2026-03-29T01:00:00.000Z", "Europe/Berlin")
    assert change.local_time_before == "2026-03-29T02:00:00+01:00"
    assert change.local_time_after == "2026-03-29T03:00:00+02:00"


@pytest.mark.parametrize(
    ("before", "after", "sentence"),
    [
        ("2026-03-29T02:00:00+01:00", "2026-03-29T03:00:00+02:00", "forward from 02:00 to 03:00"),
        ("2026-10-25T03:00:00+02:00", "2026-10-25T02:00:00+01:00", "back from 03:00 to 02:00"),
    ],
)
def test_a_change_of_the_clocks_is_marked_and_described(before: str, after: str, sentence: str) -> None:
    change = {"at": before, "timezone": "Europe/Berlin", "localTimeBefore": before, "localTimeAfter": after}
    since = datetime.fromisoformat(before) - timedelta(hours=6)
    timeline = {
        "since": since.isoformat(),
        "now": since.isoformat(),
        "until": (since + timedelta(hours=24)).isoformat(),
        "count": 1,
        "workflows": [timeline_lane(workflowId="wf_a", workflowName="Nightly", isDeployed=True)],
        "decisions": [],
        "clockChanges": [change],
    }
    frame = PageFrame("", "", since, {}, {}, visitor=None)
    page = render(
        schedule_list.PAGE,
        {
            "schedules": {"schedules": [], "count": 0, "offset": 0},
            "timeline": timeline,
            "scheduler": None,
        },
        frame,
    )
    assert f"Clocks go {sentence} in Europe/Berlin" in page
    assert page.count('class="shift" x1="25.0%"') == 1


def test_starts_of_several_workflows_in_one_minute_collide_unless_they_are_dense() -> None:
    def lane(name: str, *times: str, **fields: Any) -> dict[str, Any]:  # noqa: ANN401 - any field of a lane
        ticks = [{"at": f"2026-01-01T{one}Z", "localTime": one, "isByClockChange": False} for one in times]
        return timeline_lane(workflowName=name, ticks=ticks, **fields)

    lanes = [
        lane("Nightly", "03:00:00", "04:00:00"),
        lane("Sync", "03:00:40"),
        lane("Busy", "04:00:00", ticksAreCut=True),
    ]
    collisions = schedule_list.find_collisions(lanes)
    assert collisions == {"2026-01-01T03:00": ["Nightly", "Sync"]}
    start = datetime(2026, 1, 1, tzinfo=UTC)
    axis = schedule_list.LaneAxis(start, start, start + timedelta(hours=12))
    first, second = schedule_list.build_marks(lanes[0], axis, collisions)
    assert (first.kind, second.kind) == ("clash", "tick")
    assert first.title.endswith("in the same minute as Sync")


def test_a_duty_is_late_after_three_intervals_and_a_report() -> None:
    now = datetime(2026, 1, 1, 1, tzinfo=UTC)
    duties = [
        {"name": "late", "everySeconds": 5, "lastAt": "2026-01-01T00:59:00Z", "seconds": 0.1},
        {"name": "on time", "everySeconds": 60, "lastAt": "2026-01-01T00:58:00Z", "seconds": 0.1},
    ]
    assert schedule_list.list_late_duties({"duties": duties}, now) == ["late"]
    assert schedule_list.list_late_duties(None, now) == []


@pytest.mark.every_database
async def test_waiting_runs_lie_on_the_lane_of_their_workflow_by_the_kind_of_their_wait(
    harness: GatewayHarness, people: OrganizationUsers
) -> None:
    workflow_id = await people.owner.create(name="Waits", status="active", **GRAPH)
    now = harness.gateway.clock()
    due_at = [now + timedelta(hours=hours) for hours in (5, 5.01, 9, 12, 30)]
    retried = await run(
        harness, people.owner, workflow_id, status="waiting", due_at=due_at[0], started_at=now
    )
    for number, target in ((1, workflow_id), (2, workflow_id), (3, "delayed"), (4, "delayed")):
        await run(harness, people.owner, workflow_id, status="waiting", due_at=due_at[number], target=target)
    interval = BlockedInterval(
        execution_id=retried,
        started_at=now,
        shard=people.owner.user.shard,
        organization_id=people.owner.user.organization_id,
        code="retry-at",
    )
    statement = insert(BlockedInterval).values(interval.model_dump())
    await harness.gateway.database.transaction(lambda connection: connection.execute(statement))
    [lane] = (await get_json(people.owner, TIMELINE))["workflows"]
    kinds = [(one["kind"], one["count"]) for one in lane["due"]]
    assert kinds == [("retry", 1), ("deferred", 1), ("deferred", 1), ("timer", 1)]
    [shorter] = (await get_json(people.owner, f"{TIMELINE}?hours=10"))["workflows"]
    assert [one["kind"] for one in shorter["due"]] == ["retry", "deferred", "deferred"]
    assert (await get_json(people.stranger, TIMELINE))["workflows"] == []
    page = await (await sign_in(harness, people.owner.key)).get("/dashboard/schedule")
    assert page.text.count('class="due deferred"') == 2
    assert "1 run to be tried again" in page.text


async def test_a_schedule_tells_the_lag_of_its_last_run_and_since_when_it_is_overdue(
    harness: GatewayHarness, people: OrganizationUsers
) -> None:
    workflow_id = await create_active_workflow(people.owner, {"intervalSeconds": 3_600})
    execution_id = await run(harness, people.owner, workflow_id)
    async with harness.gateway.database.read() as connection:
        accepted_at = await connection.scalar(
            select(col(Execution.created_at)).where(col(Execution.id) == execution_id)
        )
    assert accepted_at is not None
    planned_at = accepted_at - timedelta(seconds=90)
    columns = {"last_run_at": planned_at, "last_execution_id": execution_id, "due_at": planned_at}
    late = update(Schedule).where(col(Schedule.workflow_id) == workflow_id).values(columns)
    await harness.gateway.database.transaction(lambda connection: connection.execute(late))
    shown = await get_json(people.owner, f"{WORKFLOWS}/{workflow_id}/schedule")
    assert shown["lastRun"]["lagSeconds"] == 90
    assert datetime.fromisoformat(shown["overdueSince"]) == planned_at.replace(
        microsecond=planned_at.microsecond // 1_000 * 1_000
    )
    assert shown["overdueReason"] == "no-leader"
    page = await (await sign_in(harness, people.owner.key)).get("/dashboard/schedule")
    assert "1 min 30 s late" in page.text
    assert ": no scheduler leads" in page.text
    until = harness.gateway.clock() + timedelta(hours=1)
    lead = {"name": "overdue", "owner": "scheduler_overdue", "epoch": 1, "lease_until": until}
    await harness.gateway.database.transaction(
        lambda connection: connection.execute(insert(Leadership).values(lead))
    )
    [listed] = (await get_json(people.owner, "/api/v1/schedules"))["schedules"]
    assert listed["overdueReason"] == "behind"
    await harness.gateway.database.transaction(
        lambda connection: connection.execute(delete(Leadership).where(col(Leadership.name) == "overdue"))
    )
    coming = update(Schedule).where(col(Schedule.workflow_id) == workflow_id)
    soon = harness.gateway.clock() + timedelta(hours=1)
    await harness.gateway.database.transaction(
        lambda connection: connection.execute(coming.values(due_at=soon))
    )
    assert (await get_json(people.owner, f"{WORKFLOWS}/{workflow_id}/schedule"))["overdueSince"] is None


def timeline_lane(**fields: Any) -> dict[str, Any]:  # noqa: ANN401 - any field of a lane
    empty: dict[str, list[Any]] = {name: [] for name in ("windows", "awake", "ticks", "due")}
    return {**empty, "workflowName": "Nightly", "ticksAreCut": False, "lastRunAt": None, **fields}


@pytest.mark.parametrize(
    ("lane", "marks"),
    [
        (timeline_lane(), []),
        (
            timeline_lane(windows=[{"start": "2026-01-01T00:00:00Z", "end": "2026-01-01T06:00:00Z"}]),
            [("window", 0.0, 50.0)],
        ),
        (
            timeline_lane(ticks=[{"at": "2026-01-01T09:00:00Z", "localTime": "", "isByClockChange": True}]),
            [("clock", 75.0, 0)],
        ),
        (
            timeline_lane(due=[{"at": "2026-01-01T06:00:00Z", "kind": "retry", "count": 3}]),
            [("retry", 50.0, 0)],
        ),
        (timeline_lane(lastRunAt="2026-01-01T03:00:00Z"), [("ran", 25.0, 0)]),
        (timeline_lane(lastRunAt="2025-12-31T03:00:00Z"), []),
    ],
)
def test_marks_lie_at_their_share_of_the_time(
    lane: dict[str, Any], marks: list[tuple[str, float, float]]
) -> None:
    start = datetime(2026, 1, 1, tzinfo=UTC)
    axis = schedule_list.LaneAxis(start, start + timedelta(hours=2), start + timedelta(hours=12))
    assert [(one.kind, one.x, one.width) for one in schedule_list.build_marks(lane, axis, {})] == marks
    assert axis.list_labels(3) == [(25.0, "03"), (50.0, "06"), (75.0, "09")]
