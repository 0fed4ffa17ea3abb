"""Deliveries of all workflows: each request with its outcome, its reason and its run, and refused ones unnamed."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final

from gateway.dashboard.addresses import page_address
from gateway.dashboard.page import Page, PageData, PageFrame

if TYPE_CHECKING:
    from gateway.dashboard.page_request import PageRequest

LIMIT: Final = 50
SHOWN_SAMPLES: Final = 20
START: Final = "start"
PATH: Final = "/dashboard/deliveries"
FILTERS: Final = ("outcome", "reason", "route", "workflow_id", "since", "until")
OUTCOMES: Final = (
    ("", "", "All"),
    ("accepted", "", "Accepted"),
    ("duplicate", "", "Duplicate"),
    ("deferred", "", "Deferred"),
    ("deferred", "outside-window", "Deferred: window"),
    ("deferred", "workflow-paused", "Deferred: paused"),
    ("rejected", "", "Rejected"),
    ("shed", "", "Shed"),
)
"""Outcome, code of the reason and label of each filter."""
ROUTES: Final = (
    ("", "All routes"),
    ("enqueue", "Messages"),
    ("enqueue-batch", "Batches"),
    ("email-trigger", "Mails"),
    ("hook", "Webhooks"),
    ("events", "Events"),
)
REDRIVEN_IN_BULK: Final = frozenset({"rejected", "shed"})
"""Outcomes without a run, whose requests a person may want to run after all."""
REDRIVEN_ROUTES: Final = frozenset({"enqueue", "email-trigger", "hook"})
"""Routes with one workflow for each request."""
INVALID: Final = "validation-failed"
"""Reason of a request that would be refused again."""
MEANINGS: Final = {
    "duplicate": "Repeats an earlier request: the answer and the run are the first one's.",
    "deferred": "Its run starts when the workflow may run again.",
}


async def load(page: PageRequest) -> PageData:
    """Ask the API for 50 deliveries, the plan of a bulk redrive, and samples of refused requests.

    The plan is None unless the outcome is rejected or shed without limits of time or reason; the samples are None on
    later pages, and with filters other than the outcome rejected. Both are None if they are forbidden. Raises
    `ApiError`.
    """
    given = page.query
    filters = {name: given[name] for name in FILTERS if given.get(name)}
    deliveries, samples, plan = await asyncio.gather(
        page.get("/api/v1/deliveries", **filters, limit=LIMIT, after=given.get("after", START)),
        _load_samples(page, filters),
        _plan_redrive(page, filters),
    )
    return {"deliveries": deliveries, "samples": samples, "plan": plan}


async def _load_samples(page: PageRequest, filters: Mapping[str, str]) -> Any:  # noqa: ANN401 - any JSON value
    """Return up to 20 samples of refused requests; None on later pages, with filters other than the outcome `rejected`,
    and if they are forbidden.
    """
    if page.query.get("after", START) != START or not set(filters) <= {"outcome"}:
        return None
    if filters.get("outcome", "rejected") != "rejected":
        return None
    return await page.get_if_present("/api/v1/intake-samples", limit=SHOWN_SAMPLES)


async def _plan_redrive(page: PageRequest, filters: Mapping[str, str]) -> Any:  # noqa: ANN401 - any JSON value
    """Return the plan of a redrive of all listed deliveries; None unless they are rejected or shed ones
    without limits of time or reason.
    """
    if filters.get("outcome") not in REDRIVEN_IN_BULK or {"since", "until", "reason"} & set(filters):
        return None
    return await page.plan_if_allowed("/api/v1/deliveries/redrive", filter=redrive_filter(filters))


def can_redrive(delivery: Mapping[str, Any]) -> bool:
    """Return whether a delivery can run again, by its route and the reason of its refusal; the API still
    refuses one without kept content.
    """
    reason = delivery["reason"]
    return delivery["route"] in REDRIVEN_ROUTES and not (reason and reason["code"] == INVALID)


def redrive_filter(filters: Mapping[str, str]) -> Mapping[str, str]:
    """Return the API filter of a redrive of the deliveries of a list; only outcome, route and workflow are
    taken over.
    """
    names = {"outcome": "outcome", "route": "route", "workflow_id": "workflowId"}
    return {names[name]: value for name, value in filters.items() if name in names}


def view(data: PageData, frame: PageFrame) -> Mapping[str, Any]:
    """Return the template values: the deliveries, the filters, and the addresses of other pages of the list."""
    listed = data["deliveries"]
    filters = {name: frame.query[name] for name in FILTERS if frame.query.get(name)}
    is_newest = frame.query.get("after", START) == START
    plan, samples = data["plan"], data["samples"]
    return {
        "title": "Deliveries",
        "crumbs": (("Deliveries", ""),),
        "deliveries": listed["deliveries"],
        "count": listed["count"],
        "count_is_lower_bound": listed["countIsLowerBound"],
        "filters": filters,
        "outcomes": [
            (
                label,
                page_address(frame, PATH, {**filters, "outcome": outcome, "reason": reason}),
                (filters.get("outcome", ""), filters.get("reason", "")) == (outcome, reason),
            )
            for outcome, reason, label in OUTCOMES
        ],
        "routes": [
            (
                label,
                page_address(frame, PATH, {**filters, "route": route}),
                filters.get("route", "") == route,
            )
            for route, label in ROUTES
        ],
        "can_pick": any(can_redrive(one) for one in listed["deliveries"]),
        "meanings": MEANINGS,
        "can_redrive": can_redrive,
        "workflow_name": next((one["workflowName"] for one in listed["deliveries"]), ""),
        "redrivable": plan["matched"] if plan else 0,
        "redrive_filter": redrive_filter(filters),
        "may_run": frame.may("workflows:execute"),
        "samples": samples["samples"] if samples else (),
        "sample_count": samples["count"] if samples else 0,
        "older": page_address(frame, PATH, {**filters, "after": listed["next"]}) if listed["next"] else "",
        "newest": "" if is_newest else page_address(frame, PATH, filters),
        "is_newest": is_newest,
    }


PAGE: Final = Page(PATH, "delivery_list.html", load, view, "deliveries", ("deliveries",))
