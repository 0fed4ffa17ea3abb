"""Publish a value in the state of the execution, and pass the data on."""

from __future__ import annotations

from typing import TYPE_CHECKING

from engine import values
from nodes import config_fields

if TYPE_CHECKING:
    from engine.node_api import NodeCall
    from engine.values import Json


async def run(call: NodeCall) -> Json:
    key = config_fields.read_text(call.config, "key")
    await call.services.state.publish(call.caller, key, values.encode_json(call.config.get("value")))
    return call.data
