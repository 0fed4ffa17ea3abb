"""Endpoint that counts the unfinished runs of an organization by reason."""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum
from typing import TYPE_CHECKING, Final

from concurrency.ttl_cache import TTLCache
from gateway.explanations.run_explanations import is_broker_reachable
from gateway.http.request import GatewayRequest
from gateway.http.responses import JsonResponse
from gateway.http.wire import Instant, WireStruct, instant, optional_instant
from journal.explanations import run_counts, run_explanation
from journal.explanations.blockers import BLOCKER_RULES, BlockerCode, BlockerKind
from models import access_store

if TYPE_CHECKING:
    from models.worker_presence import WorkerPresence

RECENT_SECONDS: Final = 1.0
"""Time for which an answer is given again: an open overview asks up to four times a second."""


class ReasonCount(WireStruct):
    """Number of unfinished runs with one primary reason."""

    code: BlockerCode
    kind: BlockerKind
    count: int
    count_is_lower_bound: bool
    """True if there may be more; each kind is counted up to 10,000."""
    oldest_since: Instant | None
    """Earliest time since which one of them has this reason."""
    until: Instant | None
    """Earliest known end of the reason, such as the next opening of a window; null without one."""
    meaning: str
    remedy: str


class WorkerState(StrEnum):
    """State of the workers of the server."""

    ABSENT = "absent"
    """None has reported within 15 seconds."""
    FREE = "free"
    """One of them takes further runs."""
    FULL = "full"
    """All hold as many runs as they may."""


class WorkerCounts(WireStruct):
    """Workers of the server that have reported within 15 seconds."""

    state: WorkerState
    present: int | None
    concurrency: int | None
    """Number of runs that they hold at most."""
    held_runs: int | None
    """These numbers add up the work of all organizations: null unless the organization is the operator's."""
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


_recent: Final = TTLCache[tuple[int, str], OrganizationExplanation](RECENT_SECONDS, 1_000)
"""Last answer by gateway and organization: everybody in it sees the same counts."""


async def show(request: GatewayRequest) -> JsonResponse:
    """Count the unfinished runs of the organization by the reason that keeps them from moving.

    Private runs, such as node tests, don't count. Runs in the queue of the workers count as `queued-behind`, and
    running ones as `node-running`. The counts are at most a second old.
    """
    key = (id(request.gateway), request.caller.organization_id)
    shape = _recent.get(key)
    if shape is None:
        shape = await _explain_organization(request)
        _recent.put(key, shape)
    return JsonResponse(shape)


async def _explain_organization(request: GatewayRequest) -> OrganizationExplanation:
    """Return the counts of the caller's organization as of now."""
    gateway = request.gateway
    is_reachable = await is_broker_reachable(gateway.broker)
    async with gateway.database.read_snapshot() as connection:
        counts = await run_counts.count_runs(connection, request.caller.organization_id)
        is_operator = await access_store.is_operator_organization(connection, request.caller.organization_id)
    present = run_explanation.present_workers(counts.workers, counts.now)
    reasons = [
        ReasonCount(
            code=code,
            kind=BLOCKER_RULES[code].kind,
            count=found.count,
            count_is_lower_bound=found.is_lower_bound,
            oldest_since=optional_instant(found.oldest_since),
            until=optional_instant(found.until),
            meaning=BLOCKER_RULES[code].meaning,
            remedy=BLOCKER_RULES[code].remedy,
        )
        for code, found in counts.by_code.items()
    ]
    return OrganizationExplanation(
        as_of=instant(counts.now),
        reasons=sorted(reasons, key=lambda reason: (-reason.count, reason.code)),
        workers=WorkerCounts(
            state=_state_of(present),
            present=len(present) if is_operator else None,
            concurrency=sum(worker.concurrency for worker in present) if is_operator else None,
            held_runs=sum(worker.held_runs for worker in present) if is_operator else None,
            last_seen=optional_instant(max((one.seen_at for one in counts.workers), default=None)),
        ),
        unknown=[] if is_reachable else ["broker: Redis does not answer"],
    )


def _state_of(present: Sequence[WorkerPresence]) -> WorkerState:
    """Return the state of the present workers: absent without any, free if one takes further runs, else full."""
    if not present:
        return WorkerState.ABSENT
    is_full = all(worker.held_runs >= worker.concurrency for worker in present)
    return WorkerState.FULL if is_full else WorkerState.FREE
