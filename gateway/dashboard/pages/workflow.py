"""Page of one workflow: its graph, why its pods run or not, its runs, deliveries, dead letters and versions."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final

from gateway.dashboard.graph_map import MAX_CARDS, draw_graph
from gateway.dashboard.page import Page, PageData, PageFrame

if TYPE_CHECKING:
    from gateway.dashboard.page_request import PageRequest

SHOWN_ROWS: Final = 10
PATH: Final = "/dashboard/workflows/{id}"


async def load(page: PageRequest) -> PageData:
    """Ask for the workflow, and for everything about it that its visitor may see."""
    workflow_id = page.parameters["id"]
    path = f"/api/v1/workflows/{workflow_id}"
    workflow, runs = await asyncio.gather(
        page.get(path), page.get_if_present("/api/v1/executions", workflow_id=workflow_id, limit=SHOWN_ROWS)
    )
    names = ("why", "lifecycle", "deliveries", "dead-letters", "versions", "inbound-address", "schedule")
    asked = [page.get_if_present(f"{path}/{name}", limit=_limit_of(name)) for name in names]
    if runs and runs["executions"]:
        spans_path = f"/api/v1/executions/{runs['executions'][0]['id']}/spans"
        asked.append(page.get_if_present(spans_path, limit=MAX_CARDS))
    answers = await asyncio.gather(*asked)
    found = {name.replace("-", "_"): answer for name, answer in zip(names, answers, strict=False)}
    spans = answers[len(names)] if len(answers) > len(names) else None
    return {"workflow": workflow, "runs": runs, "spans": spans, **found}


def _limit_of(name: str) -> int | None:
    """Return the number of rows of a list; None for an object."""
    return SHOWN_ROWS if name in {"deliveries", "dead-letters", "versions"} else None


def view(data: PageData, frame: PageFrame) -> Mapping[str, Any]:
    """Return the parts of the page."""
    workflow, spans = data["workflow"], data["spans"]
    states = None if spans is None else {span["nodeId"]: span["status"] for span in spans["spans"]}
    return {
        "title": workflow["name"],
        "crumbs": (
            ("Workflows", f"{frame.root}/dashboard/workflows"),
            (workflow["name"], ""),
        ),
        **data,
        "map": draw_graph(workflow["nodes"], workflow["connections"], states),
        "api": f"/api/v1/workflows/{workflow['id']}",
        "may_write": frame.may("workflows:write"),
        "may_run": frame.may("workflows:execute"),
        "is_active": workflow["status"] == "active",
        "is_deployed": bool(data["why"]) and data["why"]["deploymentStatus"] != "not-deployed",
        "is_up": bool(data["why"])
        and data["why"]["deploymentStatus"] in {"running", "starting", "deploying"},
    }


PAGE: Final = Page(PATH, "workflow.html", load, view, "workflows", ("executions",))
