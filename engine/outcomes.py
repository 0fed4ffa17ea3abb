"""Outcomes of nodes in their stored form: outputs as JSON, failures as errors of a node and of a run."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import TYPE_CHECKING, Final

from msgspec.structs import astuple

from engine import run_limits, values
from engine.expressions import ExpressionError
from engine.run_errors import FailureCause, NodeError
from engine.run_records import RunError
from engine.values import InvalidJson

if TYPE_CHECKING:
    from engine.graph import GraphNode
    from engine.values import Json

MAX_MESSAGE_LENGTH: Final = 8_192
TIMEOUT_CODE: Final = "timeout"
EXPIRED_CODE: Final = "expired"
LOST_ATTEMPT_CODE: Final = "lost-attempt"
NEEDS_CONFIRM_CODE: Final = "write-needs-confirm"
UNKNOWN_OUTCOMES: Final = frozenset({TIMEOUT_CODE, "timed-out", "interrupted"})
"""Codes of errors that leave the outcome of a write unknown."""

_UNSTORABLE = re.compile("[\0\ud800-\udfff]")


def encode_output(output: Json, max_bytes: int) -> bytes:
    """Return an output as JSON; raises `InvalidJson`, and `NodeError` if it is too large."""
    try:
        return values.encode_json(output, max_bytes=max_bytes)
    except InvalidJson as error:
        if error.code != "too-large":
            raise
        raise output_too_large(max_bytes) from error


def output_too_large(max_bytes: int) -> NodeError:
    """Return the error of an output above the size limit."""
    name = run_limits.setting_name("max_output_bytes")
    return NodeError(
        f"The output is larger than the maximum of {max_bytes:,} bytes ({name})",
        code="output-too-large",
    )


def error_output(reason: RunError, data: Json, max_bytes: int) -> tuple[Json, bytes]:
    """Return the output at the error port; data that doesn't fit beside the error is omitted."""
    output: Json = {"error": reason.as_json(), "data": data}
    try:
        return output, encode_output(output, max_bytes)
    except (InvalidJson, NodeError):
        output = {"error": reason.as_json(), "data": None}
        return output, values.encode_json(output)


def node_timed_out(node: GraphNode) -> NodeError:
    """Return the error of a node that has exceeded its timeout."""
    return NodeError(
        f"The node exceeded its timeout of {node.timeout_seconds:g} s", code=TIMEOUT_CODE, retryable=True
    )


def to_run_error(reason: RunError) -> RunError:
    """Convert a node's error to the error of its run, which has fewer codes; the cause keeps the node's code."""
    if reason.code == TIMEOUT_CODE:
        return replace(reason, cause=None)
    cause = reason.cause or FailureCause(reason.code, reason.message, reason.node_id)
    return replace(reason, code="node-error", cause=cause)


def to_node_run_error(error: NodeError, node_id: str, attempt: int) -> RunError:
    """Convert an error to the stored error of a node, with texts that every database accepts."""
    cause = error.cause
    if error.request is not None:
        method, url = error.request
        cause = FailureCause(error.code, error.message, node_id, method=method, url=url or None)
    if cause is not None:
        # Runs of other workflows may have written it.
        cause = FailureCause(*(text and make_storable(text) for text in astuple(cause)))
    return RunError(error.code, make_storable(error.message), node_id, attempt, cause)


def make_storable(text: str) -> str:
    """Return an arbitrary text in a form that every database accepts."""
    return _UNSTORABLE.sub("\ufffd", text[:MAX_MESSAGE_LENGTH])


def to_node_error(error: Exception) -> NodeError:
    """Convert an exception of a node to a `NodeError`; an unexpected one keeps its type in the message."""
    if isinstance(error, NodeError):
        return error
    if isinstance(error, ExpressionError):
        return NodeError(str(error), code="expression-error")
    if isinstance(error, InvalidJson):
        return NodeError(str(error), code=error.code)
    if isinstance(error, TimeoutError):
        return NodeError(str(error) or "Timed out", code=TIMEOUT_CODE, retryable=True)
    return NodeError(f"{type(error).__name__}: {error}")
