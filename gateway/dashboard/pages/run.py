"""One run: its first error, why it does not move, its graph and time in one list, and a node in detail."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any, Final

from gateway.dashboard.addresses import page_address
from gateway.dashboard.form_fields import list_fields
from gateway.dashboard.formats import SECOND_MS, look_of_wait, milliseconds_between, parse_instant, show_share
from gateway.dashboard.graph_map import draw_graph
from gateway.dashboard.page import Page, PageData, PageFrame
from gateway.dashboard.pages import agent_turns, run_node
from gateway.dashboard.pages.agent_turns import AgentStrip
from gateway.dashboard.run_bars import list_phases
from gateway.dashboard.run_rows import build_timeline
from models.timestamps import format_timestamp

if TYPE_CHECKING:
    from gateway.dashboard.page_request import PageRequest
    from gateway.dashboard.run_rows import RunTimeline

UNREACHED: Final = frozenset({"pending", "skipped"})
"""States of nodes that have not run."""
BEFORE_CALL: Final = frozenset({"unresolved-mapping"})
"""Codes of errors of nodes that were not called."""
ENDED: Final = frozenset({"completed", "failed", "stopped", "cancelled"})
WORDS_OF_TIME: Final = (
    ("queued", "in the queue", ""),
    ("waking", "waking a pod", "lit"),
    ("running", "work", "good"),
)
STILL: Final = timedelta(seconds=3)
"""Time without progress from which on a run says why: each node blocks it for a moment."""
VIEWS: Final = {"": "Graph and time", "map": "Map", "table": "Table"}
"""Labels of the views of the nodes by their names in the address."""
SHARES: Final = 1_000
"""Units of the bar that shows where the time went."""
SHOWN_STEPS: Final = 500
"""Steps of all agents of a run that are read for the turns of one."""
OTHER_RUNS: Final = 6
"""Earlier runs that a node can be compared with by choosing them."""
KEPT: Final = ("node", "iteration", "tab", "view", "with", "open", "at")
"""Parameters of the address that the links of the page keep."""


async def load(page: PageRequest) -> PageData:
    """Ask the API for the run, its graph and the reasons why it waits, then for the span of the selected node with its
    open tab, and for open questions.

    Also for runs to compare with (the tab `diff`), and for runs that failed in the same way. A span is one execution of
    a node. Absent parts are None. Raises `ApiError`.
    """
    path = f"/api/v1/executions/{page.parameters['id']}"
    # First, since the page of an ended run is final: its nodes must be at least as recent as its end.
    run = await page.get(path, summary="true")
    graph, why = await asyncio.gather(page.get(f"{path}/graph"), page.get_if_present(f"{path}/why"))
    if why:
        why.pop("asOf", None)  # it would change the tag of an unchanged page
    state = run_node.choose_state(graph["states"], page.query)
    tab = run_node.choose_tab(page.query, state, graph)
    node, inputs = await asyncio.gather(_load_node(page, path, state, tab), _load_inputs(page, path, run))
    others, alike = None, None
    if run["status"] == "failed":
        alike = await page.get_if_present(f"{path}/same-failures", limit=1)
    if tab == "diff":
        others = await page.get_if_present(
            "/api/v1/executions",
            workflow_id=run["workflowId"],
            until=run["createdAt"],
            after="start",
            limit=OTHER_RUNS,
        )
    wanted = page.query.get("node")
    if wanted and state is None:
        # A node that was not reached has no span: its config is that of the definition.
        graph = await page.get(f"{path}/graph", expand="config")
    return {
        "run": run,
        "graph": graph,
        "why": why,
        "inputs": inputs,
        "others": others,
        "alike": alike,
        **node,
    }


async def _load_node(
    page: PageRequest, path: str, state: Mapping[str, Any] | None, tab: str
) -> Mapping[str, Any]:
    """Return span, recorded steps and differences of the selected node, those that the open tab shows; None
    for absent ones.
    """
    if state is None:
        return {"span": None, "diff": None, "steps": None}
    iteration = run_node.choose_iteration(state, page.query)
    of_node = f"{path}/spans/{state['nodeId']}"
    span, diff, steps = await asyncio.gather(
        page.get_if_present(of_node, iteration=iteration),
        page.get_if_present(f"{of_node}/diff", iteration=iteration, **{"with": page.query.get("with")})
        if tab == "diff"
        else asyncio.sleep(0),
        # Those of the agents inside of an agent are steps of other nodes.
        page.get_if_present(f"{path}/steps", limit=SHOWN_STEPS)
        if tab == run_node.STEPS
        else asyncio.sleep(0),
    )
    return {"span": span, "diff": diff, "steps": steps}


async def _load_inputs(page: PageRequest, path: str, run: Mapping[str, Any]) -> Any:  # noqa: ANN401 - any JSON value
    """Return the open questions of a run that waits; None for other runs."""
    return await page.get_if_present(f"{path}/pending-inputs") if run["status"] == "waiting" else None


def view(data: PageData, frame: PageFrame) -> Mapping[str, Any]:
    """Return the template values: the run, its timeline or map, and the selected node with its tab."""
    run, graph, why = data["run"], data["graph"], data["why"] or {}
    has_ended = run["status"] in ENDED
    state = run_node.choose_state(graph["states"], frame.query)
    node_id = frame.query.get("node") or (state["nodeId"] if state else "")
    shown_view = frame.query.get("view", "") if frame.query.get("view") in VIEWS else ""
    shows_map = shown_view == "map"
    steps = {step["nodeId"]: step["seconds"] * SECOND_MS for step in why.get("criticalPath", ())}
    whole = run["durationMs"] or 0
    timeline = build_timeline(
        run,
        graph,
        frame.now,
        steps,
        waking_seconds=_sum_waking_seconds(run, why.get("history", ())),
        why=why,
        opened=frame.query.get("open", ""),
        selected=node_id,
    )
    name = graph["workflowName"] or run["workflowId"]
    row = next((row for row in timeline.rows if row.id == node_id and not row.folded), None)
    return {
        "title": f"{name}: {run['status']}",
        "crumbs": (
            ("Workflows", f"{frame.root}/dashboard/workflows"),
            (name, f"{frame.root}/dashboard/workflows/{run['workflowId']}"),
            (run["id"], ""),
        ),
        "topics": () if has_ended else (name_topic(run["id"], graph),),
        "run": run,
        "graph": graph,
        "name": name,
        "holder": name_holder(run["lease"]),
        "has_ended": has_ended,
        "api": f"/api/v1/executions/{run['id']}",
        "versions_path": f"{frame.root}/dashboard/workflows/{run['workflowId']}/versions",
        "change_address": find_change_address(frame, run, graph),
        "why": data["why"],
        "still_from": find_still_from(why.get("since"), frame.now),
        "alike": data["alike"],
        "phases": list_phases(why.get("wake")),
        "shares": show_shares(why.get("timing")),
        "timeline": timeline,
        "summary": summarize(timeline),
        "written": list_writes(graph, run["error"]) if run["error"] else None,
        "labels": {state["nodeId"]: state["nodeLabel"] for state in graph["states"]},
        "row": row,
        "map": draw_graph(
            graph["nodes"],
            graph["connections"],
            timeline.states,
            focus=frame.query.get("node", ""),
            at=frame.query.get("at", ""),
        )
        if shows_map
        else None,
        "here": _build_address(frame, node="", at=""),
        "shown_view": shown_view,
        "views": [
            (label, _build_address(frame, view=name), name == shown_view) for name, label in VIEWS.items()
        ],
        "path_share": show_share(min(int(sum(steps.values())), whole), whole) if steps and whole else "",
        "shares_of_path": {
            node_id: show_share(min(int(spent), whole), whole) if whole else ""
            for node_id, spent in steps.items()
        },
        "states": {state["nodeId"]: state for state in graph["states"]},
        "reused": {
            one["nodeId"] for one in graph["states"] if one["endedAt"] and one["endedAt"] < run["createdAt"]
        },
        "strips": list_strips(graph["states"]),
        "address_of": lambda node_id: _build_address(
            frame, node=node_id, tab="", iteration="", at="", **{"with": ""}
        ),
        "open_addresses": {
            row.id: _build_address(frame, open=row.id) + f"#node-{row.id}"
            for row in timeline.rows
            if row.folded
        },
        "inputs": [
            {**one, "fields": list_fields(one["schema"])} for one in (data["inputs"] or {}).get("inputs", ())
        ],
        "may_execute": frame.may("workflows:execute"),
        **run_node.view_node(data, frame, row, lambda **changes: _build_address(frame, **changes)),
    }


def find_change_address(frame: PageFrame, run: Mapping[str, Any], graph: Mapping[str, Any]) -> str:
    """Return the address of the differences between the definition of the last completed run and that of this one.

    Empty unless the first is a version, and the second a version or the workflow as it is now.
    """
    after = run["version"] or ("current" if graph["isCurrent"] else None)
    if graph["previousVersion"] is None or after is None:
        return ""
    path = f"/dashboard/workflows/{run['workflowId']}/versions"
    return page_address(frame, path, {"from": str(graph["previousVersion"]), "to": str(after)})


def find_still_from(since: str | None, now: datetime) -> str:
    """Return the time from which on a run without progress `since` a time says why; empty if it has come."""
    at = parse_instant(since)
    return "" if at is None or at + STILL <= now else format_timestamp(at + STILL)


def list_strips(states: Sequence[Mapping[str, Any]]) -> Mapping[str, AgentStrip]:
    """Return the lines at the rows of nodes that ask models now, and of agents that have not ended, by node id."""
    return {
        state["nodeId"]: agent_turns.describe_progress(state["agent"])
        if "agent" in state
        else AgentStrip(0, state["nodeType"], "")
        for state in states
        if "agent" in state or run_node.writes_text(state)
    }


def name_topic(run_id: str, graph: Mapping[str, Any]) -> str:
    """Return the topic of the event stream of a run that goes on: its changes, and the texts of its models if it has a
    node that asks one.
    """
    types = {node["type"] for node in graph["nodes"]} | {state["nodeType"] for state in graph["states"]}
    return f"texts:{run_id}" if types & run_node.MODEL_TYPES else f"execution:{run_id}"


def _build_address(frame: PageFrame, **changes: str) -> str:
    """Return the address of the run's page with its present parameters, some of them changed; empty ones are
    removed.
    """
    query = {name: frame.query.get(name, "") for name in KEPT} | changes
    return page_address(frame, f"/dashboard/runs/{frame.parameters['id']}", query)


def _sum_waking_seconds(run: Mapping[str, Any], history: Sequence[Mapping[str, Any]]) -> float:
    """Return the seconds that a run waited before its start for a pod to be woken (a cold start).

    `history` has the reasons for which the run waited, with their times. The sum is 0 for a run without such a wait,
    and for one that has not started.
    """
    started = run["startedAt"]
    lengths = [
        milliseconds_between(one["from"], one["to"] or started)
        for one in history
        if one["code"] == "waking" and started and one["from"] < started
    ]
    return sum(length or 0 for length in lengths) / 1_000


def list_writes(graph: Mapping[str, Any], error: Mapping[str, Any]) -> Sequence[str] | None:
    """Return the labels of the nodes with a write that have run, also if they failed; None if the effect of a node is
    unknown.

    `error` is that of the run. A node that failed before its call, by a mapping that finds nothing, is left out unless
    it is in a loop.
    """
    effects = {node["id"]: node["effect"] for node in graph["nodes"]}
    cause = error.get("cause") or error
    uncalled = error.get("nodeId") if cause["code"] in BEFORE_CALL else None
    states = [
        one
        for one in graph["states"]
        if one["status"] not in UNREACHED and (one["nodeId"] != uncalled or one["iterationCounts"])
    ]
    if any(effects.get(one["nodeId"]) is None for one in states):
        return None
    return [one["nodeLabel"] for one in states if effects[one["nodeId"]] == "write"]


def name_holder(lease: Mapping[str, Any] | None) -> str:
    """Return the process that holds the lease of a run as words: `pod shop-0`, or the name of a worker; empty
    without a lease.
    """
    if lease is None:
        return ""
    kind, _, name = lease["owner"].rpartition(":")
    return f"pod {name.partition('/')[0]}" if kind.startswith("pod:") else f"worker {name}"


def summarize(timeline: RunTimeline) -> str:
    """Return the number of nodes in each state as a sentence, such as `7 done, 1 failed, 2 not reached`."""
    words = (
        ("completed", "done"),
        ("failed", "failed"),
        ("running", "running"),
        ("retrying", "retried"),
        ("waiting", "waiting"),
        ("skipped", "skipped"),
        ("cancelled", "cancelled"),
        ("not-reached", "not reached"),
    )
    return ", ".join(
        f"{timeline.counts[state]} {word}" for state, word in words if timeline.counts.get(state)
    )


def show_shares(timing: Mapping[str, Any] | None) -> Sequence[tuple[str, str, int, int, int]]:
    """Return label, tone, milliseconds, start and width of each part of a run's time, the longest first.

    Start and width are in thousandths of the whole; a width is at least 2. Parts under a millisecond are left out.
    Empty without timing.
    """
    if not timing:
        return ()
    parts = [(word, tone, timing.get(name) or 0) for name, word, tone in WORDS_OF_TIME]
    parts += [
        (f"waiting {look_of_wait(code)[0]}", "warn", time) for code, time in timing["waitingFor"].items()
    ]
    whole = sum(seconds for _, _, seconds in parts)
    shares, start = [], 0
    for word, tone, seconds in sorted(parts, key=lambda part: -part[2]):
        milliseconds = int(seconds * 1_000)
        if milliseconds > 0 and whole:
            width = max(round(SHARES * seconds / whole), 2)
            shares.append((word, tone, milliseconds, start, width))
            start += width
    return shares


PAGE: Final = Page("/dashboard/runs/{id}", "run.html", load, view, "runs")
