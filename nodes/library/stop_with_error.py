"""Fail the node, and so the run, with a message of the author."""

from __future__ import annotations

from typing import TYPE_CHECKING, NoReturn

from engine.run_errors import NodeError
from engine.values import value_as_text

if TYPE_CHECKING:
    from engine.node_api import NodeCall

EMPTY_MESSAGE = "The workflow stopped itself, and its message is empty"


def run(call: NodeCall) -> NoReturn:
    raise NodeError(value_as_text(call.config["message"]) or EMPTY_MESSAGE)
