"""Define the response to the webhook's sender, and pass the data on."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from nodes import webhook_responses

if TYPE_CHECKING:
    from engine.node_api import NodeCall
    from engine.values import Json

WHEN_DONE_MODE: Final = "when-done"


def run(call: NodeCall) -> Json:
    answer = webhook_responses.build_response(call.config)
    if _is_awaited(call.scope.get("trigger")):
        call.log("info", f"The sender of the webhook gets a response with the status {answer.status}")
    else:
        call.log("info", "No sender waits for this response: no webhook that waits has started the run")
    return call.data


def _is_awaited(trigger: Json) -> bool:
    """Return whether a webhook started the run, and its sender waits for the response (`respond` is `when-done`)."""
    return isinstance(trigger, dict) and trigger.get("respond") == WHEN_DONE_MODE
