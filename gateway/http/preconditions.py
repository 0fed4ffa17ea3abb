"""Preconditions of a change: ownership, and an unchanged revision."""

from __future__ import annotations

from typing import TYPE_CHECKING

from msgspec import Struct

from gateway.http.errors import ApiError

if TYPE_CHECKING:
    from models.access import ApiCaller


class RequestedObject(Struct, frozen=True):
    """Object that the path of a request names, with the identity and the condition under which it is used."""

    id: str
    caller: ApiCaller
    if_match: str | None
    """Value of the header `If-Match`."""


def require_owner(caller: ApiCaller, owner_id: str, *, what: str) -> None:
    """Raise a 403 error unless the caller owns an object or is an admin; only these may change, share or delete it."""
    if owner_id != caller.user_id and not caller.is_admin:
        message = f"Only the {what}'s owner and admins of the organization may do this"
        raise ApiError(403, "not-owner", message)


def require_match(if_match: str | None, current: str, *, what: str) -> None:
    """Raise a 412 error unless `If-Match` is None, `*`, or contains the tag `current` (RFC 9110, 13.1.1).

    `what` names the object in the message; the error carries its present tag.
    """
    if if_match is None or if_match.strip() == "*":
        return
    if current not in (tag.strip() for tag in if_match.split(",")):
        message = f"The {what} has changed since you read it: read it again, then repeat your change"
        raise ApiError(412, "precondition-failed", message, headers={"ETag": current})
