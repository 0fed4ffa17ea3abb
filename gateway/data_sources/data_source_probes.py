"""Connection tests of data sources: real connections, as in a run, with a limit of some seconds."""

from __future__ import annotations

import asyncio
import re
from collections import OrderedDict, deque
from math import ceil
from time import monotonic
from typing import TYPE_CHECKING, Final

import structlog
from msgspec import Struct
from msgspec.structs import replace

from engine.run_errors import NodeError
from engine.services import RunCaller
from gateway.http import errors, limits
from models.data_source import decrypt_secrets
from models.data_source_types import DataSourceType
from models.encryption import VaultError
from models.timestamps import DatabaseClock
from nodes import redaction
from nodes.connection_phases import ConnectionPhase, note_phase, record_phases
from nodes.connections.data_source import ConnectionSource
from nodes.connections.data_source_policy import ConnectionPolicy, ServerDatabase

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from engine.services import ObjectBucket
    from models.data_source import DataSource
    from models.encryption import SecretVault
    from models.settings import ServerSettings
    from nodes.connection_phases import PhaseResult
    from nodes.mcp.tool_definitions import ToolDefinition

log = structlog.get_logger()

WINDOW_SECONDS: Final = 60.0
MAX_REMEMBERED_ORGANIZATIONS: Final = 10_000
_ADDRESS: Final = re.compile(
    r"(?<![\w.])(?:\d{1,3}(?:\.\d{1,3}){3}|[0-9A-Fa-f]*:[0-9A-Fa-f]*:[0-9A-Fa-f:.]+)(?![\w.]*\w)"
)
_DATABASES: Final = frozenset({DataSourceType.POSTGRESQL, DataSourceType.MYSQL, DataSourceType.SQLITE})


class ProbeResult(Struct, frozen=True):
    """Result of a connection test."""

    is_ok: bool
    message: str
    duration_milliseconds: int = 0
    models: Sequence[str] = ()
    """Names that a provider of language models lists."""
    tools: Sequence[ToolDefinition] = ()
    """Tools that a tool server lists."""
    protocol_version: str = ""
    """Version that a tool server has agreed to."""
    phases: Sequence[PhaseResult] = ()
    """Phases of the connection that were begun; a failed one is the last."""


class _SingleSource(Struct, frozen=True):
    """Lookup that returns one data source for every caller; access was checked before."""

    source: ConnectionSource

    async def find(self, caller: RunCaller, source_id: str) -> ConnectionSource:  # noqa: ARG002 - the protocol's signature
        return self.source


class DataSourceProber:
    """Connects to data sources for tests."""

    def __init__(
        self, vault: SecretVault, settings: ServerSettings, clock: DatabaseClock | None = None
    ) -> None:
        self._clock = clock or DatabaseClock()
        self._vault = vault
        self._settings = settings
        self._begun: OrderedDict[str, deque[float]] = OrderedDict()

    async def probe(self, source: DataSource) -> ProbeResult:
        """Test the connection to a data source, and return success, a message and the duration in milliseconds.

        The caller's access was checked before. A failed connection is a result, not an error. Raises a 429
        error after 30 tests of the organization within a minute.
        """
        self.count_test(source.organization_id)
        began = monotonic()
        with record_phases() as recorder:
            found = await self._attempt(source)
        milliseconds = round((monotonic() - began) * 1000)
        log.info(
            "data source tested",
            data_source_id=source.id,
            is_ok=found.is_ok,
            duration_milliseconds=milliseconds,
        )
        return replace(found, duration_milliseconds=milliseconds, phases=recorder.results)

    async def _attempt(self, source: DataSource) -> ProbeResult:
        """Connect within ten seconds, and return the result; its message has no secrets, and no IP address except the
        configured host.

        Undecryptable secrets, `NodeError` and the time limit are failures.
        """
        try:
            secrets = decrypt_secrets(self._vault, source)
        except VaultError as error:
            return ProbeResult(is_ok=False, message=f"{error}: set its secrets again")
        try:
            async with asyncio.timeout(limits.DATA_SOURCE_TEST_SECONDS):
                if source.type == DataSourceType.AI_PROVIDER:
                    names = await self._list_models(source, secrets)
                    listed = f"The provider lists {len(names):,} models" if names else "The provider answers"
                    return ProbeResult(is_ok=True, message=listed, models=names)
                if source.type == DataSourceType.MCP_SERVER:
                    return await self._list_tools(source, secrets)
                return ProbeResult(is_ok=True, message=await self._connect(source, secrets))
        except TimeoutError:
            message = f"No answer within {limits.DATA_SOURCE_TEST_SECONDS} seconds"
            return ProbeResult(is_ok=False, message=message)
        except NodeError as error:
            return ProbeResult(is_ok=False, message=_redact(error.message, source.settings, secrets))

    async def _connect(self, source: DataSource, secrets: dict[str, str]) -> str:
        """Connect to a data source as a node would, and return a message about it; raises `NodeError` if that
        fails.

        A database answers `SELECT 1`, a bucket is listed, a mail server accepts the login; secrets for HTTP
        are only decrypted.
        """
        from nodes.connections.data_source_connections import DataSourceConnections  # noqa: PLC0415 - most gateways never need the drivers

        caller = RunCaller(source.organization_id, source.owner_id, "", "", "")
        policy = ConnectionPolicy(
            allowed_networks=self._settings.outbound_allowed_networks,
            own_databases=(ServerDatabase.from_url(self._settings.database_url),),
            files=self._settings.files_dir,
            clock=self._clock,
        )
        found = ConnectionSource(
            source.id, source.organization_id, source.type, source.revision, source.settings, secrets
        )
        connections = DataSourceConnections(_SingleSource(found), policy)
        try:
            if source.type in _DATABASES:
                database = await connections.database(caller, source.id, source.type)
                seconds = float(limits.DATA_SOURCE_TEST_SECONDS)
                with note_phase(ConnectionPhase.QUERY):
                    await database.query("SELECT 1", [], max_rows=1, max_bytes=1_000, timeout_seconds=seconds)
                return "The database answers"
            if source.type == DataSourceType.S3:
                bucket = await connections.bucket(caller, source.id)
                with note_phase(ConnectionPhase.QUERY):
                    await _list_one(bucket)
                return "The bucket can be listed"
            if source.type == DataSourceType.SMTP:
                server = await connections.mail_server(caller, source.id)
                await server.check(timeout_seconds=float(limits.DATA_SOURCE_TEST_SECONDS))
                return "The mail server accepts the login" if secrets else "The mail server answers"
        finally:
            await connections.close()
        return "Its secrets can be decrypted; only a workflow tests them"

    async def _list_models(self, source: DataSource, secrets: Mapping[str, str]) -> Sequence[str]:
        """Return the names of the models that a provider lists; raises `NodeError`."""
        from nodes.ai import model_client  # noqa: PLC0415 - most gateways never need it
        from nodes.ai.model_connection import build_listing_connection  # noqa: PLC0415 - the same

        outbound = model_client.open_model_outbound(
            self._settings.outbound_allowed_networks, self._settings.model_hosts
        )
        try:
            listing = build_listing_connection(source.settings, secrets)
            with note_phase(ConnectionPhase.QUERY):
                return await model_client.ModelClient(outbound).list_models(listing)
        finally:
            await outbound.close()

    async def _list_tools(self, source: DataSource, secrets: Mapping[str, str]) -> ProbeResult:
        """Return a successful result with the tools that a tool server lists; raises `NodeError`."""
        from nodes.mcp import mcp_session  # noqa: PLC0415 - most gateways never need it

        outbound = mcp_session.open_outbound(
            self._settings.outbound_allowed_networks, self._settings.tool_server_hosts
        )
        try:
            address = mcp_session.build_address(source.settings, secrets)
            with note_phase(ConnectionPhase.QUERY):
                async with mcp_session.open_session(outbound, address) as session:
                    tools = await session.list_tools()
        finally:
            await outbound.close()
        return ProbeResult(
            is_ok=True,
            message=f"The tool server lists {len(tools):,} tools",
            tools=tools,
            protocol_version=session.version or "",
        )

    def count_test(self, organization_id: str) -> None:
        """Count a test of an organization; raises a 429 error if there were 30 within the last minute.

        Tests could serve to guess passwords or to scan for servers.
        """
        now = monotonic()
        begun = self._begun.setdefault(organization_id, deque())
        self._begun.move_to_end(organization_id)
        while begun and begun[0] <= now - WINDOW_SECONDS:
            begun.popleft()
        if len(begun) >= limits.DATA_SOURCE_TESTS:
            seconds = ceil(begun[0] + WINDOW_SECONDS - now)
            message = f"An organization may test data sources {limits.DATA_SOURCE_TESTS} times a minute"
            raise errors.ApiError(429, "rate-limited", message, retry_after_seconds=seconds)
        begun.append(now)
        if len(self._begun) > MAX_REMEMBERED_ORGANIZATIONS:
            self._begun.popitem(last=False)


async def _list_one(bucket: ObjectBucket) -> None:
    try:
        await bucket.list("", max_objects=1, timeout_seconds=float(limits.DATA_SOURCE_TEST_SECONDS))
    except NodeError as error:
        if error.code != "too-many-objects":
            raise


def _redact(message: str, settings: Mapping[str, object], secrets: Mapping[str, str]) -> str:
    """Return a driver's message with secrets replaced, and each IP address except the configured host by "its
    address".
    """
    return _ADDRESS.sub(
        lambda found: found[0] if found[0] == settings.get("host") else "its address",
        redaction.redact_text(message, secrets.values()),
    )
