"""Origin of the request that is being answered, for records that are written far below its handler."""

from __future__ import annotations

from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from gateway.http.client_address import client_of_scope
from models.access import hash_address

if TYPE_CHECKING:
    from starlette.types import Scope


@dataclass(frozen=True, slots=True)
class RequestOrigin:
    """Id of a request, and the keyed hash of the address that it came from."""

    request_id: str
    address_hash: str


CURRENT_REQUEST: Final[ContextVar[Scope | None]] = ContextVar("request", default=None)
"""Request that this task, or the one that began it, answers."""


def current_origin() -> RequestOrigin | None:
    """Return the origin of the current request; None outside of requests, such as in commands."""
    scope = CURRENT_REQUEST.get()
    if scope is None:
        return None
    secret: bytes = scope["app"].state.gateway.settings.secret
    return RequestOrigin(str(scope["request_id"]), hash_address(client_of_scope(scope), secret))
