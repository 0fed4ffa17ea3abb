"""Trusted proxies: whose `X-Forwarded-For` says where a request comes from."""

from __future__ import annotations

from ipaddress import ip_network
from typing import TYPE_CHECKING, Any, Final, cast

import structlog
from uvicorn.middleware.proxy_headers import ProxyHeadersMiddleware

if TYPE_CHECKING:
    from collections.abc import Iterable

log = structlog.get_logger()

FORWARDED_FOR: Final = b"x-forwarded-for"
MOST_TRUSTED: Final = 256
"""Addresses of one network that can all be proxies; more are a network of machines that could pretend anything."""


class TrustedProxies:
    """Addresses and networks of proxies, as settings name them."""

    def __init__(self, named: str) -> None:
        """`named` are addresses and networks, separated by commas; `*` trusts everybody."""
        self._trusted = ProxyHeadersMiddleware(cast("Any", None), trusted_hosts=named).trusted_hosts
        self._has_warned = False
        if broad := ", ".join(one for one in map(str.strip, named.split(",")) if _is_broad(one)):
            log.warning(
                "trusted proxies are a whole network, of which any machine can pretend any address: name the ingress",
                variable="PILOTFLAME_TRUSTED_PROXIES",
                networks=broad,
            )

    def is_trusted(self, address: str) -> bool:
        """Tell whether an address is that of a proxy."""
        return address in self._trusted

    def client(
        self, peer: tuple[str, int] | None, headers: Iterable[tuple[bytes, bytes]]
    ) -> tuple[str, int] | None:
        """Return where a request comes from: from its peer, unless that is a proxy which says more."""
        is_trusted = peer is not None and peer[0] in self._trusted
        if not is_trusted and self._has_warned:
            return peer
        told = [value for name, value in headers if name == FORWARDED_FOR]
        if not told:
            return peer
        if not is_trusted:
            self._warn(peer)
            return peer
        host, port = self._trusted.get_trusted_client_address(b", ".join(told).decode("latin-1"))
        return (host, port) if host else peer

    def _warn(self, peer: tuple[str, int] | None) -> None:
        self._has_warned = True
        log.warning(
            "X-Forwarded-For of an untrusted peer is passed over: name it in PILOTFLAME_TRUSTED_PROXIES if it is"
            " your proxy; all of its clients count as one address until then",
            peer=peer[0] if peer else "",
        )


def _is_broad(named: str) -> bool:
    if named == "*":
        return True
    try:
        return ip_network(named).num_addresses > MOST_TRUSTED
    except ValueError:
        return False
