"""Hash chain of audit entries: each entry has the hash of its content and of the entry before it in its organization.

Entries join the chain shortly after their commit, so that changes of one organization do not wait for one another.
An entry that is changed, removed or inserted later breaks the chain.
"""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Final

import msgspec
import structlog
from msgspec import Struct
from sqlalchemy import func, select, update
from sqlmodel import col

from models.audit import AuditEntry
from models.timestamps import to_microseconds

if TYPE_CHECKING:
    from sqlalchemy import Row
    from sqlalchemy.ext.asyncio import AsyncConnection

    from models.database import Database

log = structlog.get_logger()

MAX_ORGANIZATIONS: Final = 50
"""Organizations whose entries one turn chains."""
MAX_ENTRIES: Final = 500
"""Entries of one organization that one turn chains."""
READ_ENTRIES: Final = 1_000
_encode: Final = msgspec.json.Encoder().encode
_COLUMNS: Final = (
    *(col(AuditEntry.id), col(AuditEntry.organization_id), col(AuditEntry.user_id), col(AuditEntry.key_id)),
    *(col(AuditEntry.action), col(AuditEntry.object_id), col(AuditEntry.before_hash)),
    *(col(AuditEntry.after_hash), col(AuditEntry.created_at)),
    *(col(AuditEntry.request_id), col(AuditEntry.address_hash), col(AuditEntry.changes)),
    *(col(AuditEntry.sequence), col(AuditEntry.chain_hash)),
)


class ChainHead(Struct, frozen=True):
    """Newest entry of an organization's chain."""

    organization_id: str
    sequence: int
    chain_hash: str


class ChainBreak(Struct, frozen=True):
    """First place at which the chain of an organization does not hold."""

    organization_id: str
    sequence: int
    entry_id: str
    reason: str


def hash_entry(previous: str, sequence: int, entry: Row[*tuple[object, ...]]) -> str:
    """Return the chain hash of an audit entry: SHA-256, in hex, of its sequence number, content and time, and of
    `previous`, the chain hash of the entry before it ("" for the first).
    """
    content = _list_content(previous, sequence, entry)
    # Absent ones too: a request that is added to an entry of the operator must break the chain.
    content += [entry.request_id, entry.address_hash, entry.changes]
    return hashlib.sha256(_encode(content)).hexdigest()


def is_hash_of(chain_hash: str | None, previous: str, sequence: int, entry: Row[*tuple[object, ...]]) -> bool:
    """Return whether `chain_hash` is that of an entry with this number behind `previous`; False for None.

    A hash of earlier releases is accepted too, since their scheduler may chain new entries during an upgrade. Such a
    hash proves neither the request, the address nor the changes of the entry.
    """
    if chain_hash == hash_entry(previous, sequence, entry):
        return True
    content = _list_content(previous, sequence, entry)
    return chain_hash == hashlib.sha256(_encode(content)).hexdigest()


def _list_content(previous: str, sequence: int, entry: Row[*tuple[object, ...]]) -> list[object]:
    """Return the values that every chain hash covers, in order: `previous`, `sequence`, and an entry's id,
    organization, author, key, action, object, hashes of the object, and time.
    """
    return [
        *(previous, sequence, entry.id, entry.organization_id, entry.user_id, entry.key_id, entry.action),
        *(entry.object_id, entry.before_hash, entry.after_hash, to_microseconds(entry.created_at)),
    ]


async def chain_entries(database: Database) -> int:
    """Give new audit entries their numbers and hashes in the chains of their organizations; return how many got them.

    One call covers at most 50 organizations and 500 entries of each. The new head of each chain is logged, so that a
    log outside of the database can prove that no entry was removed from its end. Raises `DatabaseUnavailable`, and
    SQLAlchemy's `IntegrityError` if another process has chained entries meanwhile.
    """
    unchained = (
        select(col(AuditEntry.organization_id))
        .where(col(AuditEntry.chain_hash).is_(None))
        .distinct()
        .limit(MAX_ORGANIZATIONS)
    )
    async with database.read() as connection:
        organization_ids = (await connection.scalars(unchained)).all()
    count = 0
    for organization_id in organization_ids:
        added, head = await database.transaction(partial(_chain, organization_id=organization_id))
        count += added
        log.info(
            "audit entries chained",
            organization_id=organization_id,
            entries=added,
            sequence=head.sequence,
            chain_hash=head.chain_hash,
        )
    return count


async def _chain(connection: AsyncConnection, *, organization_id: str) -> tuple[int, ChainHead]:
    """Chain the oldest unchained entries of one organization, at most `MAX_ENTRIES`; return their number and
    the head of the chain, which is the old one without such entries.
    """
    of_organization = col(AuditEntry.organization_id) == organization_id
    newest = (
        select(col(AuditEntry.sequence), col(AuditEntry.chain_hash))
        .where(of_organization, col(AuditEntry.sequence).is_not(None))
        .order_by(col(AuditEntry.sequence).desc())
        .limit(1)
    )
    found = (await connection.execute(newest)).first()
    sequence, previous = (0, "") if found is None else (found[0] or 0, found[1] or "")
    unchained = (
        select(*_COLUMNS)
        .where(of_organization, col(AuditEntry.chain_hash).is_(None))
        .order_by(col(AuditEntry.created_at), col(AuditEntry.id))
        .limit(MAX_ENTRIES)
    )
    entries = (await connection.execute(unchained)).all()
    for entry in entries:
        sequence += 1
        previous = hash_entry(previous, sequence, entry)
        # Another leader may have chained it: then the unique sequence refuses this transaction.
        await connection.execute(
            update(AuditEntry)
            .where(col(AuditEntry.id) == entry.id, col(AuditEntry.chain_hash).is_(None))
            .values(sequence=sequence, chain_hash=previous)
        )
    return len(entries), ChainHead(organization_id, sequence, previous)


async def find_breaks(
    connection: AsyncConnection, *, organization_id: str | None = None, newest: int | None = None
) -> Sequence[ChainBreak]:
    """Return the first break of each chain that has one: a missing or changed entry. Intact chains are left out.

    Without `organization_id`, the chains of all organizations are checked; with `newest`, only so many of the last
    entries of each. Entries that are missing at the end of a chain, or not chained yet, are not noticed.
    """
    heads = select(col(AuditEntry.organization_id), func.max(col(AuditEntry.sequence))).where(
        col(AuditEntry.sequence).is_not(None)
    )
    if organization_id is not None:
        heads = heads.where(col(AuditEntry.organization_id) == organization_id)
    breaks = []
    for found_id, head in (await connection.execute(heads.group_by(col(AuditEntry.organization_id)))).all():
        first = 1 if newest is None else max((head or 0) - newest + 1, 1)
        if (broken := await _find_break(connection, found_id, first)) is not None:
            breaks.append(broken)
    return breaks


async def _find_break(connection: AsyncConnection, organization_id: str, first: int) -> ChainBreak | None:
    """Return the first missing or changed entry of a chain from number `first` on; None if there is none.

    The hash of the entry before `first` is trusted.
    """
    expected, previous = first, ""
    async for entry in _read_chain(connection, organization_id, max(first - 1, 1)):
        if entry.sequence == first - 1:
            previous = entry.chain_hash or ""
            continue
        if entry.sequence != expected:
            reason = f"the entries {expected} to {entry.sequence - 1} are missing"
            return ChainBreak(organization_id, expected, entry.id, reason)
        if not is_hash_of(entry.chain_hash, previous, entry.sequence, entry):
            return ChainBreak(
                organization_id, expected, entry.id, "its content or the entry before it was changed"
            )
        expected, previous = expected + 1, entry.chain_hash
    return None


async def _read_chain(
    connection: AsyncConnection, organization_id: str, first: int
) -> AsyncIterator[Row[*tuple[object, ...]]]:
    """Yield the chained entries of an organization from number `first` on, in order, read in batches."""
    sequence = first - 1
    while True:
        batch = (
            select(*_COLUMNS)
            .where(col(AuditEntry.organization_id) == organization_id, col(AuditEntry.sequence) > sequence)
            .order_by(col(AuditEntry.sequence))
            .limit(READ_ENTRIES)
        )
        rows = (await connection.execute(batch)).all()
        if not rows:
            return
        for row in rows:
            yield row
        sequence = rows[-1].sequence
