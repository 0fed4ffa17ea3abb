"""Handlers for the services of nodes in pods: blobs, data sources, sub-workflows, event waits and throttles.

Each call names in its path a run that the pod holds (the path's run), and acts in the name of that run's user. The
pod can't choose another user. A 422 error is the `NodeError` with which the pod fails its node.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from hashlib import sha256 as hash_of
from typing import TYPE_CHECKING, Final
from urllib.parse import unquote

import msgspec

from engine.run_errors import NodeError
from engine.services import EventWaitRequest, SignalRequest
from execution.node_blobs import MAX_BLOB_BYTES
from execution.pod_api import (
    FINAL,
    MAX_RECORD_BYTES,
    NODE_ERROR_HEADER,
    RETRYABLE,
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
    OpenAnswersRequest,
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
from gateway.http import errors
from gateway.http.downloads import BlobDownload
from gateway.http.errors import ApiError
from gateway.http.request import BodyLimit
from gateway.http.responses import JsonResponse, NoContent
from gateway.pods import lease_checks, record_checks
from gateway.pods.pod_endpoint import decode_call
from journal.blobs.blob_storage import BlobLost, BlobOwner, BlobsUnavailable
from json_text import decoding

if TYPE_CHECKING:
    from gateway.http.request import GatewayRequest
    from gateway.pods.lease_checks import LeaseHolder

MAX_START_BYTES: Final = 60_000_000
"""As large as the largest output of a node, since an output may become the input of a run."""
ASK_SECONDS: Final = 20.0
"""Seconds for which a call may wait for the server's database. The pod repeats the call afterwards."""


async def put_blob(request: GatewayRequest, holder: LeaseHolder) -> NoContent:
    """Store the body as a blob for the chain of runs in the path, of which the pod must hold a run.

    Raises 409 `lease-lost`, 422 for a wrong hash and 503 without blob storage.
    """
    owner = await _find_owner(request, holder)
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


async def get_blob(request: GatewayRequest, holder: LeaseHolder) -> BlobDownload:
    """Answer with a blob of the chain of runs in the path, of which the pod must hold a run.

    Raises 409 `lease-lost`, 404 for a missing or corrupt blob and 503 without blob storage.
    """
    owner = await _find_owner(request, holder)
    try:
        return await BlobDownload.of(request.gateway.blobs, owner, request.path_params["sub"])
    except BlobLost as error:
        raise errors.not_found("content") from error
    except BlobsUnavailable as error:
        raise errors.not_ready(f"{error}: try again") from error


async def _find_owner(request: GatewayRequest, holder: LeaseHolder) -> BlobOwner:
    """Return the owner of the blobs of the chain of runs in the path.

    Raises 409 `lease-lost` unless the pod holds a run of the chain.
    """
    key_id = request.path_params["id"]
    await lease_checks.require_resume_chain(request.gateway.database, holder, key_id)
    return BlobOwner(holder.organization_id, key_id)


async def open_data_source(request: GatewayRequest, holder: LeaseHolder) -> JsonResponse:
    """Answer with a data source and its decrypted secrets, if the user of the path's run may use it.

    Raises 409 `lease-lost`, 422 for a `NodeError`, and 503 if the database does not answer.
    """
    call = await decode_call(request, DataSourceRequest)
    caller = await lease_checks.read_caller(request.gateway.database, holder, request.path_params["id"])
    async with _translate_errors():
        return JsonResponse(await request.gateway.pod_services.sources.find(caller, call.source_id))


async def find_model(request: GatewayRequest, holder: LeaseHolder) -> JsonResponse:
    """Answer with a language model and the key of its provider, if the user of the path's run may use it.

    Raises 409 `lease-lost`, 422 for a `NodeError`, and 503 if the database does not answer.
    """
    call = await decode_call(request, ModelRequest)
    caller = await lease_checks.read_caller(request.gateway.database, holder, request.path_params["id"])
    async with _translate_errors():
        return JsonResponse(await request.gateway.pod_services.models.find(caller, call.model_id))


async def block_model(request: GatewayRequest, holder: LeaseHolder) -> JsonResponse:
    """Store the time for which the provider of a model accepts no calls, if the user of the path's run may use it.

    Nothing is stored for other models, if a later time is stored, and if the database becomes unavailable. Raises 409
    `lease-lost`.
    """
    call = await decode_call(request, ModelBlockRequest)
    caller = await lease_checks.read_caller(request.gateway.database, holder, request.path_params["id"])
    await request.gateway.pod_services.models.block(caller, call.model_id, call.seconds)
    return JsonResponse({})


async def reserve_model_call(request: GatewayRequest, holder: LeaseHolder) -> JsonResponse:
    """Reserve the most that a model call of the path's run may cost, in all budgets that count it, if there are any.

    A repeated request for a call reserves nothing more. Raises 409 `lease-lost`, 422 for a `NodeError`, such as an
    exceeded budget, and 503 if the database does not answer.
    """
    call = await decode_call(request, ModelReserveRequest)
    caller = await lease_checks.read_caller(request.gateway.database, holder, request.path_params["id"])
    async with _translate_errors():
        await request.gateway.pod_services.models.ledger.reserve(caller, call.reservation)
    return JsonResponse({})


async def settle_model_call(request: GatewayRequest, holder: LeaseHolder) -> JsonResponse:
    """Store usage and cost of a call of a model by the path's run, in place of its reservation.

    A repeated request for a call changes nothing. If the database becomes unavailable, the reservation stays, and the
    answer is the same. Raises 409 `lease-lost`.
    """
    call = await decode_call(request, ModelSettleRequest)
    caller = await lease_checks.read_caller(request.gateway.database, holder, request.path_params["id"])
    await request.gateway.pod_services.models.ledger.settle(caller, call.settlement, is_reserved=True)
    return JsonResponse({})


async def release_model_call(request: GatewayRequest, holder: LeaseHolder) -> JsonResponse:
    """Remove the reservation of a model call of the path's run, unless its cost is stored or the database becomes
    unavailable; raises 409 `lease-lost`.
    """
    call = await decode_call(request, ModelReleaseRequest)
    caller = await lease_checks.read_caller(request.gateway.database, holder, request.path_params["id"])
    await request.gateway.pod_services.models.ledger.release(caller, call.key)
    return JsonResponse({})


async def count_failed_model_call(request: GatewayRequest, holder: LeaseHolder) -> JsonResponse:
    """Count a failed call of a model by the path's run in the metrics of the model; raises 409 `lease-lost`.

    A repeated request counts once more; nothing is counted while the database is unavailable.
    """
    call = await decode_call(request, ModelFailureRequest)
    caller = await lease_checks.read_caller(request.gateway.database, holder, request.path_params["id"])
    await request.gateway.pod_services.models.ledger.count_failure(caller, call.failed)
    return JsonResponse({})


async def receive_open_answers(request: GatewayRequest, holder: LeaseHolder) -> JsonResponse:
    """Pass pieces of streamed model answers to the gateways that follow their runs; answer which of the named runs are
    followed, and which of them must send their open answers from the beginning.

    The latter are named once. Runs that the pod doesn't hold are ignored. Raises `DatabaseUnavailable`.
    """
    call = await decode_call(request, OpenAnswersRequest)
    return JsonResponse(await request.gateway.pod_services.answers.receive(holder, call))


async def start_run(request: GatewayRequest, holder: LeaseHolder) -> JsonResponse:
    """Start a run of another workflow (a sub-workflow) for a node of the path's run, and answer with its id.

    A repeated request for the same node and iteration starts no second run, and gets the same id. Raises 409
    `lease-lost`, 422 for a `NodeError` (a workflow that can't be started), and 503 if the database does not answer.
    """
    call = await decode_call(request, StartRunRequest, max_bytes=MAX_START_BYTES)
    database = request.gateway.database
    caller = await lease_checks.read_caller(database, holder, request.path_params["id"])
    node = (call.node_id, call.iteration)
    caller = await lease_checks.take_write_key(database, caller, node, call.write_key_id)
    caller = msgspec.structs.replace(caller, is_tainted=call.is_tainted, is_read_only=call.is_read_only)
    async with _translate_errors():
        execution_id = await request.gateway.pod_services.runs.start(
            caller,
            call.workflow_id,
            decoding.decode(call.inputs),
            node_id=call.node_id,
            iteration=call.iteration,
            awaited=call.awaited,
        )
    return JsonResponse(StartRunResponse(execution_id))


async def read_workflow_effect(request: GatewayRequest, holder: LeaseHolder) -> JsonResponse:
    """Answer whether a run of another workflow may write, for the user of the path's run.

    Raises 409 `lease-lost`, and 503 if the database does not answer.
    """
    call = await decode_call(request, WorkflowEffectRequest)
    caller = await lease_checks.read_caller(request.gateway.database, holder, request.path_params["id"])
    async with _translate_errors():
        may_write = await request.gateway.pod_services.runs.may_write(caller, call.workflow_id)
    return JsonResponse(WorkflowEffectResponse(may_write))


async def create_approval_links(request: GatewayRequest, holder: LeaseHolder) -> JsonResponse:
    """Create an approval link for each of the named nodes of the run in the path; answer with their URLs, in the order
    of the nodes.

    Anyone with a link can answer the question without an account. A repeated request gets the same URLs. Raises
    409 `lease-lost`, 422 for a `NodeError` (no public URL of the server), and 503 if the database does not answer.
    """
    call = await decode_call(request, ApprovalLinksRequest)
    caller = await lease_checks.read_caller(request.gateway.database, holder, request.path_params["id"])
    async with _translate_errors():
        urls = await request.gateway.pod_services.approvals.create_links(caller, call.places)
    return JsonResponse(ApprovalLinksResponse(urls))


async def create_callback_url(request: GatewayRequest, holder: LeaseHolder) -> JsonResponse:
    """Answer with the callback URL of a node of the path's run.

    Raises 409 `lease-lost`, 422 for a `NodeError`, and 503 if the database does not answer.
    """
    call = await decode_call(request, CallbackUrlRequest)
    caller = await lease_checks.read_caller(request.gateway.database, holder, request.path_params["id"])
    async with _translate_errors():
        url = await request.gateway.pod_services.callbacks.create_url(
            caller, node_id=call.node_id, iteration=call.iteration
        )
    return JsonResponse(CallbackUrlResponse(url))


async def sign(request: GatewayRequest, holder: LeaseHolder) -> JsonResponse:
    """Answer with the headers that sign a request of a node with the secrets of its organization.

    Raises 409 `lease-lost`, 422 for a `NodeError`, and 503 if the database does not answer.
    """
    call = await decode_call(request, SignatureRequest, max_bytes=MAX_RECORD_BYTES)
    caller = await lease_checks.read_caller(request.gateway.database, holder, request.path_params["id"])
    async with _translate_errors():
        headers = await request.gateway.pod_services.callbacks.sign(caller, call.message_id, call.body)
    return JsonResponse(SignatureResponse(headers))


async def expect_event(request: GatewayRequest, holder: LeaseHolder) -> JsonResponse:
    """Register that a node of the path's run waits for an event, and answer with the time when the wait expires.

    It is null for a wait without a limit, and if the run is gone or the node has its answer. Earlier events within its
    period answer it at once. Raises 409 `lease-lost`, 422 for an invalid filter or a `NodeError`, and 503 if the
    database does not answer.
    """
    call = await decode_call(request, ExpectEventRequest)
    record_checks.require_readable(call)
    caller = await lease_checks.read_caller(request.gateway.database, holder, request.path_params["id"])
    async with _translate_errors():
        expires_at = await request.gateway.pod_services.events.expect(
            caller,
            EventWaitRequest(
                call.event_type, call.condition, call.given, call.look_back_seconds, call.timeout_seconds
            ),
            node_id=call.node_id,
            iteration=call.iteration,
        )
    return JsonResponse(ExpectEventResponse(expires_at))


async def expect_signal(request: GatewayRequest, holder: LeaseHolder) -> JsonResponse:
    """Register that a node of the path's run waits for a signal, and answer with the end of the wait.

    An unread signal of the name answers it at once: then the answer is that of the node. Raises 409 `lease-lost`,
    422 for a `NodeError`, and 503 if the database does not answer.
    """
    call = await decode_call(request, ExpectSignalRequest)
    caller = await lease_checks.read_caller(request.gateway.database, holder, request.path_params["id"])
    async with _translate_errors():
        expected = await request.gateway.pod_services.signals.expect(
            caller,
            SignalRequest(call.name, call.timeout_seconds),
            node_id=call.node_id,
            iteration=call.iteration,
        )
    return JsonResponse(expected)


async def reply_to_signal(request: GatewayRequest, holder: LeaseHolder) -> JsonResponse:
    """Store a reply to the signal that a node of the path's run has received; only the first reply counts.

    Raises 409 `lease-lost`, 422 for a `NodeError`, and 503 if the database does not answer.
    """
    call = await decode_call(request, ReplyToSignalRequest, max_bytes=MAX_RECORD_BYTES)
    caller = await lease_checks.read_caller(request.gateway.database, holder, request.path_params["id"])
    record_checks.require_json(call.value)
    async with _translate_errors():
        await request.gateway.pod_services.signals.reply(caller, call.node_id, call.iteration, call.value)
    return JsonResponse(ReplyToSignalResponse())


async def publish(request: GatewayRequest, holder: LeaseHolder) -> JsonResponse:
    """Publish a value under a key in the state of the path's run, in place of an earlier one; not for an ended run.

    Raises 409 `lease-lost`, 422 for a `NodeError`, and 503 if the database does not answer.
    """
    call = await decode_call(request, PublishRequest, max_bytes=MAX_RECORD_BYTES)
    caller = await lease_checks.read_caller(request.gateway.database, holder, request.path_params["id"])
    record_checks.require_json(call.value)
    async with _translate_errors():
        await request.gateway.pod_services.state.publish(caller, call.key, call.value)
    return JsonResponse(PublishResponse())


async def reserve(request: GatewayRequest, holder: LeaseHolder) -> JsonResponse:
    """Reserve the next time at which a throttled node may run, and answer with it; each request reserves another.

    Raises 409 `lease-lost`, 422 for a `NodeError`, and 503 if the database does not answer.
    """
    call = await decode_call(request, ThrottleRequest)
    caller = await lease_checks.read_caller(request.gateway.database, holder, request.path_params["id"])
    async with _translate_errors():
        at = await request.gateway.pod_services.throttle.reserve(
            caller,
            call.key,
            limit=call.limit,
            per_seconds=call.per_seconds,
            max_wait_seconds=call.max_wait_seconds,
        )
    return JsonResponse(ThrottleResponse(at))


@asynccontextmanager
async def _translate_errors() -> AsyncIterator[None]:
    """Translate a node's error in the block to a 422 error whose headers say whether it is retryable, and when.

    A block of over 20 seconds becomes a 503 error.
    """
    try:
        async with asyncio.timeout(ASK_SECONDS):
            yield
    except NodeError as error:
        kind, seconds = RETRYABLE if error.retryable else FINAL, error.retry_after_seconds
        raise ApiError(
            *(422, error.code, error.message),
            retry_after_seconds=None if seconds is None else math.ceil(seconds),
            headers={NODE_ERROR_HEADER: kind},
        ) from error
    except TimeoutError as error:
        raise errors.not_ready("The database does not answer: try again") from error
