"""Reply to a signal that a node of the run has received."""

from __future__ import annotations

from typing import TYPE_CHECKING

from engine import values
from nodes import config_fields

if TYPE_CHECKING:
    from engine.node_api import NodeCall
    from engine.values import Json


async def run(call: NodeCall) -> Json:
    receiver = config_fields.read_text(call.config, "receivedBy")
    reply = values.encode_json(call.config.get("value"))
    await call.services.signals.reply(call.caller, receiver, call.iteration, reply)
    return call.data
