"""Data sources: databases, mail servers and buckets that nodes use, with a test of each."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import quote

from gateway.dashboard import source_form
from gateway.dashboard.addresses import page_address
from gateway.dashboard.formats import show_share
from gateway.dashboard.hour_charts import draw_bars, label_hours
from gateway.dashboard.page import Page, PageData, PageFrame
from gateway.dashboard.visibility import list_users, may_change

if TYPE_CHECKING:
    from gateway.dashboard.page_request import PageRequest

LIMIT: Final = 50
MAX_USERS: Final = 100
SHOWN_LOSSES: Final = 5
ASLEEP: Final = frozenset({"not-deployed", "stopped", "failed"})
"""Statuses of deployments without pods."""
PATH: Final = "/dashboard/sources"
ADDRESS_FIELDS: Final = ("host", "endpoint", "url", "file", "bucket")
"""Settings of which the first that is there says where a source is."""


async def load(page: PageRequest) -> PageData:
    """Ask the API for a page of 50 data sources, by the type and offset of the query, and for the selected one with its
    use and the names of users.

    Source and use are None for an unknown source. Users are None for a visitor who may not list them. All three are
    None without a selected source. Raises `ApiError`.
    """
    given = page.query
    selected = given.get("source", "")
    path = f"/api/v1/datasources/{quote(selected, safe='')}"
    sources, source, usage, users = await asyncio.gather(
        page.get("/api/v1/datasources", type=given.get("type"), limit=LIMIT, offset=given.get("offset")),
        page.get_if_present(path) if selected else no_answer(),
        page.get_if_present(f"{path}/usage") if selected else no_answer(),
        page.get_if_present("/api/v1/auth/users", limit=MAX_USERS) if selected else no_answer(),
    )
    # It may be deleted between the two answers.
    return {
        "sources": sources,
        "source": source,
        "usage": source and usage,
        "users": users,
        "tag": page.tags.get(path, ""),
    }


async def no_answer() -> None:
    """Return None, in place of the answer to a request that is not made."""


def view(data: PageData, frame: PageFrame) -> Mapping[str, Any]:
    """Return the template values: the data sources with their addresses, and the address of the next page."""
    sources = data["sources"]
    shown = sources["offset"] + len(sources["dataSources"])
    is_last = shown >= sources["count"]
    source, usage = data["source"], data["usage"]
    filters = {name: frame.query.get(name, "") for name in ("type", "offset")}
    may_write = frame.may("datasources:write")
    new_form = source_form.build_form(frame.query.get("new", "")) if may_write else None
    return {
        "title": "Data sources",
        "crumbs": (("Data sources", ""),),
        "new_form": new_form,
        "new_types": [
            (type_, label, page_address(frame, PATH, {**filters, "new": type_}))
            for type_, label in source_form.LABELS.items()
        ]
        if may_write and "new" in frame.query
        else (),
        "new_page": page_address(frame, PATH, {**filters, "new": "sqlite"}) if may_write else "",
        "sources": [
            {**source, "address": _address_of(source["settings"])} for source in sources["dataSources"]
        ],
        "count": sources["count"],
        "source": source,
        "tag": data["tag"],
        "usage": usage,
        "bars": None
        if usage is None
        else draw_bars(
            [hour["ended"] for hour in usage["hours"]], [hour["failed"] for hour in usage["hours"]]
        ),
        "hour_labels": [] if usage is None else label_hours(usage["hours"]),
        "share": "" if usage is None or not usage["ended"] else show_share(usage["failed"], usage["ended"]),
        "loses": describe_losses(usage),
        "address": "" if source is None else _address_of(source["settings"]),
        "users": () if source is None else list_users(source, data["users"], frame),
        "awake": [one for one in usage["workflows"] if one["deploymentStatus"] not in ASLEEP]
        if usage
        else [],
        "may_change": source is not None and may_change(source, "datasources:write", frame),
        "address_of": lambda source_id: page_address(frame, PATH, {**filters, "source": source_id}),
        "user_id": frame.visitor["userId"] if frame.visitor else "",
        "type": frame.query.get("type", ""),
        "next": "" if is_last else page_address(frame, PATH, {"offset": str(shown)}),
    }


def describe_losses(usage: Mapping[str, Any] | None) -> str:
    """Return the names of the workflows and models that fail without a data source, as a sentence; empty for none.

    There may be further ones that the visitor may not see.
    """
    named = [] if usage is None else [one["name"] for one in (*usage["workflows"], *usage["models"])]
    if not named:
        return ""
    others = f" and {len(named) - SHOWN_LOSSES} more" if len(named) > SHOWN_LOSSES else ""
    return f"At least these name it, and fail without it: {', '.join(named[:SHOWN_LOSSES])}{others}."


def _address_of(settings: Mapping[str, Any]) -> str:
    """Return the address of a data source from its settings: host, port and database, or endpoint, URL, file
    or bucket.

    Empty without one.
    """
    name = next((settings[field] for field in ADDRESS_FIELDS if settings.get(field)), "")
    port = f":{settings['port']}" if settings.get("port") else ""
    database = f"/{settings['database']}" if settings.get("database") else ""
    return f"{name}{port}{database}"


PAGE: Final = Page(PATH, "data_source_list.html", load, view, "sources")
