"""Sessions on the server's own PostgreSQL: each ends by itself, and frees its locks, when its process stands still."""

from __future__ import annotations

import asyncio
import socket
from functools import partial
from typing import TYPE_CHECKING, Any, Final
from weakref import WeakKeyDictionary, WeakSet

import asyncpg

from models.circuit_breaker import CircuitBreaker

if TYPE_CHECKING:
    from asyncio import AbstractEventLoop
    from collections.abc import Mapping

    from sqlalchemy.engine import URL

    from models.circuit_breaker import GuardedCall

LOCK_WAIT_MILLISECONDS: Final = 2_000
"""So long a statement waits for a row or a key that another transaction has locked."""
IDLE_TRANSACTION_MILLISECONDS: Final = 5_000
"""So long a process may be frozen in the middle of a transaction before it loses it, and with it all locks."""
SESSION_TIMEOUTS: Final = {
    "lock_timeout": str(LOCK_WAIT_MILLISECONDS),
    "idle_in_transaction_session_timeout": str(IDLE_TRANSACTION_MILLISECONDS),
}
# By these the server notices that a client's machine is gone, or takes nothing more.
_SERVER_SOCKET: Final = {
    "tcp_keepalives_idle": "5",
    "tcp_keepalives_interval": "2",
    "tcp_keepalives_count": "3",
    "tcp_user_timeout": "10000",
}
# The same on our side, by the names of Linux; other systems have some of them.
_CLIENT_SOCKET: Final = {"TCP_KEEPIDLE": 5, "TCP_KEEPINTVL": 2, "TCP_KEEPCNT": 3, "TCP_USER_TIMEOUT": 10_000}
_without_timeouts: WeakSet[Any] = WeakSet()
_connections: WeakKeyDictionary[AbstractEventLoop, dict[str, WeakSet[Any]]] = WeakKeyDictionary()
"""All that were opened, by loop and address."""
_breakers: WeakKeyDictionary[AbstractEventLoop, dict[str, CircuitBreaker]] = WeakKeyDictionary()
"""All pools of a loop that lead to one address share one: whoever meets an outage first tells the others."""


class MonitoredConnection(asyncpg.Connection):
    """A connection whose end is noticed though the machine at the other end says nothing any more."""

    __slots__ = ()

    def __init__(self, protocol: Any, transport: Any, *others: Any) -> None:  # noqa: ANN401 - asyncpg's own
        super().__init__(protocol, transport, *others)
        _enable_keep_alive(transport.get_extra_info("socket"))


def driver_address(url: URL) -> str:
    """Return a URL of SQLAlchemy as the driver reads it."""
    return url.set(drivername="postgresql").render_as_string(hide_password=False)


async def open_session(address: str, *, settings: Mapping[str, str], **options: Any) -> Any:  # noqa: ANN401 - asyncpg's own
    """Open a session with these settings and our timeouts; behind a pooler that passes none on, without them.

    Takes what `asyncpg.connect` takes, and raises what that raises.
    """
    connection = await _open_session(address, settings, options)
    of_loop = _connections.setdefault(asyncio.get_running_loop(), {})
    of_loop.setdefault(address, WeakSet()).add(connection)
    return connection


async def open_checked_session(address: str, **options: Any) -> Any:  # noqa: ANN401 - asyncpg's own
    """Open a session as `connect` does, and see whether a pooler in between has dropped the timeouts in silence."""
    connection = await open_session(address, settings={}, **options)
    try:
        found = await connection.fetchval("SELECT setting FROM pg_settings WHERE name = 'lock_timeout'")
    except BaseException:
        connection.terminate()  # nobody else knows of it yet
        raise
    if found != SESSION_TIMEOUTS["lock_timeout"]:
        _without_timeouts.add(connection)
    return connection


def timeout_statement() -> str:
    """Return the statement that sets the timeouts for one transaction, where a pooler has passed none on."""
    settings = (f"set_config('{name}', '{value}', true)" for name, value in SESSION_TIMEOUTS.items())
    return f"SELECT {', '.join(settings)}"


def has_timeouts(connection: object) -> bool:
    """Tell whether the session itself has the timeouts, or each transaction has to set them."""
    return connection not in _without_timeouts


def guard_server(address: str) -> GuardedCall:
    """Return the context of a call to a server; it raises `DatabaseUnavailable` where that doesn't answer anybody."""
    of_loop = _breakers.setdefault(asyncio.get_running_loop(), {})
    breaker = of_loop.get(address)
    if breaker is None:
        breaker = of_loop[address] = CircuitBreaker(
            partial(_probe_server, address), partial(_terminate_connections, address)
        )
    return breaker.guard()


async def _open_session(address: str, settings: Mapping[str, str], options: dict[str, Any]) -> Any:  # noqa: ANN401 - asyncpg's own
    options["connection_class"] = MonitoredConnection
    try:
        return await asyncpg.connect(
            address, server_settings={**SESSION_TIMEOUTS, **_SERVER_SOCKET, **settings}, **options
        )
    except asyncpg.ProtocolViolationError as error:
        if "unsupported startup parameter" not in str(error):
            raise
    connection = await asyncpg.connect(address, **options)
    _without_timeouts.add(connection)
    return connection


async def _probe_server(address: str) -> None:
    """Return once the server has answered on a connection of its own, be it by a refusal."""
    try:
        connection = await _open_session(address, {}, {})
    except asyncpg.PostgresError:
        return
    try:
        # A pooler answers by itself up to here.
        await connection.fetchval("SELECT 1")
    except asyncpg.PostgresError:
        return
    finally:
        connection.terminate()


def _terminate_connections(address: str) -> None:
    """Break all connections to a server: each statement on its way there fails at once."""
    for connection in list(_connections.get(asyncio.get_running_loop(), {}).get(address, ())):
        connection.terminate()


def _enable_keep_alive(found: socket.socket | None) -> None:
    if found is None or found.family not in {socket.AF_INET, socket.AF_INET6}:
        return
    found.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in _CLIENT_SOCKET.items():
        option = getattr(socket, name, None)
        if option is not None:
            found.setsockopt(socket.IPPROTO_TCP, option, value)
