"""Findings about nodes that call tools of other servers: those that their tool servers don't let through now."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from sqlalchemy import select
from sqlmodel import col

from engine.agents import workflow_traits
from engine.findings import FindingType, GraphFinding
from engine.node_api import MCP_TOOL_TYPE
from models import data_source
from models.data_source import DataSource
from models.tool_server import ToolEffect, read_tools

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncConnection

    from engine.graph import GraphNode, ParsedGraph
    from models.access import ApiCaller
    from models.tool_server import ListedTools

SUGGESTION = "Refresh the tool server, and read and accept the definition. Calls are refused until then."


async def find_refused_tools(
    connection: AsyncConnection, caller: ApiCaller, graph: ParsedGraph
) -> list[GraphFinding]:
    """Return a warning for each node, and tool of an agent, that could not call its tool by the server's stored list.

    Servers that the caller can't see, and names that are expressions, are left out. No server is contacted.
    """
    callers = [node for node in workflow_traits.iterate_callers(graph) if node.type == MCP_TOOL_TYPE]
    names = {str(node.config.get("toolServer", "")) for node in callers}
    if not names:
        return []
    rows = await connection.execute(
        select(col(DataSource.id), col(DataSource.tools)).where(
            col(DataSource.id).in_(names), data_source.is_readable_by(caller)
        )
    )
    servers: dict[str, Any] = {row.id: row.tools for row in rows}
    return [
        GraphFinding(FindingType.TOOL_NOT_ACCEPTED, f'Node "{node.label}": {problem}', SUGGESTION, node.id)
        for node in callers
        if str(node.config.get("toolServer")) in servers and "{{" not in str(node.config.get("tool", ""))
        for problem in _find_problem(node, read_tools(servers[str(node.config["toolServer"])]))
    ]


def _find_problem(node: GraphNode, listed: ListedTools) -> Iterator[str]:
    """Yield the first reason, if any, for which the calls of a node are refused, by its config and the lists of its
    server.
    """
    name, wanted = str(node.config.get("tool", "")), node.config.get("hash")
    accepted = listed.accepted.get(name)
    offered = {str(each["name"]): str(each["hash"]) for each in listed.offered}
    if accepted is None:
        yield f"the tool {name!r} is not accepted at its tool server"
    elif name not in offered:
        yield f"the tool server doesn't list the tool {name!r} any more"
    elif accepted.hash != offered[name]:
        yield f"the definition of the tool {name!r} has changed since it was accepted"
    elif wanted not in {None, accepted.hash}:
        yield f"the tool {name!r} was accepted with another definition than `hash` names"
    elif node.config.get("effect") == "read" and accepted.effect is ToolEffect.WRITE:
        yield f"the tool {name!r} was accepted as one that writes, and `effect` is `read`"
