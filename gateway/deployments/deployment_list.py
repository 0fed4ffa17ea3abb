"""Endpoints of an organization's deployments: their states, and their next starts and stops."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from heapq import nsmallest
from itertools import chain
from typing import TYPE_CHECKING, Annotated, Any, Final, cast
from zoneinfo import ZoneInfoNotFoundError

from msgspec import Meta
from sqlalchemy import Row, select
from sqlmodel import col

from gateway.http.request import GatewayRequest
from gateway.http.responses import JsonResponse
from gateway.http.wire import Instant, WireStruct, instant, optional_instant
from journal.deployments import activity
from models import lifecycle_policy
from models.deployment import (
    Deployment,
    DeploymentState,
    DeploymentStatus,
    build_situation,
    status_of,
    stopped_reason_of,
)
from models.lifecycle_policy import (
    DeploymentSituation,
    LifecycleTransition,
    PolicyType,
    StoppedReason,
    TransitionKind,
)
from models.timestamps import from_microseconds
from models.workflow import Workflow, is_readable_by

if TYPE_CHECKING:
    from datetime import datetime

    from sqlalchemy import Select

    from models.access import ApiCaller

MAX_DEPLOYMENTS: Final = 500
BATCH_DEPLOYMENTS: Final = 500
"""Deployments that the summary reads at once."""
SHOWN: Final = 10
"""Deployments of each kind in the summary."""


class ListedDeployment(WireStruct):
    """Deployment of a workflow in a list."""

    workflow_id: str
    workflow_name: str
    deployment_status: DeploymentStatus
    stopped_reason: StoppedReason | None
    """Reason why it is stopped; null while it runs."""
    reason: str | None
    """Reason why its pods can't start."""
    reason_code: str | None
    start_failures: int
    """Consecutive failed starts."""
    replicas: int
    ready_replicas: int
    observed_at: Instant | None
    """Time since which its pods are in their present state."""
    policy_type: PolicyType
    last_activity_at: Instant | None
    next_transition: TransitionKind | None
    """Next start or stop if there is no further activity; null if there is none."""
    next_transition_at: Instant | None


class DeploymentList(WireStruct):
    """Deployments of an organization, at most 500, in the order of the ids of their workflows."""

    as_of: Instant
    is_complete: bool
    """Whether there are no more than 500."""
    deployments: Sequence[ListedDeployment]


class DeploymentSummary(WireStruct):
    """Number of deployments by state, those that fail, and the next starts and stops."""

    as_of: Instant
    count: int
    states: Mapping[DeploymentStatus, int]
    """Number of deployments in each state that any has."""
    failed: Annotated[Sequence[ListedDeployment], Meta(max_length=SHOWN)]
    """Deployments whose pods can't start, in the order of the ids of their workflows."""
    upcoming: Annotated[Sequence[ListedDeployment], Meta(max_length=SHOWN)]
    """Deployments that start or stop next, the first one first."""


async def index(request: GatewayRequest) -> JsonResponse:
    """List the deployments of the workflows that the caller may read, with their next starts and stops.

    At most 500 are listed.
    """
    statement = activities_statement(request.caller).limit(MAX_DEPLOYMENTS + 1)
    async with request.gateway.database.read() as connection:
        rows = (await connection.execute(statement)).all()
    return JsonResponse(
        DeploymentList(
            as_of=instant(request.gateway.clock()),
            is_complete=len(rows) <= MAX_DEPLOYMENTS,
            deployments=[_show_deployment(row) for row in rows[:MAX_DEPLOYMENTS]],
        )
    )


async def show_summary(request: GatewayRequest) -> JsonResponse:
    """Count the deployments of the workflows that the caller may read by state, and show ten that fail and the next
    ten starts and stops.

    All deployments count, however many there are.
    """
    states = Counter[DeploymentStatus]()
    failed: list[Row[*tuple[Any, ...]]] = []
    moving: list[_MovingDeployment] = []
    last = ""
    async with request.gateway.database.read() as connection:
        while True:
            statement = activities_statement(request.caller, after=last).limit(BATCH_DEPLOYMENTS)
            rows = (await connection.execute(statement)).all()
            statuses = [status_of(cast("DeploymentState", row)) for row in rows]
            states.update(statuses)
            pairs = zip(rows, statuses, strict=True)
            failed += [row for row, status in pairs if status is DeploymentStatus.FAILED][
                : SHOWN - len(failed)
            ]
            moving = nsmallest(SHOWN, chain(moving, _find_moving(rows)))
            if len(rows) < BATCH_DEPLOYMENTS:
                break
            last = rows[-1].workflow_id
    return JsonResponse(
        DeploymentSummary(
            as_of=instant(request.gateway.clock()),
            count=states.total(),
            states=states,
            failed=[_show_deployment(row) for row in failed],
            upcoming=[_show_deployment(one.row) for one in moving],
        )
    )


@dataclass(frozen=True, slots=True, order=True)
class _MovingDeployment:
    """Deployment that starts or stops at a known time; the earlier ones, then those with lower ids, come first."""

    at: datetime
    workflow_id: str
    row: Row[*tuple[Any, ...]] = field(compare=False)


def _find_moving(rows: Iterable[Row[*tuple[Any, ...]]]) -> Iterator[_MovingDeployment]:
    """Yield the deployments that start or stop at a known time."""
    for row in rows:
        upcoming = _find_transition(row, _build_situation(row))
        if upcoming is not None:
            yield _MovingDeployment(upcoming.at, row.workflow_id, row)


def activities_statement(caller: ApiCaller, after: str = "") -> Select[*tuple[Any, ...]]:
    """Return the statement of the deployed workflows that a caller may read, those with ids after `after`, by id.

    A row has the name of the workflow, and all on which the next start or stop depends.
    """
    return _of_caller(activity.activity_statement().add_columns(col(Workflow.name)), caller, after)


def ids_statement(caller: ApiCaller, after: str) -> Select[*tuple[Any, ...]]:
    """Return the statement of the ids of the deployed workflows that a caller may read, those after `after`, by id."""
    statement = select(col(Deployment.workflow_id)).join(
        Workflow, col(Workflow.id) == col(Deployment.workflow_id)
    )
    return _of_caller(statement, caller, after)


def _of_caller(
    statement: Select[*tuple[Any, ...]], caller: ApiCaller, after: str
) -> Select[*tuple[Any, ...]]:
    """Restrict a statement about deployments to those that a caller may read with workflow ids after `after`, by id."""
    return statement.where(
        col(Deployment.organization_id) == caller.organization_id,
        col(Deployment.workflow_id) > after,
        col(Deployment.is_deployed),
        is_readable_by(caller),
    ).order_by(col(Deployment.workflow_id))


def _show_deployment(row: Row[*tuple[Any, ...]]) -> ListedDeployment:
    """Return the deployment of a row of `activities_statement` as the API shows it; without a next transition where
    this host doesn't know the time zone of its policy.

    No `Deployment` is built of the row: for hundreds of rows, that would take most of the time.
    """
    state: DeploymentState = cast("DeploymentState", row)
    situation = _build_situation(row)
    upcoming = _find_transition(row, situation)
    return ListedDeployment(
        workflow_id=row.workflow_id,
        workflow_name=row.name,
        deployment_status=status_of(state),
        stopped_reason=stopped_reason_of(state),
        reason=row.observed_reason or row.failed_reason,
        reason_code=row.observed_reason_code or row.failed_reason_code,
        start_failures=row.start_failures,
        replicas=row.replicas,
        ready_replicas=row.ready_replicas,
        observed_at=optional_instant(row.observed_at),
        policy_type=PolicyType(lifecycle_policy.effective_policy(row.lifecycle)["type"]),
        last_activity_at=optional_instant(situation.last_activity_at),
        next_transition=upcoming.kind if upcoming else None,
        next_transition_at=optional_instant(upcoming.at if upcoming else None),
    )


def _build_situation(row: Row[*tuple[Any, ...]]) -> DeploymentSituation:
    """Return the facts of a row of `activities_statement` on which the next start or stop depends."""
    return build_situation(
        cast("DeploymentState", row),
        has_due=bool(row.has_due),
        has_running=bool(row.has_running),
        last_ended_at=row.last_ended_at,
    )


def _find_transition(
    row: Row[*tuple[Any, ...]], situation: DeploymentSituation
) -> LifecycleTransition | None:
    """Return the next start or stop of a deployment; None without one, and where this host doesn't know the time zone
    of its policy.
    """
    try:
        policy = lifecycle_policy.parse_policy(lifecycle_policy.effective_policy(row.lifecycle))
        return lifecycle_policy.next_transition(policy, situation, from_microseconds(row.now))
    except ZoneInfoNotFoundError:
        return None
