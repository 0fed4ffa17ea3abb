"""Client addresses: the origin of a request, and the addresses that count as one client."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from ipaddress import AddressValueError, IPv4Address, IPv6Address, IPv6Network
from typing import Any, Final

_HOST_BITS: Final = 64
"""Every IPv6 host may use a whole /64 (RFC 7421), so a count of single addresses would never see one twice.
"""


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
