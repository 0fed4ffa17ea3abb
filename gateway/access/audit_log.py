"""Audit entries, written in the transaction of the change, so that both are stored or neither."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Protocol

import msgspec
from sqlalchemy import insert

from engine.values import fingerprint
from gateway.http.request_origin import current_origin
from models import ids
from models.access import ApiKey, User
from models.audit import AuditAction, AuditEntry
from models.database_time import PresentTime

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from sqlalchemy.ext.asyncio import AsyncConnection

OPERATOR: Final = "operator"
_NOT_HASHED: Final = {"hash", "secret_id", "last_used_at", "last_route", "last_address_hash"}


@dataclass(frozen=True, slots=True)
class ServerOperator:
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
) -> None:
    """Insert an entry for an author's change of an object into the audit trail, with the request that makes it.

    `before` and `after` are hashes of its content, None for an absent object; nothing is inserted if they are
    equal. `changes` are the first ones by path, as `audit_changes.list_changes` returns them.
    """
    if before == after:
        return
    origin = current_origin()
    statement = insert(AuditEntry).values(
        id=ids.new_id("audit"),
        organization_id=author.organization_id,
        shard=author.shard,
        user_id=author.user_id,
        key_id=author.key_id,
        action=action,
        object_id=object_id,
        before_hash=before,
        after_hash=after,
        request_id=origin.request_id if origin else None,
        address_hash=origin.address_hash if origin else None,
        changes=[{**change} for change in changes] if changes else None,
        created_at=PresentTime(),
    )
    await connection.execute(statement)


def hash_content(row: ApiKey | User) -> str:
    """Return the SHA-256 of a row as hexadecimal text, without its secrets and a key's last use.

    The audit trail stores it, so that a change of the row is provable without its content.
    """
    return fingerprint(msgspec.to_builtins(row.model_dump(exclude=_NOT_HASHED)))
