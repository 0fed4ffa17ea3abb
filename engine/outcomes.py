"""What comes of nodes in the form in which it is kept: outputs as JSON, failures as errors of a node and of a run."""

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
UNKNOWN_OUTCOMES: Final = frozenset({TIMEOUT_CODE, "timed-out", "interrupted"})
"""Codes of errors after which nobody knows whether a write was made."""

_UNSTORABLE = re.compile("[\0\ud800-\udfff]")


def encode_output(output: Json, max_bytes: int) -> bytes:
    """Return an output as JSON; raises `InvalidJson`, and `NodeError` where it is too large to be kept."""
    try:
        return values.encode_json(output, max_bytes=max_bytes)
    except InvalidJson as error:
        if error.code != "too-large":
            raise
        raise output_too_large(max_bytes) from error


def output_too_large(max_bytes: int) -> NodeError:
    """Return the error of an output that takes more than the limit."""
    name = run_limits.setting_name("max_output_bytes")
    return NodeError(
        f"The output takes more than the {max_bytes:,} bytes that can be kept ({name})",
        code="output-too-large",
    )


def error_output(reason: RunError, data: Json, max_bytes: int) -> tuple[Json, bytes]:
    """Return what leaves by the error port; data that would not fit beside the error is left out."""
    output: Json = {"error": reason.as_json(), "data": data}
    try:
        return output, encode_output(output, max_bytes)
    except (InvalidJson, NodeError):
        output = {"error": reason.as_json(), "data": None}
        return output, values.encode_json(output)


def node_timed_out(node: GraphNode) -> NodeError:
    """Return the error of a node that has used up its time."""
    return NodeError(
        f"The node took longer than its {node.timeout_seconds:g} s", code=TIMEOUT_CODE, retryable=True
    )


def to_run_error(reason: RunError) -> RunError:
    """Return what a node's failure is to its run, which has fewer codes: a cause keeps the code of the node."""
    if reason.code == TIMEOUT_CODE:
        return replace(reason, cause=None)
    cause = reason.cause or FailureCause(reason.code, reason.message, reason.node_id)
    return replace(reason, code="node-error", cause=cause)


def to_node_run_error(error: NodeError, node_id: str, attempt: int) -> RunError:
    """Return an error as that of a node, with texts that every database takes."""
    cause = error.cause
    if error.request is not None:
        method, url = error.request
        cause = FailureCause(error.code, error.message, node_id, method=method, url=url or None)
    if cause is not None:
        # The runs of other workflows may have written it.
        cause = FailureCause(*(text and make_storable(text) for text in astuple(cause)))
    return RunError(error.code, make_storable(error.message), node_id, attempt, cause)


def make_storable(text: str) -> str:
    """Return a text of anybody's making as every database takes it."""
    return _UNSTORABLE.sub("\ufffd", text[:MAX_MESSAGE_LENGTH])


def to_node_error(error: Exception) -> NodeError:
    """Translate what a node raised: its own words where it chose them, else the kind of surprise."""
    if isinstance(error, NodeError):
        return error
    if isinstance(error, ExpressionError):
        return NodeError(str(error), code="expression-error")
    if isinstance(error, InvalidJson):
        return NodeError(str(error), code=error.code)
    if isinstance(error, TimeoutError):
        return NodeError(str(error) or "Timed out", code=TIMEOUT_CODE, retryable=True)
    return NodeError(f"{type(error).__name__}: {error}")
