"""What validation finds in a graph, as clients see it."""

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
    """An edit that is certain to mend a finding: where in the node or connection, and what is to stand there."""

    action: FixAction
    node_id: str | UnsetType = UNSET
    connection_id: str | UnsetType = UNSET
    path: Sequence[str | int] | UnsetType = UNSET
    value: Any = UNSET


class FindingShape(WireStruct):
    """One thing to mend, and how."""

    type: FindingType
    message: str
    suggestion: str
    node_id: str | UnsetType = UNSET
    connection_id: str | UnsetType = UNSET
    fix: FixShape | UnsetType = UNSET


def show_finding(findings: Sequence[GraphFinding]) -> list[FindingShape]:
    return [msgspec.convert(finding.as_json(), FindingShape) for finding in findings]
