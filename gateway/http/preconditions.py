"""Preconditions of a change: ownership, and an unchanged revision."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gateway.http.errors import ApiError

if TYPE_CHECKING:
    from gateway.http.request import GatewayRequest


def require_owner(request: GatewayRequest, owner_id: str, *, what: str) -> None:
    """Raise 403 when the caller may use an object, but not change, share or delete it."""
    if owner_id != request.caller.user_id and not request.caller.is_admin:
        message = f"Only the {what}'s owner and admins of the organization may do this"
        raise ApiError(403, "not-owner", message)


def require_match(request: GatewayRequest, current: str, *, what: str) -> None:
    """Raise 412 unless `If-Match` is absent, `*`, or contains the `current` tag (RFC 9110, 13.1.1)."""
    given = request.headers.get("if-match")
    if given is None or given.strip() == "*":
        return
    if current not in (tag.strip() for tag in given.split(",")):
        message = f"The {what} has changed since you read it: read it again, then repeat your change"
        raise ApiError(412, "precondition-failed", message, headers={"ETag": current})
