"""The data goes on by the port of the first case that fits, or by `default`."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

from engine.node import Result
from engine.values import equal

if TYPE_CHECKING:
    from engine.node import Call
    from engine.values import Json

DEFAULT = "default"


def run(call: Call) -> Result:
    value = call.config.get("value", call.data)
    for index, case in enumerate(cast("list[dict[str, Json]]", call.config["cases"])):
        condition = call.conditions.get(f"cases.{index}.condition")
        if condition.test(call.scope, call.unresolved) if condition else equal(value, case["equals"]):
            return Result(call.data, port=str(case["port"]))
    return Result(call.data, port=DEFAULT)
