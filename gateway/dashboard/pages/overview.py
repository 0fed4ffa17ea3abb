"""Overview: problems that need a person, charts of a day, reasons of waits, failures by cause, and pods."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any, Final

from gateway.dashboard.formats import (
    POD_STATES,
    StateLook,
    look_of_pod,
    look_of_wait,
    parse_instant,
    show_count,
)
from gateway.dashboard.hour_charts import draw_bars, draw_lines, label_hours
from gateway.dashboard.page import Page, PageData, PageFrame
from models.timestamps import format_timestamp

if TYPE_CHECKING:
    from gateway.dashboard.page_request import PageRequest

DAY: Final = timedelta(days=1)
NAMED_WORKFLOWS: Final = 100
NAMED_ALONE: Final = 10
GROUPED_FAILURES: Final = 100
"""Number of the newest failed runs that are grouped."""
RECENT_SECONDS: Final = 10.0
"""Time for which drift and dead letters are shown again: an open page loads itself up to four times a second."""
URGENT_TIME: Final = timedelta(hours=1)
"""Time for which a failure counts as one that goes on."""
SHOWN_NEEDS: Final = 3
"""Number of failures and of deployments that need a person at most; the page lists others below."""
SHOWN_SCHEDULES: Final = 5
SHOWN_NEXT: Final = 8
PATH: Final = "/dashboard/overview"
NEEDS_PERSON: Final = frozenset({"change", "escalate"})
"""Kinds of reasons that do not end by themselves."""
SHOWN_ELSEWHERE: Final = frozenset({"no-worker", "deployment-failed"})
"""Codes of reasons that other lines of the page explain."""
RUNS: Final = "node-running"


async def load(page: PageRequest) -> PageData:
    """Ask the API for reasons, statistics of 24 hours, deployments, dead letters, 100 failed runs, drift, the
    number of workflows, and the next five schedules.

    Drift is None unless the visitor is an admin. Raises `ApiError`.
    """
    # Whole minutes, so that an unchanged page keeps its tag for a minute.
    since = format_timestamp((page.now - DAY).replace(second=0, microsecond=0))
    why, drift, dead, stats, statistics, deployments, failed, schedules = await asyncio.gather(
        page.get("/api/v1/why"),
        page.get_recent("/api/v1/admin/drift", seconds=RECENT_SECONDS),
        page.get_recent("/api/v1/dead-letters/groups", seconds=RECENT_SECONDS),
        page.get_recent("/api/v1/workflows/stats", seconds=RECENT_SECONDS),
        page.get("/api/v1/executions/statistics"),
        page.get("/api/v1/deployments"),
        page.get("/api/v1/executions", status="failed", since=since, after="start", limit=GROUPED_FAILURES),
        page.get("/api/v1/schedules", limit=SHOWN_SCHEDULES),
    )
    names = await _load_names(page, failed["executions"])
    # The time of these answers would change the tag of an unchanged page.
    for answer in (statistics, deployments):
        answer.pop("asOf")
    return {
        "why": why,
        "drift": drift,
        "dead": dead,
        "stats": stats,
        "statistics": statistics,
        "deployments": deployments,
        "names": names,
        "failed": failed,
        "schedules": schedules,
    }


async def _load_names(page: PageRequest, failed: Sequence[Mapping[str, Any]]) -> Mapping[str, str]:
    """Return the names of the workflows of failed runs by id; they are the only ones that the page shows.

    Most are among the first hundred of the list. Of the others, the ten that failed last are asked one by one.
    """
    if not failed:
        return {}
    listed = await page.get("/api/v1/workflows", limit=NAMED_WORKFLOWS)
    names = {one["id"]: one["name"] for one in listed["workflows"]}
    others = dict.fromkeys(run["workflowId"] for run in failed if run["workflowId"] not in names)
    found = await asyncio.gather(
        *(page.get_if_present(f"/api/v1/workflows/{one}") for one in [*others][:NAMED_ALONE])
    )
    return names | {one["id"]: one["name"] for one in found if one is not None}


def view(data: PageData, frame: PageFrame) -> Mapping[str, Any]:
    """Return the template values: problems, charts, reasons of waits, failures by cause, and pods."""
    reasons = data["why"]["reasons"]
    findings = [] if data["drift"] is None else data["drift"]["findings"]
    hours = data["statistics"]["hours"]
    failures = group_failures(data["failed"]["executions"])
    deployments = data["deployments"]["deployments"]
    needs = {
        "workers": [True] if data["why"]["workers"]["state"] == "absent" else [],
        "findings": [finding for finding in findings if finding["severity"] == "critical"],
        "failing": [group for group in failures if is_recent(group["last"], frame.now)][:SHOWN_NEEDS],
        "stuck": [one for one in deployments if one["deploymentStatus"] == "failed"][:SHOWN_NEEDS],
        "dead": [data["dead"]] if data["dead"] and data["dead"]["count"] else [],
        "reasons": [
            one for one in reasons if one["kind"] in NEEDS_PERSON and one["code"] not in SHOWN_ELSEWHERE
        ],
    }
    return {
        "title": "Overview",
        "crumbs": (("Overview", ""),),
        "today": f"{frame.now:%a} {frame.now.day} {frame.now:%b %Y}, {frame.now:%H:%M} UTC",
        "needs": needs,
        "need_count": sum(map(len, needs.values())),
        "dead_workflows": count_by_workflow(data["dead"]),
        "waits": list_waits(reasons),
        "needs_waits": any(one["kind"] in NEEDS_PERSON for one in reasons),
        "running": sum(one["count"] for one in reasons if one["code"] == RUNS),
        "total": data["statistics"]["total"],
        "accepted": draw_bars([hour["accepted"] for hour in hours]),
        "ended": draw_bars(
            [hour["accepted"] - hour["unfinished"] for hour in hours], [hour["failed"] for hour in hours]
        ),
        "wake_lines": draw_lines(hours, "wakeP50Ms", "wakeP95Ms"),
        "run_lines": draw_lines(hours, "runP50Ms", "runP95Ms"),
        "hour_labels": label_hours(hours),
        "first_hour": hours[0]["startsAt"] if hours else "",
        "hour_count": len(hours),
        "is_first": data["stats"] is not None and not data["stats"]["total"] and frame.may("workflows:write"),
        "failures": failures,
        "names": data["names"],
        "pods": count_pods(deployments),
        "upcoming": list_upcoming(deployments, data["schedules"]["schedules"], frame.now),
    }


def is_recent(text: str, now: datetime) -> bool:
    """Return whether a time in an API answer is within the last hour."""
    at = parse_instant(text)
    return at is not None and at > now - URGENT_TIME


def count_by_workflow(dead: Mapping[str, Any] | None) -> str:
    """Return the dead letters of the three workflows with most, such as `11 of Customer sync, 3 of Mails`."""
    counts: Counter[str] = Counter()
    for group in (dead or {"groups": ()})["groups"]:
        counts[group["workflowName"]] += group["count"]
    shown = [f"{show_count(count)} of {name}" for name, count in counts.most_common(SHOWN_NEEDS)]
    return ", ".join(shown) + (" and others" if len(counts) > SHOWN_NEEDS else "")


def list_waits(reasons: Sequence[Mapping[str, Any]]) -> Sequence[Mapping[str, Any]]:
    """Return the reasons of waits that end by themselves, most frequent first, with words and a tone each."""
    found = []
    for one in reasons:
        if one["kind"] not in NEEDS_PERSON and one["code"] != RUNS:
            words, tone = look_of_wait(one["code"])
            found.append({**one, "words": words, "tone": tone})
    return found


def count_pods(deployments: Sequence[Mapping[str, Any]]) -> Sequence[tuple[int, StateLook]]:
    """Return the number of deployments of each state that there is, with its look."""
    counts = Counter(look_of_pod(one["deploymentStatus"]) for one in deployments)
    order = list(dict.fromkeys(POD_STATES.values()))
    return [(counts[look], look) for look in order if counts[look]]


def list_upcoming(
    deployments: Sequence[Mapping[str, Any]], schedules: Sequence[Mapping[str, Any]], now: datetime
) -> Sequence[Mapping[str, str]]:
    """Return the next eight starts and stops of pods and scheduled runs in order of time: time, day, workflow,
    verb and cause; the day is empty for those of today.
    """
    found = [
        {
            "at": one["nextTransitionAt"],
            "workflowId": one["workflowId"],
            "name": one["workflowName"],
            "verb": "starts" if one["nextTransition"] == "start" else "stops",
            "cause": describe_cause(one),
        }
        for one in deployments
        if one["nextTransitionAt"] is not None
    ]
    found += [
        {
            "at": one["nextRuns"][0]["startsAt"],
            "workflowId": one["workflowId"],
            "name": one["workflowName"],
            "verb": "runs",
            "cause": "by its schedule",
        }
        for one in schedules
        if one["isActive"] and one["nextRuns"]
    ]
    shown = sorted(found, key=lambda one: (one["at"], one["name"]))[:SHOWN_NEXT]
    return [{**one, "day": name_day(one["at"], now)} for one in shown]


def name_day(text: str, now: datetime) -> str:
    """Return the day of a time in an API answer in UTC, such as `Mon 30 Nov`; empty for that of `now`."""
    at = parse_instant(text)
    return "" if at is None or at.date() == now.date() else f"{at:%a} {at.day} {at:%b}"


def describe_cause(deployment: Mapping[str, Any]) -> str:
    """Return the cause of a deployment's next start or stop, by its policy; empty if there is none to tell."""
    is_start = deployment["nextTransition"] == "start"
    match deployment["policyType"]:
        case "scheduled-window":
            return "its window opens" if is_start else "its window closes"
        case "idle-shutdown" | "on-demand" if not is_start:
            since = parse_instant(deployment["lastActivityAt"])
            return "" if since is None else f"idle since {since:%H:%M}"
        case _:
            return ""


def group_failures(runs: Sequence[Mapping[str, Any]]) -> Sequence[Mapping[str, Any]]:
    """Return failed runs, the newest first, grouped by workflow, node and error code, in the order of their
    newest failure.

    Each group has its count, first and last time, and the id of its newest run as a sample.
    """
    groups: dict[tuple[str, str | None, str], dict[str, Any]] = {}
    for run in runs:
        error = run["error"] or {"code": "unknown", "message": "", "nodeId": None}
        cause = error.get("cause") or error
        key = (run["workflowId"], cause.get("nodeId") or error.get("nodeId"), cause["code"])
        newest = {
            "workflowId": key[0],
            "nodeId": key[1],
            "code": key[2],
            "message": cause["message"],
            "sample": run["id"],
            "last": run["createdAt"],
            "count": 0,
        }
        group = groups.setdefault(key, newest)
        group["count"] += 1
        group["first"] = run["createdAt"]
    return list(groups.values())


PAGE: Final = Page(PATH, "overview.html", load, view, "overview", ("executions",))
