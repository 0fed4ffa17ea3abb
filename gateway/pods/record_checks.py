"""Checks of the rows that a pod writes and others read: valid JSON, times with a zone, and valid blob references.

A pod runs its users' nodes, so its data is as untrusted as any other request body.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING

import msgspec

from engine import values
from engine.conditions import compile_condition
from engine.expressions import ExpressionError
from engine.span_recorder import MAX_METADATA_KEYS
from engine.task_node import NewTask
from engine.values import InvalidJson
from gateway.http import errors
from gateway.http.errors import ApiError
from journal.blobs.blob_reference import BlobReference, InvalidBlobReference
from journal.run_labels import MAX_VALUE_CHARACTERS, METADATA_KEY
from json_text import decoding
from models import ids
from nodes.custom_types import TYPE_PATTERN, VERSION_PATTERN

if TYPE_CHECKING:
    from datetime import datetime

    from engine.agents.agent_steps import AgentStep
    from engine.run_records import NodeSpan
    from execution.pod_api import ExpectEventRequest
    from journal.store import RunWrite

MAX_HASHES_BYTES = 1_024
MAX_NODE_CHARACTERS = 200
MAX_TASK_CHARACTERS = 500
MAX_STEP_NUMBER = 1_000_000_000
MAX_CALL_ID_CHARACTERS = 100_000
"""Some gateways to models put signed thoughts into the ids of tool calls."""
MAX_TASK_SECONDS = 604_800
MAX_TASK_COUNT = 10_000
MAX_TASK_INPUT_BYTES = 1 << 30


class _AwaitedNode(msgspec.Struct):
    kind: str
    request: dict[str, object] | None = None


def require_storable(write: RunWrite) -> None:
    """Raise a 422 error for values of a pod's write that could not be stored or read back from their row.

    Such as invalid JSON, times without zone, ids and texts that are too long or contain NUL.
    """
    try:
        for span in write.spans:
            _check_span(span)
        for step in write.steps:
            _check_step(step)
    except (InvalidJson, InvalidBlobReference, msgspec.DecodeError) as error:
        raise _refuse_write(f"A value can't be stored: {error}") from error
    if any(moment.tzinfo is None for moment in _iterate_moments(write)):
        raise _refuse_write("A time has no zone")
    if write.blocked_node is not None and not is_storable_text(write.blocked_node):
        raise _refuse_write("The blocked node is not a valid ID")
    if not all(is_storable_text(text) for place in write.cancelled_tasks for text in place):
        raise _refuse_write("A cancelled task is not one of a node")
    _check_metadata(write)
    if write.channel and not ids.is_id(write.channel):
        raise _refuse_write("The channel is not a valid ID")


def _check_metadata(write: RunWrite) -> None:
    for key, value in write.metadata.items():
        if not METADATA_KEY.match(key) or len(value) > MAX_VALUE_CHARACTERS or "\0" in value:
            raise _refuse_write("An entry of the metadata is invalid")
    if len(write.metadata) > MAX_METADATA_KEYS:
        raise _refuse_write("There are too many keys of metadata")


def is_storable_text(text: str) -> bool:
    """Return whether every database can store a text of a pod: within the length limit, and without NUL."""
    return len(text) <= MAX_NODE_CHARACTERS and "\0" not in text


def require_readable(call: ExpectEventRequest) -> None:
    """Raise a 422 error for an event filter that can't be compiled, and for its values unless they are a list."""
    try:
        if call.condition is not None:
            compile_condition(values.decode_json(call.condition.encode()))
        if not isinstance(values.decode_json(call.given.encode()), list):
            raise _refuse_write("The values of the filter are not a list")
    except (InvalidJson, ExpressionError) as error:
        raise _refuse_write(f"The filter is invalid: {error}") from error


def require_json(value: bytes) -> None:
    """Raise a 422 error unless a value of a pod is JSON that the server accepts."""
    try:
        values.decode_json(value)
    except InvalidJson as error:
        raise _refuse_write(f"The value is invalid: {error}") from error


def _check_span(span: NodeSpan) -> None:
    """Raise a 422 error, or an error of the decoding, for a span that could not be stored or read back."""
    _check_model_calls(span.model_calls)
    for text in (span.input, span.output, span.resolved_config, span.rendered_config):
        if text is not None:
            values.decode_json(text)
    for reference in (span.input_blob, span.output_blob):
        if reference is not None:
            BlobReference.from_text(reference)
    if span.awaits is not None:
        values.decode_json(span.awaits)
        decoding.decode(span.awaits, _AwaitedNode)
    if span.task is not None:
        _check_task(span.task)
    if span.hashes is not None and len(span.hashes) > MAX_HASHES_BYTES:
        raise _refuse_write("The hashes are too long")
    for execution_id in (span.reused_from, span.key_id):
        if execution_id is not None and not ids.is_id(execution_id):
            raise _refuse_write("The execution of a span is not a valid ID")


def _check_step(step: AgentStep) -> None:
    """Raise a 422 error, or `InvalidJson`, for a step of an agent that could not be stored or read back."""
    texts = (step.node_id, step.iteration, step.request_hash, step.effect or "")
    lengths = (
        *((step.name, MAX_TASK_CHARACTERS), (step.key, MAX_TASK_CHARACTERS)),
        (step.call_id, MAX_CALL_ID_CHARACTERS),
    )
    numbers = (step.number, step.attempt, step.losses, step.conversation or 0)
    if not all(0 <= number <= MAX_STEP_NUMBER for number in numbers):
        raise _refuse_write("A step has a number that can't be stored")
    is_valid = all(len(text) <= limit and "\0" not in text for text, limit in lengths)
    if not is_valid or not all(is_storable_text(text) for text in texts):
        raise _refuse_write("A step has a text that can't be stored")
    for text in (step.arguments, step.result):
        if text is not None:
            values.decode_json(text)


def _check_model_calls(raw: bytes | None) -> None:
    if raw is not None:
        from engine.model_calls import ModelCallRecord  # noqa: PLC0415 - loaded with the first call of a model

        decoding.decode(raw, list[ModelCallRecord])


def _check_task(raw: bytes) -> None:
    """Raise a 422 error, or an error of the decoding, for a new task that could not be stored or read back."""
    task = decoding.decode(raw, NewTask)
    for value in (task.config, task.input):
        values.decode_json(bytes(value))
    texts = (task.type, task.version, task.content_hash, task.pool, task.key, task.concurrency_key or "")
    seconds = (
        *(task.timeout_seconds, task.lease_seconds, task.first_delay_seconds, task.max_delay_seconds),
        task.start_timeout_seconds or 0,
    )
    counts = (task.max_attempts, task.concurrency_limit or 1)
    if (
        not all(len(text) <= MAX_TASK_CHARACTERS and "\0" not in text for text in texts)
        or not all(0 <= one <= MAX_TASK_SECONDS for one in seconds)
        or not all(1 <= one <= MAX_TASK_COUNT for one in counts)
        or not 0 <= task.input_bytes <= MAX_TASK_INPUT_BYTES
        or not re.match(VERSION_PATTERN, task.version)
        or not re.match(TYPE_PATTERN, task.type)
    ):
        raise _refuse_write("A task is invalid")


def _iterate_moments(write: RunWrite) -> Iterator[datetime]:
    moments = [write.due_at, *(line.created_at for line in write.logs)]
    for attempt in write.attempts:
        moments += [attempt.started_at, attempt.ended_at, attempt.next_attempt_at]
    for step in write.steps:
        moments += [step.started_at, step.ended_at]
    for span in write.spans:
        moments += [span.started_at, span.ended_at, span.wake_at]
    yield from (moment for moment in moments if moment is not None)


def _refuse_write(message: str) -> ApiError:
    return errors.invalid([errors.problem("writes", "invalid-value", message)])
