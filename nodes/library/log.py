"""Write a line to the execution's log, and pass the data on."""

from __future__ import annotations

from typing import TYPE_CHECKING

from engine.run_records import LogLevel
from engine.values import value_as_text
from nodes import config_fields

if TYPE_CHECKING:
    from engine.node_api import NodeCall
    from engine.values import Json

MAXIMUM_BYTES = 8_192
ELLIPSIS = "…"


def run(call: NodeCall) -> Json:
    message = value_as_text(call.config.get("message"))
    call.log(config_fields.read_choice(call.config, "level", LogLevel), _truncate(message))
    return call.data


def _truncate(message: str) -> str:
    encoded = message.encode()
    if len(encoded) <= MAXIMUM_BYTES:
        return message
    return encoded[: MAXIMUM_BYTES - len(ELLIPSIS.encode())].decode(errors="ignore") + ELLIPSIS
