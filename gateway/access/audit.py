"""Audit trail for admins: changes, which are never changed or deleted, and decisions of the system."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

from gateway.access import audit_rows
from gateway.access.audit_rows import (
    SYSTEM,
    AuditFilter,
    AuditKind,
    AuditSelection,
    DeferredDelivery,
    ReclaimedExecution,
)
from gateway.http import keyset
from gateway.http.keyset import AFTER, KeysetPage
from gateway.http.parameters import (
    LIMIT,
    OFFSET,
    ChoiceParameter,
    TextParameter,
    TimeParameter,
    sorted_by,
)
from gateway.http.request import GatewayRequest
from gateway.http.responses import JsonResponse
from gateway.http.wire import Instant, WireStruct, instant, optional_instant
from journal.explanations.blockers import BlockerCode
from models.audit import AuditAction, AuditEntry, SystemDecision
from models.lifecycle_policy import LifecycleAction, LifecycleReason

if TYPE_CHECKING:
    from datetime import datetime

    from gateway.access.audit_rows import AuditRow
    from models.deployment import LifecycleDecision

KIND: Final = ChoiceParameter(
    "kind",
    "`change` (default): changes of objects; `decision`: decisions of the system; `all`: both.",
    AuditSelection,
)
OBJECT: Final = TextParameter("objectId", "Only entries about this workflow, data source, key or user.")
ACTION: Final = ChoiceParameter("action", "Only entries with this action.", AuditAction)
USER: Final = TextParameter("userId", "Only entries by this user; `system`: decisions by a policy.")
KEY: Final = TextParameter("keyId", "Only changes by this key.")
REQUEST: Final = TextParameter("requestId", "Only changes by this request.")
ADDRESS: Final = TextParameter("addressHash", "Only changes from the address with this hash.")
REASON: Final = ChoiceParameter(
    "reason", "Only decisions about deployments with this reason.", LifecycleReason
)
SINCE: Final = TimeParameter("since", "Only entries from this time on.")
UNTIL: Final = TimeParameter("until", "Only entries before this time.")
SORT: Final = sorted_by(audit_rows.SORTABLE)
LISTED: Final = (
    *(KIND, OBJECT, ACTION, USER, KEY, REQUEST, ADDRESS, REASON, SINCE, UNTIL),
    *(LIMIT, OFFSET, AFTER, SORT),
)
DECISION_ACTIONS: Final = {action: name for name, action in audit_rows.LIFECYCLE_ACTIONS.items()}


class AuditChange(WireStruct):
    """Change of a value at a path."""

    path: str
    before: str | None
    """JSON text, `sha256:` and the hash of a long one, or `(hidden)` where it may be secret; null without a value."""
    after: str | None


class AuditEntryShape(WireStruct):
    """One change or decision, as the API shows it."""

    id: str
    kind: AuditKind
    action: AuditAction
    object_id: str
    """Changed workflow, data source, key or user; workflow of a decision."""
    user_id: str
    key_id: str
    """Key of the author. Both ids are `operator` for a change by the operator of the server, and `system` for a
    decision; a decision that a user has asked for names the user.
    """
    before_hash: str | None
    """SHA-256 of the object before the change; null when it was created."""
    after_hash: str | None
    """SHA-256 of the object after the change; null when it was deleted."""
    request_id: str | None
    """Request that made the change; null for decisions and for changes by the operator of the server."""
    address_hash: str | None
    """Keyed hash of the address that the request came from: equal addresses have equal hashes."""
    changes: Sequence[AuditChange] | None
    """First 20 changes by path; null where they are not recorded."""
    sequence: int | None
    """Place in the hash chain of the organization; null in the first seconds."""
    chain_hash: str | None
    """SHA-256 of the entry and of the chain hash before it, by which changed or missing entries are found."""
    reason: str | None
    """Reason of a decision, such as `idle`, `worker-lost` or `retention`; null for a change."""
    inputs: Mapping[str, Any] | None
    """Facts on which a decision is based, such as the policy, the delivery or the retention; null for a change."""
    created_at: Instant


class AuditEntryList(KeysetPage, kw_only=True):
    """Page of the audit trail; `count` is the number of all matching entries, with `after` up to 10,000."""

    count: int
    limit: int
    offset: int
    entries: Sequence[AuditEntryShape]


async def index(request: GatewayRequest) -> JsonResponse:
    """List changes of workflows, data sources, keys and users of the organization, with author and time.

    With `kind`, the list also has the decisions of the system to start, wake, drain and stop deployments, to defer
    deliveries, to take executions back from lost workers and to delete old executions, with reason and inputs.
    Decisions are kept for 30 days, deferred deliveries as long as other ones, reclaims as long as their executions,
    and changes for good.
    """
    query = request.query
    part = query.page()
    wanted = AuditFilter(
        selection=query[KIND] or AuditSelection.CHANGE,
        object_id=query[OBJECT],
        action=query[ACTION],
        user_id=query[USER],
        key_id=query[KEY],
        request_id=query[REQUEST],
        address_hash=query[ADDRESS],
        reason=query[REASON],
        since=query[SINCE],
        until=query[UNTIL],
    )
    bounds = keyset.read_bounds(query, SORT)
    is_newest_first = SORT.is_newest_first(query[SORT]) is not False
    async with request.gateway.database.read() as connection:
        page = await audit_rows.list_entries(
            connection, request.caller, wanted, part, bounds, is_newest_first=is_newest_first
        )
    return JsonResponse(
        AuditEntryList(
            count=page.count,
            count_is_lower_bound=page.is_lower_bound,
            limit=part.limit,
            offset=part.offset,
            next=page.next_cursor,
            entries=[_show_row(one) for one in page.items],
        )
    )


def _show_row(row: AuditRow) -> AuditEntryShape:
    match row:
        case AuditEntry():
            return _show_entry(row)
        case DeferredDelivery():
            return _show_deferral(row)
        case ReclaimedExecution():
            return _show_reclaim(row)
        case SystemDecision():
            return _show_by_system(
                row.id, AuditAction(row.action), row.workflow_id, row.reason, row.inputs, row.at
            )
        case _:
            return _show_decision(row)


def _show_deferral(row: DeferredDelivery) -> AuditEntryShape:
    """Return a delivery whose run starts later as an audit entry.

    Its reason is the part of the delivery's reason before the first `:`, None without a reason.
    """
    inputs = {
        "deliveryId": row.id,
        "executionId": row.execution_id,
        "route": row.route,
        "notBefore": optional_instant(row.not_before),
    }
    code = (row.reason or "").partition(":")[0] or None
    return _show_by_system(
        row.id, AuditAction.DELIVERY_DEFERRED, row.workflow_id, code, inputs, row.created_at
    )


def _show_reclaim(row: ReclaimedExecution) -> AuditEntryShape:
    """Return the reclaim of an execution from a lost worker as the API shows it."""
    return _show_by_system(
        row.id,
        AuditAction.EXECUTION_RECLAIMED,
        row.workflow_id,
        BlockerCode.WORKER_LOST.value,
        {"executionId": row.execution_id, "leaseEndedAt": instant(row.started_at)},
        row.created_at,
    )


def _show_by_system(
    item_id: str,
    action: AuditAction,
    workflow_id: str,
    reason: str | None,
    inputs: Mapping[str, Any],
    at: datetime,
) -> AuditEntryShape:
    """Return a decision that no user has asked for as the API shows it."""
    return AuditEntryShape(
        id=item_id,
        kind=AuditKind.DECISION,
        action=action,
        object_id=workflow_id,
        user_id=SYSTEM,
        key_id=SYSTEM,
        before_hash=None,
        after_hash=None,
        request_id=None,
        address_hash=None,
        changes=None,
        sequence=None,
        chain_hash=None,
        reason=reason,
        inputs=inputs,
        created_at=instant(at),
    )


def _show_entry(entry: AuditEntry) -> AuditEntryShape:
    """Return a change as the API shows it."""
    return AuditEntryShape(
        id=entry.id,
        kind=AuditKind.CHANGE,
        action=AuditAction(entry.action),
        object_id=entry.object_id,
        user_id=entry.user_id,
        key_id=entry.key_id,
        before_hash=entry.before_hash,
        after_hash=entry.after_hash,
        request_id=entry.request_id,
        address_hash=entry.address_hash,
        changes=None if entry.changes is None else [AuditChange(**change) for change in entry.changes],
        sequence=entry.sequence,
        chain_hash=entry.chain_hash,
        reason=None,
        inputs=None,
        created_at=instant(entry.created_at),
    )


def _show_decision(decision: LifecycleDecision) -> AuditEntryShape:
    """Return a decision about a deployment as the API shows it."""
    return AuditEntryShape(
        id=decision.id,
        kind=AuditKind.DECISION,
        action=DECISION_ACTIONS[LifecycleAction(decision.action)],
        object_id=decision.workflow_id,
        user_id=decision.user_id or SYSTEM,
        key_id=SYSTEM,
        before_hash=None,
        after_hash=None,
        request_id=None,
        address_hash=None,
        changes=None,
        sequence=None,
        chain_hash=None,
        reason=LifecycleReason(decision.reason),
        inputs=decision.inputs,
        created_at=instant(decision.at),
    )
