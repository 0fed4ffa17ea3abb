"""Bulk inserts of organizations with many workflows, of every kind that lists distinguish."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from itertools import cycle, pairwise
from typing import Any, TypeAlias

from sqlalchemy import insert
from sqlalchemy.ext.asyncio import AsyncConnection

from gateway.workflows.workflow_rows import build_search_text
from models import ids
from models.access import Organization, User
from models.workflow import Workflow, WorkflowGraph, WorkflowShare, WorkflowStatus, WorkflowTag

Rows: TypeAlias = list[dict[str, Any]]

BEGINNING = datetime(2025, 1, 1, tzinfo=UTC)
NODES = 10
ROWS_AT_ONCE = 5_000
SHARED = 50
"""One in this many workflows is shared with the member."""

ACTIONS = ("Sync", "Import", "Clean", "Enrich", "Report", "Archive", "Notify")
SUBJECTS = ("orders", "customers", "invoices", "stock", "tickets", "leads", "payments", "sensors", "pages")
COMMON_WORD, RARE_WORD, ABSENT_WORD = "DATABASE", "réconciliation", "xylophone"
"""Words in the description of every workflow, of one in five hundred, and of none; stored in other case."""
COMMON_TAG, RARE_TAG, ABSENT_TAG = "production", "audited", "nowhere"
"""Tags of half of the workflows, of one in five hundred, and of none."""


@dataclass(frozen=True, slots=True)
class WorkflowOwners:
    """Users that own the workflows of an organization."""

    organization: Organization
    owner: User
    """Owns two thirds."""
    other: User
    """Owns the rest."""
    member: User
    """Owns one of five hundred."""


async def fill(connection: AsyncConnection, crowd: WorkflowOwners, number: int) -> Rows:
    """Insert `number` workflows of an organization: one in twenty is deleted,
    one in fifty a template, one in ten public.

    Returns their rows; the caller commits.
    """
    workflows = [_build_workflow(crowd, index) for index in range(number)]
    graph = build_nodes(NODES)
    edges = build_connections(graph)
    for start in range(0, number, ROWS_AT_ONCE):
        part = workflows[start : start + ROWS_AT_ONCE]
        graphs = [
            {"workflow_id": row["id"], "shard": row["shard"], "nodes": graph, "connections": edges}
            for row in part
        ]
        await connection.execute(insert(Workflow), part)
        await connection.execute(insert(WorkflowGraph), graphs)
        await connection.execute(insert(WorkflowTag), [*_tag_rows(part)])
    shares = [
        {"workflow_id": row["id"], "user_id": crowd.member.id, "shared_at": row["created_at"]}
        for row in workflows[::SHARED]
    ]
    await connection.execute(insert(WorkflowShare), shares)
    return workflows


def _build_workflow(crowd: WorkflowOwners, index: int) -> dict[str, Any]:
    """Return the row of the workflow with this number, from which all of its columns are derived."""
    # The digits are unordered and of equal length in each name, so that all collations sort them alike.
    name = f"{ACTIONS[index % 7]} {SUBJECTS[index % 9]} {index * 7919 % 100_000:05}"
    description = _build_description(index)
    created_at = BEGINNING + timedelta(seconds=index // 3)
    return Workflow(
        id=ids.new_id("wf"),
        organization_id=crowd.organization.id,
        shard=crowd.organization.shard,
        owner_id=_choose_owner(crowd, index).id,
        name=name,
        description=description,
        search_text=build_search_text(name, description),
        status=_choose_status(index),
        version=1 + index % 11,
        tags=[*_tag_names(index)],
        settings={"timeout": 3600, "retryOnFailure": False, "maxRetries": 3},
        config={"appId": f"app-{index % 100}"},
        app_id=f"app-{index % 100}",
        scopes=["datasources:read:ds_orders", "models:invoke:mdl_summary"],
        is_public=index % 10 == 3,
        is_template=index % 50 == 4,
        created_at=created_at,
        updated_at=created_at + timedelta(seconds=index * 7919 % 86_400),
        deleted_at=created_at if index % 20 == 5 else None,
    ).model_dump()


def _choose_owner(crowd: WorkflowOwners, index: int) -> User:
    if index % 500 == 1:
        return crowd.member
    return crowd.other if index % 3 == 0 else crowd.owner


def _build_description(index: int) -> str:
    rare = f" {RARE_WORD.upper()} of accounts included." if index % 500 == 9 else ""
    return (
        f"Reads the {SUBJECTS[index % 9]} of region {index % 40} from the database every hour, checks them against"
        f" what was there before, and tells team {index % 25} on the usual channel.{rare}"
    )


def _choose_status(index: int) -> WorkflowStatus:
    """Return draft for half of the workflows, active for most others, paused and archived for one in twenty
    each.
    """
    if index % 2:
        return WorkflowStatus.DRAFT
    others = {0: WorkflowStatus.PAUSED, 2: WorkflowStatus.ARCHIVED}
    return others.get(index % 20, WorkflowStatus.ACTIVE)


def _tag_names(index: int) -> Iterable[str]:
    yield f"team-{index % 25}"
    if index % 2 == 0:
        yield COMMON_TAG
    if index % 500 == 8:
        yield RARE_TAG


def _tag_rows(workflows: Rows) -> Iterable[dict[str, str]]:
    for row in workflows:
        if row["deleted_at"] is None:
            for tag in row["tags"]:
                yield {"organization_id": row["organization_id"], "tag": tag, "workflow_id": row["id"]}


# ── graphs ──────────────────────────────────────────────────────────────────────────────────────────────────


def build_nodes(number: int) -> Rows:
    """Return so many nodes, a trigger and its successors, in the stored form, which clients may send too."""
    kinds = cycle((_set, _build_conditional, _request))
    return [
        _build_node("start", "manual", 0, {}),
        *(kind(index) for index, kind in zip(range(1, number), kinds, strict=False)),
    ]


def build_connections(nodes: Sequence[dict[str, Any]]) -> Rows:
    """Return connections in the stored form that lead from each node to the next."""
    return [
        {
            "id": f"conn-{source['id']}",
            "source": source["id"],
            "sourcePort": "true" if source["type"] == "conditional" else "output",
            "target": target["id"],
            "targetPort": "input",
        }
        for source, target in pairwise(nodes)
    ]


def _set(index: int) -> dict[str, Any]:
    total = {"$op": "add", "args": ["{{ data.body.total }}", 1]}
    return _build_node(
        f"node-{index}", "set", index, {"values": {"total": total, "state": "{{ data.body.state }}"}}
    )


def _build_conditional(index: int) -> dict[str, Any]:
    condition = {"left": "{{ data.total }}", "operator": "greater-than", "right": index}
    return _build_node(f"node-{index}", "conditional", index, {"condition": condition})


def _request(index: int) -> dict[str, Any]:
    url = f"https://api.example.com/orders/{index}"
    body = {"total": "{{ data.total }}", "note": "Checked by the workflow"}
    return _build_node(f"node-{index}", "http-request", index, {"method": "POST", "url": url, "body": body})


def _build_node(node_id: str, node_type: str, index: int, config: dict[str, Any]) -> dict[str, Any]:
    return {
        "id": node_id,
        "type": node_type,
        "label": f"Step {index}",
        "position": {"x": 100 + 250 * (index % 40), "y": 200 + 150 * (index // 40)},
        "config": config,
        "inputMappings": {},
        "passThroughValues": {},
    }
