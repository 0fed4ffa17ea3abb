"""Schedules of all workflows: next runs, last runs, and the reason if one is inactive."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final

from gateway.dashboard.addresses import list_address
from gateway.dashboard.page import Page, PageData, PageFrame

if TYPE_CHECKING:
    from gateway.dashboard.page_request import PageRequest

LIMIT: Final = 50
PATH: Final = "/dashboard/schedule"


async def load(page: PageRequest) -> PageData:
    """Ask the API for a page of schedules; raises `ApiError`."""
    return {"schedules": await page.get("/api/v1/schedules", limit=LIMIT, offset=page.query.get("offset"))}


def view(data: PageData, frame: PageFrame) -> Mapping[str, Any]:
    """Return the template values: the schedules with their timing in words, and the address of the next page."""
    listed = data["schedules"]
    shown = listed["offset"] + len(listed["schedules"])
    is_last = shown >= listed["count"]
    return {
        "title": "Schedule",
        "crumbs": (("Schedule", ""),),
        "schedules": [{**one, "timing": describe_timing(one["policy"])} for one in listed["schedules"]],
        "count": listed["count"],
        "next": "" if is_last else list_address(frame, PATH, {"offset": str(shown)}),
    }


def describe_timing(policy: Mapping[str, Any] | None) -> str:
    """Return the timing of a schedule, such as `30 7 * * mon-fri, Europe/Berlin` or `every 60 s`.

    Empty without a policy.
    """
    if policy is None:
        return ""
    if policy["cron"] is not None:
        return f"{policy['cron']}, {policy['timezone']}"
    return f"every {policy['intervalSeconds']:,} s"


PAGE: Final = Page(PATH, "schedule_list.html", load, view, "schedule", ("executions",))
