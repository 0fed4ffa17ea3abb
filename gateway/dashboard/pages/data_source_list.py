"""Data sources: databases, mail servers and buckets that nodes use, with a test of each."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final

from gateway.dashboard.addresses import list_address
from gateway.dashboard.page import Page, PageData, PageFrame

if TYPE_CHECKING:
    from gateway.dashboard.page_request import PageRequest

LIMIT: Final = 50
PATH: Final = "/dashboard/sources"
ADDRESS_FIELDS: Final = ("host", "endpoint", "url", "file", "bucket")
"""Settings of which the first that is there says where a source is."""


async def load(page: PageRequest) -> PageData:
    """Ask for a page of data sources."""
    given = page.query
    return {
        "sources": await page.get(
            "/api/v1/datasources", type=given.get("type"), limit=LIMIT, offset=given.get("offset")
        )
    }


def view(data: PageData, frame: PageFrame) -> Mapping[str, Any]:
    """Return the rows, and whether the visitor may test a source."""
    sources = data["sources"]
    shown = sources["offset"] + len(sources["dataSources"])
    is_last = shown >= sources["count"]
    return {
        "title": "Data sources",
        "crumbs": (("Data sources", ""),),
        "sources": [
            {**source, "address": _address_of(source["settings"])} for source in sources["dataSources"]
        ],
        "count": sources["count"],
        "user_id": frame.visitor["userId"] if frame.visitor else "",
        "type": frame.query.get("type", ""),
        "next": "" if is_last else list_address(frame, PATH, {"offset": str(shown)}),
    }


def _address_of(settings: Mapping[str, Any]) -> str:
    """Return the place of a source: its host with port and database, or another setting that names it."""
    name = next((settings[field] for field in ADDRESS_FIELDS if settings.get(field)), "")
    port = f":{settings['port']}" if settings.get("port") else ""
    database = f"/{settings['database']}" if settings.get("database") else ""
    return f"{name}{port}{database}"


PAGE: Final = Page(PATH, "data_source_list.html", load, view, "sources")
