"""Overview: problems that need a person, charts of a day, reasons of waits, failures by cause, and pods."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import urlencode

from gateway.dashboard.addresses import page_address
from gateway.dashboard.formats import (
    POD_STATES,
    StateLook,
    look_of_pod,
    look_of_wait,
    parse_instant,
    show_count,
    show_day_time,
    show_hours,
)
from gateway.dashboard.hour_charts import draw_bars, draw_lines, label_hours
from gateway.dashboard.page import Page, PageData, PageFrame
from models.timestamps import format_timestamp, parse_timestamp

if TYPE_CHECKING:
    from gateway.dashboard.page_request import PageRequest

RECENT_SECONDS: Final = 10.0
"""Time for which drift and dead letters are shown again: an open page loads itself up to four times a second."""
URGENT_TIME: Final = timedelta(hours=1)
"""Time for which a failure counts as one that goes on."""
SHOWN_NEEDS: Final = 3
"""Number of deployments that need a person, and of workflows with dead letters, that a line names at most."""
SHOWN_SCHEDULES: Final = 5
SHOWN_CAUSES: Final = 20
"""Number of causes of failures at most, unless the address asks for all."""
PATH: Final = "/dashboard/overview"
NEEDS_PERSON: Final = frozenset({"change", "escalate"})
"""Kinds of reasons that do not end by themselves."""
SHOWN_ELSEWHERE: Final = frozenset({"no-worker", "deployment-failed"})
"""Codes of reasons that other lines of the page explain."""
PENDING: Final = frozenset({"queued-behind", "waiting-for-slot", "waking", "draining", "broker-down"})
"""Codes of reasons for which runs wait a short time only, unless the server has too much to do."""
LONG_WAIT: Final = timedelta(minutes=5)
"""Age of a pending run from which on it needs a person."""
HOUR: Final = timedelta(hours=1)
FEW_WORKFLOWS: Final = 3
"""Number of workflows up to which the page says that none has run."""
RUNS: Final = "node-running"


async def load(page: PageRequest) -> PageData:
    """Ask the API for reasons, statistics of 24 hours, deployments with their pod time, dead letters, questions,
    failed runs by cause, drift, the number of workflows, and the next five schedules.

    On a server with few workflows and no runs in that time, also for the newest run and the only workflow. Drift is
    None unless the visitor is an admin. Raises `ApiError`.
    """
    shown = read_range(page.query)
    (
        why,
        drift,
        dead,
        stats,
        questions,
        usage,
        statistics,
        deployments,
        failed,
        schedules,
    ) = await asyncio.gather(
        page.get("/api/v1/why"),
        page.get_recent("/api/v1/admin/drift", seconds=RECENT_SECONDS),
        page.get_recent("/api/v1/dead-letters/groups", seconds=RECENT_SECONDS),
        page.get_recent("/api/v1/workflows/stats", seconds=RECENT_SECONDS, is_kept=may_be_old),
        page.get_recent("/api/v1/pending-inputs", seconds=RECENT_SECONDS),
        page.get_recent("/api/v1/deployments/usage", seconds=RECENT_SECONDS),
        page.get("/api/v1/executions/statistics"),
        page.get("/api/v1/deployments/summary"),
        page.get(
            "/api/v1/executions/failures",
            **shown,
            expand="previousVersion",
        ),
        page.get("/api/v1/schedules", limit=SHOWN_SCHEDULES),
    )
    # The time of these answers would change the tag of an unchanged page.
    for answer in (why, statistics, deployments, failed):
        answer.pop("asOf", None)
    newest, listed = None, None
    workflow_count = None if stats is None else stats["readable"]["total"]
    if 0 < (workflow_count or 0) <= FEW_WORKFLOWS and not statistics["total"]["accepted"]:
        newest, listed = await asyncio.gather(
            page.get("/api/v1/executions", after="start", limit=1),
            page.get("/api/v1/workflows", after="start", limit=2),
        )
    return {
        "newest": newest,
        "only_workflow": listed["workflows"][0] if listed and len(listed["workflows"]) == 1 else None,
        "why": why,
        "drift": drift,
        "dead": dead,
        "workflow_count": workflow_count,
        "questions": questions,
        # Tenths of hours, so that an unchanged page keeps its tag for minutes.
        "pod_time": describe_pod_time(usage),
        "statistics": statistics,
        "deployments": deployments,
        "failed": failed,
        "schedules": schedules,
    }


def may_be_old(stats: Mapping[str, Any] | None) -> bool:
    """Return whether the numbers of workflows may be shown again: not if there is none, as before a newcomer's first
    one.
    """
    return stats is None or stats["readable"]["total"] > 0


def shows_all(query: Mapping[str, str]) -> bool:
    """Return whether the address asks for all causes of failures that the API lists, not for the newest alone."""
    return query.get("causes") == "all"


def read_range(query: Mapping[str, str]) -> Mapping[str, str]:
    """Return the time range of the address, `since` and `until` in UTC as the API writes times.

    It is empty unless both are times and `since` is earlier.
    """
    try:
        since, until = parse_timestamp(query["since"]), parse_timestamp(query["until"])
    except (KeyError, ValueError, OverflowError):
        return {}
    return {"since": format_timestamp(since), "until": format_timestamp(until)} if since < until else {}


def view(data: PageData, frame: PageFrame) -> Mapping[str, Any]:
    """Return the template values: problems, charts, reasons of waits, failures by cause, and pods."""
    reasons = data["why"]["reasons"]
    hours = data["statistics"]["hours"]
    failures = data["failed"]["groups"]
    needs = find_needs(data, failures, frame.now)
    if not shows_all(frame.query):
        failures = failures[:SHOWN_CAUSES]
    has_more = len(failures) < len(data["failed"]["groups"])
    shown = read_range(frame.query)
    return {
        "title": "Overview",
        "crumbs": (("Overview", ""),),
        "today": f"{frame.now:%a} {frame.now.day} {frame.now:%b %Y}, {frame.now:%H:%M} UTC",
        "present": format_timestamp(frame.now),
        "needs": needs,
        "need_count": sum(map(len, needs.values())),
        "dead_workflows": count_by_workflow(data["dead"]),
        "own_questions": describe_questions(data["questions"], frame.now),
        "waits": list_waits(reasons, frame.now),
        "running": sum(one["count"] for one in reasons if one["code"] == RUNS),
        "total": data["statistics"]["total"],
        "accepted": draw_bars([hour["accepted"] for hour in hours]),
        "ended": draw_bars(
            [hour["accepted"] - hour["unfinished"] for hour in hours], [hour["failed"] for hour in hours]
        ),
        "queue_lines": draw_lines(hours, "queueP50Ms", "queueP95Ms"),
        "wake_lines": draw_lines(hours, "wakeP50Ms", "wakeP95Ms"),
        "run_lines": draw_lines(hours, "runP50Ms", "runP95Ms"),
        "hour_labels": label_hours(hours),
        "first_hour": hours[0]["startsAt"] if hours else "",
        "hour_count": len(hours),
        "range": shown,
        "range_text": f"{show_day_time(shown['since'], frame.now)} to {show_day_time(shown['until'], frame.now)}"
        if shown
        else "",
        "range_query": f"&{urlencode(shown)}" if shown else "",
        "range_bars": find_shade(hours, shown),
        "range_starts": [(hour["startsAt"], show_day_time(hour["startsAt"], frame.now)) for hour in hours],
        "range_ends": [
            (end, show_day_time(end, frame.now))
            for hour in hours
            for end in (format_timestamp(parse_timestamp(hour["startsAt"]) + HOUR),)
        ],
        "is_first": data["workflow_count"] == 0 and frame.may("workflows:write"),
        "only_workflow": data["only_workflow"],
        "has_not_run": data["newest"] is not None
        and not data["newest"]["executions"]
        and frame.may("workflows:execute"),
        "failures": failures,
        "urgent_runs": {
            group["executionId"] for group in data["failed"]["groups"] if is_urgent(group, frame.now)
        },
        "has_more_failures": has_more or not data["failed"]["isComplete"],
        "more_failures": page_address(frame, PATH, {**shown, "causes": "all"}) if has_more else "",
        "may_run": frame.may("workflows:execute"),
        "pods": count_pods(data["deployments"]["states"]),
        "pod_time": data["pod_time"],
        "upcoming": list_upcoming(data["deployments"]["upcoming"], data["schedules"]["schedules"], frame.now),
    }


def find_needs(
    data: PageData, failures: Sequence[Mapping[str, Any]], now: datetime
) -> Mapping[str, Sequence[Any]]:
    """Return the problems that need a person, by kind, the worst kinds first; a kind without problems is empty."""
    reasons, workers = data["why"]["reasons"], data["why"]["workers"]
    has_worker = workers["state"] != "absent"
    findings = [
        one
        for one in (() if data["drift"] is None else data["drift"]["findings"])
        if has_worker or one["class"] != "no-worker"
    ]
    pending = [one for one in reasons if one["code"] in PENDING and one["oldestSince"] is not None]
    oldest = min(pending, key=lambda one: one["oldestSince"], default=None)
    is_late = oldest is not None and parse_timestamp(oldest["oldestSince"]) < now - LONG_WAIT
    minor = [one for one in findings if one["severity"] != "critical"]
    return {
        "workers": [] if has_worker else [True],
        "findings": [one for one in findings if one["severity"] == "critical"],
        "failing": rank_causes([group for group in failures if is_urgent(group, now)]),
        "stuck": data["deployments"]["failed"][:SHOWN_NEEDS],
        "oldest": [{**oldest, "words": look_of_wait(oldest["code"])[0]}] if oldest and is_late else [],
        "dead": [data["dead"]] if data["dead"] and data["dead"]["count"] else [],
        "reasons": [
            one for one in reasons if one["kind"] in NEEDS_PERSON and one["code"] not in SHOWN_ELSEWHERE
        ],
        "drift": [minor] if minor else [],
    }


def describe_questions(questions: Mapping[str, Any] | None, now: datetime) -> str:
    """Return the number of questions for the visitor and the one that expires first, as a sentence.

    Empty without questions for the visitor, and for visitors who may not answer.
    """
    own = [] if questions is None else [one for one in questions["inputs"] if one["assignment"] == "caller"]
    expiring = min(
        (one for one in own if one["expiresAt"] is not None), key=lambda one: one["expiresAt"], default=None
    )
    end = f" “{expiring['title']}” expires {show_day_time(expiring['expiresAt'], now)}." if expiring else ""
    return f"{show_count(len(own))} of them for you.{end}" if own else ""


def describe_pod_time(usage: Mapping[str, Any] | None) -> str:
    """Return the pod time of today as words, such as `14.2 h today, of 69 h always on`; empty without deployments."""
    if usage is None or not usage["alwaysOnPodSeconds"]:
        return ""
    used, whole = (
        show_hours(usage[name] / HOUR.total_seconds()) for name in ("podSeconds", "alwaysOnPodSeconds")
    )
    return f"{used} today, of {whole} always on"


def find_shade(hours: Sequence[Mapping[str, Any]], shown: Mapping[str, str]) -> tuple[int, int] | None:
    """Return the index of the first hour on the charts that the range `shown` (of `read_range`) touches, and the number
    of hours that it touches; None if there are none.
    """
    if not shown:
        return None
    since, until = parse_timestamp(shown["since"]), parse_timestamp(shown["until"])
    inside = [
        number
        for number, hour in enumerate(hours)
        for start in (parse_timestamp(hour["startsAt"]),)
        if start < until and start + HOUR > since
    ]
    return (inside[0], len(inside)) if inside else None


def is_urgent(group: Mapping[str, Any], now: datetime) -> bool:
    """Return whether the last run of a group has failed within the last hour, and no run in its place has completed."""
    at = parse_instant(group["lastAt"])
    return at is not None and at > now - URGENT_TIME and group["completedSuccessorId"] is None


def rank_causes(groups: Sequence[Mapping[str, Any]]) -> Sequence[Mapping[str, Any]]:
    """Return the groups of failures, joined by workflow, node and code, the worst first: by the share of the runs of
    their workflow, times their count.

    `groups` begin with the last failure, whose run and message stand for those joined with it.
    """
    causes: dict[tuple[str, str | None, str], dict[str, Any]] = {}
    for group in groups:
        cause = causes.setdefault(
            (group["workflowId"], group["nodeId"], group["code"]), {**group, "count": 0}
        )
        cause["count"] += group["count"]
        cause["firstAt"] = min(cause["firstAt"], group["firstAt"])
    return sorted(
        causes.values(), key=lambda cause: cause["count"] ** 2 / max(cause["workflowRuns"], 1), reverse=True
    )


def count_by_workflow(dead: Mapping[str, Any] | None) -> str:
    """Return the numbers of dead letters of the three workflows with most as text, such as `11 of Customer
    sync, 3 of Mails`.
    """
    workflows = dead["workflows"] if dead else ()
    counts = [f"{show_count(row['count'])} of {row['workflowName']}" for row in workflows[:SHOWN_NEEDS]]
    return ", ".join(counts) + (" and others" if len(workflows) > SHOWN_NEEDS else "")


def list_waits(reasons: Sequence[Mapping[str, Any]], now: datetime) -> Sequence[Mapping[str, Any]]:
    """Return the reasons of waits in the given order, with words and a tone each, and their known end; runs that nodes
    execute are left out.
    """
    found = []
    for one in reasons:
        if one["code"] != RUNS:
            words, tone = look_of_wait(one["code"])
            if one["until"] is not None:
                verb = "opens" if one["code"] == "window-closed" else "next"
                words = f"{words} ({verb} {show_day_time(one['until'], now)})"
            found.append({**one, "words": words, "tone": tone})
    return found


def count_pods(states: Mapping[str, int]) -> Sequence[tuple[int, StateLook]]:
    """Return the numbers of deployments by their look, from the numbers by status; looks without a deployment
    are left out.
    """
    counts: Counter[StateLook] = Counter()
    for status, number in states.items():
        counts[look_of_pod(status)] += number
    order = list(dict.fromkeys(POD_STATES.values()))
    return [(counts[look], look) for look in order if counts[look]]


def list_upcoming(
    deployments: Sequence[Mapping[str, Any]], schedules: Sequence[Mapping[str, Any]], now: datetime
) -> Sequence[Mapping[str, str]]:
    """Return the next starts and stops of pods and the next runs of schedules in order of time: time, day, workflow,
    verb and cause; the day is empty for those of today.
    """
    transitions = [
        {
            "at": one["nextTransitionAt"],
            "workflowId": one["workflowId"],
            "name": one["workflowName"],
            "verb": "starts" if one["nextTransition"] == "start" else "stops",
            "cause": describe_cause(one, now),
        }
        for one in deployments
    ]
    runs = [
        {
            "at": one["nextRuns"][0]["startsAt"],
            "workflowId": one["workflowId"],
            "name": one["workflowName"],
            "verb": "runs",
            "cause": describe_local_time(one),
        }
        for one in schedules
        if one["isActive"] and one["nextRuns"]
    ]
    return [{**one, "day": name_day(one["at"], now)} for one in sorted(transitions + runs, key=_by_time)]


def describe_local_time(schedule: Mapping[str, Any]) -> str:
    """Return the next time of a schedule in its zone, such as `06:00 in Europe/Berlin`; `by its schedule` in UTC."""
    zone = schedule["policy"]["timezone"]
    return "by its schedule" if zone == "UTC" else f"{schedule['nextRuns'][0]['localTime'][11:16]} in {zone}"


def _by_time(one: Mapping[str, str]) -> tuple[str, str]:
    return one["at"], one["name"]


def name_day(text: str, now: datetime) -> str:
    """Return the day of a time in an API answer in UTC, such as `Mon 30 Nov`; empty for that of `now`."""
    at = parse_instant(text)
    return "" if at is None or at.date() == now.date() else f"{at:%a} {at.day} {at:%b}"


def describe_cause(deployment: Mapping[str, Any], now: datetime) -> str:
    """Return the cause of a deployment's next start or stop, by its state and policy; empty if there is none."""
    is_start = deployment["nextTransition"] == "start"
    failures = deployment["startFailures"]
    if is_start and failures:
        return f"again after {failures} failed start{'' if failures == 1 else 's'}"
    match deployment["policyType"]:
        case "scheduled-window":
            return "its window opens" if is_start else "its window closes"
        case "idle-shutdown" | "on-demand" if not is_start:
            since = deployment["lastActivityAt"]
            return "" if since is None else f"idle since {show_day_time(since, now)}"
        case "always-on" if is_start:
            return "it is always on"
        case _:
            return "a run is due" if is_start else ""


PAGE: Final = Page(PATH, "overview.html", load, view, "overview", ("executions",))
