"""The audit trail, for admins to read: nothing in it is ever changed or deleted."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

from gateway.access import audit_log
from gateway.access.audit_log import AuditFilter
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
SINCE: Final = TimeParameter("since", "Only changes from this moment on.")
UNTIL: Final = TimeParameter("until", "Only changes before this moment.")
SORT: Final = sorted_by(audit_log.SORTABLE)
LISTED: Final = (OBJECT, ACTION, USER, SINCE, UNTIL, LIMIT, OFFSET, SORT)


class AuditEntryShape(WireStruct):
    """One change."""

    id: str
    action: AuditAction
    object_id: str
    """The workflow, data source, key or user that was changed."""
    user_id: str
    key_id: str
    """Whose key did it, and which; of whoever runs the server, `operator` both times."""
    before_hash: str | None
    """SHA-256 of what the object was; null where there was none."""
    after_hash: str | None
    """SHA-256 of what it became; null where it is gone."""
    created_at: Instant


class AuditEntryList(WireStruct):
    """A part of the audit trail; `count` tells how many entries there are in all."""

    count: int
    limit: int
    offset: int
    entries: Sequence[AuditEntryShape]


async def index(request: GatewayRequest) -> JsonResponse:
    """List who changed which workflow, data source, key or user of the organisation, and when."""
    query = request.query
    part, order = query.page(), query[SORT]
    wanted = AuditFilter(query[OBJECT], query[ACTION], query[USER], query[SINCE], query[UNTIL])
    async with request.gateway.database.read() as connection:
        count, found = await audit_log.list_entries(connection, request.caller, wanted, part, order)
    entries = [_entry(one) for one in found]
    return JsonResponse(AuditEntryList(count=count, limit=part.limit, offset=part.offset, entries=entries))


def _entry(entry: AuditEntry) -> AuditEntryShape:
    return AuditEntryShape(
        id=entry.id,
        action=AuditAction(entry.action),
        object_id=entry.object_id,
        user_id=entry.user_id,
        key_id=entry.key_id,
        before_hash=entry.before_hash,
        after_hash=entry.after_hash,
        created_at=instant(entry.created_at),
    )
