"""Traits of stored workflows, read together with the workflows that they call."""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Final

from msgspec import Struct
from sqlalchemy import select
from sqlmodel import col

from engine.agents import tool_reach, workflow_traits
from engine.agents.workflow_traits import UNKNOWN, WorkflowTraits
from engine.graph import ParsedGraph
from journal import definition_snapshot
from models.workflow import Workflow, WorkflowGraph, is_readable_by

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncConnection

    from engine.values import Json
    from models.access import ApiCaller
    from nodes.catalog import NodeCatalog

MAX_LEVELS: Final = 8
MAX_WORKFLOWS: Final = 200
"""Limits of the workflows that are read, at all levels together; those beyond are unknown."""


class CalledWorkflow(Struct, frozen=True):
    """Workflow that others call."""

    graph: ParsedGraph
    settings: Mapping[str, Json]
    calls: frozenset[str]


async def read(
    connection: AsyncConnection, caller: ApiCaller, workflow_ids: Collection[str], catalog: NodeCatalog
) -> dict[str, WorkflowTraits]:
    """Return the traits of all these workflows by id, as they are now.

    They are `UNKNOWN` for one that is missing or that the caller may not read, and for called ones beyond 8 levels or
    200 workflows.
    """
    found: dict[str, CalledWorkflow] = {}
    wanted = set(workflow_ids)
    for _ in range(MAX_LEVELS):
        if not wanted or len(found) + len(wanted) > MAX_WORKFLOWS:
            break
        new = await _read_level(connection, caller, wanted)
        found |= new
        wanted = {called for each in new.values() for called in each.calls} - found.keys()
    # In a thread: other work goes on while large graphs are examined.
    return await asyncio.to_thread(_describe_all, workflow_ids, found, catalog)


async def _read_level(
    connection: AsyncConnection, caller: ApiCaller, workflow_ids: Collection[str]
) -> dict[str, CalledWorkflow]:
    """Return graph, settings and called workflows of those workflows that the caller may read, by id; others are left
    out.
    """
    columns = (col(WorkflowGraph.nodes), col(WorkflowGraph.connections), col(Workflow.settings))
    rows = await connection.execute(
        select(col(Workflow.id), *columns)
        .join(WorkflowGraph, col(WorkflowGraph.workflow_id) == col(Workflow.id))
        .where(col(Workflow.id).in_(workflow_ids), is_readable_by(caller))
    )
    read: dict[str, CalledWorkflow] = {}
    for workflow_id, nodes, connections, settings in rows:
        graph = ParsedGraph.from_stored(definition_snapshot.build_definition(nodes, connections, settings))
        read[workflow_id] = CalledWorkflow(graph, settings, workflow_traits.list_called(graph))
    return read


def _describe_all(
    workflow_ids: Collection[str], found: Mapping[str, CalledWorkflow], catalog: NodeCatalog
) -> dict[str, WorkflowTraits]:
    """Return the traits of workflows by id: `UNKNOWN` for those that `found` lacks, and, where workflows call one
    another in a circle, for the inner call.
    """
    traits: dict[str, WorkflowTraits] = {}
    begun: set[str] = set()

    def describe(workflow_id: str) -> WorkflowTraits:
        if workflow_id in traits:
            return traits[workflow_id]
        if workflow_id in begun or workflow_id not in found:
            return UNKNOWN
        begun.add(workflow_id)
        each = found[workflow_id]
        called = {called: describe(called) for called in each.calls}
        traits[workflow_id] = tool_reach.describe_workflow(each.graph, each.settings, catalog, called)
        return traits[workflow_id]

    return {workflow_id: describe(workflow_id) for workflow_id in workflow_ids}
