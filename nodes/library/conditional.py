"""Pass the data on through port `true` or `false`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from engine.node_api import NodeResult

if TYPE_CHECKING:
    from engine.node_api import NodeCall


def run(call: NodeCall) -> NodeResult:
    holds = call.conditions["condition"].test(call.scope, call.unresolved)
    return NodeResult(call.data, port="true" if holds else "false")
