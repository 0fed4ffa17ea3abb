"""Node services in a pod, by calls to the gateway. Each call acts in the name of its run."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from time import monotonic
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import quote, unquote

import msgspec

from engine.run_errors import NodeError
from engine.services import SignalExpectation
from execution.pod_api import (
    ApprovalLinksRequest,
    ApprovalLinksResponse,
    CallbackUrlRequest,
    CallbackUrlResponse,
    DataSourceRequest,
    ExpectEventRequest,
    ExpectEventResponse,
    ExpectSignalRequest,
    ModelBlockRequest,
    ModelFailureRequest,
    ModelReleaseRequest,
    ModelRequest,
    ModelReserveRequest,
    ModelSettleRequest,
    PublishRequest,
    PublishResponse,
    ReplyToSignalRequest,
    ReplyToSignalResponse,
    SignatureRequest,
    SignatureResponse,
    StartRunRequest,
    StartRunResponse,
    ThrottleRequest,
    ThrottleResponse,
    WorkflowEffectRequest,
    WorkflowEffectResponse,
)
from execution.retry import until_available
from journal.blobs.blob_storage import BlobLabel, BlobLost, BlobOwner, BlobsUnavailable, OpenBlob
from models.errors import DatabaseUnavailable
from nodes.connections.data_source import ConnectionSource, ToolPin
from runner.gateway_client import CallRefused

if TYPE_CHECKING:
    from datetime import datetime

    from engine.model_calls import FailedModelCall, ModelReservation, ModelSettlement
    from engine.services import EventWaitRequest, RunCaller, SignalRequest
    from engine.values import Json
    from nodes.ai.model_connection import ModelConnection
    from runner.gateway_client import GatewayClient

CACHE_SECONDS: Final = 2.0
MAX_CACHED: Final = 1_000
BLOB_SECONDS: Final = 60.0
CHUNK_BYTES: Final = 1_048_576
_FILE_NAME_PARAMETER: Final = "filename*=UTF-8''"


class RemoteDataSources:
    """Lookup of data sources, cached shortly for each run, because a loop asks for the same one every time."""

    def __init__(self, gateway: GatewayClient) -> None:
        self._gateway = gateway
        self._remembered: OrderedDict[tuple[str, str], tuple[float, ConnectionSource]] = OrderedDict()

    async def find(self, caller: RunCaller, source_id: str) -> ConnectionSource:
        """Return a data source with its secrets from the gateway, cached for two seconds per run.

        Raises the `NodeError` of the gateway, such as for a source that the run may not use, and a retryable one if the
        gateway refuses or doesn't answer.
        """
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
        """Return a data source from the gateway; raises a retryable `NodeError`
        if the gateway refuses or doesn't answer.
        """
        path = f"/executions/{caller.execution_id}/data-sources"
        try:
            found = await self._gateway.call(path, DataSourceRequest(source_id), dict[str, Any])
        except (DatabaseUnavailable, CallRefused) as error:
            message = "The data source could not be looked up just now"
            raise NodeError(message, code="data-source-unavailable", retryable=True) from error
        tools = {name: ToolPin(**pin) for name, pin in found.pop("tools", {}).items()}
        return ConnectionSource(**found, tools=tools)


class RemoteModelLedger:
    """Reserves and settles the costs of model calls at the gateway; implements `nodes.ai.model_ledger.ModelLedger`."""

    def __init__(self, gateway: GatewayClient) -> None:
        self._gateway = gateway

    async def reserve(self, caller: RunCaller, reservation: ModelReservation) -> bool:
        """Reserve the maximum cost of a call in the budgets that count it; always returns True.

        Again with the same key, nothing more is reserved. Raises `NodeError`: for an exceeded budget, for an unknown
        price under a budget that limits the cost, and a retryable one if the gateway refuses or doesn't answer.
        """
        path = f"/executions/{caller.execution_id}/models/reserve"
        try:
            await self._gateway.call(path, ModelReserveRequest(reservation), dict[str, Any])
        except (DatabaseUnavailable, CallRefused) as error:
            message = "The budget could not be read just now"
            raise NodeError(message, code="model-unavailable", retryable=True) from error
        # The gateway doesn't say whether a budget counts the call, and a release of nothing does no harm.
        return True

    async def settle(self, caller: RunCaller, settlement: ModelSettlement, *, is_reserved: bool) -> None:  # noqa: ARG002 - the protocol's parameter
        """Replace the reservation of a call by its real cost; it stays if the gateway refuses or doesn't answer.

        `is_reserved` is ignored: the gateway finds the reservation itself.
        """
        path = f"/executions/{caller.execution_id}/models/settle"
        with suppress(DatabaseUnavailable, CallRefused):
            await self._gateway.call(path, ModelSettleRequest(settlement), dict[str, Any])

    async def release(self, caller: RunCaller, key: str) -> None:
        """Remove the reservation of a call that costs nothing; it stays if the gateway refuses or doesn't answer."""
        path = f"/executions/{caller.execution_id}/models/release"
        with suppress(DatabaseUnavailable, CallRefused):
            await self._gateway.call(path, ModelReleaseRequest(key), dict[str, Any])

    async def count_failure(self, caller: RunCaller, failed: FailedModelCall) -> None:
        """Count a failed call in the metrics of its model; it isn't counted
        if the gateway refuses or doesn't answer.
        """
        path = f"/executions/{caller.execution_id}/models/failed"
        with suppress(DatabaseUnavailable, CallRefused):
            await self._gateway.call(path, ModelFailureRequest(failed), dict[str, Any])

    async def close(self) -> None:
        """Do nothing: the gateway stores each cost at once."""


class RemoteModels:
    """Lookup of language models, with the keys of their providers."""

    def __init__(self, gateway: GatewayClient) -> None:
        self._gateway = gateway
        self.ledger = RemoteModelLedger(gateway)

    async def find(self, caller: RunCaller, model_id: str) -> ModelConnection:
        """Return a model with the key of its provider, asked from the gateway at each call; raises `NodeError`.

        The error is retryable if the gateway refuses or doesn't answer.
        """
        from nodes.ai.model_connection import ModelConnection  # noqa: PLC0415 - loaded with the first call of a model

        path = f"/executions/{caller.execution_id}/models"
        try:
            return await self._gateway.call(path, ModelRequest(model_id), ModelConnection)
        except (DatabaseUnavailable, CallRefused) as error:
            message = "The model could not be looked up just now"
            raise NodeError(message, code="model-unavailable", retryable=True) from error

    async def block(self, caller: RunCaller, model_id: str, seconds: float) -> None:
        """Report to the gateway that the provider of a model accepts no calls for `seconds`;
        a failed report is ignored.
        """
        path = f"/executions/{caller.execution_id}/models/blocked"
        with suppress(DatabaseUnavailable, CallRefused):
            await self._gateway.call(path, ModelBlockRequest(model_id, seconds), dict[str, Any])


class RemoteRunStarter:
    """Starts runs of other workflows; implements `engine.services.SubRunService`."""

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
        """Start a run of another workflow through the gateway, at most once per node and iteration; return its id.

        An `awaited` run answers the node at its end. Raises `NodeError` or `CallRefused`; waits while the gateway is
        unavailable.
        """
        inputs = msgspec.Raw(msgspec.json.encode(trigger_inputs))
        call = StartRunRequest(
            workflow_id,
            inputs,
            node_id,
            iteration,
            awaited,
            write_key_id=caller.write_key_id,
            is_tainted=caller.is_tainted,
            is_read_only=caller.is_read_only,
        )
        path = f"/executions/{caller.execution_id}/runs"
        return (await until_available(lambda: self._gateway.call(path, call, StartRunResponse))).execution_id

    async def may_write(self, caller: RunCaller, workflow_id: str) -> bool:
        """Return whether a run of another workflow may write, as the gateway says; true if it refuses to answer.

        Waits while the gateway is unavailable.
        """
        path, call = f"/executions/{caller.execution_id}/workflow-effect", WorkflowEffectRequest(workflow_id)
        try:
            answer = await until_available(lambda: self._gateway.call(path, call, WorkflowEffectResponse))
        except CallRefused:
            return True  # a gateway of an earlier version
        return answer.may_write


class RemoteApprovalLinks:
    """Creates links of approvals; implements `engine.services.ApprovalLinkService`."""

    def __init__(self, gateway: GatewayClient) -> None:
        self._gateway = gateway

    async def create_links(self, caller: RunCaller, places: Sequence[tuple[str, str]]) -> Sequence[str]:
        """Return the URLs of approval links, in the order of `places`, pairs of node id and iteration;
        the same in every call.

        Raises `NodeError` or `CallRefused`; waits while the gateway is unavailable.
        """
        path, call = f"/executions/{caller.execution_id}/approval-links", ApprovalLinksRequest(places)
        return (await until_available(lambda: self._gateway.call(path, call, ApprovalLinksResponse))).urls


class RemoteCallbacks:
    """Callback URLs and signatures of the gateway; implements `engine.services.CallbackService`."""

    def __init__(self, gateway: GatewayClient) -> None:
        self._gateway = gateway

    async def create_url(self, caller: RunCaller, *, node_id: str, iteration: str) -> str:
        """Return the callback URL of a node and iteration, the same in every call.

        Raises `NodeError` or `CallRefused`; waits while the gateway is unavailable.
        """
        path, call = f"/executions/{caller.execution_id}/callback-url", CallbackUrlRequest(node_id, iteration)
        return (await until_available(lambda: self._gateway.call(path, call, CallbackUrlResponse))).url

    async def sign(self, caller: RunCaller, message_id: str, body: bytes) -> Mapping[str, str]:
        """Return the headers that sign `body`, as the message `message_id`, with the organization's secrets, which stay
        at the gateway.

        Raises `NodeError` or `CallRefused`; waits while the gateway is unavailable.
        """
        path, call = f"/executions/{caller.execution_id}/signatures", SignatureRequest(message_id, body)
        return (await until_available(lambda: self._gateway.call(path, call, SignatureResponse))).headers


class RemoteThrottle:
    """Reserves times under rate limits; implements `engine.services.ThrottleService`."""

    def __init__(self, gateway: GatewayClient) -> None:
        self._gateway = gateway

    async def reserve(
        self, caller: RunCaller, key: str, *, limit: int, per_seconds: float, max_wait_seconds: float
    ) -> datetime:
        """Reserve the next free slot of the rate `key`, `limit` runs per `per_seconds`, at the gateway.

        Return the time of the slot; each call reserves another one. Raises `NodeError` if it is over `max_wait_seconds`
        away, and `CallRefused`; waits while the gateway is unavailable.
        """
        call = ThrottleRequest(key, limit, per_seconds, max_wait_seconds)
        path = f"/executions/{caller.execution_id}/reservations"
        return (await until_available(lambda: self._gateway.call(path, call, ThrottleResponse))).at


class RemoteEventWaits:
    """Registers event waits of nodes; implements `engine.services.EventWaitService`."""

    def __init__(self, gateway: GatewayClient) -> None:
        self._gateway = gateway

    async def expect(
        self, caller: RunCaller, wanted: EventWaitRequest, *, node_id: str, iteration: str
    ) -> datetime | None:
        """Register a node as waiting for an event at the gateway; return the time at which the wait expires.

        None without an expiry, or if the node has its answer already. Raises `NodeError` or `CallRefused`; waits while
        the gateway is unavailable.
        """
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


class RemoteSignalWaits:
    """Registers signal waits of nodes; implements `engine.services.SignalWaitService`."""

    def __init__(self, gateway: GatewayClient) -> None:
        self._gateway = gateway

    async def expect(
        self, caller: RunCaller, wanted: SignalRequest, *, node_id: str, iteration: str
    ) -> SignalExpectation:
        """Register a node as waiting for a signal at the gateway; return the end of the wait,
        or the answer if it has arrived.

        Raises `NodeError` or `CallRefused`; waits while the gateway is unavailable.
        """
        call = ExpectSignalRequest(node_id, iteration, wanted.name, wanted.timeout_seconds)
        path = f"/executions/{caller.execution_id}/signal-waits"
        return await until_available(lambda: self._gateway.call(path, call, SignalExpectation))

    async def reply(self, caller: RunCaller, node_id: str, iteration: str, value: bytes) -> None:
        """Store the reply (JSON) of a node to the signal that it received, at the gateway.

        Raises `NodeError` or `CallRefused`; waits while the gateway is unavailable.
        """
        path = f"/executions/{caller.execution_id}/signal-replies"
        call = ReplyToSignalRequest(node_id, iteration, value)
        await until_available(lambda: self._gateway.call(path, call, ReplyToSignalResponse))


class RemoteState:
    """Publishes values in the states of runs; implements `engine.services.StateService`."""

    def __init__(self, gateway: GatewayClient) -> None:
        self._gateway = gateway

    async def publish(self, caller: RunCaller, key: str, value: bytes) -> None:
        """Publish the value (JSON) of a key in the state of the run, at the gateway, in place of an earlier one.

        Raises `NodeError` or `CallRefused`; waits while the gateway is unavailable.
        """
        path, call = f"/executions/{caller.execution_id}/state", PublishRequest(key, value)
        await until_available(lambda: self._gateway.call(path, call, PublishResponse))


class RemoteBlobStorage:
    """Blobs of the runs that this pod holds; implements `journal.blobs.blob_storage.BlobStorage`."""

    def __init__(self, gateway: GatewayClient) -> None:
        self._gateway = gateway

    async def put(self, owner: BlobOwner, sha256: str, content: bytes, label: BlobLabel) -> None:
        """Send a blob to the gateway, which stores it durably; raises `BlobsUnavailable`
        if it isn't stored within a minute.
        """
        headers = {"Content-Type": label.type, "X-Name": quote(label.name, safe="")}
        try:
            async with self._gateway.stream(
                "PUT", _blob_path(owner, sha256), content, headers=headers, seconds=BLOB_SECONDS
            ):
                pass
        except (DatabaseUnavailable, CallRefused) as error:
            raise BlobsUnavailable(f"The blob could not be stored: {error}") from error

    @asynccontextmanager
    async def open(self, owner: BlobOwner, sha256: str) -> AsyncIterator[OpenBlob]:
        """Open a blob from the gateway, to be read in chunks within the block and within a minute.

        Raises `BlobLost` if the gateway refuses it, as a missing one, and `BlobsUnavailable`.
        """
        try:
            async with self._gateway.stream(
                "GET", _blob_path(owner, sha256), seconds=BLOB_SECONDS
            ) as response:
                name = response.headers.get("Content-Disposition", "").partition(_FILE_NAME_PARAMETER)[2]
                label = BlobLabel(response.headers.get("Content-Type", ""), unquote(name))
                size = response.content_length or 0
                yield OpenBlob(label, size, response.content.iter_chunked(CHUNK_BYTES))
        except CallRefused as error:
            raise BlobLost("The blob does not exist") from error
        except DatabaseUnavailable as error:
            raise BlobsUnavailable(f"The blob could not be read: {error}") from error

    async def close(self) -> None:
        """Do nothing: the gateway client owns the connections."""


def _blob_path(owner: BlobOwner, sha256: str) -> str:
    return f"/blobs/{owner.key_id}/{sha256}"
