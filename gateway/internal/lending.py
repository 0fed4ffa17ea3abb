"""The handlers by which nodes in pods reach what the server lends to nodes: contents, data sources, runs, rates.

Each is for one run that the pod holds, in the name of whom that run works for; the pod has no say in that.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from hashlib import sha256 as hash_of
from typing import TYPE_CHECKING, Final
from urllib.parse import unquote

from engine.run_errors import NodeError
from engine.services import EventWaitRequest
from execution.node_blobs import MAX_BLOB_BYTES
from execution.pod_api import (
    FINAL,
    NODE_ERROR_HEADER,
    RETRYABLE,
    DataSourceRequest,
    ExpectEventRequest,
    ExpectEventResponse,
    StartRunRequest,
    StartRunResponse,
    ThrottleRequest,
    ThrottleResponse,
)
from gateway import errors
from gateway.errors import ApiError
from gateway.http.body_limit import BodyLimit
from gateway.http.downloads import Download
from gateway.http.responses import JsonResponse, NoContent
from gateway.internal import checks, holding
from gateway.internal.endpoint import decoded
from journal.blobs.blob_storage import BlobLost, BlobOwner, BlobsUnavailable
from json_text import decoding

if TYPE_CHECKING:
    from gateway.http.request import Request
    from gateway.internal.holding import Holder

MAX_START_BYTES: Final = 60_000_000
"""What a run is started with may be as large as what a node may give out."""
ASK_SECONDS: Final = 20.0
"""How long a call may wait for our own database; whoever asked asks again."""


async def put_blob(request: Request, holder: Holder) -> NoContent:
    """Keep a content for a line of runs."""
    owner = await _owner(request, holder)
    content = await request.body_up_to(BodyLimit(MAX_BLOB_BYTES, setting=""))
    wanted = request.path_params["sub"]
    if await asyncio.to_thread(lambda: hash_of(content).hexdigest()) != wanted:
        raise errors.invalid([errors.problem("sha256", "invalid-value", "The content has another hash")])
    media_type = request.headers.get("content-type", "")
    name = unquote(request.headers.get("x-name", ""))
    try:
        await request.gateway.blobs.put(owner, content, media_type=media_type, name=name)
    except BlobsUnavailable as error:
        raise errors.not_ready(f"{error}: try again") from error
    return NoContent()


async def get_blob(request: Request, holder: Holder) -> Download:
    """Return a content of a line of runs."""
    owner = await _owner(request, holder)
    try:
        return await Download.of(request.gateway.blobs, owner, request.path_params["sub"])
    except BlobLost as error:
        raise errors.not_found("content") from error
    except BlobsUnavailable as error:
        raise errors.not_ready(f"{error}: try again") from error


async def _owner(request: Request, holder: Holder) -> BlobOwner:
    key_id = request.path_params["id"]
    await holding.require_line(request.gateway.database, holder, key_id)
    return BlobOwner(holder.organization_id, key_id)


async def open_data_source(request: Request, holder: Holder) -> JsonResponse:
    """Return a data source with its secrets."""
    call = await decoded(request, DataSourceRequest)
    caller = await holding.caller(request.gateway.database, holder, request.path_params["id"])
    async with _told():
        return JsonResponse(await request.gateway.runners.sources.find(caller, call.source_id))


async def start_run(request: Request, holder: Holder) -> JsonResponse:
    """Start a run of another workflow."""
    call = await decoded(request, StartRunRequest, max_bytes=MAX_START_BYTES)
    caller = await holding.caller(request.gateway.database, holder, request.path_params["id"])
    async with _told():
        execution_id = await request.gateway.runners.runs.start(
            caller,
            call.workflow_id,
            decoding.decode(call.inputs),
            node_id=call.node_id,
            iteration=call.iteration,
            awaited=call.awaited,
        )
    return JsonResponse(StartRunResponse(execution_id))


async def expect_event(request: Request, holder: Holder) -> JsonResponse:
    """Have a node wait for an event."""
    call = await decoded(request, ExpectEventRequest)
    checks.require_readable(call)
    caller = await holding.caller(request.gateway.database, holder, request.path_params["id"])
    async with _told():
        expires_at = await request.gateway.runners.events.expect(
            caller,
            EventWaitRequest(
                call.event_type, call.condition, call.given, call.look_back_seconds, call.timeout_seconds
            ),
            node_id=call.node_id,
            iteration=call.iteration,
        )
    return JsonResponse(ExpectEventResponse(expires_at))


async def reserve(request: Request, holder: Holder) -> JsonResponse:
    """Take the next place at a limited rate."""
    call = await decoded(request, ThrottleRequest)
    caller = await holding.caller(request.gateway.database, holder, request.path_params["id"])
    async with _told():
        at = await request.gateway.runners.pace.reserve(
            caller,
            call.key,
            limit=call.limit,
            per_seconds=call.per_seconds,
            max_wait_seconds=call.max_wait_seconds,
        )
    return JsonResponse(ThrottleResponse(at))


@asynccontextmanager
async def _told() -> AsyncIterator[None]:
    """Tell a node's error as one, and of a database that is away in time."""
    try:
        async with asyncio.timeout(ASK_SECONDS):
            yield
    except NodeError as error:
        kind = RETRYABLE if error.retryable else FINAL
        raise ApiError(422, error.code, error.message, headers={NODE_ERROR_HEADER: kind}) from error
    except TimeoutError as error:
        raise errors.not_ready("The database does not answer: try again") from error
