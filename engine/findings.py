"""Findings of graph validation: the problem, its place, a suggestion, and an edit that is certain to help."""

from __future__ import annotations

from enum import StrEnum
from typing import TYPE_CHECKING, Final

from msgspec import Struct

if TYPE_CHECKING:
    from collections.abc import Sequence

    from engine.values import Json

MAX_FINDINGS: Final = 1_000
"""Maximum number of errors, and of warnings, in a list. Validation stops at more errors."""


class FindingType(StrEnum):
    """Types of findings."""

    EMPTY_WORKFLOW = "empty-workflow"
    MISSING_TRIGGER = "missing-trigger"
    MULTIPLE_TRIGGERS = "multiple-triggers"
    BROKEN_CONNECTION = "broken-connection"
    DUPLICATE_NODE_ID = "duplicate-node-id"
    CYCLE = "cycle"
    UNKNOWN_NODE_TYPE = "unknown-node-type"
    INVALID_PORT = "invalid-port"
    INVALID_CONFIG = "invalid-config"
    LOOP_BODY_ENTERED = "loop-body-entered"
    LOOPS_TOO_DEEP = "loops-too-deep"
    NOT_RUNNABLE = "not-runnable"
    """A warning in drafts, which are unfinished."""
    UNRESOLVED_MODEL_PLACEHOLDER = "unresolved-model-placeholder"
    """A place for a language model names none; a warning in drafts."""
    DISCONNECTED_NODE = "disconnected-node"
    MISSING_CONFIG = "missing-config"
    UNRESOLVED_MAPPING = "unresolved-mapping"
    INLINE_SECRET = "inline-secret"  # noqa: S105 - the name of a finding
    AGENT_EXFILTRATION_PATH = "agent-exfiltration-path"
    """An agent reads texts of outsiders and private data, and can send without an approval."""
    TOOL_WITHHELD = "tool-withheld"
    """A tool calls a workflow that writes, and the agent may only read."""
    TOOL_NOT_ACCEPTED = "tool-not-accepted"
    """The tool server of a tool refuses its calls: its definition is not accepted, or has changed."""
    MODEL_PRICE_UNKNOWN = "model-price-unknown"
    """A budget limits the cost of a model without a price, whose calls it refuses."""
    NO_WORKER = "no-worker"
    """No worker of the organization performs the tasks of a custom node now."""


WARNING_TYPES: Final = frozenset({
    FindingType.DISCONNECTED_NODE,
    FindingType.MISSING_CONFIG,
    FindingType.UNRESOLVED_MAPPING,
    FindingType.INLINE_SECRET,
    FindingType.AGENT_EXFILTRATION_PATH,
    FindingType.TOOL_WITHHELD,
    FindingType.TOOL_NOT_ACCEPTED,
    FindingType.MODEL_PRICE_UNKNOWN,
    FindingType.NO_WORKER,
})  # fmt: skip
"""Types that leave a graph valid."""

UNFINISHED_TYPES: Final = frozenset({
    FindingType.NOT_RUNNABLE,
    FindingType.UNRESOLVED_MODEL_PLACEHOLDER,
})  # fmt: skip
"""Types that leave a draft valid."""


class FixAction(StrEnum):
    """Kind of edit of a graph."""

    REMOVE_CONNECTION = "remove-connection"
    SET_PORT = "set-port"
    """Of a connection; `path` is the field: `sourcePort` or `targetPort`."""
    SET_NODE_TYPE = "set-node-type"
    SET_VERSION = "set-version"
    SET_CONFIG = "set-config"
    """`path` leads from the config to the value, possibly through objects and lists."""
    RENAME_CONFIG = "rename-config"
    """`path` leads from the config to the field, and `value` is its new name; its content stays."""
    SET_INPUT_MAPPING = "set-input-mapping"
    """`path` leads from the mappings to the value, mostly in one step: the name of the mapped field."""
    SET_PASS_THROUGH_VALUE = "set-pass-through-value"  # noqa: S105 - the name of an edit
    """`path` is the key of the output, and `value` the key of the input."""


class SuggestedFix(Struct, frozen=True):
    """Edit that fixes a finding: the node or connection, the path in it, and the new value."""

    action: FixAction
    node_id: str | None = None
    connection_id: str | None = None
    path: Sequence[str | int] = ()
    value: Json = None
    """Null for a removal."""

    def as_json(self) -> dict[str, Json]:
        fields: dict[str, Json] = {"action": self.action, **_id_fields(self.node_id, self.connection_id)}
        if self.path:
            fields["path"] = list(self.path)
        if self.value is not None:
            fields["value"] = self.value
        return fields


class GraphFinding(Struct, frozen=True):
    """Problem in a graph."""

    type: FindingType
    message: str
    suggestion: str
    node_id: str | None = None
    connection_id: str | None = None
    fix: SuggestedFix | None = None

    def as_json(self) -> dict[str, Json]:
        found: dict[str, Json] = {"type": self.type, "message": self.message, "suggestion": self.suggestion}
        found |= _id_fields(self.node_id, self.connection_id)
        if self.fix is not None:
            found["fix"] = self.fix.as_json()
        return found


class ValidationResult(Struct, frozen=True):
    """Findings of one validation; a graph with warnings alone is valid."""

    errors: tuple[GraphFinding, ...] = ()
    warnings: tuple[GraphFinding, ...] = ()
    is_truncated: bool = False
    """Whether there are, or may be, more findings than listed."""

    @property
    def is_valid(self) -> bool:
        return not self.errors


class FindingCollector:
    """Collector of the findings for a `ValidationResult`."""

    def __init__(self, *, is_draft: bool) -> None:
        self._warning_types = WARNING_TYPES | UNFINISHED_TYPES if is_draft else WARNING_TYPES
        self._errors: list[GraphFinding] = []
        self._warnings: list[GraphFinding] = []
        self._is_truncated = False

    def add(self, finding: GraphFinding) -> None:
        """Add a finding as an error or a warning, by its type.

        Beyond 1,000 errors, or 1,000 warnings, it is dropped, and the result is marked as truncated.
        """
        kept = self._warnings if finding.type in self._warning_types else self._errors
        if len(kept) < MAX_FINDINGS:
            kept.append(finding)
        else:
            self._is_truncated = True

    @property
    def has_capacity(self) -> bool:
        """Whether one more error would be listed; a graph lists 1,000 at most."""
        return len(self._errors) < MAX_FINDINGS

    def truncate(self) -> None:
        """Record that the rest of the graph was not validated."""
        self._is_truncated = True

    def result(self) -> ValidationResult:
        """Return the errors and warnings collected so far."""
        return ValidationResult(tuple(self._errors), tuple(self._warnings), self._is_truncated)


def _id_fields(node_id: str | None, connection_id: str | None) -> dict[str, Json]:
    ids: dict[str, Json] = {}
    if node_id is not None:
        ids["nodeId"] = node_id
    if connection_id is not None:
        ids["connectionId"] = connection_id
    return ids
