"""Bulk operations in words, for the pages that begin and follow them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

RECENT_OPERATIONS: Final = 5
PATH: Final = "/api/v1/bulk-operations"
PACES: Final = ((2, "2 a second"), (10, "10 a second"), (100, "100 a second"), (1000, "at once"))
ACTS: Final = {
    "redrive-dead-letters": ("Redrive", "redriven"),
    "replay-dead-letters": ("Replay", "replayed"),
    "purge-dead-letters": ("Discard", "discarded"),
    "cancel-executions": ("Cancel runs", "canceled"),
    "retry-executions": ("Resume runs", "resumed"),
    "replay-executions": ("Replay runs", "replayed"),
}
"""Name and participle of each act of a bulk operation."""
ENDS: Final = {
    "stopped": "stopped",
    "first-failed": "the first one did not complete",
    "key-not-valid": "its key is no longer valid",
    "scope-required": "its key may not run workflows",
    "internal-error": "an error of the server, which its log has",
}
"""Words for the end of a bulk operation before its last object, by status or reason."""


def describe_operations(listed: Mapping[str, Any] | None) -> Sequence[Mapping[str, Any]]:
    """Return the bulk operations of an API answer, each with the name and participle of its act and its end in words.

    The end of an open or completed operation is empty. None, for a visitor who may see none, gives no operations.
    """
    return [_describe(one) for one in (listed or {}).get("operations", ())]


def _describe(operation: Mapping[str, Any]) -> Mapping[str, Any]:
    act, done_word = ACTS[operation["action"]]
    end = ENDS.get(operation["endReason"] or operation["status"], "")
    return {**operation, "act": act, "done_word": done_word, "end": end}
