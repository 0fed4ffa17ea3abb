"""Traits of workflows that others call: their effect, the texts and data that their runs read, and ways out.

So an agent with a workflow as a tool is judged by the nodes of that workflow, and of those that it calls in turn.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Final, TypeAlias

from msgspec import Struct

from engine.agents import agent_wiring
from engine.agents.tool_kinds import SUB_WORKFLOW_TYPE
from engine.node_api import TOOL_TYPE, NodeEffect

if TYPE_CHECKING:
    from engine.graph import GraphNode, ParsedGraph


class WorkflowTraits(Struct, frozen=True):
    """Traits of the runs of a workflow, together with the runs that they start."""

    effect: NodeEffect
    """`write` if one of its nodes writes, else `read`."""
    gives_outside_text: bool
    """Whether a node reads text that outsiders may have written."""
    gives_private_data: bool
    """Whether a node reads data of the organization."""
    can_send: bool
    """Whether data can leave by a node, or by a tool of an agent without an approval."""
    exposed_agent: str = ""
    """Label of an agent that reads private data and can send without an approval, so that a text of outsiders in its
    input is all that is missing; empty without one."""


UNKNOWN: Final = WorkflowTraits(
    NodeEffect.WRITE, gives_outside_text=True, gives_private_data=True, can_send=True
)
"""Traits of a workflow that can't be read: all that an agent may have to fear."""
TraitsById: TypeAlias = "Mapping[str, WorkflowTraits]"
"""Traits by the id of the workflow; one that is missing is unknown."""


def traits_of(node: GraphNode, traits: TraitsById) -> WorkflowTraits:
    """Return the traits of the workflow that a `sub-workflow` node calls; those of the worst case for an
    unknown one.
    """
    return traits.get(name_workflow(node), UNKNOWN)


def name_workflow(node: GraphNode) -> str:
    """Return the id of the workflow that a node calls; empty for a node that calls none."""
    workflow_id = node.config.get("workflowId")
    return workflow_id if node.type == SUB_WORKFLOW_TYPE and isinstance(workflow_id, str) else ""


def list_called(graph: ParsedGraph) -> frozenset[str]:
    """Return the ids of the workflows that the nodes and tools of a graph call."""
    return frozenset(filter(None, map(name_workflow, iterate_callers(graph))))


def iterate_callers(graph: ParsedGraph) -> Iterator[GraphNode]:
    """Yield the nodes of a graph; in place of each tool the node that does its calls, or the tool if it has no valid
    target.
    """
    for node in graph.nodes:
        yield (agent_wiring.target_of(node) or node) if node.type == TOOL_TYPE else node
