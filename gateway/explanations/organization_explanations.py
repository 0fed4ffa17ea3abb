"""Endpoint that counts the unfinished runs of an organization by reason."""

from __future__ import annotations

from collections.abc import Sequence

from gateway.explanations.run_explanations import is_broker_reachable
from gateway.http.request import GatewayRequest
from gateway.http.responses import JsonResponse
from gateway.http.wire import Instant, WireStruct, instant, optional_instant
from journal.explanations import run_counts, run_explanation
from journal.explanations.blockers import BLOCKER_RULES, BlockerCode, BlockerKind


class ReasonCount(WireStruct):
    """Number of unfinished runs with one primary reason."""

    code: BlockerCode
    kind: BlockerKind
    count: int
    count_is_lower_bound: bool
    """True if there may be more; each kind is counted up to 10,000."""
    oldest_since: Instant | None
    """Earliest time since which one of them has this reason."""
    meaning: str
    remedy: str


class WorkerCounts(WireStruct):
    """Workers of the server that have reported within 15 seconds."""

    present: int
    concurrency: int
    """Number of runs that they hold at most."""
    held_runs: int
    last_seen: Instant | None
    """Last report of any worker."""


class OrganizationExplanation(WireStruct):
    """Unfinished runs of an organization by reason."""

    as_of: Instant
    reasons: Sequence[ReasonCount]
    """Most frequent first."""
    workers: WorkerCounts
    unknown: Sequence[str]
    """Facts that could not be read."""


async def show(request: GatewayRequest) -> JsonResponse:
    """Count the unfinished runs of the organization by the reason that keeps them from moving.

    Runs in the queue of the workers count as `queued-behind`, and running ones as `node-running`.
    """
    gateway = request.gateway
    is_reachable = await is_broker_reachable(gateway.broker)
    async with gateway.database.read_snapshot() as connection:
        counts = await run_counts.count_runs(connection, request.caller.organization_id)
    present = run_explanation.present_workers(counts.workers, counts.now)
    reasons = [
        ReasonCount(
            code=code,
            kind=BLOCKER_RULES[code].kind,
            count=found.count,
            count_is_lower_bound=found.is_lower_bound,
            oldest_since=optional_instant(found.oldest_since),
            meaning=BLOCKER_RULES[code].meaning,
            remedy=BLOCKER_RULES[code].remedy,
        )
        for code, found in counts.by_code.items()
    ]
    shape = OrganizationExplanation(
        as_of=instant(counts.now),
        reasons=sorted(reasons, key=lambda reason: (-reason.count, reason.code)),
        workers=WorkerCounts(
            present=len(present),
            concurrency=sum(worker.concurrency for worker in present),
            held_runs=sum(worker.held_runs for worker in present),
            last_seen=optional_instant(max((one.seen_at for one in counts.workers), default=None)),
        ),
        unknown=[] if is_reachable else ["broker: Redis does not answer"],
    )
    return JsonResponse(shape)
