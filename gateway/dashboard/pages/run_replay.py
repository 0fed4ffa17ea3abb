"""Plan of a replay: which results are reused, which nodes run again, and which writes need a decision."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final

from gateway.dashboard.addresses import list_address
from gateway.dashboard.page import Page, PageData, PageFrame

if TYPE_CHECKING:
    from gateway.dashboard.page_request import PageRequest

DEFINITIONS: Final = (("current", "The workflow as it is now"), ("original", "As it ran"))
DECISIONS: Final = {
    "reuse": ("good", "completed", "Reused"),
    "rerun": ("lit", "running", "Runs"),
    "maybe": ("warn", "waiting", "Runs if its input changes"),
    "ask": ("bad", "alert", "Would write again"),
}


async def load(page: PageRequest) -> PageData:
    """Ask the API for the run and the plan of its replay, then for the labels of its nodes; raises `ApiError`.

    The plan states for each node whether its result is reused; the query chooses the run's or the present
    definition.
    """
    path = f"/api/v1/executions/{page.parameters['id']}"
    run, plan = await asyncio.gather(
        page.get(path), page.plan(f"{path}/replay", definition=_choose_definition(page.query))
    )
    workflow = await page.get_if_present(f"/api/v1/workflows/{run['workflowId']}")
    run = {name: value for name, value in run.items() if name != "outputs"}
    return {"run": run, "plan": plan, "workflow": workflow}


def _choose_definition(query: Mapping[str, str]) -> str:
    """Return the definition that the query chooses for a replay; the first of `DEFINITIONS` for anything else."""
    given = query.get("definition", "")
    return given if given in dict(DEFINITIONS) else DEFINITIONS[0][0]


def view(data: PageData, frame: PageFrame) -> Mapping[str, Any]:
    """Return the template values: the nodes of the plan with their decisions, and the addresses of other plans."""
    run, plan, workflow = data["run"], data["plan"], data["workflow"]
    path = f"/dashboard/runs/{run['id']}"
    definition = _choose_definition(frame.query)
    name = workflow["name"] if workflow else run["workflowId"]
    counts = plan["counts"]
    return {
        "title": f"Replay {name}",
        "crumbs": (("Runs", f"{frame.root}/dashboard/runs"), (run["id"], frame.root + path), ("Replay", "")),
        "run": run,
        "plan": plan,
        "labels": {node["id"]: node["label"] for node in (workflow or {}).get("nodes", ())},
        "decisions": DECISIONS,
        "definition": definition,
        "definitions": [
            (label, list_address(frame, f"{path}/replay", {"definition": one}), one == definition)
            for one, label in DEFINITIONS
        ],
        "writes": [
            node for node in plan["nodes"] if node["effect"] == "write" and node["decision"] != "reuse"
        ],
        "runs": counts["rerun"] + counts["maybe"] + counts["ask"],
        "may_execute": frame.may("workflows:execute"),
    }


PAGE: Final = Page("/dashboard/runs/{id}/replay", "run_replay.html", load, view, "runs")
