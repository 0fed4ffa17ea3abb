"""Client addresses: who a request came from, and which addresses count as one client."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from ipaddress import AddressValueError, IPv4Address, IPv6Address, IPv6Network
from typing import Any, Final

_HOST_BITS: Final = 64
"""Every IPv6 host may use a whole /64 (RFC 7421): counting single addresses would count nobody twice."""


@lru_cache(maxsize=4_096)
def client_of(address: str) -> str:
    """Return the client that an address stands for: the /64 of an IPv6 address, any other address as it is."""
    if ":" not in address:
        return address
    try:
        found = IPv6Address(address.partition("%")[0])
    except AddressValueError:
        return address
    mapped: IPv4Address | None = found.ipv4_mapped
    return str(mapped) if mapped else str(IPv6Network((int(found), _HOST_BITS), strict=False))


def client_of_scope(scope: Mapping[str, Any]) -> str:
    """Return the client of a request; empty where its connection has no address."""
    client = scope.get("client")
    return client_of(client[0]) if client else ""
