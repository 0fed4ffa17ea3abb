"""Database server of a data source: address, login and TLS mode."""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Self, TypeVar

from engine.run_errors import NodeError
from models.data_source_types import DatabaseTls
from nodes import config_fields
from nodes.connections import data_source_policy
from nodes.connections.data_source_policy import ConnectionPolicy, ResolveHost
from nodes.url_targets import MAX_PORT

if TYPE_CHECKING:
    from nodes.connections.data_source import ConnectionSource

Opened = TypeVar("Opened")

CONNECT_SECONDS = 10


@dataclass(frozen=True)
class DatabaseEndpoint:
    host: str
    port: int
    database: str
    user: str
    tls: DatabaseTls
    password: str = field(repr=False)

    @classmethod
    def from_source(cls, source: ConnectionSource) -> Self:
        """Read the settings of a database's data source; raises `NodeError` for incomplete or invalid ones."""
        settings = {"tls": DatabaseTls.PREFER.value, **source.settings}
        return cls(
            host=config_fields.read_text(settings, "host"),
            port=int(config_fields.read_number(settings, "port", minimum=1, maximum=MAX_PORT)),
            database=config_fields.read_text(settings, "database"),
            user=config_fields.read_text(settings, "user"),
            tls=config_fields.read_choice(settings, "tls", DatabaseTls),
            password=source.secrets.get("password", ""),
        )

    def tls_context(self) -> ssl.SSLContext | None:
        """Return the TLS context for connections to this server; None if its setting disables TLS.

        Certificates are verified only under `DatabaseTls.VERIFY_FULL`.
        """
        if self.tls is DatabaseTls.DISABLE:
            return None
        context = _NamedTlsContext(ssl.PROTOCOL_TLS_CLIENT)
        context.server_name = self.host
        if self.tls is DatabaseTls.VERIFY_FULL:
            context.load_default_certs()
        else:
            context.check_hostname = False
            context.verify_mode = ssl.CERT_NONE
        return context

    async def connect(
        self,
        connection_policy: ConnectionPolicy,
        resolve: ResolveHost,
        open_at: Callable[[str, ssl.SSLContext | None], Awaitable[Opened]],
    ) -> Opened:
        """Open a connection by `open_at` at the first of the host's addresses that accepts one, within ten seconds
        each.

        `open_at` gets address and TLS context. Under `DatabaseTls.PREFER`, an address that fails is tried again without
        TLS. Raises `NodeError`: before any attempt if one of the addresses is not permitted, that of `open_at` at once,
        and a retryable one if no address accepts a connection.
        """
        found = await data_source_policy.resolve_allowed(
            connection_policy, resolve, host=self.host, port=self.port, database=self.database or self.user
        )
        failure = connection_error("the server did not answer")
        context = self.tls_context()
        for address in found:
            try:
                async with asyncio.timeout(CONNECT_SECONDS):
                    return await self._open(open_at, str(address), context)
            except TimeoutError:
                failure = connection_error(f"there was no answer within {CONNECT_SECONDS} s")
            except ssl.SSLError:
                failure = connection_error("its certificate is not trusted, or it does not support TLS")
            except OSError:
                failure = connection_error("the server did not answer, or not with TLS")
        raise failure

    async def _open(
        self,
        open_at: Callable[[str, ssl.SSLContext | None], Awaitable[Opened]],
        address: str,
        context: ssl.SSLContext | None,
    ) -> Opened:
        try:
            return await open_at(address, context)
        except OSError:
            if self.tls is not DatabaseTls.PREFER:
                raise
            return await open_at(address, None)


class _NamedTlsContext(ssl.SSLContext):
    """TLS context that sends and verifies the host name, although an address is connected."""

    server_name: str

    def wrap_bio(self, *args: Any, **named: Any) -> ssl.SSLObject:  # noqa: ANN401 - passed on
        return super().wrap_bio(*args, **(named | {"server_hostname": self.server_name}))


class NameResolver:
    """Resolver in its own threads: a lookup blocks one for as long as the owner of the name likes."""

    def __init__(self) -> None:
        self._threads = ThreadPoolExecutor(max_workers=16, thread_name_prefix="connection-names")

    async def resolve(self, name: str) -> Sequence[str]:
        def ask() -> list[str]:
            infos = socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)
            return [str(address[0]) for *_, address in infos]

        return await asyncio.get_running_loop().run_in_executor(self._threads, ask)

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)


def connection_error(reason: str, *, retryable: bool = True) -> NodeError:
    """Return the error `connection-failed` for an unusable database.

    The message contains `reason` as it is, which must contain no address, user or secret.
    """
    return NodeError(
        f"No connection to the database: {reason}", code="connection-failed", retryable=retryable
    )
