"""PostgreSQL sessions that end by themselves and release their locks.

They end when their process freezes or its machine is lost.
"""

from __future__ import annotations

import asyncio
import socket
from functools import partial
from typing import TYPE_CHECKING, Any, Final
from weakref import WeakKeyDictionary, WeakSet

import asyncpg

from concurrency.shielded_opening import open_shielded
from models.circuit_breaker import BUSY_SECONDS, CircuitBreaker

if TYPE_CHECKING:
    from asyncio import AbstractEventLoop
    from collections.abc import Mapping

    from sqlalchemy.engine import URL

    from models.circuit_breaker import GuardedCall

LOCK_WAIT_MILLISECONDS: Final = 2_000
"""Lock wait of a statement for a row or key that another transaction has locked."""
IDLE_TRANSACTION_MILLISECONDS: Final = 5_000
"""Time for which a process may freeze inside a transaction before the transaction and its locks are lost."""
SESSION_TIMEOUTS: Final = {
    "lock_timeout": str(LOCK_WAIT_MILLISECONDS),
    "idle_in_transaction_session_timeout": str(IDLE_TRANSACTION_MILLISECONDS),
}
# With these settings, the server detects a client machine that is gone or accepts no data.
_SERVER_SOCKET: Final = {
    "tcp_keepalives_idle": "5",
    "tcp_keepalives_interval": "2",
    "tcp_keepalives_count": "3",
    "tcp_user_timeout": "10000",
}
# The same for the client's socket, with the option names of Linux; other systems have some of them.
_CLIENT_SOCKET: Final = {"TCP_KEEPIDLE": 5, "TCP_KEEPINTVL": 2, "TCP_KEEPCNT": 3, "TCP_USER_TIMEOUT": 10_000}
_without_timeouts: WeakSet[Any] = WeakSet()
_connections: WeakKeyDictionary[AbstractEventLoop, dict[str, WeakSet[Any]]] = WeakKeyDictionary()
"""Open connections by event loop and address."""
_breakers: WeakKeyDictionary[AbstractEventLoop, dict[str, CircuitBreaker]] = WeakKeyDictionary()
"""Circuit breakers by event loop and address.

All pools of a loop share one, so that the first to detect an outage fails the calls of the others.
"""


class MonitoredConnection(asyncpg.Connection):
    """Connection with keep-alive probes, which detect a server machine that has silently gone."""

    __slots__ = ()

    def __init__(self, protocol: Any, transport: Any, *others: Any) -> None:  # noqa: ANN401 - asyncpg's own
        super().__init__(protocol, transport, *others)
        _enable_keep_alive(transport.get_extra_info("socket"))


def driver_address(url: URL) -> str:
    """Return the address for asyncpg of a database URL of SQLAlchemy, with its password."""
    return url.set(drivername="postgresql").render_as_string(hide_password=False)


async def open_session(address: str, *, settings: Mapping[str, str], **options: Any) -> Any:  # noqa: ANN401 - asyncpg's own
    """Open a session with these settings of PostgreSQL and the timeouts of `SESSION_TIMEOUTS`; `guard_server`
    terminates it in an outage.

    Behind a pooler that refuses settings, the session has neither settings nor timeouts. Takes the options of
    `asyncpg.connect`, and raises its exceptions.
    """
    connection = await _open_session(address, settings, options)
    of_loop = _connections.setdefault(asyncio.get_running_loop(), {})
    of_loop.setdefault(address, WeakSet()).add(connection)
    return connection


async def open_checked_session(address: str, **options: Any) -> Any:  # noqa: ANN401 - asyncpg's own
    """Open a session as `open_session` does; if a pooler has silently dropped the timeouts, `has_timeouts` is False for
    it.
    """
    connection = await open_session(address, settings={}, **options)
    try:
        found = await connection.fetchval("SELECT setting FROM pg_settings WHERE name = 'lock_timeout'")
    except BaseException:
        connection.terminate()  # no other code knows of the connection yet
        raise
    if found != SESSION_TIMEOUTS["lock_timeout"]:
        _without_timeouts.add(connection)
    return connection


def timeout_statement() -> str:
    """Return the statement that sets the lock timeout (2 s) and the idle timeout (5 s) of the current transaction.

    Sessions of a pooler that drops these settings need it in each transaction.
    """
    settings = (f"set_config('{name}', '{value}', true)" for name, value in SESSION_TIMEOUTS.items())
    return f"SELECT {', '.join(settings)}"


def has_timeouts(connection: object) -> bool:
    """Return whether the session has the timeouts; otherwise each transaction must run `timeout_statement`."""
    return connection not in _without_timeouts


def guard_server(address: str) -> GuardedCall:
    """Return the context manager for one call to the server at `address`, which raises `DatabaseUnavailable` during an
    outage.

    All calls of an event loop to a server share one circuit breaker.
    """
    of_loop = _breakers.setdefault(asyncio.get_running_loop(), {})
    breaker = of_loop.get(address)
    if breaker is None:
        breaker = of_loop[address] = CircuitBreaker(
            partial(_probe_server, address), partial(_terminate_connections, address)
        )
    return breaker.guard()


async def _open_session(address: str, settings: Mapping[str, str], options: dict[str, Any]) -> Any:  # noqa: ANN401 - asyncpg's own
    """Open a session with settings and timeouts; without either, as `has_timeouts` tells then, if a pooler refuses
    settings.

    If the caller is canceled, the session is terminated as soon as it is open.
    """
    return await open_shielded(_log_in(address, settings, options), lambda opened: opened.terminate())


async def _log_in(address: str, settings: Mapping[str, str], options: dict[str, Any]) -> Any:  # noqa: ANN401 - asyncpg's own
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
    """Return after the server has answered a query on a new connection, even by an error.

    Raises `OSError` and `TimeoutError` without an answer.
    """
    try:
        connection = await _open_session(address, {}, {"timeout": BUSY_SECONDS})
    except asyncpg.PostgresError:
        return
    try:
        # Without a query, only the pooler may have answered.
        await connection.fetchval("SELECT 1")
    except asyncpg.PostgresError:
        return
    finally:
        connection.terminate()


def _terminate_connections(address: str) -> None:
    """Terminate all connections of this event loop to a server, so that each statement in progress fails at once."""
    for connection in list(_connections.get(asyncio.get_running_loop(), {}).get(address, ())):
        connection.terminate()


def _enable_keep_alive(tcp_socket: socket.socket | None) -> None:
    """Enable keep-alive probes of an idle TCP connection, so that a silent loss of the server is detected; other
    sockets are not changed.
    """
    if tcp_socket is None or tcp_socket.family not in {socket.AF_INET, socket.AF_INET6}:
        return
    tcp_socket.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in _CLIENT_SOCKET.items():
        option = getattr(socket, name, None)
        if option is not None:
            tcp_socket.setsockopt(socket.IPPROTO_TCP, option, value)
