"""DNS endpoints for the pods of workflows, as an operator writes them in a setting."""

from __future__ import annotations

import re
from ipaddress import IPv4Network, IPv6Network, ip_network
from typing import Final

from msgspec import Struct

DNS_PORT: Final = 53
MAX_PORT: Final = 65_535
_ENTRY: Final = re.compile(r"(?:\[(?P<bracketed>[^\]]+)\]|(?P<plain>[^\[\]:]+))(?::(?P<port>[0-9]{1,5}))?\Z")
_NAMESPACE: Final = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?\Z")


class DnsEndpoint(Struct, frozen=True):
    """Address of DNS servers: the pods of a namespace, or a network, and the port that they listen on.

    A network policy sees the port of the pod, not of the Service in front of it: OpenShift's is 5353.
    """

    place: str | IPv4Network | IPv6Network
    """Name of a namespace, or a network."""
    port: int = DNS_PORT


def parse_endpoint(text: str) -> DnsEndpoint:
    """Return the endpoint in a text such as `kube-system`, `openshift-dns:5353`, `169.254.20.10` or
    `[fd00::10]:53`.

    The port is 53 by default. Raises `ValueError` for anything else.
    """
    match = _ENTRY.match(text)
    port = int(match["port"] or DNS_PORT) if match is not None else 0
    if match is None or not 1 <= port <= MAX_PORT:
        raise ValueError(f"{text!r} is not a DNS endpoint: write a namespace, address or network, and :port")
    name = match["bracketed"] or match["plain"]
    if match["bracketed"] is None and _NAMESPACE.match(name) and not name.isdecimal():
        return DnsEndpoint(name, port)
    try:
        return DnsEndpoint(ip_network(name), port)
    except ValueError as error:
        raise ValueError(f"{text!r} names neither a namespace nor a network: {error}") from error


def parse_endpoints(text: str) -> tuple[DnsEndpoint, ...]:
    """Return the endpoints of a list that is separated by commas, without empty entries; raises `ValueError`
    for an invalid one.
    """
    return tuple(parse_endpoint(part.strip()) for part in text.split(",") if part.strip())
