"""Records of a run in the journal: spans, log lines and its outcome, and the stored form of outputs and failures."""

from __future__ import annotations

import re
from datetime import datetime
from enum import StrEnum
from typing import TYPE_CHECKING, Final, Protocol

import msgspec
from msgspec import Struct
from msgspec.structs import astuple, replace

from engine import run_limits, values
from engine.expressions import ExpressionError
from engine.node_api import CONTINUE, TOOL_TYPE
from engine.run_errors import FailureCause, NodeError
from engine.values import InvalidJson

if TYPE_CHECKING:
    from collections.abc import Mapping

    from engine.agents.agent_steps import AgentStep
    from engine.graph import GraphNode
    from engine.values import Json

MAX_MESSAGE_LENGTH: Final = 8_192
TIMEOUT_CODE: Final = "timeout"
EXPIRED_CODE: Final = "expired"
LOST_ATTEMPT_CODE: Final = "lost-attempt"
NEEDS_CONFIRM_CODE: Final = "write-needs-confirm"
UNKNOWN_OUTCOMES: Final = frozenset(
    {
        *(TIMEOUT_CODE, "timed-out", "interrupted", "tool-server-failed", "tool-server-invalid-answer"),
        # The server has answered, so that it has probably done what it was asked for.
        *("response-too-large", "invalid-response", "insecure-redirect", "too-many-redirects"),
    }
)
"""Codes of errors that leave the outcome of a write unknown."""

_UNSTORABLE = re.compile("[\0\ud800-\udfff]")


class SpanStatus(StrEnum):
    """State of a node within one run."""

    RUNNING = "running"
    WAITING = "waiting"
    RETRYING = "retrying"
    COMPLETED = "completed"
    FAILED = "failed"
    SKIPPED = "skipped"
    CANCELLED = "cancelled"
    CANDIDATE = "candidate"
    """Not reached yet, with a result of an earlier run that is reused if the key is the same.

    `wake_at` has its end.
    """
    UNCONFIRMED = "unconfirmed"
    """The same, for a write that must not be repeated with another key."""


CANDIDATE_STATUSES = frozenset({SpanStatus.CANDIDATE, SpanStatus.UNCONFIRMED})
"""Statuses of nodes that a replay has not reached; nobody else sees their spans."""
SETTLED_STATUSES = frozenset({SpanStatus.COMPLETED, SpanStatus.FAILED, SpanStatus.SKIPPED})


class RunError(Struct, frozen=True):
    """Error of a run, or of a node in it."""

    code: str
    message: str
    node_id: str | None = None
    attempt: int | None = None
    cause: FailureCause | None = None
    """For a node, a cause with more information than `code` and `message`; for a run, the error of the node.
    """

    def as_json(self) -> dict[str, Json]:
        """Return the error as expressions see it: code, message, node id and attempt."""
        return {"code": self.code, "message": self.message, "nodeId": self.node_id, "attempt": self.attempt}


def encode_error(error: RunError | None) -> str | None:
    """Return an error as JSON text for a row and the API, with its cause if it has one; None for no error."""
    if error is None:
        return None
    shown = error.as_json() if error.cause is None else {**error.as_json(), "cause": error.cause}
    return msgspec.json.encode(shown).decode()


class NodeSpan(msgspec.Struct, frozen=True):
    """Record of one node in one run; a later row replaces an earlier one."""

    node_id: str
    label: str
    type: str
    status: SpanStatus
    sequence: int
    """Sequence number of spans and log lines of a run, over all its attempts."""
    started_at: datetime | None
    ended_at: datetime | None = None
    iteration: str = ""
    """Iteration of the enclosing loops: empty outside of loops, `3`, or `3.0` in a nested loop.

    Each iteration has a span of its own, under the id of its loop.
    """
    port: str | None = None
    attempt: int = 1
    input_node: str | None = None
    """Node whose unchanged output is the input of this node; otherwise `input` contains it."""
    input: bytes | None = None
    output: bytes | None = None
    error: RunError | None = None
    unresolved: tuple[str, ...] = ()
    wake_at: datetime | None = None
    awaits: bytes | None = None
    """JSON of a wait: the source of the answer, and the result without one: `{kind, request, expired:
    {output, port}}`.

    If `expired` is null, the node fails without an answer.
    """
    resolved_config: bytes | None = None
    """Config of a write node as rendered for its first attempt; later attempts reuse it."""
    hashes: bytes | None = None
    """Key of the node; see `engine.node_key`."""
    input_blob: bytes | None = None
    """JSON reference to the blob of an input that is too large for a row; `input` is None in the row then."""
    output_blob: bytes | None = None
    reused_from: str | None = None
    """Execution that ran the node, if a replay has reused its result."""
    key_id: str | None = None
    """Execution id in the node's idempotency key, if it is not that of its run."""
    rendered_config: bytes | None = None
    """Config as rendered, for display: only of nodes without `resolved_config` whose config has expressions.

    In the row, JSON or the reference to a blob.
    """
    model_calls: bytes | None = None
    """JSON list of the calls of language models that the node has made, as `engine.model_calls` has them."""
    task: bytes | None = None
    """JSON of the task to create together with this span, which waits for its answer; no column of its row."""

    @property
    def is_iteration(self) -> bool:
        """Whether this is the span of one iteration of a loop, which has the port `continue` and no hashes."""
        return self.port == CONTINUE and self.hashes is None

    @property
    def is_tool_wait(self) -> bool:
        """Whether this is the span of the wait of an agent's tool call: nodes of tools never run by themselves."""
        return self.type == TOOL_TYPE


class AttemptSpan(msgspec.Struct, frozen=True):
    """Record of one attempt of a node with several attempts; a later row replaces an earlier one."""

    node_id: str
    label: str
    type: str
    iteration: str
    attempt: int
    status: SpanStatus
    sequence: int
    """Sequence number, shared with the spans and log lines of the run."""
    started_at: datetime | None
    """None if unchanged since an earlier row, or unknown."""
    ended_at: datetime | None = None
    """None while the attempt is in progress, or if its worker was lost and its end is unknown."""
    next_attempt_at: datetime | None = None
    error: RunError | None = None


class LogLevel(StrEnum):
    """Level of a line in the log of an execution, the lowest first."""

    DEBUG = "debug"
    INFO = "info"
    WARNING = "warning"
    ERROR = "error"


LOG_LEVELS: Final = tuple(LogLevel)


class LogLine(msgspec.Struct, frozen=True):
    """Line in the log of an execution."""

    level: str
    message: str
    node_id: str | None
    sequence: int
    created_at: datetime


class RunStatus(StrEnum):
    """Status at the end of one attempt at a run."""

    COMPLETED = "completed"
    FAILED = "failed"
    STOPPED = "stopped"
    CANCELLED = "cancelled"
    WAITING = "waiting"
    RELEASED = "released"
    """Released for the next process that claims it."""


UNFINISHED_STATUSES = frozenset({RunStatus.WAITING, RunStatus.RELEASED})
"""Statuses after which the run continues later."""


class RunOutcome(Struct, frozen=True):
    """Outcome of one attempt at a run."""

    status: RunStatus
    error: RunError | None = None
    due_at: datetime | None = None
    """Time at which a waiting run is due."""


class RunJournalWriter(Protocol):
    """Journal of one run. Records are durable only after `commit` has returned."""

    def record(self, span: NodeSpan) -> None:
        """Add the new state of a node to the next commit, where it replaces earlier states."""

    def record_attempt(self, attempt: AttemptSpan) -> None:
        """Add an attempt to the next commit; the caller records the state of its node after it."""

    def record_step(self, step: AgentStep) -> None:
        """Add the new state of a step of an agent to the next commit, where it replaces earlier states."""

    def log(self, line: LogLine) -> None:
        """Add a log line to the next commit."""

    def set_metadata(self, metadata: Mapping[str, str]) -> None:
        """Add metadata of the run to the next commit; a later value of a key replaces an earlier one."""

    def advance(self, share: float) -> None:
        """Add a share to the progress of the run; all shares of a run sum up to 1."""

    async def commit(self) -> None:
        """Make all records so far durable; waits while the database is unavailable.

        Raises `LeaseLost` if this process no longer holds the run.
        """

    def holds_lease(self) -> bool:
        """Return whether, by the monotonic clock, the lease is certain to last a moment longer."""


def encode_output(output: Json, max_bytes: int) -> bytes:
    """Return an output as JSON; raises `InvalidJson`, and `NodeError` if it is too large."""
    try:
        return values.encode_json(output, max_bytes=max_bytes)
    except InvalidJson as error:
        if error.code != "too-large":
            raise
        raise build_size_error(max_bytes) from error


def build_size_error(max_bytes: int) -> NodeError:
    """Return (not raise) the error of a node whose output is larger than `max_bytes`, which names the setting."""
    name = run_limits.setting_name("max_output_bytes")
    return NodeError(
        f"The output is larger than the maximum of {max_bytes:,} bytes ({name})",
        code="output-too-large",
    )


def error_output(reason: RunError, data: Json, max_bytes: int) -> tuple[Json, bytes]:
    """Return the output at a node's error port, an object with `error` and the input as `data`, and its JSON.

    An input that doesn't fit beside the error is replaced by null.
    """
    output: Json = {"error": reason.as_json(), "data": data}
    try:
        return output, encode_output(output, max_bytes)
    except (InvalidJson, NodeError):
        output = {"error": reason.as_json(), "data": None}
        return output, values.encode_json(output)


def build_timeout_error(node: GraphNode) -> NodeError:
    """Return (not raise) the retryable error of a node that has exceeded its timeout."""
    return NodeError(
        f"The node exceeded its timeout of {node.timeout_seconds:g} s", code=TIMEOUT_CODE, retryable=True
    )


def to_run_error(reason: RunError) -> RunError:
    """Convert a node's error to the error of its run: `timeout` stays, without a cause; others become `node-error`.

    Their cause is that of the node's error, or else the node's code and message.
    """
    if reason.code == TIMEOUT_CODE:
        return replace(reason, cause=None)
    cause = reason.cause or FailureCause(reason.code, reason.message, reason.node_id)
    return replace(reason, code="node-error", cause=cause)


def to_node_run_error(error: NodeError, node_id: str, attempt: int) -> RunError:
    """Convert an error of a node's attempt to its stored form, with texts that every database accepts.

    An HTTP request that failed is named in the cause.
    """
    cause = error.cause
    if error.request is not None:
        method, url = error.request
        cause = FailureCause(error.code, error.message, node_id, method=method, url=url or None)
    if cause is not None:
        # Runs of other workflows may have written it.
        cause = FailureCause(*(text and make_storable(text) for text in astuple(cause)))
    return RunError(error.code, make_storable(error.message), node_id, attempt, cause)


def make_storable(text: str) -> str:
    """Return a text cut to 8,192 characters, with characters that databases refuse (NUL, surrogates) replaced."""
    return _UNSTORABLE.sub("\ufffd", text[:MAX_MESSAGE_LENGTH])


def to_node_error(error: Exception) -> NodeError:
    """Convert an exception of a node to a `NodeError`; only timeouts become retryable.

    A `NodeError` is returned unchanged, and an unexpected exception keeps its type in the message.
    """
    if isinstance(error, NodeError):
        return error
    if isinstance(error, ExpressionError):
        return NodeError(str(error), code="expression-error")
    if isinstance(error, InvalidJson):
        return NodeError(str(error), code=error.code)
    if isinstance(error, TimeoutError):
        return NodeError(str(error) or "Timed out", code=TIMEOUT_CODE, retryable=True)
    return NodeError(f"{type(error).__name__}: {error}")
