"""Query rows of a MySQL database in a read-only transaction."""

from __future__ import annotations

from typing import TYPE_CHECKING

from nodes import sql_nodes
from nodes.sql_text import SqlDialect

if TYPE_CHECKING:
    from engine.node_api import NodeCall
    from engine.values import Json


async def run(call: NodeCall) -> Json:
    return await sql_nodes.run_query(call, SqlDialect.MYSQL)
