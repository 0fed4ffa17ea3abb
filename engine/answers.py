"""Answers to waiting nodes, and what stands for one that nobody gave, as they are kept."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import msgspec

from engine import values
from engine.errors import NodeError
from engine.events import FailureCause
from engine.node import OUTPUT, Result

if TYPE_CHECKING:
    from engine.node import Await
    from engine.values import Json


class _Error(msgspec.Struct):
    code: str
    message: str
    cause: FailureCause | None = None


class _Answer(msgspec.Struct):
    """One of the two."""

    output: Any = None
    port: str = OUTPUT
    error: _Error | None = None


class _Awaits(msgspec.Struct):
    expired: _Answer | None = None


def result(payload: bytes) -> Result:
    """Return what an answer gives its node; raises `InvalidJson`, and `NodeError` for a failure."""
    answer = msgspec.convert(values.decode(payload), _Answer)
    if answer.error is not None:
        error = answer.error
        raise NodeError(error.message, code=error.code, cause=error.cause)
    return Result(answer.output, answer.port)


def awaits(outcome: Await) -> Json:
    """Return what is kept of a node that waits for an answer."""
    expired = outcome.expired
    return {
        "kind": outcome.kind.value,
        "request": outcome.request,
        "expired": None if expired is None else {"output": expired.output, "port": expired.port},
    }


def expired(kept: bytes) -> Result | None:
    """Return what a node gives when nobody has answered in time; None: it fails."""
    found = msgspec.convert(values.decode(kept), _Awaits).expired
    return None if found is None else Result(found.output, found.port)
