"""Audit trail for admins. Entries are never changed or deleted."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

from gateway.access import audit_log
from gateway.access.audit_log import AuditFilter
from gateway.http import keyset
from gateway.http.keyset import AFTER, KeysetPage
from gateway.http.parameters import LIMIT, OFFSET, ChoiceParameter, TextParameter, TimeParameter, sorted_by
from gateway.http.request import GatewayRequest
from gateway.http.responses import JsonResponse
from gateway.http.wire import Instant, WireStruct, instant
from models.audit import AuditAction

if TYPE_CHECKING:
    from models.audit import AuditEntry

OBJECT: Final = TextParameter("objectId", "Only changes of this workflow, data source, key or user.")
ACTION: Final = ChoiceParameter("action", "Only changes of this kind.", AuditAction)
USER: Final = TextParameter("userId", "Only changes by this user.")
SINCE: Final = TimeParameter("since", "Only changes from this time on.")
UNTIL: Final = TimeParameter("until", "Only changes before this time.")
SORT: Final = sorted_by(audit_log.SORTABLE)
LISTED: Final = (OBJECT, ACTION, USER, SINCE, UNTIL, LIMIT, OFFSET, AFTER, SORT)


class AuditChange(WireStruct):
    """Change of a value at a path."""

    path: str
    before: str | None
    """JSON text, `sha256:` and the hash of a long one, or `(hidden)` where it may be secret; null without a value."""
    after: str | None


class AuditEntryShape(WireStruct):
    """One change, as the API shows it."""

    id: str
    action: AuditAction
    object_id: str
    """Changed workflow, data source, key or user."""
    user_id: str
    key_id: str
    """Key of the author. Both ids are `operator` for a change by the operator of the server."""
    before_hash: str | None
    """SHA-256 of the object before the change; null when it was created."""
    after_hash: str | None
    """SHA-256 of the object after the change; null when it was deleted."""
    request_id: str | None
    """Request that made the change; null for changes by the operator of the server."""
    address_hash: str | None
    """Keyed hash of the address that the request came from: equal addresses have equal hashes."""
    changes: Sequence[AuditChange] | None
    """First 20 changes by path; null where they are not recorded."""
    sequence: int | None
    """Place in the hash chain of the organization; null in the first seconds."""
    chain_hash: str | None
    """SHA-256 of the entry and of the chain hash before it, by which changed or missing entries are found."""
    created_at: Instant


class AuditEntryList(KeysetPage, kw_only=True):
    """Page of the audit trail; `count` is the number of all matching entries, with `after` up to 10,000."""

    count: int
    limit: int
    offset: int
    entries: Sequence[AuditEntryShape]


async def index(request: GatewayRequest) -> JsonResponse:
    """List changes of workflows, data sources, keys and users of the organization, with author and time."""
    query = request.query
    part, order = query.page(), query[SORT]
    wanted = AuditFilter(query[OBJECT], query[ACTION], query[USER], query[SINCE], query[UNTIL])
    bounds = keyset.read_bounds(query, SORT)
    async with request.gateway.database.read() as connection:
        page = await audit_log.list_entries(connection, request.caller, wanted, part, order, bounds)
    return JsonResponse(
        AuditEntryList(
            count=page.count,
            count_is_lower_bound=page.is_lower_bound,
            limit=part.limit,
            offset=part.offset,
            next=page.next_cursor,
            entries=[_show_entry(one) for one in page.items],
        )
    )


def _show_entry(entry: AuditEntry) -> AuditEntryShape:
    """Return an entry of the audit trail as the API shows it."""
    return AuditEntryShape(
        id=entry.id,
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
        created_at=instant(entry.created_at),
    )
