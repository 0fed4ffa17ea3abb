"""Endpoints of the calendar of a workflow's pods, and of the pod time of an organization; spans of calendars."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from typing import TYPE_CHECKING, Final
from zoneinfo import ZoneInfoNotFoundError

from sqlalchemy import select
from sqlmodel import col

from gateway.deployments import deployment_list, lifecycle_rows
from gateway.deployments.lifecycle_rows import DAY, PodChange, TimeRange, start_of_day
from gateway.http.request import GatewayRequest
from gateway.http.responses import JsonResponse
from gateway.http.wire import Instant, WireStruct, instant, optional_instant
from gateway.workflows import editing
from journal.deployments import activity
from models import lifecycle_policy, weekly_windows
from models.deployment import Deployment
from models.lifecycle_policy import (
    AlwaysOnPolicy,
    LifecycleReason,
    ScheduledWindowPolicy,
    StoppedReason,
    TransitionKind,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterable

    from sqlalchemy.ext.asyncio import AsyncConnection

    from journal.deployments.activity import DeploymentActivity
    from models.access import ApiCaller
    from models.lifecycle_policy import DeploymentPolicy

PAST_DAYS: Final = 7
FUTURE_DAYS: Final = 6


class TimeSpan(WireStruct):
    """Time from one instant to another."""

    start: Instant
    end: Instant


class AwakeSpan(TimeSpan):
    """Time for which a workflow had pods."""

    reason: LifecycleReason | None
    """Reason of the start; null if it began before the shown time."""
    is_by_hand: bool
    is_open: bool
    """Whether it has pods now."""


class CalendarDay(WireStruct):
    """Day in UTC."""

    starts_at: Instant
    pod_seconds: float
    """Pod time so far: desired pods over time."""
    always_on_pod_seconds: float
    """Pod time so far if it had never stopped since it was deployed first."""
    planned_pod_seconds: float
    """Pod time to come without further activity."""


class HoldKind(StrEnum):
    """Act of a user that keeps the pods awake."""

    STARTED = "started"
    """Start outside the windows of the policy, which lasts until the next closing."""
    KEPT_AWAKE = "kept-awake"
    """Request to keep the deployment awake until a time."""


class CalendarHold(WireStruct):
    """Act of a user that keeps the pods awake against the policy."""

    kind: HoldKind

    since: Instant
    user_id: str | None
    until: Instant | None
    """End of the hold: the time that the user has set, or the next closing of a window; null without one."""


class LifecycleCalendar(WireStruct):
    """Two weeks of a workflow's pods: seven days before today, today, and six after it."""

    workflow_id: str
    since: Instant
    now: Instant
    until: Instant
    days: Sequence[CalendarDay]
    """In UTC, the earliest first."""
    awake: Sequence[AwakeSpan]
    """Past times with pods by the last 1,000 decisions, the earliest first."""
    planned: Sequence[TimeSpan]
    """Coming times with pods without further activity."""
    windows: Sequence[TimeSpan]
    """Windows of a `scheduled-window` policy, past ones by the present policy."""
    failed_starts: Sequence[Instant]
    hold: CalendarHold | None
    """Null unless a user alone keeps the pods awake now, or until a time that the user has set."""


class PodTime(WireStruct):
    """Pod time of the deployments that the caller may read, today in UTC."""

    since: Instant
    as_of: Instant
    pod_seconds: float
    always_on_pod_seconds: float
    """Pod time of the same deployments if they had never stopped since they were deployed first."""


async def show(request: GatewayRequest) -> JsonResponse:
    """Show when a workflow had pods in the last seven days, and when it will have some in the next six.

    Future times follow from its policy and its present state, without further activity.
    """
    async with request.gateway.database.read() as connection:
        workflow = await editing.find_readable_row(connection, request.requested_object)
        seen = await activity.read_activity(connection, workflow.id)
        now = request.gateway.clock() if seen is None else seen.now
        today = start_of_day(now.astimezone(UTC))
        shown = TimeRange(today - PAST_DAYS * DAY, today + (FUTURE_DAYS + 1) * DAY)
        decisions = await lifecycle_rows.read_decisions(connection, [workflow.id], shown.since)
        pod_seconds = await lifecycle_rows.sum_pod_time_by_day(connection, workflow.id, shown.since, now)
    policy = lifecycle_policy.parse_policy(lifecycle_policy.effective_policy(workflow.lifecycle))
    windows: list[TimeRange] = []
    planned: list[TimeRange] = []
    hold = None
    # A zone that this host does not know has no windows.
    with suppress(ZoneInfoNotFoundError):
        windows += list_windows(policy, shown)
        planned += _list_planned(seen, windows, now, shown.until)
        hold = _find_hold(seen, decisions)
    replicas = seen.deployment.last_replicas if seen else 0
    begun = TimeRange(seen.deployment.created_at if seen else now, now)
    coming = replicas if seen and seen.deployment.is_deployed else 0
    return JsonResponse(
        LifecycleCalendar(
            workflow_id=workflow.id,
            since=instant(shown.since),
            now=instant(now),
            until=instant(shown.until),
            days=[
                CalendarDay(
                    starts_at=instant(day),
                    pod_seconds=round(pod_seconds[number], 1) if number < len(pod_seconds) else 0.0,
                    always_on_pod_seconds=_to_pod_seconds([begun], day, replicas),
                    planned_pod_seconds=_to_pod_seconds(planned, day, coming),
                )
                for number, day in enumerate(_list_days(shown))
            ],
            awake=[*list_awake_spans(decisions, shown.since, now)],
            planned=[_show_range(one) for one in planned],
            windows=[_show_range(one) for one in windows],
            failed_starts=[
                instant(one.at) for one in decisions if one.reason == "failed" and one.at >= shown.since
            ],
            hold=hold,
        )
    )


async def show_usage(request: GatewayRequest) -> JsonResponse:
    """Show the pod time since midnight in UTC of the deployments that the caller may read, and their pod time if they
    had never stopped.
    """
    now = request.gateway.clock()
    today = TimeRange(start_of_day(now.astimezone(UTC)), now)
    async with request.gateway.database.read() as connection:
        pod_seconds, always_on = 0.0, 0.0
        async for workflow_ids in _list_deployed(connection, request.caller):
            [used] = await lifecycle_rows.sum_pod_time(connection, workflow_ids, [today])
            pod_seconds += used
            always_on += await _sum_without_stops(connection, workflow_ids, today)
    return JsonResponse(
        PodTime(
            since=instant(today.since),
            as_of=instant(now),
            pod_seconds=round(pod_seconds, 1),
            always_on_pod_seconds=round(always_on, 1),
        )
    )


# ── spans ───────────────────────────────────────────────────────────────────────────────────────────────────


def list_awake_spans(decisions: Iterable[PodChange], since: datetime, now: datetime) -> Iterable[AwakeSpan]:
    """Yield the times with pods since `since`; the last one ends at `now` if pods still run.

    `decisions` are those about one deployment since then, preceded by the last earlier one, ordered by time.
    """
    begun: PodChange | None = None
    for one in decisions:
        if one.replicas > 0 and begun is None:
            begun = one
        elif one.replicas == 0 and begun is not None:
            if one.at > since:
                yield _show_span(begun, one.at, since, is_open=False)
            begun = None
    if begun is not None:
        yield _show_span(begun, now, since, is_open=True)


def _show_span(begun: PodChange, end: datetime, since: datetime, *, is_open: bool) -> AwakeSpan:
    """Return a time with pods, cut to its part after `since`; its reason is None if it began before."""
    return AwakeSpan(
        start=instant(max(begun.at, since)),
        end=instant(end),
        reason=LifecycleReason(begun.reason) if begun.at >= since else None,
        is_by_hand=begun.user_id is not None,
        is_open=is_open,
    )


def list_windows(policy: DeploymentPolicy, shown: TimeRange) -> Iterable[TimeRange]:
    """Yield the windows of a policy within a time, cut to it; none under another policy than `scheduled-window`.

    Raises `ZoneInfoNotFoundError` for an unknown time zone.
    """
    if not isinstance(policy, ScheduledWindowPolicy):
        return
    opened_at = shown.since if weekly_windows.is_open(policy.schedule, shown.since) else None
    for change in weekly_windows.window_changes(policy.schedule, shown.since, shown.until):
        if change.is_open:
            opened_at = change.at
        elif opened_at is not None:
            yield TimeRange(opened_at, change.at)
            opened_at = None
    # A window that opens at the very end has no part in it.
    if opened_at is not None and opened_at < shown.until:
        yield TimeRange(opened_at, shown.until)


# ── parts of the answers ────────────────────────────────────────────────────────────────────────────────────


async def _list_deployed(connection: AsyncConnection, caller: ApiCaller) -> AsyncIterator[Sequence[str]]:
    """Yield the ids of the deployed workflows that a caller may read, in batches of at most 500."""
    last = ""
    while True:
        statement = deployment_list.ids_statement(caller, last).limit(deployment_list.BATCH_DEPLOYMENTS)
        if found := [*await connection.scalars(statement)]:
            yield found
        if len(found) < deployment_list.BATCH_DEPLOYMENTS:
            return
        last = found[-1]


async def _sum_without_stops(
    connection: AsyncConnection, workflow_ids: Sequence[str], today: TimeRange
) -> float:
    """Return the pod time in seconds that deployments would have within a time if they never stopped after their first
    deploy.
    """
    statement = select(col(Deployment.last_replicas), col(Deployment.created_at)).where(
        col(Deployment.workflow_id).in_(workflow_ids)
    )
    rows = (await connection.execute(statement)).all()
    seconds = [row.last_replicas * today.overlap(row.created_at, today.until).total_seconds() for row in rows]
    return float(sum(seconds))


def _list_days(shown: TimeRange) -> Sequence[datetime]:
    """Return the beginning of each day of a time that begins at a midnight, in order."""
    return [shown.since + number * DAY for number in range((shown.until - shown.since) // DAY)]


def _list_planned(
    seen: DeploymentActivity | None, windows: Sequence[TimeRange], now: datetime, until: datetime
) -> Iterable[TimeRange]:
    """Yield the times from now on in which a deployment will have pods without further activity, in order.

    They are its current time with pods, until its next stop or `until`, or the time from its next start on, and the
    windows that open later. Nothing for a workflow that isn't deployed, or is archived.
    """
    if seen is None or not seen.deployment.is_deployed:
        return
    if seen.situation.stopped_reason is StoppedReason.ARCHIVED:
        return
    upcoming = lifecycle_policy.next_transition(seen.policy, seen.situation, now)
    is_up = seen.situation.is_up and seen.situation.drain_until is None
    starts = upcoming is not None and upcoming.kind is TransitionKind.START
    end = now
    if is_up:
        stops = upcoming is not None and upcoming.kind is TransitionKind.STOP
        end = min(upcoming.at, until) if upcoming is not None and stops else until
        yield TimeRange(now, max(end, now))
    elif starts and upcoming is not None:
        # It starts now, again after a failure, or with a window. Under other policies, its end is not known.
        end = min(max(upcoming.at, now), until)
        if isinstance(seen.policy, AlwaysOnPolicy):
            yield TimeRange(end, until)
    for one in windows:
        if (starts or one.since > now) and one.until > end:
            yield TimeRange(max(one.since, end), one.until)


def _to_pod_seconds(spans: Sequence[TimeRange], day: datetime, replicas: int) -> float:
    """Return the pod time in seconds of the parts of `spans` within a day, with this number of pods at all times."""
    length = sum((one.overlap(day, day + DAY) for one in spans), timedelta())
    return round(replicas * length.total_seconds(), 1)


def _show_range(one: TimeRange) -> TimeSpan:
    return TimeSpan(start=instant(one.since), end=instant(one.until))


def _find_hold(seen: DeploymentActivity | None, decisions: Sequence[PodChange]) -> CalendarHold | None:
    """Return the act of a user that keeps a deployment awake now, None without one.

    It is a hold until a set time, or a start by hand while the policy alone would have stopped it. Raises
    `ZoneInfoNotFoundError` for an unknown time zone.
    """
    if seen is None:
        return None
    kept = seen.deployment
    if kept.is_deployed and kept.kept_awake_until is not None and kept.kept_awake_until > seen.now:
        return CalendarHold(
            kind=HoldKind.KEPT_AWAKE,
            since=instant(kept.kept_awake_since or seen.now),
            user_id=kept.kept_awake_by,
            until=instant(kept.kept_awake_until),
        )
    if seen.situation.started_by_hand_at is None:
        return None
    verdict = lifecycle_policy.decide(seen.policy, seen.situation, seen.now)
    if verdict.reason is not LifecycleReason.STARTED_BY_HAND:
        return None
    by_users = [one.user_id for one in decisions if one.user_id is not None and one.replicas > 0]
    return CalendarHold(
        kind=HoldKind.STARTED,
        since=instant(seen.situation.started_by_hand_at),
        user_id=by_users[-1] if by_users else None,
        until=optional_instant(verdict.check_at),
    )
