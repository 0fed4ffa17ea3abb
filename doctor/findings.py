"""Findings of the doctor: their classes, severities, and the fixes that exist for them."""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from typing import TYPE_CHECKING, Final, TypeAlias

from msgspec import Struct, field

if TYPE_CHECKING:
    from engine.values import Json


class DriftClass(StrEnum):
    """Kind of finding."""

    LEASE_EXPIRED = "lease-expired"
    PENDING_UNCLAIMED = "pending-unclaimed"
    SLOT_UNUSED = "slot-unused"
    SCHEDULE_OVERDUE = "schedule-overdue"
    WAIT_OVERDUE = "wait-overdue"
    DEFERRED_OVERDUE = "deferred-overdue"
    AWAKE_AGAINST_POLICY = "awake-against-policy"
    ASLEEP_AGAINST_WINDOW = "asleep-against-window"
    REPLICAS_DIFFER = "replicas-differ"
    MANIFEST_DIFFERS = "manifest-differs"
    STATUS_DIFFERS = "status-differs"
    CHANGE_NOT_APPLIED = "change-not-applied"
    WORKFLOW_WITHOUT_DEPLOYMENT = "workflow-without-deployment"
    DEPLOYMENT_WITHOUT_WORKFLOW = "deployment-without-workflow"
    BLOB_WITHOUT_ROW = "blob-without-row"
    ROW_WITHOUT_BLOB = "row-without-blob"
    MIGRATION_BEHIND = "migration-behind"
    INVALID_INDEX = "invalid-index"
    NO_LEADER = "no-leader"
    NO_WORKER = "no-worker"
    CLOCK_SKEW = "clock-skew"
    VERSIONS_DIFFER = "versions-differ"
    AUDIT_CHAIN_BROKEN = "audit-chain-broken"
    UNSAFE_SETTING = "unsafe-setting"


class DriftSeverity(StrEnum):
    """Urgency of a finding."""

    WARNING = "warning"
    """It costs money or time, or will fail later."""
    CRITICAL = "critical"
    """Accepted work does not go on, or data is not safe."""


class DriftSubject(Struct, frozen=True):
    """Object of a finding; `organization_id` is None for parts of the server."""

    type: str
    id: str
    organization_id: str | None = None


FindingKey: TypeAlias = tuple[DriftClass, str, str]
"""Class of a finding, and type and id of its subject."""


class DriftFinding(Struct, frozen=True):
    """Finding about one subject."""

    drift_class: DriftClass
    subject: DriftSubject
    message: str
    """Fact in one sentence, for an operator."""
    evidence: Mapping[str, Json] = field(default_factory=dict)
    severity: DriftSeverity = DriftSeverity.WARNING
    remedy: str | None = None
    """Action of a person, for a finding without a fix."""

    @property
    def key(self) -> FindingKey:
        """Identity of a finding in two observations: class, and type and id of its subject."""
        return (self.drift_class, self.subject.type, self.subject.id)


class DriftFix(Struct, frozen=True):
    """Fix of a class of findings, by a guarded statement of the server's normal path."""

    id: str
    description: str
    is_safe: bool
    """Whether the server does the same by itself, so that nothing can be lost by it."""


FIXES: Final[Mapping[DriftClass, DriftFix]] = {
    DriftClass.LEASE_EXPIRED: DriftFix(
        "reclaim-leases", "returns runs of lost workers to the queue", is_safe=True
    ),
    DriftClass.PENDING_UNCLAIMED: DriftFix("wake-workers", "wakes all workers", is_safe=True),
    DriftClass.SLOT_UNUSED: DriftFix("admit-waiting-runs", "gives free slots to waiting runs", is_safe=True),
    DriftClass.SCHEDULE_OVERDUE: DriftFix(
        "start-due-schedules", "starts the runs of due schedules", is_safe=True
    ),
    DriftClass.WAIT_OVERDUE: DriftFix("promote-due-runs", "returns due runs to the queue", is_safe=True),
    DriftClass.DEFERRED_OVERDUE: DriftFix(
        "wake-deployments", "wakes deployments with due runs", is_safe=True
    ),
    DriftClass.AWAKE_AGAINST_POLICY: DriftFix(
        "keep-policies", "applies the lifecycle policies", is_safe=True
    ),
    DriftClass.ASLEEP_AGAINST_WINDOW: DriftFix(
        "keep-policies", "applies the lifecycle policies", is_safe=True
    ),
    DriftClass.BLOB_WITHOUT_ROW: DriftFix(
        "delete-orphaned-blobs", "deletes blobs that have belonged to no run for a day", is_safe=True
    ),
    DriftClass.CHANGE_NOT_APPLIED: DriftFix("reconcile", "asks the deployer to apply it again", is_safe=True),
    DriftClass.REPLICAS_DIFFER: DriftFix("reconcile", "asks the deployer to apply it again", is_safe=True),
    DriftClass.MANIFEST_DIFFERS: DriftFix("reconcile", "asks the deployer to apply it again", is_safe=True),
    DriftClass.STATUS_DIFFERS: DriftFix("reconcile", "asks the deployer to apply it again", is_safe=True),
    DriftClass.WORKFLOW_WITHOUT_DEPLOYMENT: DriftFix(
        "reconcile", "asks the deployer to apply it again", is_safe=True
    ),
    DriftClass.DEPLOYMENT_WITHOUT_WORKFLOW: DriftFix(
        "delete-deployment", "deletes the deployment's objects from the cluster", is_safe=False
    ),
}
"""Fixes by class; a class without one needs a person, and its findings have a remedy."""
