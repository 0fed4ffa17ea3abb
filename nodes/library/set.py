"""New fields are laid over the data, or take its place."""

from __future__ import annotations

from enum import StrEnum
from typing import TYPE_CHECKING

from engine.run_errors import NodeError
from nodes import fields

if TYPE_CHECKING:
    from engine.node_api import NodeCall
    from engine.values import Json


class Mode(StrEnum):
    MERGE = "merge"
    REPLACE = "replace"


def run(call: NodeCall) -> Json:
    values = call.values["values"].render(call.scope, call.unresolved)
    if not isinstance(values, dict):
        raise fields.unfit("values", "an object", values)
    if fields.choice(call.config, "mode", Mode) is Mode.REPLACE or call.data is None:
        return values
    if not isinstance(call.data, dict):
        arrived = fields.kind_of(call.data)
        message = f"Fields can be set on an object, but {arrived} arrived; `mode: replace` drops it"
        raise NodeError(message, code="not-an-object")
    return {**call.data, **values}
