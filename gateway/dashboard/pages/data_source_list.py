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
    """Ask the API for a page of 50 data sources, by the type and offset of the query; raises `ApiError`."""
    given = page.query
    return {
        "sources": await page.get(
            "/api/v1/datasources", type=given.get("type"), limit=LIMIT, offset=given.get("offset")
        )
    }


def view(data: PageData, frame: PageFrame) -> Mapping[str, Any]:
    """Return the template values: the data sources with their addresses, and the address of the next page."""
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
    """Return the address of a data source from its settings: host, port and database, or endpoint, URL, file
    or bucket.

    Empty without one.
    """
    name = next((settings[field] for field in ADDRESS_FIELDS if settings.get(field)), "")
    port = f":{settings['port']}" if settings.get("port") else ""
    database = f"/{settings['database']}" if settings.get("database") else ""
    return f"{name}{port}{database}"


PAGE: Final = Page(PATH, "data_source_list.html", load, view, "sources")
