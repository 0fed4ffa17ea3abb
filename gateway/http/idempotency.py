"""Idempotency keys: the same key and body get the first answer again for a day.

Requests without the header `Idempotency-Key` get a deduplication key, from the id that their sender gives them.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime, timedelta
from hashlib import sha256
from typing import TYPE_CHECKING, Final

import msgspec
from msgspec.structs import astuple, replace
from sqlalchemy import delete, select, update
from sqlalchemy.dialects import postgresql, sqlite
from sqlmodel import col

from engine.values import fingerprint
from gateway.http import limits
from gateway.http.errors import ApiError
from journal.dead_letters import redrive_scope
from journal.store import IdempotencyKey
from json_text import decoding
from models.execution import Idempotency

if TYPE_CHECKING:
    from sqlalchemy import ColumnElement
    from sqlalchemy.ext.asyncio import AsyncConnection

    from engine.values import Json


REPLAYED: Final[Mapping[str, str]] = {"Idempotent-Replayed": "true"}
"""Header of a repeated answer."""


def build_key(key: str, sender: str, route: str, body: Json) -> IdempotencyKey:
    """Return the idempotency key of a request from the value of its header, valid for a day.

    Requests are equal when one sender sends them to one route with one key; the `body` of equal requests is
    then compared. `sender` and `route` are any texts that identify these.
    """
    scope = sha256(f"{sender}\n{route}".encode()).hexdigest()
    return IdempotencyKey(scope, key, fingerprint(body), limits.IDEMPOTENCY_SECONDS)


def is_key(text: str) -> bool:
    """Return whether a text is a valid key: 1 to 255 visible ASCII characters."""
    return 1 <= len(text) <= limits.IDEMPOTENCY_KEY_LENGTH and all(
        "!" <= character <= "~" for character in text
    )


def mismatch_error() -> ApiError:
    """Return the 422 error for a key that was used before with another body."""
    return ApiError(422, "idempotency-mismatch", "This Idempotency-Key was used before, with another body")


async def reserve_key(
    connection: AsyncConnection, key: IdempotencyKey, *, shard: int, resource_id: str, now: datetime
) -> str:
    """Reserve a key for an object that the transaction creates, and return the id of the object to which the
    key belongs.

    That is `resource_id`, or the id of the first request with the key: then the caller must create nothing.
    Keys of different shards are different; expired ones are reserved anew. It waits for a concurrent
    transaction with the same key. Raises a 422 error when the first request had another body.
    """
    identity = _identify(key, shard)
    await connection.execute(delete(Idempotency).where(*identity, col(Idempotency.expires_at) <= now))
    row = Idempotency(
        shard=shard,
        scope=key.scope,
        key=key.key,
        fingerprint=key.fingerprint,
        resource_id=resource_id,
        expires_at=now + timedelta(seconds=key.lifetime_seconds),
    )
    insert = postgresql.insert if connection.dialect.name == "postgresql" else sqlite.insert
    await connection.execute(insert(Idempotency).values(row.model_dump()).on_conflict_do_nothing())
    bound = (
        await connection.execute(
            select(col(Idempotency.fingerprint), col(Idempotency.resource_id)).where(*identity)
        )
    ).one()
    if bound.fingerprint != key.fingerprint:
        raise mismatch_error()
    return str(bound.resource_id)


async def bind_key(connection: AsyncConnection, key: IdempotencyKey, *, shard: int, resource_id: str) -> None:
    """Bind a key that the transaction has reserved to another object, once this is known."""
    statement = update(Idempotency).where(*_identify(key, shard)).values(resource_id=resource_id)
    await connection.execute(statement)


def _identify(key: IdempotencyKey, shard: int) -> tuple[ColumnElement[bool], ...]:
    return (
        col(Idempotency.shard) == shard,
        col(Idempotency.scope) == key.scope,
        col(Idempotency.key) == key.key,
    )


# ── deduplication keys ──────────────────────────────────────────────────────────────────────────────────────


YEAR_SECONDS: Final = 366 * 86_400
"""Longer than the usual retention of redriven and purged runs."""
WEEK_SECONDS: Final = 7 * 86_400
"""For keys derived from the ids of providers; longer than the providers retry."""


def sender_key(workflow_id: str, deduplication_id: str) -> IdempotencyKey:
    """Return the idempotency key of a message with a `deduplicationId` in a workflow, for a day; content
    isn't compared.
    """
    return _build_key("deduplication", workflow_id, deduplication_id, limits.IDEMPOTENCY_SECONDS)


def derive_key(kind: str, place: str, key: str, *, content: str = "") -> IdempotencyKey:
    """Return the idempotency key of a provider's request to a `place`, from the provider's own id, valid for
    a week.

    `kind` separates ids of different meaning. A place is a workflow or an organization. Bodies are not
    compared, since providers sign again when they retry; `content` is compared.
    """
    return replace(_build_key(kind, place, key, WEEK_SECONDS), fingerprint=content)


def redrive_key(workflow_id: str, resource_id: str) -> IdempotencyKey:
    """Return the idempotency key, for a year, that marks a dead letter or delivery as redriven or purged.

    A redrive is a new attempt to process it.
    """
    return IdempotencyKey(redrive_scope(workflow_id), resource_id, "", YEAR_SECONDS)


def encode_key(key: IdempotencyKey) -> str:
    """Return a key as a delivery stores it, so that a redrive and a sender's repetition share the key."""
    return msgspec.json.encode(astuple(key)).decode()


def decode_key(text: str) -> IdempotencyKey:
    """Decode an idempotency key from the JSON text in which a delivery stores it."""
    return IdempotencyKey(*decoding.decode(text, tuple[str, str, str, int]))


def _build_key(kind: str, place: str, key: str, lifetime_seconds: int) -> IdempotencyKey:
    scope = sha256(f"{kind}\n{place}".encode()).hexdigest()
    text = key if is_key(key) else sha256(key.encode()).hexdigest()
    return IdempotencyKey(scope, text, "", lifetime_seconds)
