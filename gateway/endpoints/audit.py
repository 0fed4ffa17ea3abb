"""The audit trail, for admins to read: nothing in it is ever changed or deleted."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

from gateway import audit
from gateway.audit import Filter
from gateway.http.parameters import LIMIT, OFFSET, Choice, Moment, Text, sorted_by
from gateway.http.request import Request
from gateway.http.responses import JsonResponse
from gateway.http.wire import Instant, Wire, instant
from models.audit import AuditAction

if TYPE_CHECKING:
    from models.audit import AuditEntry

OBJECT: Final = Text("objectId", "Only changes of this workflow, data source, key or user.")
ACTION: Final = Choice("action", "Only changes of this kind.", AuditAction)
USER: Final = Text("userId", "Only changes by this user.")
SINCE: Final = Moment("since", "Only changes from this moment on.")
UNTIL: Final = Moment("until", "Only changes before this moment.")
SORT: Final = sorted_by(audit.SORTABLE)
LISTED: Final = (OBJECT, ACTION, USER, SINCE, UNTIL, LIMIT, OFFSET, SORT)


class Entry(Wire):
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


class EntryList(Wire):
    """A part of the audit trail; `count` tells how many entries there are in all."""

    count: int
    limit: int
    offset: int
    entries: Sequence[Entry]


async def index(request: Request) -> JsonResponse:
    """List who changed which workflow, data source, key or user of the organisation, and when."""
    query = request.query
    part, order = query.page(), query[SORT]
    wanted = Filter(query[OBJECT], query[ACTION], query[USER], query[SINCE], query[UNTIL])
    async with request.gateway.database.read() as connection:
        count, found = await audit.page(connection, request.caller, wanted, part, order)
    entries = [_entry(one) for one in found]
    return JsonResponse(EntryList(count=count, limit=part.limit, offset=part.offset, entries=entries))


def _entry(entry: AuditEntry) -> Entry:
    return Entry(
        id=entry.id,
        action=AuditAction(entry.action),
        object_id=entry.object_id,
        user_id=entry.user_id,
        key_id=entry.key_id,
        before_hash=entry.before_hash,
        after_hash=entry.after_hash,
        created_at=instant(entry.created_at),
    )
