"""Handlers through which pods claim runs, write the journal, and poll for work and requests."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from datetime import timedelta
from functools import partial
from typing import TYPE_CHECKING, Final

import msgspec

from engine.run_records import CANDIDATE_STATUSES
from execution.pod_api import (
    MAX_RECORD_BYTES,
    ClaimRequest,
    ClaimResponse,
    CountResponse,
    DefinitionsRequest,
    DefinitionsResponse,
    LogPositions,
    NodeAnswersResponse,
    PodContact,
    RecordRequest,
    RecordResponse,
    ReleaseRequest,
    RenewRequest,
    RenewResponse,
    RunsRequest,
    ServerDatabaseAddress,
    SpansRequest,
    SpansResponse,
    StepsRequest,
    StepsResponse,
    SuspectsRequest,
    SuspectsResponse,
    WorkPollRequest,
)
from gateway.http import errors
from gateway.http.responses import JsonResponse
from gateway.pods import lease_checks, record_checks
from gateway.pods.pod_endpoint import decode_call
from journal import blocked_intervals
from journal.deployments import activity
from journal.store import ClaimQuery, LeaseRenewal
from messages import wakeups
from messages.broker import BrokerUnavailable
from models.database import is_sqlite
from models.errors import DatabaseUnavailable, LockWaitTimeout, PartialCommit
from models.task_states import watch_key
from nodes.connections import data_source_policy

if TYPE_CHECKING:
    from collections.abc import Sequence

    from gateway.http.request import GatewayRequest
    from gateway.pods.lease_checks import LeaseHolder
    from gateway.state import GatewayState
    from journal.store import ClaimedRun, RunWrite

YOUNG_POD_TIME: Final = timedelta(minutes=15)
"""Age of a pod up to which its first claims may take runs that have waited for its start."""
MANY_WRITES = 20
"""Number of writes or spans above which they are checked in a thread."""


async def contact(request: GatewayRequest, holder: LeaseHolder) -> JsonResponse:
    """Answer a pod's first call with its deployed definition and the database that data sources must not reach.

    The runs of earlier processes of the pod are returned to the queue. Raises a 409 error `not-deployed` if the
    workflow was never deployed; an undeployed one still has its last definition.
    """
    gateway = request.gateway
    await _reclaim_earlier(gateway, holder)
    found = await lease_checks.deployed_definition(gateway.database, holder)
    if found is None:
        raise errors.conflict("not-deployed", "This workflow is not deployed")
    return JsonResponse(
        PodContact(
            holder.organization_id,
            holder.shard,
            *found,
            own_database=_own_database(gateway),
            is_stopped=await lease_checks.is_stopped(gateway.database, holder),
            now=gateway.database.clock.now(),
        )
    )


async def _reclaim_earlier(gateway: GatewayState, holder: LeaseHolder) -> None:
    """Put the runs of earlier processes of the same pod back into the queue, and notify pods of them.

    A pod never has two processes at the same time, so the earlier ones have ended.
    """
    held_by = await activity.pod_lease_owners(gateway.database, holder.workflow_id)
    earlier = [
        process
        for process in held_by
        if process.pod == holder.process.pod and process.started_at < holder.process.started_at
    ]
    if await activity.reclaim_pod_leases(gateway.database, gateway.store, holder.workflow_id, earlier):
        await gateway.pod_services.poll_hub.notify_pods([holder.workflow_id])


def _own_database(gateway: GatewayState) -> ServerDatabaseAddress | None:
    if is_sqlite(gateway.database.url):
        return None
    own = data_source_policy.ServerDatabase.from_url(gateway.settings.database_url)
    return ServerDatabaseAddress(own.host, own.port, own.database)


async def wait(request: GatewayRequest, holder: LeaseHolder) -> JsonResponse:
    """Answer when the pod may have runs to claim, or has stop or cancel requests to runs that it holds.

    The answer is empty at the timeout of the call, and nothing is claimed. Raises a 503 error if too many
    pods wait.
    """
    call = await decode_call(request, WorkPollRequest)
    return JsonResponse(await request.gateway.pod_services.poll_hub.wait(holder, call))


async def claim(request: GatewayRequest, holder: LeaseHolder) -> JsonResponse:
    """Claim pending runs of this deployment for the pod, and answer with them; with none if it is stopped or drains.

    The lease of each run lasts for `lease_seconds` of the body. The answer has no completion actions. Requests that
    wait for the claim of a run are notified.
    """
    call = await decode_call(request, ClaimRequest)
    if not await lease_checks.takes_runs(request.gateway.database, holder):
        return JsonResponse(ClaimResponse(()))
    claimed = await request.gateway.store.claim(
        ClaimQuery(
            holder.owner,
            call.lease_seconds,
            call.limit,
            target=holder.workflow_id,
            is_trial=call.is_trial,
            max_isolation_losses=call.max_isolation_losses,
        )
    )
    await wakeups.notify_taken_runs(request.gateway.broker, claimed)
    await _record_wakes(request.gateway, holder, claimed)
    # Completion actions are not the pod's business and may contain addresses that it must not see.
    level = request.gateway.pod_services.log_levels.get(holder.workflow_id)
    own = [
        msgspec.structs.replace(one, completion_action=None, concurrency_key=None, log_level=level)
        for one in claimed
    ]
    return JsonResponse(ClaimResponse(own))


async def _record_wakes(gateway: GatewayState, holder: LeaseHolder, claimed: Sequence[ClaimedRun]) -> None:
    """Record that runs claimed for the first time by a pod younger than 15 minutes have waited for its start.

    Losing this record is harmless, so failures of the database are ignored.
    """
    fresh = [run.execution_id for run in claimed if not run.has_journal]
    if not fresh or gateway.clock() - holder.process.started_at > YOUNG_POD_TIME:
        return
    record = partial(
        blocked_intervals.add_waking_intervals,
        execution_ids=fresh,
        pod_started_at=holder.process.started_at,
    )
    with suppress(DatabaseUnavailable, LockWaitTimeout):
        await gateway.database.transaction(record)


async def suspects(request: GatewayRequest, holder: LeaseHolder) -> JsonResponse:
    """Answer whether suspects of this deployment wait for a trial, a run apart from all others.

    A suspect is a run that lost several processes; those that lost more than `max_isolation_losses` of the body in
    trials don't count.
    """
    call = await decode_call(request, SuspectsRequest)
    store = request.gateway.store
    return JsonResponse(
        SuspectsResponse(await store.has_suspects(call.max_isolation_losses, holder.workflow_id))
    )


async def record(request: GatewayRequest, holder: LeaseHolder) -> JsonResponse:
    """Write the progress of runs to the journal; answer with the runs that the pod still holds, and those not
    written.

    Raises a 422 error for two writes of one run and for values that can't be stored.
    """
    call = await decode_call(request, RecordRequest, max_bytes=MAX_RECORD_BYTES)
    if len({write.execution_id for write in call.writes}) < len(call.writes):
        message = "A run has more than one write"
        raise errors.invalid([errors.problem("writes", "duplicate", message)])
    if len(call.writes) > MANY_WRITES or len(call.writes and call.writes[0].spans) > MANY_WRITES:
        await asyncio.to_thread(_require_storable, call)
    else:
        _require_storable(call)
    for write in call.writes:
        # A pod does not choose the organization whose workers get its tasks.
        write.organization_id = holder.organization_id if _has_tasks(write) else ""
        write.clock_moved = None  # that of the pod's process
    unwritten: frozenset[str] = frozenset()
    try:
        held = await request.gateway.store.record(call.writes, owner=holder.owner)
    except PartialCommit as error:
        held, unwritten = error.held, error.unwritten
    if held:
        await _publish(request.gateway, call, held)
    return JsonResponse(RecordResponse(sorted(held), sorted(unwritten)))


def _require_storable(call: RecordRequest) -> None:
    for write in call.writes:
        record_checks.require_storable(write)


def _has_tasks(write: RunWrite) -> bool:
    return bool(write.cancelled_tasks) or any(span.task is not None for span in write.spans)


async def _publish(gateway: GatewayState, call: RecordRequest, held: frozenset[str]) -> None:
    """Notify clients that wait for written runs, and task workers of new tasks; a lost notification is harmless."""
    channels = {write.execution_id: write.channel for write in call.writes if write.execution_id in held}
    tasks = {
        watch_key(write.organization_id): ""
        for write in call.writes
        if write.execution_id in held and write.organization_id
    }
    with suppress(BrokerUnavailable):  # Clients that wait for a run also poll once a second
        await gateway.broker.publish(channels | tasks)


async def renew(request: GatewayRequest, holder: LeaseHolder) -> JsonResponse:
    """Renew the leases of runs.

    Answers with the renewed ones and their stop or cancel requests, the locked ones, and the present time.
    """
    call = await decode_call(request, RenewRequest)
    held = [LeaseRenewal(lease.execution_id, lease.shard, lease.token) for lease in call.leases]
    renewed = await request.gateway.store.renew(held, call.lease_seconds, owner=holder.owner)
    return JsonResponse(
        RenewResponse(
            {one.execution_id: one.request for one in renewed if not one.is_locked},
            [one.execution_id for one in renewed if one.is_locked],
            request.gateway.database.clock.now(),
        )
    )


async def release(request: GatewayRequest, holder: LeaseHolder) -> JsonResponse:
    """Release all runs that the database assigns to this pod, except those in `held`; answer with their number.

    The pod doesn't know of them, since the answer to their claim was lost.
    """
    call = await decode_call(request, ReleaseRequest)
    return JsonResponse(CountResponse(await request.gateway.store.release(holder.owner, call.held)))


async def promote(request: GatewayRequest, holder: LeaseHolder) -> JsonResponse:
    """Put the runs of this deployment with a wait that is over by now back into the queue; answer with their number."""
    return JsonResponse(CountResponse(await lease_checks.promote_due(request.gateway.database, holder)))


async def definitions(request: GatewayRequest, holder: LeaseHolder) -> JsonResponse:
    """Answer with the definitions of runs that the pod holds, by hash; others are omitted."""
    call = await decode_call(request, DefinitionsRequest)
    found = await lease_checks.read_definitions(request.gateway.database, holder, call.hashes)
    return JsonResponse(DefinitionsResponse(found))


async def spans(request: GatewayRequest, holder: LeaseHolder) -> JsonResponse:
    """Answer with a page of the recorded spans of a run that the pod holds; empty for other runs.

    Raises 503 for a page with candidates (spans of an earlier run that a replay may reuse) if the pod is of an older
    release without them.
    """
    call = await decode_call(request, SpansRequest)
    found = await lease_checks.read_spans(request.gateway.database, holder, call.execution_id, call.after)
    if not call.reads_candidates and any(span.status in CANDIDATE_STATUSES for span in found):
        # The pod releases the run, and one of the present version takes it when it has replaced this one.
        raise errors.not_ready("A replay needs pods of the present version")
    return JsonResponse(SpansResponse(found))


async def steps(request: GatewayRequest, holder: LeaseHolder) -> JsonResponse:
    """Answer with a page of the steps of agents of a run that the pod holds; empty for other runs."""
    call = await decode_call(request, StepsRequest)
    found = await lease_checks.read_steps(request.gateway.database, holder, call.execution_id, call.after)
    return JsonResponse(StepsResponse(found))


async def log_ends(request: GatewayRequest, holder: LeaseHolder) -> JsonResponse:
    """Answer with the last log position of each run that the pod holds."""
    call = await decode_call(request, RunsRequest)
    found = await lease_checks.read_log_ends(request.gateway.database, holder, call.execution_ids)
    return JsonResponse(LogPositions(found))


async def answers(request: GatewayRequest, holder: LeaseHolder) -> JsonResponse:
    """Answer with the wait answers of nodes in the runs that the pod holds."""
    call = await decode_call(request, RunsRequest)
    found = await lease_checks.read_answers(request.gateway.database, holder, call.execution_ids)
    return JsonResponse(NodeAnswersResponse(found))
