"""Audit entries, written in the transaction of the change, so that both are stored or neither.

They name the changes of an object by path. Entries are kept for good, so a credential that somebody has written into a
config must never enter them: values are recorded of chosen fields alone, of all others only the path.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from hashlib import sha256
from typing import TYPE_CHECKING, Any, Final, Protocol

import msgspec
from msgspec import Struct
from sqlalchemy import insert

from engine.values import MISSING, compare_values, fingerprint
from gateway.http.request_origin import current_origin
from models import ids
from models.access import ApiKey, User
from models.audit import AuditAction, AuditEntry
from models.database_time import PresentTime

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncConnection

    from engine.values import Json, Missing
    from gateway.http.request_origin import RequestOrigin

OPERATOR: Final = "operator"
MAX_CHANGES: Final = 20
MAX_PATH: Final = 200
MAX_TEXT: Final = 100
"""Characters of a value as JSON that are recorded; longer ones are recorded as a hash."""
HIDDEN: Final = "(hidden)"
_INSERT: Final = insert(AuditEntry).values(created_at=PresentTime())
"""Statement of all entries: most requests that change something execute it, and to build it takes 0.1 ms."""
_NOT_HASHED: Final = {"hash", "secret_id", "last_used_at", "last_route", "last_address_hash"}


class ServerOperator(Struct, frozen=True):
    """Operator of the server as the author of a change, by the command line or settings; no user and no key."""

    organization_id: str
    shard: int
    user_id: str = OPERATOR
    key_id: str = OPERATOR


class ChangeAuthor(Protocol):
    """Author of a change, with the way by which it was made."""

    @property
    def organization_id(self) -> str: ...
    @property
    def shard(self) -> int: ...
    @property
    def user_id(self) -> str:
        """Id of the user, `OPERATOR` for the operator of the server, or the mail address of an approver
        without an account.
        """

    @property
    def key_id(self) -> str:
        """Id of the key; for a change without one, the name of the way by which it was made, such as the
        command line.
        """


async def record_change(
    connection: AsyncConnection,
    author: ChangeAuthor,
    action: AuditAction,
    object_id: str,
    *,
    before: str | None,
    after: str | None,
    changes: Sequence[Mapping[str, str | None]] | None = None,
    origin: RequestOrigin | None = None,
) -> None:
    """Insert an entry for an author's change of an object into the audit trail, with the request that makes it.

    `origin` is that request; None: the one that is being answered.

    `before` and `after` are hashes of the object's content, None for an absent object; nothing is inserted if they are
    equal. `changes` are those of single fields, as `list_changes` returns them; None for none.
    """
    if before == after:
        return
    origin = origin or current_origin()
    columns = {
        "id": ids.new_id("audit"),
        "organization_id": author.organization_id,
        "shard": author.shard,
        "user_id": author.user_id,
        "key_id": author.key_id,
        "action": action,
        "object_id": object_id,
        "before_hash": before,
        "after_hash": after,
        "request_id": origin.request_id if origin else None,
        "address_hash": origin.address_hash if origin else None,
        "changes": [{**change} for change in changes] if changes else None,
    }
    await connection.execute(_INSERT, columns)


def list_changes(
    before: Mapping[str, Any], after: Mapping[str, Any], *, shown: Collection[str]
) -> Sequence[Mapping[str, str | None]]:
    """Return the first 20 paths at which two contents differ, as `path`, `before` and `after`; the contents are JSON
    objects.

    Values are JSON text, or `sha256:` and its hash for over 100 bytes, for fields in `shown` and parts of them. They
    are "(hidden)" for all others, and None on a side without a value.
    """
    difference = compare_values({**before}, {**after}, at_most=MAX_CHANGES)
    return [
        {
            "path": change.path[:MAX_PATH],
            "before": _show(change.before, is_shown=_is_within(change.path, shown)),
            "after": _show(change.after, is_shown=_is_within(change.path, shown)),
        }
        for change in difference.changes
    ]


def _is_within(path: str, fields: Collection[str]) -> bool:
    """Return whether a path is one of the fields, or a part of one, such as `settings.host` of `settings`."""
    return any(path == field or path.startswith((f"{field}.", f"{field}[")) for field in fields)


def _show(value: Json | Missing, *, is_shown: bool) -> str | None:
    if value is MISSING:
        return None
    if not is_shown:
        return HIDDEN
    text = msgspec.json.encode(value)
    if len(text) <= MAX_TEXT:
        return text.decode()
    return f"sha256:{sha256(text).hexdigest()}"


def by_id(items: Sequence[Mapping[str, Any]]) -> dict[str, Json]:
    """Return items by their ids, so that paths name them instead of their positions; of equal ids, the last item
    counts.
    """
    return {str(item["id"]): {**item} for item in items}


def hash_content(row: ApiKey | User) -> str:
    """Return the SHA-256 of a row as hexadecimal text, without its secrets and a key's last use.

    The audit trail stores it, so that a change of the row is provable without its content.
    """
    return fingerprint(msgspec.to_builtins(row.model_dump(exclude=_NOT_HASHED)))
