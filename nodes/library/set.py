"""Merge new fields into the data, or replace it."""

from __future__ import annotations

from enum import StrEnum
from typing import TYPE_CHECKING

from engine.run_errors import NodeError
from nodes import config_fields

if TYPE_CHECKING:
    from engine.node_api import NodeCall
    from engine.values import Json


class SetMode(StrEnum):
    MERGE = "merge"
    REPLACE = "replace"


def run(call: NodeCall) -> Json:
    values = call.values["values"].render(call.scope, call.unresolved)
    if not isinstance(values, dict):
        raise config_fields.invalid_field("values", "an object", values)
    if config_fields.read_choice(call.config, "mode", SetMode) is SetMode.REPLACE or call.data is None:
        return values
    if not isinstance(call.data, dict):
        arrived = config_fields.describe_type(call.data)
        message = f"Fields can be set on an object, but {arrived} arrived; `mode: replace` replaces it"
        raise NodeError(message, code="not-an-object")
    return {**call.data, **values}
