"""API shapes of validation findings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import msgspec
from msgspec import UNSET, UnsetType

from engine.findings import FindingType, FixAction
from gateway.http.wire import WireStruct

if TYPE_CHECKING:
    from engine.findings import GraphFinding


class FixShape(WireStruct):
    """Edit that resolves a finding: the field of the node or connection, and its new value."""

    action: FixAction
    node_id: str | UnsetType = UNSET
    connection_id: str | UnsetType = UNSET
    path: Sequence[str | int] | UnsetType = UNSET
    value: Any = UNSET


class FindingShape(WireStruct):
    """Validation finding with a suggestion."""

    type: FindingType
    message: str
    suggestion: str
    node_id: str | UnsetType = UNSET
    connection_id: str | UnsetType = UNSET
    fix: FixShape | UnsetType = UNSET


def show_findings(findings: Sequence[GraphFinding]) -> list[FindingShape]:
    return [msgspec.convert(finding.as_json(), FindingShape) for finding in findings]
