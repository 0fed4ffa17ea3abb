"""Checks of the ways to PostgreSQL and Redis: a pooler in a mode that breaks sessions, and a Redis that evicts.

Both are set up outside of this server, and neither shows before it is under load.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import asyncpg
from msgspec import Struct
from redis.asyncio import Redis
from redis.exceptions import RedisError

from doctor.findings import DriftClass, DriftFinding, DriftSeverity, DriftSubject
from messages import redis_broker
from messages.broker import RedisMayEvict
from models import postgresql_sessions
from models.database import is_sqlite

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sqlalchemy.engine import URL

CONNECT_SECONDS: Final = 5.0
POOLED_SETTINGS: Final = {"plan_cache_mode": "force_custom_plan", "jit": "off"}
"""Options that the database must have where a pooler drops those of a session."""
_POOL_MODE: Final = "pool_mode"


class ServerAddresses(Struct, frozen=True):
    """Addresses of the servers behind the database and the wakeups."""

    database_url: URL
    broker_url: str | None
    """Redis, or the PostgreSQL that announces wakeups instead."""


async def check_connections(addresses: ServerAddresses) -> Sequence[DriftFinding]:
    """Return findings about the pooler in front of PostgreSQL and about Redis.

    Servers that don't answer, SQLite, and connections without a pooler give none.
    """
    found: list[DriftFinding] = []
    broker_url = addresses.broker_url or ""
    if not is_sqlite(addresses.database_url):
        address = postgresql_sessions.driver_address(addresses.database_url)
        listen_url = broker_url if broker_url.startswith("postgresql") else ""
        found += await _check_pooler(address, listen_url.replace("+asyncpg", "", 1))
    if broker_url.startswith("redis"):
        found += await _check_redis(broker_url)
    return found


async def _check_redis(url: str) -> Sequence[DriftFinding]:
    """Return a critical finding if Redis may evict keys when its memory is full (`maxmemory-policy`).

    Nothing is found if Redis doesn't answer or does not tell its policy.
    """
    client = Redis.from_url(url, socket_timeout=CONNECT_SECONDS, socket_connect_timeout=CONNECT_SECONDS)
    try:
        await redis_broker.refuse_evicting(client)
    except (RedisError, OSError):
        return ()
    except RedisMayEvict as error:
        return [
            _build_finding(
                "maxmemory-policy",
                f"{error}. No process starts with this Redis.",
                "Run `redis-cli config set maxmemory-policy noeviction`, and set it in the server's own configuration.",
                DriftSeverity.CRITICAL,
            )
        ]
    finally:
        await client.aclose()
    return ()


async def _check_pooler(address: str, listen_address: str) -> Sequence[DriftFinding]:
    """Return findings about the pooler in front of the database; none if it doesn't answer.

    `listen_address` is the URL at which processes listen for notifications of PostgreSQL, empty if Redis carries them.
    """
    try:
        first = await asyncpg.connect(address, timeout=CONNECT_SECONDS)
    except (asyncpg.PostgresError, OSError, TimeoutError):
        return ()
    try:
        return await _examine_pooler(first, address, listen_address)
    except (asyncpg.PostgresError, asyncpg.InterfaceError, OSError, TimeoutError):
        return ()
    finally:
        first.terminate()


async def _examine_pooler(first: Any, address: str, listen_address: str) -> Sequence[DriftFinding]:  # noqa: ANN401 - asyncpg's own
    """Return findings about the pooler through which `first` is connected; none without a pooler.

    Findings are statement mode, and for transaction mode notifications through the pooler and missing database options.
    """
    # A pooler answers the start of a session itself, with a process id that it has made up.
    if await first.fetchval("SELECT pg_backend_pid()") == first.get_server_pid():
        return ()
    if not await _allows_transactions(address):
        return [
            _build_finding(
                _POOL_MODE,
                "The pooler in front of PostgreSQL is in statement mode, in which no transaction is possible.",
                "Set pool_mode = transaction in the configuration of the pooler.",
                DriftSeverity.CRITICAL,
            )
        ]
    if not await _shares_sessions(first, address):
        return ()
    found: list[DriftFinding] = []
    if listen_address == address:
        found.append(
            _build_finding(
                "PILOTFLAME_LISTEN_URL",
                "Without Redis, PostgreSQL announces wakeups, and the pooler in front of it passes none on.",
                "Set it to the address of PostgreSQL itself, or set PILOTFLAME_REDIS_URL.",
                DriftSeverity.CRITICAL,
            )
        )
    for name, expected in POOLED_SETTINGS.items():
        value = await first.fetchval("SELECT current_setting($1)", name)
        if value != expected:
            found.append(
                _build_finding(
                    name,
                    f"It is {value}: the pooler passes no options of sessions on, so the database must have them.",
                    f"ALTER DATABASE … SET {name} = {expected}",
                )
            )
    return found


async def _allows_transactions(address: str) -> bool:
    """Return whether the pooler at an address permits transactions; one in statement mode does not."""
    connection = await asyncpg.connect(address, timeout=CONNECT_SECONDS)
    try:
        async with connection.transaction():
            await connection.fetchval("SELECT 1")
    except (asyncpg.ProtocolViolationError, asyncpg.ConnectionDoesNotExistError):
        return False  # the pooler closes the connection at once
    finally:
        connection.terminate()
    return True


async def _shares_sessions(first: Any, address: str) -> bool:  # noqa: ANN401 - asyncpg's own
    """Return whether a second connection gets the server process of the first,
    as through a pooler in transaction mode.
    """
    second = await asyncpg.connect(address, timeout=CONNECT_SECONDS)
    try:
        statement = "SELECT pg_backend_pid()"
        return bool(await first.fetchval(statement) == await second.fetchval(statement))
    finally:
        second.terminate()


def _build_finding(
    setting: str, message: str, remedy: str, severity: DriftSeverity = DriftSeverity.WARNING
) -> DriftFinding:
    return DriftFinding(
        DriftClass.UNSAFE_SETTING, DriftSubject("setting", setting), message, {}, severity, remedy
    )
