"""Pass on the inputs of several branches, which the engine has awaited and combined."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from engine.node_api import NodeCall
    from engine.values import Json


def run(call: NodeCall) -> Json:
    return call.data
