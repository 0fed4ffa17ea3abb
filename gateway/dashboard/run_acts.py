"""Acts on many runs of the list of runs: cancel, resume or replay, each after its plan."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

from msgspec import Struct

from gateway.http import limits
from models.timestamps import parse_timestamp

if TYPE_CHECKING:
    from gateway.dashboard.page_request import PageRequest

PLANNED: Final = 20
"""Runs that the plan of a replay is made for, the oldest."""
VERBS: Final = {"cancel": "Cancel", "retry": "Resume", "replay": "Replay"}
"""Verb of each act of a bulk operation on runs."""
ACTS_BY_STATE: Final[Mapping[str, Sequence[str]]] = {
    "": ("replay",),
    "pending": ("cancel",),
    "running": ("cancel",),
    "waiting": ("cancel",),
    "failed": ("retry", "replay"),
    "completed": ("replay",),
    "cancelled": ("replay",),
}
"""Acts on all runs of a list by the state that it is filtered by; empty without one."""
UNFINISHED: Final = frozenset({"pending", "running", "waiting"})
BULK_FIELDS: Final = {
    "status": "status",
    "workflow_id": "workflowId",
    "trigger_type": "triggerType",
    "since": "createdAfter",
    "until": "createdBefore",
}
"""Field of a bulk operation's filter for each filter of the list that it has."""
DEFINITIONS: Final = (("original", "the definition that each had"), ("current", "the workflow as it is now"))


class ChosenAct(Struct, frozen=True):
    """Act on many runs that the address of the page names, with the choices of a replay."""

    name: str
    selection: Mapping[str, Any]
    """Filter of the bulk operation."""
    definition: str
    refresh: Sequence[str]
    """Effects of the nodes that run again in a replay although they have completed."""
    workflow_id: str
    """Workflow of all its runs; empty unless the list is filtered by one."""

    @property
    def options(self) -> Mapping[str, Any]:
        """Fields of the requests that plan and begin it, besides its filter."""
        return {"definition": self.definition, "refresh": self.refresh} if self.name == "replay" else {}


def list_acts(filters: Mapping[str, str]) -> Sequence[tuple[str, str]]:
    """Return name and verb of each act that is possible on all runs of a filter.

    Empty without a filter, and for one that bulk operations lack, such as the reason of a wait.
    """
    if not filters or not filters.keys() <= BULK_FIELDS.keys():
        return ()
    return [(act, VERBS[act]) for act in ACTS_BY_STATE.get(filters.get("status", ""), ())]


def list_picked_acts(runs: Sequence[Mapping[str, Any]]) -> Sequence[tuple[str, str]]:
    """Return name and verb of each act that at least one of the shown runs allows."""
    states = {run["status"] for run in runs}
    allowed = {
        "replay": bool(states - UNFINISHED),
        "retry": "failed" in states,
        "cancel": bool(states & UNFINISHED),
    }
    return [(act, VERBS[act]) for act, is_allowed in allowed.items() if is_allowed]


def read_act(query: Mapping[str, str], filters: Mapping[str, str]) -> ChosenAct | None:
    """Return the act on many runs that the query of an address names; None without one, and if the filters do not allow
    it.

    `only` in the query has ids of runs, in place of all runs of the filters.
    """
    name = query.get("act", "")
    only = [one for one in query.get("only", "").split(",") if one][: limits.BULK_EXECUTIONS]
    allowed = VERBS if only else dict(list_acts(filters))
    if name not in allowed:
        return None
    return ChosenAct(
        name,
        {"executionIds": only} if only else select_runs(filters),
        "current" if query.get("definition") == "current" else "original",
        [effect for effect in ("read", "model") if query.get(f"again_{effect}")],
        filters.get("workflow_id", ""),
    )


def select_runs(filters: Mapping[str, str]) -> Mapping[str, str]:
    """Return the filter of a bulk operation for the filters of the list; times without a zone become times in UTC."""
    return {
        BULK_FIELDS[name]: parse_timestamp(value).isoformat() if name in {"since", "until"} else value
        for name, value in filters.items()
    }


async def plan(page: PageRequest, act: ChosenAct) -> Mapping[str, Any] | None:
    """Ask the API for a dry run of an act: the number of runs that it would change, and for a replay the plans of the
    oldest 20.

    Return the answer as `counted`, and as `workflow` the workflow of the filter, for the labels of its nodes: None if
    the filter names none, and for other acts than a replay. Return None if the visitor may not act. Raises `ApiError`.
    """
    limit = PLANNED if act.name == "replay" else 1
    counted = await page.plan_if_allowed(
        f"/api/v1/executions/bulk-{act.name}", filter=act.selection, limit=limit, **act.options
    )
    if counted is None:
        return None
    is_named = act.name == "replay" and act.workflow_id
    workflow = await page.get_if_present(f"/api/v1/workflows/{act.workflow_id}") if is_named else None
    return {"counted": counted, "workflow": workflow}


def describe(
    planned: Mapping[str, Any] | None, query: Mapping[str, str], filters: Mapping[str, str]
) -> Mapping[str, Any] | None:
    """Return the template values of the section in which a person confirms an act on many runs.

    `planned` is what the act would do, `query` the address of the page, `filters` those of its list. None without a
    plan, or if the address names no act.
    """
    act = read_act(query, filters)
    if planned is None or act is None:
        return None
    counted = planned["counted"]
    labels = {one["id"]: one.get("label") for one in (planned["workflow"] or {}).get("nodes", ())}
    picked = len(act.selection.get("executionIds", ()))
    return {
        "name": act.name,
        "verb": VERBS[act.name],
        "sent": {"action": act.name, "filter": act.selection, **act.options},
        "count": min(counted["matched"], limits.BULK_OBJECTS),
        "is_cut": counted["matched"] > limits.BULK_OBJECTS,
        "picked": picked,
        "only": ",".join(act.selection.get("executionIds", ())),
        "definition": act.definition,
        "refresh": act.refresh,
        "definitions": DEFINITIONS,
        "plan": describe_plans(counted, labels) if act.name == "replay" else None,
    }


def describe_plans(counted: Mapping[str, Any], labels: Mapping[str, str | None]) -> Mapping[str, Any]:
    """Return the sums of the plans of a bulk replay, its refusals, and the writes that need a confirmation,
    each with its label.
    """
    counts = counted["counts"]
    unconfirmed = dict.fromkeys(node for one in counted["refused"] for node in one["nodeIds"])
    return {
        "planned": len(counted["executionIds"]) + len(counted["refused"]),
        "reused": counts["reuse"],
        "runs": counts["rerun"] + counts["maybe"] + counts["ask"],
        "unconfirmed": [(node, labels.get(node) or node) for node in unconfirmed],
        "refused": sorted({one["code"] for one in counted["refused"] if not one["nodeIds"]}),
    }
