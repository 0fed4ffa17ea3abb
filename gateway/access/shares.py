"""Shares of an object: the time of each share by user id."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import TYPE_CHECKING

from gateway.http import errors, limits
from models import access_store

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncConnection

    from models.access import ApiCaller


async def require_user(connection: AsyncConnection, user_id: str, caller: ApiCaller) -> None:
    """Raise a 404 error unless the user exists and belongs to the caller's organization; used before sharing
    an object.
    """
    if await access_store.find_user(connection, caller.organization_id, user_id) is None:
        raise errors.not_found("user")


def with_user(
    shared_with: Mapping[str, datetime],
    user_id: str,
    now: datetime,
    *,
    what: str,
    owner_id: str,
    caller: ApiCaller,
) -> Mapping[str, datetime]:
    """Return the shares of an object (user id to time) with one more user, since `now`; unchanged if the user
    has it already.

    `what` names the object in errors. Raises a 422 error for its owner and for the caller, and 409 at 1,000
    shares.
    """
    if user_id in {owner_id, caller.user_id}:
        message = f"userId must be neither the owner of the {what} nor yourself"
        raise errors.invalid([errors.problem("userId", "own-user", message)])
    if user_id in shared_with:
        return shared_with
    if len(shared_with) >= limits.SHARES:
        message = f"A {what} may be shared with at most {limits.SHARES:,} users: make it public instead"
        raise errors.conflict("too-many-shares", message)
    return {**shared_with, user_id: now}


def without_user(shared_with: Mapping[str, datetime], user_id: str) -> Mapping[str, datetime]:
    """Return the shares of an object without a user; raises a 404 error if they don't include the user."""
    if user_id not in shared_with:
        raise errors.not_found("share")
    return {user: since for user, since in shared_with.items() if user != user_id}
