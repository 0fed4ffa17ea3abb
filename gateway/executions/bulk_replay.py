"""Bulk replay: replay the ended executions that a filter selects, each as a new execution."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Literal

import structlog
from msgspec import Meta, field

from gateway.executions import bulk_actions, replay_runs
from gateway.executions.bulk import BulkResult
from gateway.executions.bulk_filter import BulkFilter
from gateway.executions.replay import NodeIds, ReplayCounts
from gateway.executions.replay_planning import ORIGINAL, ReplayChoice
from gateway.http import idempotency, limits
from gateway.http.errors import ApiError
from gateway.http.responses import JsonResponse
from gateway.http.wire import StrictWire, WireStruct, body_of, read_json
from journal.store import ExecutionKey
from models import ids
from models.audit import AuditAction
from models.errors import LockWaitTimeout

if TYPE_CHECKING:
    from gateway.executions.bulk_actions import ChosenExecutions
    from gateway.http.request import GatewayRequest

log = structlog.get_logger()


class BulkReplayOptions(StrictWire, kw_only=True):
    """Choices of a replay of several executions, which hold for each of them."""

    definition: Literal["original", "current"] = ORIGINAL
    refresh: Annotated[list[Literal["read", "model"]], Meta(max_length=2)] = field(default_factory=list)
    confirm: NodeIds = field(default_factory=list)
    """Writes that may be repeated, with new idempotency keys."""
    failed_only: bool = False
    dry_run: bool = False
    """Plan the selected executions without running them."""
    limit: Annotated[int, Meta(ge=1, le=limits.BULK_REPLAYS)] = limits.BULK_REPLAYS
    """Number of executions to act on, the oldest first; the answer has the number of remaining ones."""

    def to_choice(self) -> ReplayChoice:
        """Return the choices of the body as the planner takes them; they hold for each execution."""
        return ReplayChoice(
            definition=self.definition,
            refreshes_reads="read" in self.refresh,
            refreshes_models="model" in self.refresh,
            confirmed=frozenset(self.confirm),
            failed_only=self.failed_only,
        )


class BulkReplayRequest(BulkReplayOptions, kw_only=True):
    """Body of a bulk replay; the choices hold for each execution."""

    filter: BulkFilter


class RefusedReplay(WireStruct):
    """Execution that is not replayed."""

    execution_id: str
    code: str
    """`confirmation-required`, or the code of another refusal."""
    node_ids: Sequence[str]
    """Writes that need a confirmation."""


class BulkReplayResult(BulkResult):
    """Result of a bulk replay."""

    new_execution_ids: Sequence[str]
    """The new execution for each of `executionIds`, in the same order; empty for a dry run."""
    counts: ReplayCounts
    """Nodes of all plans by decision."""
    refused: Sequence[RefusedReplay]
    """The first 100 executions that are not replayed."""


class _BulkOutcome:
    """Plans and results so far."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter(reuse=0, rerun=0, maybe=0, ask=0)
        self.refused: list[RefusedReplay] = []
        self.planned: list[str] = []
        self.replayed: dict[str, str] = {}


async def replay(request: GatewayRequest) -> JsonResponse:
    """Replay the ended executions that match a filter, the oldest first, each as a new execution.

    Executions that were resumed or replayed already, and those of paused, archived or deleted workflows, are skipped.
    `refused` lists executions that can't be replayed, or whose plan needs a confirmation that `confirm` does not give.
    Nothing is replayed with `dryRun`, or if a backlog is full (429).
    """
    value = await read_json(request)
    body = body_of(request, value, BulkReplayRequest)
    gateway, caller = request.gateway, request.caller
    idempotency_key = request.idempotency_key(value)
    headers: Mapping[str, str] = {}
    chosen = None
    if idempotency_key is not None and not body.dry_run:
        chosen = await bulk_actions.find_begun(gateway.database, caller.shard, idempotency_key)
        headers = {} if chosen is None else idempotency.REPLAYED
    if chosen is None:
        found, by_workflow = await bulk_actions.find(
            gateway.database,
            body.filter.to_filter(caller.organization_id),
            bulk_actions.replayable(caller),
            body.limit,
        )
        if body.dry_run:
            return JsonResponse(await replay_all(request, found, body))
        for workflow_id, runs in by_workflow.items():
            await gateway.backlog.require_capacity(caller.organization_id, workflow_id, runs)
        chosen = await bulk_actions.begin_retry(
            gateway.database,
            caller,
            found,
            body.filter.workflow_id or caller.organization_id,
            idempotency_key,
            action=AuditAction.EXECUTIONS_REPLAYED,
        )
        headers = {} if chosen == found else idempotency.REPLAYED
    return JsonResponse(await replay_all(request, chosen, body), headers=headers)


async def replay_all(
    request: GatewayRequest, chosen: ChosenExecutions, body: BulkReplayOptions
) -> BulkReplayResult:
    """Plan a replay of each chosen execution, and start it unless it is a dry run; return the counts, new ids and
    refusals.

    The new ids are derived from the executions and `operation_id` of `chosen`, so a repetition starts none twice.
    """
    outcome = _BulkOutcome()
    for execution_id in chosen.execution_ids:
        new_id = ids.derive_id("exec", execution_id, chosen.operation_id)
        await _replay_one(request, ExecutionKey(execution_id, request.caller.shard), new_id, body, outcome)
    if not body.dry_run:
        log.info("executions replayed", executions=len(outcome.replayed), matched=chosen.matched)
    return _show(chosen, outcome, is_dry_run=body.dry_run)


async def _replay_one(
    request: GatewayRequest, key: ExecutionKey, new_id: str, body: BulkReplayOptions, outcome: _BulkOutcome
) -> None:
    """Plan the replay of an execution, start it as `new_id` unless it is a dry run, and add the result or refusal to
    `outcome`.

    Refusals are all API errors, a plan that needs confirmations, and a lock of another transaction (`not-ready`).
    """
    try:
        planned = await request.gateway.replays.plan(key, request.caller, body.to_choice())
        outcome.counts.update(node.decision.value for node in planned.plan.nodes)
        unconfirmed = planned.plan.unconfirmed
        if unconfirmed:
            outcome.refused.append(
                RefusedReplay(
                    execution_id=key.execution_id, code="confirmation-required", node_ids=unconfirmed
                )
            )
            return
        outcome.planned.append(key.execution_id)
        if not body.dry_run:
            gateway = request.gateway
            await replay_runs.start_planned(
                gateway.database, gateway.access, gateway.acceptances, request.caller, key, new_id, planned
            )
            outcome.replayed[key.execution_id] = new_id
    except ApiError as error:
        # It has changed since it was selected, or its definition can't run.
        outcome.refused.append(RefusedReplay(execution_id=key.execution_id, code=error.code, node_ids=()))
    except LockWaitTimeout:
        outcome.refused.append(RefusedReplay(execution_id=key.execution_id, code="not-ready", node_ids=()))


def _show(chosen: ChosenExecutions, outcome: _BulkOutcome, *, is_dry_run: bool) -> BulkReplayResult:
    """Return the result of a bulk replay, with at most 100 ids each; counts are sums over the plans."""
    listed = outcome.planned if is_dry_run else list(outcome.replayed)
    return BulkReplayResult(
        dry_run=is_dry_run,
        matched=chosen.matched,
        affected=len(outcome.replayed),
        remaining=chosen.matched - (0 if is_dry_run else len(chosen.execution_ids)),
        execution_ids=listed[: limits.BULK_LISTED],
        new_execution_ids=list(outcome.replayed.values())[: limits.BULK_LISTED],
        counts=ReplayCounts(**outcome.counts),
        refused=outcome.refused[: limits.BULK_LISTED],
    )
