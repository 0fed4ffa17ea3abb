"""Failures of tool servers as errors of nodes, with codes that tell whether a call may have been done."""

from __future__ import annotations

from typing import Final

from engine.run_errors import NodeError
from nodes.outbound_http import OutboundError, OutboundRefused, OutboundUnavailable

INVALID_ANSWER: Final = "tool-server-invalid-answer"
"""Answer that can't be read; a call that it belongs to may have been done."""
FAILED: Final = "tool-server-failed"
"""Failure inside of the server; a call may have been done."""
BUSY: Final = "tool-server-busy"
"""Refusal for now; nothing was done."""
REFUSED: Final = "tool-server-refused"
KEY_REFUSED: Final = "tool-server-key-refused"
REDIRECTED: Final = "tool-server-redirected"
WRONG_VERSION: Final = "tool-server-version"
TOOL_CHANGED: Final = "tool-changed"
TOOL_NOT_ACCEPTED: Final = "tool-not-accepted"


def build_invalid_answer(what: str) -> NodeError:
    """Return the failure of an answer that can't be read; `what` completes the message "The tool server sent …"."""
    return NodeError(f"The tool server sent {what}", code=INVALID_ANSWER)


def build_transport_failure(error: OutboundError) -> NodeError:
    """Return the failure of a request without a complete response, with the code of `error`, or `tool-server-failed` if
    it has none.

    The request may have arrived if `engine.run_records.UNKNOWN_OUTCOMES` has that code.
    """
    match error:
        case OutboundUnavailable():
            message = f"The tool server can't be reached: {error.message}"
            return NodeError(message, code=error.code.value, retryable=True)
        case OutboundRefused():
            return NodeError(f"The tool server can't be used: {error.message}", code=error.code.value)
    return NodeError(str(error), code=FAILED)
