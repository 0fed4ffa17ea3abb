"""Origins of requests: client addresses, those that count as one client, and the request that is being answered.

The latter is for records that are written far below its handler.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextvars import ContextVar
from functools import lru_cache
from ipaddress import AddressValueError, IPv4Address, IPv6Address, IPv6Network
from typing import TYPE_CHECKING, Any, Final

from msgspec import Struct

from models.access import hash_address

if TYPE_CHECKING:
    from starlette.types import Scope


_HOST_BITS: Final = 64
"""Every IPv6 host may use a whole /64 (RFC 7421), so a count of single addresses would never see one twice.
"""


class RequestOrigin(Struct, frozen=True):
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


@lru_cache(maxsize=4_096)
def client_of(address: str) -> str:
    """Return the client of an address: the /64 network of an IPv6 address, otherwise the address itself.

    An IPv4-mapped IPv6 address counts as IPv4.
    """
    if ":" not in address:
        return address
    try:
        found = IPv6Address(address.partition("%")[0])
    except AddressValueError:
        return address
    mapped: IPv4Address | None = found.ipv4_mapped
    return str(mapped) if mapped else str(IPv6Network((int(found), _HOST_BITS), strict=False))


def client_of_scope(scope: Mapping[str, Any]) -> str:
    """Return the client of a request; empty if its connection has no address."""
    client = scope.get("client")
    return client_of(client[0]) if client else ""
