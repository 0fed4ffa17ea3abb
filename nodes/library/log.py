"""A line goes into the execution's log, and the data goes on."""

from __future__ import annotations

from enum import StrEnum
from typing import TYPE_CHECKING

from engine.values import value_as_text
from nodes import fields

if TYPE_CHECKING:
    from engine.node_api import NodeCall
    from engine.values import Json

MAXIMUM_BYTES = 8_192
CUT_OFF = "…"


class Level(StrEnum):
    DEBUG = "debug"
    INFO = "info"
    WARNING = "warning"
    ERROR = "error"


def run(call: NodeCall) -> Json:
    message = value_as_text(call.config.get("message"))
    call.log(fields.choice(call.config, "level", Level), _bounded(message))
    return call.data


def _bounded(message: str) -> str:
    encoded = message.encode()
    if len(encoded) <= MAXIMUM_BYTES:
        return message
    return encoded[: MAXIMUM_BYTES - len(CUT_OFF.encode())].decode(errors="ignore") + CUT_OFF
