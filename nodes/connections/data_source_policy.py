"""Policy for the addresses of data sources: public ones, allowed networks, and never the server's own database.

A name is resolved once for each connection, every returned address is checked, and one of them is connected.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Awaitable, Callable, Container, Sequence
from ipaddress import IPv4Address
from pathlib import Path
from typing import TYPE_CHECKING, Final, Self
from urllib.parse import parse_qs, unquote, urlsplit

from msgspec import Struct, field

from engine.run_errors import NodeError
from models.timestamps import DatabaseClock
from nodes import url_targets
from nodes.connection_phases import ConnectionPhase, note_phase

if TYPE_CHECKING:
    from nodes.outbound_http import IpNetwork
    from nodes.url_targets import IpAddress

ResolveHost = Callable[[str], Awaitable[Sequence[str]]]
"""Resolver of a host name to the texts of its addresses, the preferred one first; raises OSError."""

MAX_ADDRESSES: Final = 16
RESOLVE_SECONDS: Final = 5
FIRST_UNPRIVILEGED_PORT: Final = 1024
PRIVILEGED_PORTS: Final = frozenset({443})
POSTGRESQL_PORT: Final = 5432


class ServerDatabase(Struct, frozen=True):
    """Address of the server's own database: a database of PostgreSQL, or a SQLite file."""

    host: str = ""
    """A name or an address; a folder, or an empty text, for a socket of this machine."""
    port: int = POSTGRESQL_PORT
    database: str = ""
    file: Path | None = None

    @classmethod
    def from_url(cls, url: str) -> Self:
        """Return the location of the server's own database from the URL in its settings: an SQLite file, or
        host, port and name.
        """
        parts = urlsplit(url)
        if parts.scheme.startswith("sqlite"):
            return cls(file=Path(unquote(parts.path.removeprefix("/"))))
        query = parse_qs(parts.query)
        host = query.get("host", [parts.hostname or ""])[0]
        port = int(query.get("port", [parts.port or POSTGRESQL_PORT])[0])
        return cls(host, port, unquote(parts.path.removeprefix("/")) or unquote(parts.username or ""))


class ConnectionPolicy(Struct, frozen=True):
    allowed_networks: tuple[IpNetwork, ...] = ()
    """Networks that may be connected, although they are not public."""
    own_databases: tuple[ServerDatabase, ...] = ()
    files: Path | None = None
    """Parent of the folders of organizations, for SQLite; None disables files in this process."""
    tool_server_hosts: frozenset[str] = frozenset()
    """Hosts of tool servers, or hosts with ports as `host:port`, that are allowed whatever their addresses are."""
    idle_seconds: float = 60
    max_connections_per_source: int = 5
    clock: DatabaseClock = field(default_factory=DatabaseClock)
    """Clock for signatures: servers refuse requests that are some minutes old or ahead."""
    max_file_bytes: int = 1_000_000_000
    """Maximum size of a SQLite file."""
    max_sqlite_processes: int = 2
    """Concurrent statements on SQLite files; up to twice as many if several organizations use them."""


async def resolve_allowed(
    policy: ConnectionPolicy,
    resolve: ResolveHost,
    *,
    host: str,
    port: int,
    database: str,
    privileged_ports: Container[int] = PRIVILEGED_PORTS,
) -> Sequence[IpAddress]:
    """Return the addresses of a server's host, up to 16, if connections to all of them are permitted.

    Raises `NodeError` for unresolvable hosts, private addresses that the operator has not allowed, privileged ports
    other than `privileged_ports`, and the server's own database.
    """
    with note_phase(ConnectionPhase.DNS):
        found = await _resolve(host, resolve)
        for address in found:
            _require_allowed(policy, host, address, port, privileged_ports)
        for own in policy.own_databases:
            if (own.port, own.database) == (port, database) and await _is_server_database(
                own, found, resolve
            ):
                raise NodeError("The data source is the server's own database", code="address-not-allowed")
    return found


def _require_allowed(
    policy: ConnectionPolicy, host: str, address: IpAddress, port: int, privileged_ports: Container[int]
) -> None:
    """Raise `NodeError` for an address that is not public, and for a port below 1024 that is not in `privileged_ports`.

    Networks that the operator allows are exempt. The error doesn't contain the address: users must not be able to
    resolve names of the internal network.
    """
    if any(address in network for network in policy.allowed_networks):
        return
    if not url_targets.is_public(address):
        raise NodeError(url_targets.not_public_refusal(host), code="address-not-allowed")
    if port < FIRST_UNPRIVILEGED_PORT and port not in privileged_ports:
        raise NodeError(url_targets.port_refusal(port), code="address-not-allowed")


async def _resolve(host: str, resolve: ResolveHost) -> Sequence[IpAddress]:
    """Return up to 16 addresses of a host; raises `NodeError` for an invalid host, and, retryable, if it has no address
    or can't be resolved within five seconds.
    """
    try:
        name = url_targets.canonicalize_host(f"[{host}]" if ":" in host else host)
    except ValueError as error:
        raise NodeError(f"{host[:100]!r} is not a valid host", code="address-not-allowed") from error
    try:
        return [url_targets.unmap_ipv4(name)]
    except ValueError:
        pass
    try:
        async with asyncio.timeout(RESOLVE_SECONDS):
            found = [url_targets.unmap_ipv4(text) for text in (await resolve(name))[:MAX_ADDRESSES]]
    except OSError as error:
        raise NodeError(f"{name} can't be resolved", code="connection-failed", retryable=True) from error
    if not found:
        raise NodeError(f"{name} has no address", code="connection-failed", retryable=True)
    return found


async def _is_server_database(
    own: ServerDatabase, addresses: Sequence[IpAddress], resolve: ResolveHost
) -> bool:
    """Return whether one of the addresses belongs to the machine of the server's own database; False for an SQLite
    file.

    Raises `NodeError` if the host of that database can't be resolved now: a moment later it may have one of these
    addresses.
    """
    if own.file is not None:
        return False
    if not own.host or own.host.startswith("/"):
        return any(is_local_address(address) for address in addresses)
    own_addresses = await _server_addresses(own.host, resolve)
    if any(address in own_addresses for address in addresses):
        return True
    # localhost, a loopback address and the machine's address in its network are one server under three names.
    return any(map(is_local_address, own_addresses)) and any(map(is_local_address, addresses))


async def _server_addresses(host: str, resolve: ResolveHost) -> Sequence[IpAddress]:
    try:
        return await _resolve(host, resolve)
    except NodeError as error:
        # Without the host name: the location of the server's database is secret.
        message = "It can't be determined whether this is the server's own database"
        raise NodeError(message, code="connection-failed", retryable=True) from error


def is_local_address(address: IpAddress) -> bool:
    """Return whether an IP address belongs to this machine: loopback, unspecified, or of a network interface."""
    if address.is_loopback or address.is_unspecified:
        return True
    family = socket.AF_INET if isinstance(address, IPv4Address) else socket.AF_INET6
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        try:
            probe.bind((str(address), 0))
        except OSError:
            return False
    return True
