"""What nodes in a pod are lent by way of the gateway, each in the name of the run that it is for."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from time import monotonic
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import quote, unquote

import msgspec

from engine.run_errors import NodeError
from execution.pod_api import (
    DataSourceRequest,
    ExpectEventRequest,
    ExpectEventResponse,
    StartRunRequest,
    StartRunResponse,
    ThrottleRequest,
    ThrottleResponse,
)
from execution.retry import until_available
from journal.blobs.blob_storage import BlobLabel, BlobLost, BlobOwner, BlobsUnavailable, OpenBlob
from models.errors import DatabaseUnavailable
from nodes.connections.data_source import ConnectionSource
from runner.gateway_client import CallRefused

if TYPE_CHECKING:
    from datetime import datetime

    from engine.services import EventWaitRequest, RunCaller
    from engine.values import Json
    from runner.gateway_client import GatewayClient

CACHE_SECONDS: Final = 2.0
MAX_CACHED: Final = 1_000
BLOB_SECONDS: Final = 60.0
CHUNK_BYTES: Final = 1_048_576
_FILE_NAME_PARAMETER: Final = "filename*=UTF-8''"


class RemoteDataSources:
    """Finds data sources, and remembers each for a run and a moment: a loop asks for the same one every time."""

    def __init__(self, gateway: GatewayClient) -> None:
        self._gateway = gateway
        self._remembered: OrderedDict[tuple[str, str], tuple[float, ConnectionSource]] = OrderedDict()

    async def find(self, caller: RunCaller, source_id: str) -> ConnectionSource:
        """Return a data source; raises `NodeError`."""
        key = (caller.execution_id, source_id)
        known = self._remembered.get(key)
        if known is not None and known[0] > monotonic():
            return known[1]
        until = monotonic() + CACHE_SECONDS
        source = await self._look_up(caller, source_id)
        self._remembered[key] = (until, source)
        self._remembered.move_to_end(key)
        while len(self._remembered) > MAX_CACHED:
            self._remembered.popitem(last=False)
        return source

    async def _look_up(self, caller: RunCaller, source_id: str) -> ConnectionSource:
        path = f"/executions/{caller.execution_id}/data-sources"
        try:
            found = await self._gateway.call(path, DataSourceRequest(source_id), dict[str, Any])
        except (DatabaseUnavailable, CallRefused) as error:
            message = "The data source could not be looked up just now"
            raise NodeError(message, code="data-source-unavailable", retryable=True) from error
        return ConnectionSource(**found)


class RemoteRunStarter:
    """Starts runs of other workflows; keeps the promises of `engine.services.SubRunService`."""

    def __init__(self, gateway: GatewayClient) -> None:
        self._gateway = gateway

    async def start(
        self,
        caller: RunCaller,
        workflow_id: str,
        trigger_inputs: Json,
        *,
        node_id: str,
        iteration: str,
        awaited: bool,
    ) -> str:
        """Start a run, or find the one that was started before; returns its execution id."""
        inputs = msgspec.Raw(msgspec.json.encode(trigger_inputs))
        call = StartRunRequest(workflow_id, inputs, node_id, iteration, awaited)
        path = f"/executions/{caller.execution_id}/runs"
        return (await until_available(lambda: self._gateway.call(path, call, StartRunResponse))).execution_id


class RemoteThrottle:
    """Takes places at limited rates; keeps the promises of `engine.services.ThrottleService`."""

    def __init__(self, gateway: GatewayClient) -> None:
        self._gateway = gateway

    async def reserve(
        self, caller: RunCaller, key: str, *, limit: int, per_seconds: float, max_wait_seconds: float
    ) -> datetime:
        """Return when one more may pass, and take that place."""
        call = ThrottleRequest(key, limit, per_seconds, max_wait_seconds)
        path = f"/executions/{caller.execution_id}/reservations"
        return (await until_available(lambda: self._gateway.call(path, call, ThrottleResponse))).at


class RemoteEventWaits:
    """Has nodes wait for events; keeps the promises of `engine.services.EventWaitService`."""

    def __init__(self, gateway: GatewayClient) -> None:
        self._gateway = gateway

    async def expect(
        self, caller: RunCaller, wanted: EventWaitRequest, *, node_id: str, iteration: str
    ) -> datetime | None:
        """Have a node wait for an event; returns when it has waited long enough."""
        call = ExpectEventRequest(
            node_id,
            iteration,
            wanted.event_type,
            wanted.condition,
            wanted.given,
            wanted.look_back_seconds,
            wanted.timeout_seconds,
        )
        path = f"/executions/{caller.execution_id}/event-waits"
        return (await until_available(lambda: self._gateway.call(path, call, ExpectEventResponse))).expires_at


class RemoteBlobStorage:
    """Contents of runs that this pod holds; keeps the promises of `journal.blobs.blob_storage.BlobStorage`."""

    def __init__(self, gateway: GatewayClient) -> None:
        self._gateway = gateway

    async def put(self, owner: BlobOwner, sha256: str, content: bytes, label: BlobLabel) -> None:
        """Keep a content; see `Contents.put`."""
        headers = {"Content-Type": label.type, "X-Name": quote(label.name, safe="")}
        try:
            async with self._gateway.exchange(
                "PUT", _blob_path(owner, sha256), content, headers=headers, seconds=BLOB_SECONDS
            ):
                pass
        except (DatabaseUnavailable, CallRefused) as error:
            raise BlobsUnavailable(f"The content could not be kept: {error}") from error

    @asynccontextmanager
    async def open(self, owner: BlobOwner, sha256: str) -> AsyncIterator[OpenBlob]:
        """Open a content; see `Contents.open`."""
        try:
            async with self._gateway.exchange(
                "GET", _blob_path(owner, sha256), seconds=BLOB_SECONDS
            ) as response:
                name = response.headers.get("Content-Disposition", "").partition(_FILE_NAME_PARAMETER)[2]
                label = BlobLabel(response.headers.get("Content-Type", ""), unquote(name))
                size = response.content_length or 0
                yield OpenBlob(label, size, response.content.iter_chunked(CHUNK_BYTES))
        except CallRefused as error:
            raise BlobLost("There is no such content") from error
        except DatabaseUnavailable as error:
            raise BlobsUnavailable(f"The content could not be read: {error}") from error

    async def close(self) -> None:
        """Do nothing: the connections are the gateway's."""


def _blob_path(owner: BlobOwner, sha256: str) -> str:
    return f"/blobs/{owner.key_id}/{sha256}"
