"""TCP connections to addresses that were checked before: no name is resolved here."""

from __future__ import annotations

import asyncio
import socket
from ipaddress import IPv4Address
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from nodes.url_targets import IpAddress


async def connect_socket(address: IpAddress, port: int) -> socket.socket:
    """Return a non-blocking socket that is connected to an address; raises `OSError` if it refuses."""
    family = socket.AF_INET if isinstance(address, IPv4Address) else socket.AF_INET6
    opened = socket.socket(family, socket.SOCK_STREAM)
    try:
        opened.setblocking(False)  # noqa: FBT003 - the standard library's own signature
        await asyncio.get_running_loop().sock_connect(opened, (str(address), port))
    except BaseException:
        opened.close()
        raise
    return opened
