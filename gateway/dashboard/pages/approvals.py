"""Approvals: questions of waiting runs that the visitor may answer, each with its form."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final

from gateway.dashboard.form_fields import list_fields
from gateway.dashboard.page import Page, PageData, PageFrame

if TYPE_CHECKING:
    from gateway.dashboard.page_request import PageRequest

PATH: Final = "/dashboard/approvals"


async def load(page: PageRequest) -> PageData:
    """Ask the API for the questions of waiting runs that the visitor may answer; raises `ApiError`."""
    return {"pending": await page.get("/api/v1/pending-inputs")}


def view(data: PageData, frame: PageFrame) -> Mapping[str, Any]:
    """Return the template values: the questions with the fields of their forms."""
    pending = data["pending"]
    return {
        "title": "Approvals",
        "crumbs": (("Approvals", ""),),
        "questions": [{**one, "fields": list_fields(one["schema"])} for one in pending["inputs"]],
        "count": pending["count"],
        "may_answer": frame.may("workflows:execute"),
    }


PAGE: Final = Page(PATH, "approvals.html", load, view, "approvals", ("executions",))
