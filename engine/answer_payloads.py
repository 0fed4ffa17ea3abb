"""Stored form of wait answers, and of the default that applies when a wait expires."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar

import msgspec

from engine import values
from engine.node_api import OUTPUT, NodeResult
from engine.run_errors import FailureCause, NodeError
from engine.values import InvalidJson

if TYPE_CHECKING:
    from engine.node_api import AnswerWait
    from engine.values import Json


Record = TypeVar("Record")


class _AnswerError(msgspec.Struct):
    code: str
    message: str
    cause: FailureCause | None = None
    attempt: int | None = None


class _AnswerRecord(msgspec.Struct):
    """Either an output or an error."""

    output: Any = None
    port: str = OUTPUT
    error: _AnswerError | None = None
    logs: list[tuple[str, str]] = []


class _WaitRecord(msgspec.Struct):
    expired: _AnswerRecord | None = None


def decode_logs(payload: bytes) -> list[tuple[str, str]]:
    """Return the log lines of the stored answer to a waiting node, each as level and message; empty without any.

    Raises `InvalidJson` for malformed JSON that mentions logs.
    """
    if b'"logs":' not in payload:
        return []
    return _decode(payload, _AnswerRecord).logs


def decode_answer(payload: bytes) -> NodeResult:
    """Return the result, with output and port, that a stored answer gives its node.

    Raises `InvalidJson` for a malformed payload, and `NodeError` if the answer is a failure.
    """
    answer = _decode(payload, _AnswerRecord)
    if answer.error is not None:
        error = answer.error
        raise NodeError(error.message, code=error.code, cause=error.cause, attempt=error.attempt)
    return NodeResult(answer.output, answer.port)


def encode_wait(outcome: AnswerWait) -> Json:
    """Return the JSON form in which a wait for an answer is stored: its kind, its request, and its result at
    expiry or None.
    """
    expired = outcome.expired
    return {
        "kind": outcome.kind.value,
        "request": outcome.request,
        "expired": None if expired is None else {"output": expired.output, "port": expired.port},
    }


def decode_expired(stored_wait: bytes) -> NodeResult | None:
    """Return the result that a node has when its wait expires, from the stored wait; None if the node fails then.

    Raises `InvalidJson` for a malformed wait.
    """
    found = _decode(stored_wait, _WaitRecord).expired
    return None if found is None else NodeResult(found.output, found.port)


def _decode(stored: bytes, kind: type[Record]) -> Record:
    """Return the record of a stored JSON text; raises `InvalidJson` if it is malformed or is no such record."""
    try:
        return msgspec.convert(values.decode_json(stored), kind)
    except msgspec.ValidationError as error:
        message = f"The stored text is malformed: {error}"
        raise InvalidJson("malformed-json", message) from error
