"""Run the nodes behind port `continue` once for each item; the engine executes the iterations."""

from __future__ import annotations

from enum import StrEnum
from typing import TYPE_CHECKING, Final

from engine.node_api import LoopRequest
from nodes import config_fields

if TYPE_CHECKING:
    from engine.node_api import NodeCall

MAX_CONCURRENCY: Final = 100


class ItemErrorAction(StrEnum):
    """Handling of a failed iteration."""

    FAIL = "fail"
    CONTINUE = "continue"


def run(call: NodeCall) -> LoopRequest:
    items = {"items": call.config.get("items", call.data)}
    return LoopRequest(
        config_fields.read_sequence(items, "items"),
        concurrency=int(
            config_fields.read_number(call.config, "concurrency", minimum=1, maximum=MAX_CONCURRENCY)
        ),
        continues_on_error=config_fields.read_choice(call.config, "onItemError", ItemErrorAction)
        is ItemErrorAction.CONTINUE,
    )
