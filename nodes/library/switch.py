"""Pass the data on through the port of the first matching case, or `default`."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

from engine.node_api import NodeResult
from engine.values import equal_json

if TYPE_CHECKING:
    from engine.node_api import NodeCall
    from engine.values import Json

DEFAULT_PORT = "default"


def run(call: NodeCall) -> NodeResult:
    value = call.config.get("value", call.data)
    for index, case in enumerate(cast("list[dict[str, Json]]", call.config["cases"])):
        condition = call.conditions.get(f"cases.{index}.condition")
        if condition.test(call.scope, call.unresolved) if condition else equal_json(value, case["equals"]):
            return NodeResult(call.data, port=str(case["port"]))
    return NodeResult(call.data, port=DEFAULT_PORT)
