"""Causes of failed runs: node, code and message of the innermost error, and a fingerprint of all that failed alike."""

from __future__ import annotations

import re
from collections.abc import Mapping
from enum import StrEnum
from functools import lru_cache
from hashlib import sha256
from typing import Any, Final

import msgspec
from msgspec import Struct

from engine.run_records import EXPIRED_CODE, TIMEOUT_CODE
from journal.tasks.task_moves import START_TIMEOUT_CODE
from json_text import decoding

FINGERPRINT_LENGTH: Final = 16
FINGERPRINTS: Final = 2_000
MESSAGE_LENGTH: Final = 200
REMEMBERED_LENGTH: Final = 2_000
"""Characters of the JSON text of an error up to which its cause is remembered."""
_VARIABLE: Final = re.compile(
    r"\"[^\"]*\"|'[^']*'|“[^”]*”|\b[0-9a-fA-F-]{12,}\b|\b\w+_[0-9A-Za-z]{10,}\b|\d+"
)
"""Parts of an error message that differ between errors with one cause: quoted texts, ids and numbers."""


class FailureKind(StrEnum):
    """Kind of the failure of a run."""

    FAILED = "failed"
    """A node ended the run with an error."""
    CRASHED = "crashed"
    """Its workers died three times in a row."""
    TIMED_OUT = "timed-out"
    """Run, node or wait took too long."""


_KINDS_BY_CODE: Final = {
    "crashed": FailureKind.CRASHED,
    TIMEOUT_CODE: FailureKind.TIMED_OUT,
    EXPIRED_CODE: FailureKind.TIMED_OUT,
    START_TIMEOUT_CODE: FailureKind.TIMED_OUT,
}


class ErrorCause(Struct, frozen=True):
    """Node, code and message of the error of a run, and the fingerprint of all runs that failed alike."""

    node_id: str | None
    code: str
    message: str
    fingerprint: str

    @property
    def kind(self) -> FailureKind:
        return _KINDS_BY_CODE.get(self.code, FailureKind.FAILED)


def describe_error(workflow_id: str, stored: Mapping[str, Any] | None) -> ErrorCause:
    """Return node, code and message of the innermost error of a failed run of a workflow, and a fingerprint of 16
    hexadecimal digits; None has the code `unknown`, no node and an empty message.

    Runs with one fingerprint failed in one node with one code and kind of message: its first 200 characters, in which
    numbers, ids and quoted texts don't count.
    """
    error: Mapping[str, Any] = stored or {}
    cause: Mapping[str, Any] = error.get("cause") or error
    node_id = cause.get("nodeId") or error.get("nodeId")
    code, message = str(cause.get("code", "unknown")), str(cause.get("message", ""))
    return ErrorCause(node_id, code, message, build_fingerprint(workflow_id, node_id, code, message))


def describe_stored(workflow_id: str, stored: str | None) -> ErrorCause:
    """Return the same as `describe_error` for an error as its JSON text; short texts are decoded once for many runs."""
    describe = _describe_text if len(stored or "") <= REMEMBERED_LENGTH else _describe_text.__wrapped__
    return describe(workflow_id, stored)


@lru_cache(FINGERPRINTS)
def _describe_text(workflow_id: str, stored: str | None) -> ErrorCause:
    return describe_error(workflow_id, decoding.decode(stored) if stored else None)


def build_fingerprint(workflow_id: str, node_id: str | None, code: str, message: str) -> str:
    """Return the fingerprint, 16 hexadecimal digits, of errors with this workflow, node, code and kind of message.

    Only the first 200 characters of the message count, without numbers, ids and quoted texts.
    """
    return _build_fingerprint(workflow_id, node_id, code, message[:MESSAGE_LENGTH])


@lru_cache(FINGERPRINTS)
def _build_fingerprint(workflow_id: str, node_id: str | None, code: str, message: str) -> str:
    """Return the fingerprint of an error; it is cached, since thousands of runs fail with the same few errors."""
    cause = msgspec.json.encode([workflow_id, node_id, code, _VARIABLE.sub("…", message)])
    return sha256(cause).hexdigest()[:FINGERPRINT_LENGTH]
