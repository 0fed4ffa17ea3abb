"""Endpoint that examines the server's stores for drift."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

import msgspec
from msgspec.structs import replace

from doctor import examination
from doctor.examination import AuditScope, ExaminedStores, StoreState
from doctor.findings import FIXES, DriftClass, DriftSeverity
from gateway.drift import recent_observations
from gateway.http import errors
from gateway.http.request import GatewayRequest
from gateway.http.responses import JsonResponse
from gateway.http.wire import Instant, WireStruct, optional_instant

if TYPE_CHECKING:
    from doctor.examination import ExaminationReport
    from doctor.findings import DriftFinding, DriftFix

AUDIT_ENTRIES: Final = 1_000
"""Newest audit entries of the caller's organization whose chain a request verifies."""


class DriftSubjectShape(WireStruct):
    """Object of a finding: an execution, schedule or deployment by its id, or a part of the server by its name."""

    type: str
    id: str


class DriftFixShape(WireStruct):
    """Fix of a finding, and the command with which the operator of the server makes it."""

    id: str
    description: str
    safe: bool
    """Whether the server does the same by itself, so that nothing can be lost by it."""
    command: str


class DriftFindingShape(WireStruct):
    """Finding that both observations have."""

    drift_class: DriftClass = msgspec.field(name="class")
    severity: DriftSeverity
    subject: DriftSubjectShape
    message: str
    evidence: Mapping[str, Any]
    fix: DriftFixShape | None
    """Null if only a person can mend it; then `remedy` says how."""
    remedy: str | None


class DriftReport(WireStruct):
    """Findings about the caller's organization and about the server, the most urgent first."""

    as_of: Instant | None
    clean: bool
    """True only if every examined store answered, and nothing was found."""
    stores: Mapping[str, StoreState]
    """Result for each store: `ok`, `unreachable`, or `not-examined` from the gateway."""
    findings: Sequence[DriftFindingShape]


async def show(request: GatewayRequest) -> JsonResponse:
    """Look for drift: accepted work that stands still, deployments that differ from their policy, absent processes.

    The stores are observed twice, a second apart, and only findings of both observations are returned. An observation
    of the last minute is the first of the two if it has all findings; else the answer takes a second where something
    is found. Objects of other organizations are left out. `pilotflame doctor` also examines blobs, the cluster and
    settings, and fixes findings.
    """
    gateway, caller = request.gateway, request.caller
    audit = AuditScope(caller.organization_id, AUDIT_ENTRIES)
    stores = ExaminedStores(gateway.database, gateway.broker, audit=audit)
    recent = gateway.recent_observations
    begun_at = recent.now()
    report = await examination.examine(
        stores,
        grace_seconds=recent_observations.GRACE_SECONDS,
        seen_before=recent.find(caller.organization_id),
    )
    recent.add(caller.organization_id, report.observed, begun_at)
    if report.as_of is None and report.stores["database"] is StoreState.UNREACHABLE:
        raise errors.not_ready("The database does not answer")
    visible = [
        finding
        for finding in report.findings
        if finding.subject.organization_id in (None, caller.organization_id)
    ]
    return JsonResponse(build_report(replace(report, findings=visible)))


def build_report(report: ExaminationReport) -> DriftReport:
    """Return a report of drift in the form that the API and `pilotflame doctor --json` show.

    Drift is a contradiction between database, Redis and processes.
    """
    return DriftReport(
        as_of=optional_instant(report.as_of),
        clean=report.is_clean,
        stores=report.stores,
        findings=[_show_finding(finding) for finding in report.findings],
    )


def _show_finding(finding: DriftFinding) -> DriftFindingShape:
    """Return a finding of drift (a contradiction between database, Redis and processes) as the API shows it.

    Its `fix` is the repair that `pilotflame doctor --fix` makes for this class of drift; None if there is none.
    """
    fix = FIXES.get(finding.drift_class)
    return DriftFindingShape(
        drift_class=finding.drift_class,
        severity=finding.severity,
        subject=DriftSubjectShape(type=finding.subject.type, id=finding.subject.id),
        message=finding.message,
        evidence=finding.evidence,
        fix=None if fix is None else _show_fix(finding.drift_class, fix),
        remedy=finding.remedy,
    )


def _show_fix(drift_class: DriftClass, fix: DriftFix) -> DriftFixShape:
    return DriftFixShape(
        id=fix.id,
        description=fix.description,
        safe=fix.is_safe,
        command=f"pilotflame doctor --fix {drift_class}",
    )
