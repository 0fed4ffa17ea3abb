"""A message of a queue starts the workflow; the message and what is known of it are the data."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from engine.node import Call
    from engine.values import Json


def run(call: Call) -> Json:
    return call.data
