"""Writes without a recorded result: whether they may have had their effect."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from engine.run_records import CANDIDATE_STATUSES, NEEDS_CONFIRM_CODE, SpanStatus

if TYPE_CHECKING:
    from engine.run_records import NodeSpan

PROOFS_OF_NO_EFFECT: Final = frozenset(
    {
        *(
            "not-connected",
            "name-not-resolved",
            "address-not-allowed",
            "port-not-allowed",
            "host-not-allowed",
        ),
        *("invalid-url", "invalid-request", "invalid-config", "missing-config", "wrong-data-source"),
        *(
            "data-source-not-found",
            "data-source-unavailable",
            "data-source-unreadable",
            "invalid-data-source",
        ),
        *("tool-not-accepted", "tool-changed", "tool-server-busy", "tool-server-key-refused"),
        *("sql-error", "statement-refused", "invalid-rows", "duplicate-column"),
        *("login-refused", "tls-failed", "invalid-address", "invalid-header", "mail-too-large"),
        *("too-many-recipients", "too-many-attachments", "invalid-key", "folder-full"),
        *("workflow-not-found", "workflow-paused", "workflow-archived", "invalid-definition"),
        *("run-too-deep", "too-many-sub-runs", "concurrency-limit"),
    }
)
"""Errors of writes, besides HTTP 4xx, which are raised before anything is sent or prove that it was refused."""
_MAY_HAVE_HAPPENED: Final = ("http-408", "http-425")


def was_refused(span: NodeSpan) -> bool:
    """Return whether a node failed because a replay did not repeat its write without a confirmation.

    The write had its effect in an earlier run.
    """
    return span.error is not None and span.error.code == NEEDS_CONFIRM_CODE


def may_have_happened(span: NodeSpan) -> bool:
    """Return whether a write that was not completed may have had its effect.

    It has not if no request was recorded, or if its only attempt failed with an error that proves it, such as
    most answers 4xx.
    """
    if span.resolved_config is None:
        return False
    if span.status in CANDIDATE_STATUSES or span.status is not SpanStatus.FAILED or span.error is None:
        return True
    if span.attempt > 1:
        return True  # an earlier attempt may have ended otherwise
    code = span.error.code
    # A refused write had its effect in an earlier run: its code is no proof.
    is_refused = code.startswith("http-4") and code not in _MAY_HAVE_HAPPENED
    return not is_refused and code not in PROOFS_OF_NO_EFFECT


def keep_request(span: NodeSpan) -> tuple[bytes | None, bytes | None]:
    """Return the request, and the hashes of its key, to record for a write with this span that a replay skips.

    By these, a later replay knows that the write may have happened. The hashes are None if the write has left by a port
    or was refused: then even the same request must not be repeated. Both are None if nothing has happened.
    """
    is_completed = span.port is not None and span.error is None
    if not is_completed and not may_have_happened(span):
        return None, None
    if span.port is not None or was_refused(span):
        return span.resolved_config, None
    return span.resolved_config, span.hashes
