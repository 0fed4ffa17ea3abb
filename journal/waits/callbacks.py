"""Callbacks: tokens in the callback URLs of nodes, and the answers that other systems give by them.

A token is a MAC of its node, so nothing is stored until a callback arrives.
"""

from __future__ import annotations

import hmac
from base64 import urlsafe_b64encode
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

import msgspec
from msgspec import Struct
from sqlalchemy import select
from sqlmodel import col

from engine.node_api import AnswerSource
from journal.store import ExecutionKey
from journal.waits import node_answers
from models.execution import Execution

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncConnection

    from journal.waits.node_answers import AnswerResult

TOKEN_PREFIX: Final = "cb-"  # noqa: S105 - the beginning of every token
_PURPOSE: Final = "pilotflame callback 1"
_encode = msgspec.json.Encoder().encode


class CallbackPlace(Struct, frozen=True):
    """Node of a run that waits for a callback."""

    execution_id: str
    node_id: str
    iteration: str


def derive_token(secret: bytes, place: CallbackPlace) -> str:
    """Return the token of a callback URL: 256 bits that only a holder of the server's secret can make."""
    content = _encode([_PURPOSE, place.execution_id, place.node_id, place.iteration])
    return TOKEN_PREFIX + urlsafe_b64encode(hmac.digest(secret, content, "sha256")).decode().rstrip("=")


def is_valid_token(secrets: Sequence[bytes], place: CallbackPlace, token: str) -> bool:
    """Return whether a token was made for a node with one of the server's secrets."""
    given = token.encode()
    return any(hmac.compare_digest(derive_token(secret, place).encode(), given) for secret in secrets)


async def store_callback(
    connection: AsyncConnection, place: CallbackPlace, payload: bytes
) -> AnswerResult | None:
    """Store the payload of a callback as the answer of its node, in the caller's transaction, and make its waiting run
    pending.

    Return whether the answer is taken, late, expired or not awaited; None if the run is gone.
    """
    statement = select(col(Execution.shard)).where(col(Execution.id) == place.execution_id)
    shard = await connection.scalar(statement)
    if shard is None:
        return None
    key = ExecutionKey(place.execution_id, shard)
    return await node_answers.store_answer(
        connection, key, place.node_id, place.iteration, payload, kind=AnswerSource.CALLBACK
    )
