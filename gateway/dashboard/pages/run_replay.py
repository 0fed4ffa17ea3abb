"""Plan of a replay: which results are reused, which nodes run again, and which writes need a decision."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

from engine.agents.agent_steps import AGENT_TYPE
from gateway.dashboard.addresses import page_address
from gateway.dashboard.page import Page, PageData, PageFrame
from gateway.dashboard.version_query import query_newest_versions

if TYPE_CHECKING:
    from gateway.dashboard.page_request import PageRequest

RESUME: Final = "resume"
"""Value of `act` in the address of the plan of a resume."""
ORIGINAL: Final = "original"
DEFINITIONS: Final = (("current", "The workflow as it is now"), (ORIGINAL, "As it ran"))
SHOWN_VERSIONS: Final = 50
MAX_VERSION: Final = 999_999_999
DECISIONS: Final = {
    "reuse": ("good", "completed", "Reused"),
    "rerun": ("lit", "running", "Runs"),
    "maybe": ("warn", "waiting", "Runs if its input changes"),
    "ask": ("bad", "alert", "Would write again"),
    "skip": ("off", "skipped", "Skipped"),
}
REASONS: Final = {
    "failed": "it failed",
    "forced": "you chose it",
    "no-result": "it has no result",
    "new-node": "it is new",
    "refreshed": "it reads the outside again",
    "result-expired": "its result is no longer kept",
    "upstream-maybe": "a node before it may change",
}
"""Words for the reasons of decisions; other reasons are words already."""


async def load(page: PageRequest) -> PageData:
    """Ask the API for the run, its graph and the plan of its replay, then for its workflow and the newest versions of
    it; raises `ApiError`.

    The plan states for each node whether its result is reused; the query chooses the definition, by default that of the
    workflow as it is now.
    """
    path = f"/api/v1/executions/{page.parameters['id']}"
    run, graph, plan = await asyncio.gather(
        page.get(path, summary="true"),
        page.get(f"{path}/graph"),
        page.plan(f"{path}/replay", **_choose_options(page.query)),
    )
    workflow_path = f"/api/v1/workflows/{run['workflowId']}"
    workflow = await page.get_if_present(workflow_path)
    versions = None
    if workflow is not None:
        newest = query_newest_versions(workflow, SHOWN_VERSIONS)
        versions = await page.get_if_present(f"{workflow_path}/versions", **newest)
    return {"run": run, "plan": plan, "workflow": workflow, "graph": graph, "versions": versions}


def _choose_options(query: Mapping[str, str]) -> dict[str, Any]:
    """Return the fields of a replay request that the query chooses: its definition (the present one by default), the
    node at which it begins, the writes to leave out, and whether nodes that read the outside run again.

    A resume has no choices: it continues with the definition that ran.
    """
    if query.get("act") == RESUME:
        return {"definition": ORIGINAL}
    given = query.get("definition", "")
    is_version = given.isascii() and given.isdigit() and len(given) < len(str(MAX_VERSION))
    definition: str | int = given if given in dict(DEFINITIONS) else DEFINITIONS[0][0]
    options: dict[str, Any] = {"definition": int(given) if is_version and int(given) else definition}
    if query.get("from"):
        options["from"] = [query["from"]]
    if query.get("skip"):
        options["skip"] = query["skip"].split(",")
    if query.get("refresh") == "read":
        options["refresh"] = ["read"]
    return options


def view(data: PageData, frame: PageFrame) -> Mapping[str, Any]:
    """Return the template values: the nodes of the plan with their decisions, and the addresses of other plans."""
    run, plan, workflow = data["run"], data["plan"], data["workflow"]
    path = f"/dashboard/runs/{run['id']}"
    options = _choose_options(frame.query)
    left_out: list[str] = options.get("skip", [])
    address = f"{frame.root}{path}/replay"
    name = workflow["name"] if workflow else run["workflowId"]
    counts = plan["counts"]
    is_resume = frame.query.get("act") == RESUME
    verb = "Resume" if is_resume else "Replay"
    return {
        "title": f"{verb} {name}",
        "crumbs": (("Runs", f"{frame.root}/dashboard/runs"), (run["id"], frame.root + path), (verb, "")),
        "is_resume": is_resume,
        "has_agent": any(node["type"] == AGENT_TYPE for node in data["graph"]["nodes"]),
        "run": run,
        "plan": plan,
        "reasons": REASONS,
        "labels": {
            **{node["id"]: node["label"] for node in data["graph"]["nodes"]},
            **{node["id"]: node["label"] for node in (workflow or {}).get("nodes", ())},
        },
        "decisions": DECISIONS,
        "options": options,
        "sent": {**options, "planHash": plan["planHash"]},
        "definitions": [*DEFINITIONS, *_list_versions(data["versions"])],
        "address": address,
        "left_out": left_out,
        "skip_address": lambda node_id: _build_skip_address(frame, f"{path}/replay", left_out, node_id),
        "writes": [
            node
            for node in plan["nodes"]
            if node["effect"] == "write" and node["decision"] not in ("reuse", "skip")
        ],
        "runs": counts["rerun"] + counts["maybe"] + counts["ask"],
        "may_execute": frame.may("workflows:execute"),
    }


def _build_skip_address(frame: PageFrame, path: str, left_out: Sequence[str], node_id: str) -> str:
    """Return the address of the plan with the same other choices that leaves a node out, or no longer leaves it out."""
    chosen = [one for one in left_out if one != node_id]
    if node_id not in left_out:
        chosen.append(node_id)
    return page_address(frame, path, {**frame.query, "skip": ",".join(chosen)})


def _list_versions(versions: Mapping[str, Any] | None) -> Sequence[tuple[str, str]]:
    """Return number and label of the versions of a workflow, the newest first, as choices of the definition to run."""
    return [
        (
            str(one["version"]),
            f"Version {one['version']}" + (f", {one['versionTag']}" if one["versionTag"] else ""),
        )
        for one in reversed((versions or {}).get("versions", ()))
    ]


PAGE: Final = Page("/dashboard/runs/{id}/replay", "run_replay.html", load, view, "runs")
