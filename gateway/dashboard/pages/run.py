"""One run: its first error, why it does not move, its graph and time in one list, and a node in detail."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

from gateway.dashboard.addresses import list_address
from gateway.dashboard.graph_map import draw_graph
from gateway.dashboard.page import Page, PageData, PageFrame
from gateway.dashboard.run_rows import RunTimeline, build_timeline

if TYPE_CHECKING:
    from gateway.dashboard.page_request import PageRequest

SPANS: Final = 1_000
ENDED: Final = frozenset({"completed", "failed", "stopped", "cancelled"})
TABS: Final = (("input", "Input"), ("output", "Output"), ("config", "Config"), ("logs", "Logs"))
WORDS_OF_TIME: Final = (
    ("queued", "queued", ""),
    ("waking", "waking a pod", "lit"),
    ("running", "work", "good"),
)
SHARES: Final = 1_000
"""Units of the bar that shows where the time went."""


async def load(page: PageRequest) -> PageData:
    """Ask for the run, its spans and reasons, then for its workflow and the selected span."""
    path = f"/api/v1/executions/{page.parameters['id']}"
    run, spans, why = await asyncio.gather(
        page.get(path), page.get(f"{path}/spans", limit=SPANS), page.get_if_present(f"{path}/why")
    )
    selected = choose_span(spans["spans"], page.query)
    workflow, span, inputs = await asyncio.gather(
        page.get_if_present(f"/api/v1/workflows/{run['workflowId']}"),
        _load_span(page, path, selected),
        _load_inputs(page, path, run),
    )
    # Outputs of nodes are those of the spans; the page shows one at a time.
    run = {name: value for name, value in run.items() if name != "outputs"}
    return {"run": run, "spans": spans, "why": why, "workflow": workflow, "span": span, "inputs": inputs}


async def _load_span(page: PageRequest, path: str, selected: Mapping[str, Any] | None) -> Any:  # noqa: ANN401 - any JSON value
    if selected is None:
        return None
    return await page.get_if_present(f"{path}/spans/{selected['id']}") or selected


async def _load_inputs(page: PageRequest, path: str, run: Mapping[str, Any]) -> Any:  # noqa: ANN401 - any JSON value
    return await page.get_if_present(f"{path}/pending-inputs") if run["status"] == "waiting" else None


def choose_span(spans: Sequence[Mapping[str, Any]], query: Mapping[str, str]) -> Mapping[str, Any] | None:
    """Return the selected span; without a selection, that of the first failure, else of the present node."""
    whole = [span for span in spans if span["kind"] == "node"]
    wanted = query.get("node")
    if wanted is not None:
        turn = query.get("turn")
        of_node = [span for span in whole if span["nodeId"] == wanted]
        in_turn = [span for span in of_node if span["iteration"] == turn]
        return next(iter(in_turn or of_node[-1:]), None)
    for state in ("failed", "retrying", "waiting", "running"):
        found = [span for span in whole if span["status"] == state]
        if found:
            return found[0]
    return whole[-1] if whole else None


def view(data: PageData, frame: PageFrame) -> Mapping[str, Any]:
    """Return the values of the page."""
    run, workflow, span, why = data["run"], data["workflow"], data["span"], data["why"]
    has_ended = run["status"] in ENDED
    path_of_time = [
        one["nodeId"] if isinstance(one, Mapping) else one for one in (why or {}).get("criticalPath", ())
    ]
    timeline = build_timeline(run, data["spans"]["spans"], workflow, frame.now, path_of_time)
    node_id = frame.query.get("node") or (span["nodeId"] if span else "")
    name = workflow["name"] if workflow else run["workflowId"]
    shows_map = frame.query.get("view") == "map"
    tab = frame.query.get("tab", "")
    return {
        "title": f"{name}: {run['status']}",
        "crumbs": (
            ("Workflows", f"{frame.root}/dashboard/workflows"),
            (name, f"{frame.root}/dashboard/workflows/{run['workflowId']}"),
            (run["id"], ""),
        ),
        "topics": () if has_ended else (f"execution:{run['id']}",),
        "run": run,
        "name": name,
        "has_ended": has_ended,
        "api": f"/api/v1/executions/{run['id']}",
        "why": why,
        "shares": show_shares((why or {}).get("timing")),
        "timeline": timeline,
        "summary": summarize(timeline),
        "labels": {row.id: row.label for row in timeline.rows},
        "row": next((row for row in timeline.rows if row.id == node_id), None),
        "node": next((one for one in (workflow or {}).get("nodes", ()) if one["id"] == node_id), None),
        "span": span if span and span["nodeId"] == node_id else None,
        "tab": tab if tab in dict(TABS) else _first_tab(span),
        "tabs": [(tab, label, _address(frame, tab=tab)) for tab, label in TABS],
        "map": _draw_map(timeline, workflow) if shows_map else None,
        "shows_map": shows_map,
        "views": (
            ("Graph and time", _address(frame, view=""), not shows_map),
            ("Map", _address(frame, view="map"), shows_map),
        ),
        "addresses": {row.id: _address(frame, node=row.id, tab="", turn="") for row in timeline.rows},
        "turn_addresses": _turn_addresses(timeline, node_id, frame),
        "inputs": (data["inputs"] or {}).get("inputs", ()),
        "is_cut": data["spans"]["count"] > len(data["spans"]["spans"]),
        "may_execute": frame.may("workflows:execute"),
    }


def _address(frame: PageFrame, **changes: str) -> str:
    query = {name: frame.query.get(name, "") for name in ("node", "turn", "tab", "view")} | changes
    return list_address(frame, f"/dashboard/runs/{frame.parameters['id']}", query)


def _turn_addresses(timeline: RunTimeline, node_id: str, frame: PageFrame) -> Sequence[tuple[str, str, str]]:
    row = next((one for one in timeline.rows if one.id == node_id), None)
    if row is None:
        return ()
    return [(turn, tone, _address(frame, node=node_id, turn=turn)) for turn, tone in row.turns]


def _first_tab(span: Mapping[str, Any] | None) -> str:
    """Return the tab that a node shows first: its output, or its input if it failed."""
    return "input" if span and span["status"] == "failed" else "output"


def _draw_map(timeline: RunTimeline, workflow: Mapping[str, Any] | None) -> Any:  # noqa: ANN401 - drawn shapes
    if workflow is None:
        return None
    return draw_graph(
        workflow["nodes"], workflow["connections"], {row.id: row.state for row in timeline.rows}
    )


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
    """Return word, tone, milliseconds, start and width of each part of a run's time, the longest first."""
    if not timing:
        return ()
    parts = [(word, tone, timing.get(name) or 0) for name, word, tone in WORDS_OF_TIME]
    parts += [(f"waiting: {code}", "warn", seconds) for code, seconds in timing["waitingFor"].items()]
    whole = sum(seconds for _, _, seconds in parts)
    shares, start = [], 0
    for word, tone, seconds in sorted(parts, key=lambda part: -part[2]):
        if seconds > 0 and whole:
            width = max(round(SHARES * seconds / whole), 2)
            shares.append((word, tone, int(seconds * 1_000), start, width))
            start += width
    return shares


PAGE: Final = Page("/dashboard/runs/{id}", "run.html", load, view, "runs")
