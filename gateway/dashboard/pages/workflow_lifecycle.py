"""When a workflow has pods: a calendar of two weeks, its decisions, and another policy tried on its past runs."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Final

from msgspec import Struct

from gateway.dashboard.addresses import page_address
from gateway.dashboard.day_calendar import HOUR_SECONDS, draw_calendar
from gateway.dashboard.formats import (
    LIFECYCLE_REASONS,
    look_of_pod,
    show_day_time,
    show_duration,
    show_hours,
)
from gateway.dashboard.page import Page, PageData, PageFrame
from gateway.dashboard.policy_chart import draw_policy_chart
from gateway.http.errors import ApiError
from json_text import decoding
from models.timestamps import parse_timestamp

if TYPE_CHECKING:
    from gateway.dashboard.page_request import PageRequest

PATH: Final = "/dashboard/workflows/{id}/lifecycle"
SHOWN_DECISIONS: Final = 12
MAX_DECISIONS: Final = 100
UP: Final = frozenset({"running", "starting", "deploying"})
POLICIES: Final = {
    "always-on": "Always on",
    "idle-shutdown": "Stops when idle",
    "on-demand": "On demand",
    "scheduled-window": "In weekly windows",
}
DAYS: Final = {
    "weekdays": ("Monday to Friday", [1, 2, 3, 4, 5]),
    "all": ("Every day", [0, 1, 2, 3, 4, 5, 6]),
    "weekend": ("Saturday and Sunday", [0, 6]),
}
IDLE_MINUTES: Final = 30
HOLD_HOURS: Final = ((1, "an hour"), (4, "4 hours"), (12, "12 hours"), (24, "a day"), (168, "a week"))
"""Times for which the page offers to keep a workflow awake, in hours."""
DIGITS: Final = re.compile(r"[0-9]{1,9}\Z")
WORDS: Final = {
    "start": ("lit", "awake", "Started"),
    "wake": ("lit", "waking", "Woken for a run"),
    "drain": ("", "draining", "Draining"),
    "stop": ("", "asleep", "Stopped"),
    "none": ("", "minus", "Left as it is"),
}
"""Tone, icon and word of each action."""


class LifecycleEvent(Struct, frozen=True):
    """Start, stop or change by a user, as the list shows it."""

    at: str
    tone: str
    icon: str
    word: str
    detail: str


async def load(page: PageRequest) -> PageData:
    """Ask the API for the workflow, its lifecycle policy, calendar, explanation and 12 decisions (100 with
    `decisions=all` in the query), then for previews of the policy and of the one in the form.

    An API error about the policy of the form becomes the text `problem`; other errors are raised as `ApiError`.
    """
    path = f"/api/v1/workflows/{page.parameters['id']}"
    decisions = MAX_DECISIONS if page.query.get("decisions") == "all" else SHOWN_DECISIONS
    workflow, lifecycle, calendar, history, why = await asyncio.gather(
        page.get(path),
        page.get(f"{path}/lifecycle"),
        page.get(f"{path}/lifecycle/calendar"),
        page.get(f"{path}/lifecycle/history", limit=decisions),
        page.get_if_present(f"{path}/why"),
    )
    present = lifecycle["lifecyclePolicy"]
    candidate = read_candidate(page.query, present)
    preview, problem = await _load_preview(page, path, present), ""
    tried = preview
    if candidate != present:
        try:
            tried = await _load_preview(page, path, candidate)
        except ApiError as error:
            problem = error.message
    return {
        "workflow": {name: workflow[name] for name in ("id", "name", "status")},
        "lifecycle": lifecycle,
        "tag": page.tags.get(f"{path}/lifecycle", ""),
        "calendar": calendar,
        "history": history,
        "why": why,
        "preview": preview,
        "tried": tried,
        "candidate": candidate,
        "problem": problem,
    }


async def _load_preview(page: PageRequest, path: str, policy: Mapping[str, Any]) -> Any:  # noqa: ANN401 - any JSON value
    """Return the API's preview of a policy: the planned transitions, and its effect on past runs."""
    return await page.preview(f"{path}/lifecycle/preview", **policy)


def read_candidate(query: Mapping[str, str], current: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the lifecycle policy that the form in the query asks for; `current`, the policy as it is now, without a
    form.

    Missing fields get defaults: 30 idle minutes, weekdays from 08:00 to 18:00, UTC; so do invalid minutes and days, but
    invalid times and zones are left to the API, which refuses them.
    """
    kind = query.get("type", "")
    if kind not in POLICIES:
        return current
    if kind == "idle-shutdown":
        minutes = query.get("minutes", "")
        return {"type": kind, "idleTimeoutMinutes": int(minutes) if DIGITS.match(minutes) else IDLE_MINUTES}
    if kind == "scheduled-window":
        _, days = DAYS.get(query.get("days", ""), DAYS["weekdays"])
        window = {
            "days": days,
            "startTime": query.get("start") or "08:00",
            "endTime": query.get("end") or "18:00",
        }
        return {"type": kind, "schedule": {"timezone": query.get("zone") or "UTC", "windows": [window]}}
    return {"type": kind}


def view(data: PageData, frame: PageFrame) -> Mapping[str, Any]:
    """Return the template values: the calendar of times awake, decisions, and the comparison of both policies."""
    workflow, lifecycle, decisions = data["workflow"], data["lifecycle"], data["history"]["decisions"]
    status = lifecycle["deploymentStatus"]
    changes = [parse_timestamp(one["at"]) for one in data["preview"]["clockChanges"]]
    page_path = f"{frame.root}{PATH.replace('{id}', workflow['id']).removesuffix('/lifecycle')}"
    present = lifecycle["lifecyclePolicy"]
    days = draw_calendar(data["calendar"], changes)
    hold, by_users = data["calendar"]["hold"], data["history"]["changes"]
    holders = {
        "started": (one["userName"] for one in decisions if one["userId"] and one["replicas"]),
        "kept-awake": (one["userName"] for one in by_users if one["action"] == "workflow.kept-awake"),
    }
    is_all = frame.query.get("decisions") == "all"
    return {
        "title": f"When {workflow['name']} is awake",
        "crumbs": (
            ("Workflows", f"{frame.root}/dashboard/workflows"),
            (workflow["name"], page_path),
            ("Awake and asleep", ""),
        ),
        **data,
        "is_deployed": status != "not-deployed",
        "is_up": status in UP,
        "look": look_of_pod(status),
        "policy": describe_policy(present),
        "days": days,
        "tones": {bar.tone for day in days for bar in day.bars},
        "saving": describe_saving(data["calendar"]["days"], frame),
        "hold": hold,
        "holder": next(holders[hold["kind"]], None) if hold else None,
        "left_seconds": max(int((parse_timestamp(hold["until"]) - frame.now).total_seconds()), 60)
        if hold and hold["until"]
        else 0,
        "hold_choices": [
            (
                hours * HOUR_SECONDS,
                f"{label}, until {show_day_time((frame.now + timedelta(hours=hours)).isoformat(), frame.now)} UTC",
            )
            for hours, label in HOLD_HOURS
        ],
        "events": list_events(decisions, by_users),
        "all_decisions": ""
        if is_all or data["history"]["count"] <= len(decisions)
        else page_address(frame, f"/dashboard/workflows/{workflow['id']}/lifecycle", {"decisions": "all"}),
        "clock_changes": data["preview"]["clockChanges"],
        "policies": POLICIES,
        "day_choices": {name: label for name, (label, _) in DAYS.items()},
        "is_other": data["candidate"] != present,
        "present_policy": POLICIES.get(present["type"], present["type"]),
        "tried_policy": describe_policy(data["candidate"]),
        "chart": draw_policy_chart(data["tried"]["replay"]["days"]),
        "rows": compare_policies(data["tried"]["replay"]),
        "page_path": page_path,
        "api": f"/api/v1/workflows/{workflow['id']}",
        "may_write": frame.may("workflows:write"),
    }


def list_events(
    decisions: Sequence[Mapping[str, Any]], by_users: Sequence[Mapping[str, Any]]
) -> Sequence[LifecycleEvent]:
    """Return starts and stops with the changes by users among them, the newest first."""
    found = [*map(_show_decision, decisions), *map(_show_change, by_users)]
    return sorted(found, key=lambda one: parse_timestamp(one.at), reverse=True)


def _show_decision(decision: Mapping[str, Any]) -> LifecycleEvent:
    """Return a start or stop in words: its reason, its user and its pods."""
    tone, icon, word = WORDS.get(decision["action"], WORDS["none"])
    if decision["reason"] == "failed":
        tone, icon, word = "bad", "failed", "Start failed"
    facts = [LIFECYCLE_REASONS.get(decision["reason"], decision["reason"].replace("-", " "))]
    if decision["userId"]:
        facts.append(f"by {decision['userName'] or decision['userId']}")
    if decision["replicas"] > 1:
        facts.append(f"{decision['replicas']} pods")
    return LifecycleEvent(decision["at"], tone, icon, word, ", ".join(facts))


def _show_change(change: Mapping[str, Any]) -> LifecycleEvent:
    """Return a change of the policy, or of the time until which a user keeps the workflow awake, in words."""
    who = change["userName"] or change["userId"]
    values = {one["path"]: (_decode(one["before"]), _decode(one["after"])) for one in change["changes"]}
    if change["action"] == "workflow.lifecycle-set":
        return LifecycleEvent(change["at"], "", "pin", "Policy changed", f"{who}: {_describe_change(values)}")
    _, until = values.get("keptAwakeUntil", (None, None))
    if until is None:
        return LifecycleEvent(change["at"], "", "hand", "Released", f"{who}: its policy decides again")
    until = parse_timestamp(str(until))
    return LifecycleEvent(
        change["at"], "warn", "hand", "Kept awake", f"{who}: until {until:%Y-%m-%d %H:%M} UTC"
    )


def _describe_change(values: Mapping[str, tuple[Any, Any]]) -> str:
    """Return a change of a policy in words, such as `On demand in place of Always on`."""
    if "lifecyclePolicy.type" in values:
        before, after = (POLICIES.get(str(one), str(one)) for one in values["lifecyclePolicy.type"])
        return f"{after} in place of {before}"
    if "lifecyclePolicy.idleTimeoutMinutes" in values:
        before, after = values["lifecyclePolicy.idleTimeoutMinutes"]
        return f"stops after {after} idle minutes in place of {before}"
    return "other windows"


def _decode(text: str | None) -> Any:  # noqa: ANN401 - any JSON value
    """Return the JSON value in a recorded change; the text itself if it is the hash of a long value, None for None."""
    try:
        return None if text is None else decoding.decode(text)
    except ValueError:
        return text


def describe_saving(days: Sequence[Mapping[str, Any]], frame: PageFrame) -> str:
    """Return the past pod time of the calendar as words, such as `51.5 h since Sun 22, of 147 h always on: 65 % saved`.

    Empty for a workflow that was never deployed.
    """
    past = [
        day for day in days if parse_timestamp(day["startsAt"]) <= frame.now and day["alwaysOnPodSeconds"]
    ]
    if not past:
        return ""
    used, whole = (
        sum(day[name] for day in past) / HOUR_SECONDS for name in ("podSeconds", "alwaysOnPodSeconds")
    )
    since = parse_timestamp(past[0]["startsAt"])
    saved = max(round(100 * (1 - used / whole)), 0)
    return (
        f"{show_hours(used)} since {since:%a} {since.day}, of {show_hours(whole)} always on: {saved} % saved"
    )


def describe_policy(policy: Mapping[str, Any]) -> str:
    """Return a policy as words, such as `Stops when idle, after 30 minutes`."""
    label = POLICIES.get(policy["type"], policy["type"])
    if policy["type"] == "idle-shutdown":
        return f"{label}, after {policy.get('idleTimeoutMinutes', IDLE_MINUTES):g} minutes"
    schedule = policy.get("schedule")
    if schedule:
        windows = ", ".join(f"{one['startTime']} to {one['endTime']}" for one in schedule["windows"])
        return f"{label}, {windows} in {schedule['timezone']}"
    return str(label)


def compare_policies(replay: Mapping[str, Any]) -> Sequence[tuple[str, str, str, str, str]]:
    """Return a row for each figure of two policies, replayed on past runs: pod hours, runs that wait, and
    waiting times.

    A row has label, present and candidate value, tone and difference in words.
    """
    now, then = replay["current"], replay["candidate"]
    counts = [
        ("Runs that wait for a wake", "coldStarts"),
        ("Runs that wait for a wake or a window", "waits"),
    ]
    rows = [_compare("Time its pods are up", now["podHours"], then["podHours"], show_hours)]
    rows += [_compare(label, now[name], then[name], lambda count: f"{count:,.0f}") for label, name in counts]
    waits = [
        ("How long they wait, p95", "p95WaitSeconds"),
        ("The longest wait", "longestWaitSeconds"),
        ("They wait together", "totalWaitSeconds"),
    ]
    rows += [
        _compare(label, now[name], then[name], lambda seconds: show_duration(seconds * 1_000))
        for label, name in waits
    ]
    return rows


def _compare(label: str, now: float, then: float, show: Any) -> tuple[str, str, str, str, str]:  # noqa: ANN401 - a formatter
    """Return label, both values, tone and difference in words; more is `bad`, less `good`, and equal as shown has no
    tone.

    `now` is the value of the present policy, `then` of the candidate, and `show` turns a value into text.
    """
    difference = then - now
    if show(abs(difference)) == show(0):
        return (label, show(now), show(then), "", "the same")
    word = "more" if difference > 0 else "less"
    return (
        label,
        show(now),
        show(then),
        "bad" if difference > 0 else "good",
        f"{show(abs(difference))} {word}",
    )


PAGE: Final = Page(PATH, "workflow_lifecycle.html", load, view, "workflows")
