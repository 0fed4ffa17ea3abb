"""Audit trail: changes of objects with their authors, and decisions of the system, newest first."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import urlencode

from gateway.dashboard.addresses import page_address
from gateway.dashboard.page import Page, PageData, PageFrame

if TYPE_CHECKING:
    from gateway.dashboard.page_request import PageRequest

LIMIT: Final = 50
START: Final = "start"
MAX_USERS: Final = 100
PATH: Final = "/dashboard/audit"
KINDS: Final = {"all": "changes and decisions", "change": "changes", "decision": "decisions of the system"}
KIND: Final = "all"
"""Kind of entries that the page shows at first."""
FILTERS: Final = ("kind", "action", "objectId", "userId", "requestId", "since", "until")
LINKED_FILTERS: Final = {"keyId": "key", "addressHash": "address", "reason": "reason"}
"""Names of filters that a link in a row sets, with their words."""
OBJECT_PAGES: Final = {"wf_": "workflows/", "ds_": "sources?source="}
"""Beginnings of the addresses of objects, by the prefix of their ids."""
DECISION_ICONS: Final = {
    "deployment.started": "awake",
    "deployment.woken": "waking",
    "deployment.drained": "draining",
    "deployment.stopped": "asleep",
    "delivery.deferred": "clock",
    "executions.pruned": "trash",
    "execution.reclaimed": "undo",
}


async def load(page: PageRequest) -> PageData:
    """Ask the API for 50 entries by the filters of the query, and for the names of up to 100 users; raises
    `ApiError`.
    """
    given = {"kind": KIND, **_read_filters(page.query)}
    entries, users = await asyncio.gather(
        page.get("/api/v1/audit", **given, limit=LIMIT, after=page.query.get("after", START)),
        page.get("/api/v1/auth/users", limit=MAX_USERS),
    )
    return {"entries": entries, "users": users}


def view(data: PageData, frame: PageFrame) -> Mapping[str, Any]:
    """Return the template values: the entries with their pages, the filters, and addresses within the list."""
    entries = data["entries"]
    filters = _read_filters(frame.query)
    is_newest = frame.query.get("after", START) == START
    return {
        "title": "Audit",
        "crumbs": (("Audit", ""),),
        "entries_shown": [
            {**entry, "page": _page_of(frame, entry["objectId"])} for entry in entries["entries"]
        ],
        "count": entries["count"],
        "count_is_lower_bound": entries["countIsLowerBound"],
        "names": {user["id"]: user["name"] or user["email"] for user in data["users"]["users"]},
        "filters": filters,
        "kinds": KINDS,
        "linked": [(word, name, filters[name]) for name, word in LINKED_FILTERS.items() if name in filters],
        "decision_icons": DECISION_ICONS,
        "address_of": lambda **changes: page_address(frame, PATH, {**filters, **changes}),
        "older": page_address(frame, PATH, {**filters, "after": entries["next"]}) if entries["next"] else "",
        "newest": "" if is_newest else page_address(frame, PATH, filters),
        "export_query": f"?{urlencode({'kind': KIND, **filters})}",
    }


def _read_filters(query: Mapping[str, str]) -> dict[str, str]:
    """Return the filters of the query that are set, by their names."""
    return {name: query[name] for name in (*FILTERS, *LINKED_FILTERS) if query.get(name)}


def _page_of(frame: PageFrame, object_id: str) -> str:
    """Return the address of the page of a workflow or data source by its id; empty for other objects."""
    begin = next((begin for prefix, begin in OBJECT_PAGES.items() if object_id.startswith(prefix)), None)
    return "" if begin is None else f"{frame.root}/dashboard/{begin}{object_id}"


PAGE: Final = Page(PATH, "audit_list.html", load, view, "audit")
