"""The data goes on by port `true` or `false`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from engine.node import Result

if TYPE_CHECKING:
    from engine.node import Call


def run(call: Call) -> Result:
    holds = call.conditions["condition"].test(call.scope, call.unresolved)
    return Result(call.data, port="true" if holds else "false")
