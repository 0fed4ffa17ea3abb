"""The node fails with a message of its author's, and the run with it."""

from __future__ import annotations

from typing import TYPE_CHECKING, NoReturn

from engine.errors import NodeError
from engine.values import as_text

if TYPE_CHECKING:
    from engine.node import Call

SAYS_NOTHING = "The workflow stopped itself, and its message is empty"


def run(call: Call) -> NoReturn:
    raise NodeError(as_text(call.config["message"]) or SAYS_NOTHING)
