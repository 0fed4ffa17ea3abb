"""Groups of dead letters with one cause: their facts, and mutes, by which lists leave a group out for a time."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Annotated, Final

import msgspec
from msgspec import Struct, field

from concurrency import offload
from gateway.access import audit_log
from gateway.http import errors, limits, text_rules
from gateway.http.parameters import FlagParameter
from gateway.http.request import GatewayRequest
from gateway.http.responses import JsonResponse, NoContent
from gateway.http.text_rules import ProblemCollector
from gateway.http.wire import Instant, StrictWire, WireStruct, decode_body, instant, optional_instant
from gateway.ingest import dead_letter_rows
from gateway.ingest.dead_letter_rows import CompletedRunsFilter, DeadLetterFilter
from gateway.ingest.organization_dead_letters import FAILURE, KIND, SINCE, UNTIL, WORKFLOW
from gateway.workflows import editing, version_rows, workflow_rows
from journal.failure_causes import FailureKind
from models import access_store, dead_letter_mute
from models.audit import AuditAction
from models.dead_letter_mute import DeadLetterMute

if TYPE_CHECKING:
    from datetime import datetime

    from sqlalchemy.ext.asyncio import AsyncConnection

    from journal.dead_letters import ErrorCount
    from journal.failure_causes import ErrorCause
    from models.workflow import Workflow

MUTED: Final = FlagParameter("muted", "Only muted groups, in place of the others.")
GROUPED: Final = (WORKFLOW, KIND, FAILURE, SINCE, UNTIL, MUTED)


class MuteShape(WireStruct):
    """Mute of a group: until it ends, lists of groups leave the group out."""

    reason: str
    muted_by: str
    """Id of the user."""
    muted_by_name: str
    """Name of the user, or the mail address without one."""
    muted_at: Instant
    ends_at: Instant


class FailureCounts(WireStruct):
    """Numbers of dead letters by kind of failure, whatever kind is listed."""

    failed: int
    crashed: int
    timed_out: int


class DeadLetterGroup(WireStruct):
    """Dead letters with the same workflow, node, code and kind of message."""

    id: str
    workflow_id: str
    workflow_name: str
    node_id: str | None
    code: str
    failure: FailureKind
    message: str
    """Message of the newest one; the others may differ in numbers, ids and quoted texts."""
    count: int
    first_at: Instant
    last_at: Instant
    """Times of acceptance of the oldest and the newest."""
    newest_execution_id: str
    definitions: int
    """Number of different definitions that failed: nodes, connections and settings."""
    versions: Sequence[int]
    """Versions of the newest 10 of these definitions, ascending, without those that no version has; empty for groups
    behind the first 20.
    """
    is_current: bool | None
    """Whether the newest failed with the workflow as it is now; null for a deleted workflow, and for groups
    behind the first 20.
    """
    completed_since: int | None
    """Runs of the workflow as it is now that were accepted after the newest failure and have completed, among
    its newest 100 runs; null unless `isCurrent` is false.
    """
    mute: MuteShape | None


class DeadLettersOfWorkflow(WireStruct):
    """Number of dead letters of a workflow."""

    workflow_id: str
    workflow_name: str
    count: int


class DeadLetterGroups(WireStruct):
    """Groups of the dead letters of the organization, the one with the newest failure first."""

    count: int
    """Number of dead letters in all groups, listed or not."""
    is_complete: bool
    """Whether all groups are listed: at most 1,000."""
    oldest_at: Instant | None
    workflows: Sequence[DeadLettersOfWorkflow]
    """Numbers by workflow, the largest first, of all groups."""
    muted_groups: int
    """Number of mutes that have not ended; their groups are listed with `muted=true`."""
    failures: FailureCounts
    groups: Sequence[DeadLetterGroup]


class MuteRequest(StrictWire):
    """Body with which a group is muted: a reason for others to read, and the time until its end."""

    reason: Annotated[str, text_rules.describe_length(limits.MUTE_REASON_LENGTH, min_length=1)]
    expires_in_seconds: Annotated[int, msgspec.Meta(ge=60, le=limits.MUTE_SECONDS)]


class _GroupedRuns(Struct):
    """Group while it is collected, the newest run first."""

    newest: ErrorCount
    cause: ErrorCause
    first_at: datetime
    count: int = 0
    definitions: dict[str, str] = field(default_factory=dict)
    """Newest run of each definition, by its hash."""


class _GroupFacts(Struct, frozen=True):
    """Comparison of a group with its workflow as it is now."""

    is_current: bool | None = None
    completed_since: int | None = None


async def index(request: GatewayRequest) -> JsonResponse:
    """Group the dead letters of the organization by workflow, node, code and kind of message.

    All that the caller may see are counted, and 1,000 groups are listed. Muted groups are left out, or listed alone
    with `muted=true`.
    """
    query, caller, gateway = request.query, request.caller, request.gateway
    async with gateway.database.read() as connection:
        mutes = await _read_visible_mutes(connection, request)
        wanted = DeadLetterFilter(
            workflow_id=query[WORKFLOW],
            trigger_type=query[KIND],
            since=query[SINCE],
            until=query[UNTIL],
            only_groups=frozenset(mutes) if query[MUTED] else None,
            without_groups=frozenset() if query[MUTED] else frozenset(mutes),
        )
        rows = await dead_letter_rows.count_by_error(connection, caller, wanted)
        names = await access_store.read_user_names(
            connection, caller.organization_id, {one.muted_by for one in mutes.values()}
        )
        heads = await dead_letter_rows.read_workflow_heads(connection, [row.workflow_id for row in rows])
    collected = await offload.run_in_thread(_group_by_cause, rows)
    counts = Counter[FailureKind]()
    for group in collected:
        counts[group.cause.kind] += group.count
    if query[FAILURE] is not None:
        collected = [group for group in collected if group.cause.kind is query[FAILURE]]
    oldest_at = min((group.first_at for group in collected), default=None)
    by_workflow = Counter[str]()
    for group in collected:
        by_workflow[group.newest.workflow_id] += group.count
    facts = await _compare_with_current(request, collected[: limits.EXPLAINED_GROUPS], heads)
    versions = await _find_versions(request, collected[: limits.EXPLAINED_GROUPS])
    return JsonResponse(
        DeadLetterGroups(
            count=sum(group.count for group in collected),
            is_complete=len(collected) <= limits.DEAD_LETTER_GROUPS,
            oldest_at=optional_instant(oldest_at),
            workflows=[
                DeadLettersOfWorkflow(workflow_id, heads[workflow_id].name, count)
                for workflow_id, count in by_workflow.most_common()
            ],
            muted_groups=len(mutes),
            failures=FailureCounts(
                failed=counts[FailureKind.FAILED],
                crashed=counts[FailureKind.CRASHED],
                timed_out=counts[FailureKind.TIMED_OUT],
            ),
            groups=[
                _show_group(
                    group,
                    heads[group.newest.workflow_id].name,
                    facts.get(group.cause.fingerprint, _GroupFacts()),
                    versions.get(group.cause.fingerprint, ()),
                    _show_mute(mutes.get(group.cause.fingerprint), names),
                )
                for group in collected[: limits.DEAD_LETTER_GROUPS]
            ],
        )
    )


async def mute(request: GatewayRequest) -> JsonResponse:
    """Leave a group of dead letters out of the lists of groups until a time, with a reason.

    Only the owner of the workflow and admins may. The dead letters stay, and are listed with `muted=true`; an
    earlier mute of the group is replaced.
    """
    body = await decode_body(request, MuteRequest)
    now, problems = request.gateway.clock(), ProblemCollector()
    reason = text_rules.check_line(body.reason, "reason", problems, max_length=limits.MUTE_REASON_LENGTH)
    problems.raise_any()
    workflow = await _find_workflow(request)
    muted = DeadLetterMute(
        organization_id=request.caller.organization_id,
        group_id=request.path_params["id"],
        shard=request.caller.shard,
        workflow_id=workflow.id,
        reason=reason,
        muted_by=request.caller.user_id,
        muted_at=now,
        ends_at=now + timedelta(seconds=body.expires_in_seconds),
    )

    async def store(connection: AsyncConnection) -> Mapping[str, str]:
        await dead_letter_mute.put_mute(connection, muted)
        await audit_log.record_change(
            connection,
            request.caller,
            AuditAction.DEAD_LETTERS_MUTED,
            workflow.id,
            before=None,
            after=muted.group_id,
        )
        return await access_store.read_user_names(
            connection, request.caller.organization_id, [muted.muted_by]
        )

    names = await request.gateway.database.transaction(store)
    return JsonResponse(_show_mute(muted, names))


async def unmute(request: GatewayRequest) -> NoContent:
    """End the mute of a group of dead letters; nothing happens if it has ended.

    Only the owner of the workflow and admins may. A group that is neither muted nor has dead letters is a 404.
    """
    workflow = await _find_workflow(request)
    group_id = request.path_params["id"]

    async def end(connection: AsyncConnection) -> None:
        if await dead_letter_mute.end_mute(connection, request.caller.organization_id, group_id):
            await audit_log.record_change(
                connection,
                request.caller,
                AuditAction.DEAD_LETTERS_UNMUTED,
                workflow.id,
                before=group_id,
                after=None,
            )

    await request.gateway.database.transaction(end)
    return NoContent()


async def _read_visible_mutes(
    connection: AsyncConnection, request: GatewayRequest
) -> Mapping[str, DeadLetterMute]:
    """Return the mutes in force of workflows that the caller may read, by the ids of their groups."""
    caller = request.caller
    mutes = await dead_letter_mute.read_mutes(connection, caller.organization_id, request.gateway.clock())
    if not mutes:
        return mutes
    readable = await workflow_rows.find_readable_ids(
        connection, {one.workflow_id for one in mutes.values()}, caller
    )
    return {group_id: one for group_id, one in mutes.items() if one.workflow_id in readable}


async def _find_workflow(request: GatewayRequest) -> Workflow:
    """Return the workflow of the group in the path: of its mute, else of its newest dead letter.

    Raises a 404 error for a group that is neither muted nor has dead letters that the caller may see, and 403 unless
    the caller may change the workflow.
    """
    caller, group_id = request.caller, request.path_params["id"]
    async with request.gateway.database.read() as connection:
        mutes = await _read_visible_mutes(connection, request)
        workflow_id = mutes[group_id].workflow_id if group_id in mutes else None
        if workflow_id is None:
            rows = await dead_letter_rows.count_by_error(connection, caller, DeadLetterFilter(group=group_id))
            workflow_id = rows[0].workflow_id if rows else None
        workflow = workflow_id and await workflow_rows.find_workflow_row(connection, workflow_id, caller)
    if not workflow:
        raise errors.not_found("group of dead letters")
    editing.require_writer(caller, workflow)
    return workflow


async def _compare_with_current(
    request: GatewayRequest,
    groups: Sequence[_GroupedRuns],
    heads: Mapping[str, dead_letter_rows.WorkflowHead],
) -> Mapping[str, _GroupFacts]:
    """Return for each group, by its fingerprint, whether its newest run failed with the workflow's current definition.

    If not, also how many later runs of the current definition have completed, among the newest 100 of the workflow.
    Groups of deleted workflows are left out.
    """
    revisions = {group.newest.workflow_id: heads[group.newest.workflow_id].revision for group in groups}
    workflows = await request.gateway.workflows.load_several(request.caller.organization_id, revisions)
    facts: dict[str, _GroupFacts] = {}
    earlier: dict[str, CompletedRunsFilter] = {}
    for group in groups:
        workflow = workflows.get(group.newest.workflow_id)
        if workflow is None:
            continue
        if workflow.definition_hash == group.newest.definition_hash:
            facts[group.cause.fingerprint] = _GroupFacts(is_current=True)
        else:
            earlier[group.cause.fingerprint] = CompletedRunsFilter(
                workflow.id, workflow.definition_hash, group.newest.last_at
            )
    async with request.gateway.database.read() as connection:
        counts = await dead_letter_rows.count_completed_since(connection, [*earlier.values()])
    completed = zip(earlier, counts, strict=True)
    return facts | {key: _GroupFacts(is_current=False, completed_since=count) for key, count in completed}


async def _find_versions(
    request: GatewayRequest, groups: Sequence[_GroupedRuns]
) -> Mapping[str, Sequence[int]]:
    """Return for each group, by its fingerprint, the ascending versions of its newest 10 definitions, without
    unversioned ones.
    """
    runs = {
        group.cause.fingerprint: [*group.definitions.values()][: limits.VERSIONS_OF_GROUP] for group in groups
    }
    wanted = [execution_id for of_group in runs.values() for execution_id in of_group]
    async with request.gateway.database.read() as connection:
        found = await version_rows.find_versions_of_runs(connection, request.caller.shard, wanted)
    return {
        fingerprint: sorted({found[one] for one in of_group if one in found})
        for fingerprint, of_group in runs.items()
    }


def _group_by_cause(rows: Iterable[ErrorCount]) -> Sequence[_GroupedRuns]:
    """Return counts of dead letters grouped by cause, the group with the newest one first."""
    collected: dict[str, _GroupedRuns] = {}
    for row in sorted(rows, key=lambda row: (row.last_at, row.newest_id), reverse=True):
        cause = row.cause
        group = collected.setdefault(cause.fingerprint, _GroupedRuns(row, cause, row.first_at))
        group.first_at = min(group.first_at, row.first_at)
        group.count += row.count
        group.definitions.setdefault(row.definition_hash, row.newest_id)
    return list(collected.values())


def _show_group(
    group: _GroupedRuns, name: str, facts: _GroupFacts, versions: Sequence[int], muted: MuteShape | None
) -> DeadLetterGroup:
    """Return a group of dead letters as the API shows it.

    `name` is the name of its workflow, `facts` compare it with the workflow as it is now, and `versions` are those that
    failed.
    """
    return DeadLetterGroup(
        id=group.cause.fingerprint,
        workflow_id=group.newest.workflow_id,
        workflow_name=name,
        node_id=group.cause.node_id,
        code=group.cause.code,
        failure=group.cause.kind,
        message=group.cause.message,
        count=group.count,
        first_at=instant(group.first_at),
        last_at=instant(group.newest.last_at),
        newest_execution_id=group.newest.newest_id,
        definitions=len(group.definitions),
        versions=versions,
        is_current=facts.is_current,
        completed_since=facts.completed_since,
        mute=muted,
    )


def _show_mute(muted: DeadLetterMute | None, names: Mapping[str, str]) -> MuteShape | None:
    """Return a mute as the API shows it, with the name of its user among `names`, else the user's id; None without a
    mute.
    """
    if muted is None:
        return None
    return MuteShape(
        reason=muted.reason,
        muted_by=muted.muted_by,
        muted_by_name=names.get(muted.muted_by, muted.muted_by),
        muted_at=instant(muted.muted_at),
        ends_at=instant(muted.ends_at),
    )
