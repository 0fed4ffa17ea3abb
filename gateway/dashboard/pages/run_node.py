"""Panel of one node of a run: its data in one iteration, and its differences from another run."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final, TypeAlias

from msgspec import Struct

from engine.agents.agent_steps import AGENT_TYPE
from gateway.dashboard.formats import MAX_CHARACTERS, show_age, show_value
from gateway.dashboard.pages import agent_turns

if TYPE_CHECKING:
    from gateway.dashboard.page import PageData, PageFrame
    from gateway.dashboard.run_rows import RunRow

State: TypeAlias = Mapping[str, Any]

STEPS: Final = "steps"
"""Tab of the turns of an agent, which other nodes lack."""
TABS: Final = {"input": "Input", "output": "Output", "config": "Config", "logs": "Logs", "diff": "Diff"}
MAX_ITERATION_LINKS: Final = 24
"""Iterations of a node that have links; of more, there is a field for the number."""
FIRST_STATES: Final = ("failed", "retrying", "waiting", "running")
"""States of the node that is selected first, the most urgent first."""
UNFINISHED: Final = frozenset({"retrying", "waiting", "running"})
"""States of nodes without an output yet."""
MODEL_TYPES: Final = frozenset({AGENT_TYPE, "ai-gateway", "classifier", "extract", "llm", "llm-router"})
"""Types of nodes that ask language models, whose texts are shown while they are written."""
PARTS: Final = (
    ("definition", "Config"),
    ("input", "Input"),
    ("config", "Rendered config"),
    ("output", "Output"),
)
MAX_NAMES: Final = 10
"""Names in the input that are shown beside a path that found nothing."""
MAX_LINES: Final = 60
"""Changes that are shown of each part."""


class NodeValueChange(Struct, frozen=True):
    """Changed value of a node: the part and path, the value before, and the value now; None where there is none."""

    place: str
    before: str | None
    after: str | None


class IterationLink(Struct, frozen=True):
    """Link to an iteration of a loop."""

    name: str
    state: str
    address: str


def choose_state(states: Sequence[State], query: Mapping[str, str]) -> State | None:
    """Return the state of the node that the query selects, None for one without a state.

    Without a selection, that of the first node that failed, else that retries, waits or runs, else of the last one;
    None without nodes.
    """
    wanted = query.get("node")
    if wanted:
        return next((state for state in states if state["nodeId"] == wanted), None)
    for status in FIRST_STATES:
        found = [state for state in states if state["status"] == status]
        # The loop around a failed node has failed too, and says less.
        inner = [state for state in found if state["nodeType"] != "loop"]
        if found:
            return (inner or found)[0]
    return states[-1] if states else None


def choose_iteration(state: State, query: Mapping[str, str]) -> str:
    """Return the iteration in the query, else of a node in a loop the first that failed or still runs, else the last
    one listed.

    Iterations are texts such as `2` or `2.0`. Empty for a node outside of loops, without an iteration in the query.
    """
    iterations = state["iterations"]
    if query.get("iteration") or not iterations:
        return query.get("iteration", "")
    for status in FIRST_STATES:
        found = next((one for one in iterations if one["status"] == status), None)
        if found is not None:
            return str(found["iteration"])
    return str(iterations[-1]["iteration"])


def choose_tab(query: Mapping[str, str], state: State | None, graph: Mapping[str, Any]) -> str:
    """Return the tab that the query names, else a default by the state of the selected node.

    That is `steps` for an agent; `diff` for a failed node if an earlier good run exists, else its `input`;
    also `input` for a node that runs or waits, unless its model writes a text, `output` for other ones, and
    `config` for one without a state.
    """
    wanted = query.get("tab", "")
    if wanted in _list_tabs(state):
        return wanted
    if state is None:
        return "config"
    if state["nodeType"] == AGENT_TYPE:
        return STEPS
    if writes_text(state):
        return "output"
    if state["status"] in UNFINISHED:
        return "input"
    if state["status"] != "failed":
        return "output"
    return "diff" if graph["previousExecutionId"] else "input"


def writes_text(state: State) -> bool:
    """Return whether a model may be writing a text for a node now; `state` is that of the node, or a span of it."""
    return state["status"] == "running" and state["nodeType"] in MODEL_TYPES


def _list_tabs(state: State | None) -> Mapping[str, str]:
    """Return the names and labels of the tabs of a node."""
    return {STEPS: "Steps", **TABS} if state and state["nodeType"] == AGENT_TYPE else TABS


def view_node(
    data: PageData, frame: PageFrame, row: RunRow | None, address: Callable[..., str]
) -> Mapping[str, Any]:
    """Return the template values of the panel beside a run's graph, which shows the selected node.

    `row` is the node's row, None for a folded one. `address(**changes)` returns the page's address with
    changed parameters.
    """
    graph, span = data["graph"], data["span"]
    state = choose_state(graph["states"], frame.query)
    tab = choose_tab(frame.query, state, graph)
    if tab == "diff" and not frame.query.get("tab") and not (data["diff"] or {}).get("with"):
        tab = "input"
    iteration = choose_iteration(state, frame.query) if state else ""
    names = [one["iteration"] for one in state["iterations"]] if state else []
    number = names.index(iteration) if iteration in names else -1
    defined = next((node for node in graph["nodes"] if row is not None and node["id"] == row.id), None)
    return {
        "tab": tab,
        "tabs": [(name, label, address(tab=name)) for name, label in _list_tabs(state).items()],
        "agent": agent_turns.view_agent(span, (data["steps"] or {}).get("steps", ())),
        "span": span,
        "defined_config": (defined or {}).get("config"),
        "iteration": iteration,
        "iteration_count": sum(state["iterationCounts"].values()) if state else 0,
        "iteration_links": _link_iterations(state, address),
        "iteration_before": address(iteration=names[number - 1]) if number > 0 else "",
        "iteration_after": address(iteration=names[number + 1]) if 0 <= number < len(names) - 1 else "",
        "kept_query": {
            name: value for name, value in frame.query.items() if name in {"node", "tab", "view"} and value
        },
        "diff": data["diff"],
        "changes": list_changes(data["diff"]),
        "equal_paths": _count_equal(data["diff"]),
        "others": [
            (one["id"], f"{one['status']}, {show_age(one['createdAt'], frame.now)}")
            for one in (data["others"] or {}).get("executions", ())
        ],
        # A state is that of all iterations, of which the shown one may have ended.
        "writes_text": span is not None and writes_text(span) and records_content(span),
        "output_texts": list_texts((span or {}).get("outputData")) if tab == "output" else (),
        "lost_paths": (span or {}).get("unresolved") or (),
        "found_names": list_found_names((span or {}).get("unresolved") or (), (span or {}).get("inputData")),
    }


def list_found_names(paths: Iterable[str], data: Any) -> Sequence[tuple[str, Sequence[str]]]:  # noqa: ANN401 - any JSON value
    """Return, for each of the paths that find nothing in `data`, its longest part that exists and up to ten names
    there.

    For `data.order.sum`, these are `data.order` and its names. Paths that don't begin with `data`, and those with such
    a part that is no object, empty or a blob, are left out.
    """
    found: dict[str, Sequence[str]] = {}
    for path in paths:
        first, *names = path.split(".")
        place, value = first, data
        while names and isinstance(value, dict) and names[0] in value:
            place, value = f"{place}.{names[0]}", value[names.pop(0)]
        if first == "data" and names and isinstance(value, dict) and value and "$blob" not in value:
            found[place] = list(value)[:MAX_NAMES]
    return [*found.items()]


def records_content(span: Mapping[str, Any] | None) -> bool:
    """Return whether the model texts of a node are recorded and shown: unless `recordContent` in its span's config is
    false.
    """
    config = (span or {}).get("config")
    return not (isinstance(config, dict) and config.get("recordContent") is False)


def list_texts(output: Any) -> Sequence[tuple[str, str]]:  # noqa: ANN401 - any JSON value
    """Return names and texts of the fields of an output with several lines, at most 20,000 characters of each.

    JSON has them in one line, in which people can't read a report. Empty for other outputs.
    """
    if not isinstance(output, dict):
        return ()
    return [
        (name, value[:MAX_CHARACTERS])
        for name, value in output.items()
        if isinstance(value, str) and "\n" in value.strip()
    ]


def _link_iterations(state: State | None, address: Callable[..., str]) -> Sequence[IterationLink]:
    """Return links to the iterations of a node: to all of up to 24, if the API lists them all, else to the first 24
    listed ones that failed; empty outside of loops.
    """
    if state is None:
        return ()
    iterations = state["iterations"]
    if len(iterations) > MAX_ITERATION_LINKS or sum(state["iterationCounts"].values()) > len(iterations):
        iterations = [one for one in iterations if one["status"] == "failed"][:MAX_ITERATION_LINKS]
    return [
        IterationLink(
            one["iteration"], one["status"], address(iteration=one["iteration"], node=state["nodeId"])
        )
        for one in iterations
    ]


def list_changes(diff: Mapping[str, Any] | None) -> Sequence[NodeValueChange]:
    """Return the changed values of a comparison, of definition, input, config and output in this order, up to 60 each.

    Empty without a comparison.
    """
    return [
        NodeValueChange(
            f"{label} · {change['path']}" if change["path"] else label,
            show_value(change["before"]) if "before" in change else None,
            show_value(change["after"]) if "after" in change else None,
        )
        for name, label in PARTS
        for change in ((diff or {}).get(name) or {"changes": ()})["changes"][:MAX_LINES]
    ]


def _count_equal(diff: Mapping[str, Any] | None) -> int:
    """Return the number of equal values of a comparison; 0 without one."""
    return sum(((diff or {}).get(name) or {"equalPaths": 0})["equalPaths"] for name, _ in PARTS)
