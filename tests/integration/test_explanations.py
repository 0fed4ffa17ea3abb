"""Explanations agree with the claims: a run without blockers is the run that the next claim takes."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from sqlalchemy import delete, insert, select
from sqlalchemy.ext.asyncio import AsyncConnection
from structlog.testing import capture_logs

from journal.explanations import run_explanation, run_facts
from journal.explanations.blockers import Explanation
from journal.presence_reports import ABSENT_SECONDS
from journal.store import ClaimQuery
from models import ids
from models.access import ApiCaller, KeyScope, UserRole
from models.deployment import Deployment, ObservedState, is_ready
from models.execution import Execution
from models.loss_limits import MAX_ISOLATION_LOSSES
from models.worker_presence import WorkerPresence
from tests.integration.run_database import (
    MigratedDatabase,
    OwnedWorkflow,
    RunDatabase,
    open_run_database,
)

DEPLOYED = "deployed"
"""Stands for the id of the workflow as a target."""


@dataclass(frozen=True)
class ReachableRunState:
    """State of a run that the server can reach."""

    status: str
    target: str
    is_fresh: bool
    attempt: int
    isolation_losses: int
    is_leased: bool
    """Whether the lease of a running run lasts."""
    request: str | None
    due_in: timedelta = timedelta(hours=1)
    """Time to the end of a wait, which may be over: until a sweep promotes the run, no claim takes it."""

    def row(self, place: OwnedWorkflow, rank: int, now: datetime) -> Execution:
        is_running = self.status == "running"
        execution_id = ids.new_id("exec")
        return Execution(
            id=execution_id,
            shard=place.organization.shard,
            organization_id=place.organization.id,
            workflow_id=place.workflow_id,
            user_id=place.user_id,
            status=self.status,
            target=place.workflow_id if self.target == DEPLOYED else self.target,
            assigned_deployment_id=place.workflow_id if self.target == DEPLOYED else None,
            trigger_type="api",
            definition_hash="0" * 64,
            rank=rank,
            queue_turn=ids.turn_of_workflow(place.workflow_id),
            is_fresh=self.is_fresh,
            attempt=self.attempt,
            isolation_losses=self.isolation_losses,
            due_at=now + self.due_in if self.status == "waiting" else None,
            lease_owner="worker" if is_running else None,
            lease_until=now + timedelta(seconds=30 if self.is_leased else -30) if is_running else None,
            request=self.request if is_running else None,
            timeout_microseconds=1_000_000,
            deadline_at=now + timedelta(hours=1) if is_running else None,
            concurrency_key=place.workflow_id if self.target == "limited" else None,
            concurrency_limit=1 if self.target == "limited" else None,
            key_id=execution_id,
            channel="",
            created_at=now - timedelta(minutes=1),
            started_at=None if self.is_fresh else now,
            updated_at=now,
        )


CLAIMED_TARGETS = ["shared", "isolated", DEPLOYED]


@st.composite
def run_states(draw: st.DrawFn, target: str) -> ReachableRunState:
    """Draw a state: suspects that any worker may run have a target of their own."""
    status = draw(st.sampled_from(["pending", "pending", "pending", "pending", "waiting", "running"]))
    lost = draw(st.integers(0, 3))
    if target == "isolated":
        lost = max(lost, 2)
    elif target != DEPLOYED:
        lost = min(lost, 1)
    return ReachableRunState(
        status,
        target,
        is_fresh=lost == 0 and draw(st.booleans()),
        attempt=lost,
        isolation_losses=draw(st.integers(0, MAX_ISOLATION_LOSSES - 1)) if lost >= 2 else 0,
        is_leased=draw(st.booleans()),
        request=draw(st.sampled_from([None, "stop", "cancel"])),
        due_in=timedelta(seconds=draw(st.sampled_from([3_600, -1]))),
    )


@st.composite
def queues(draw: st.DrawFn) -> list[ReachableRunState]:
    """Draw runs of one workflow, mostly with one target, where the first of them blocks the others."""
    targets = st.sampled_from(
        [*CLAIMED_TARGETS, *CLAIMED_TARGETS, "limited", "delayed", "intake", "isolated-intake"]
    )
    common = draw(targets)
    states = [draw(run_states(common)), draw(run_states(common))]
    return [*states, draw(run_states(draw(targets)))] if draw(st.booleans()) else states


def suspect(target: str, *, lost: int) -> ReachableRunState:
    """Return a run that has lost workers and waits for a trial."""
    return ReachableRunState("pending", target, False, lost, 0, False, None)  # noqa: FBT003 - fields in their order


SERVING: dict[str, Any] = {
    "is_deployed": True,
    "replicas": 1,
    "observed": ObservedState.RUNNING,
    "stopped_reason": None,
    "is_draining": False,
    "ready_replicas": 1,
}
WORKERS = st.sampled_from(["free", "free", "free", "full", "absent", "never"])
DEPLOYMENTS = st.one_of(
    st.none(),
    st.fixed_dictionaries(
        {
            # Mostly a deployment that serves: the others block every run in the same way.
            "is_deployed": st.sampled_from([True, True, True, False]),
            "replicas": st.sampled_from([1, 1, 0]),
            "observed": st.sampled_from([ObservedState.RUNNING] * 5 + [*ObservedState]),
            "stopped_reason": st.sampled_from([None, None, "manual", "idle", "failed", "archived"]),
            "is_draining": st.sampled_from([False, False, False, True]),
            "ready_replicas": st.integers(0, 1),
        }
    ),
)


@pytest.fixture(params=["on_sqlite", "on_postgres"])
def runner(request: pytest.FixtureRequest) -> Iterator[tuple[asyncio.Runner, RunDatabase]]:
    database: MigratedDatabase = request.getfixturevalue(request.param)
    with asyncio.Runner() as runner, capture_logs():
        stack = AsyncExitStack()
        yield runner, runner.run(stack.enter_async_context(open_run_database(database)))
        runner.run(stack.aclose())


def test_a_run_has_no_blockers_exactly_when_a_claim_takes_it(
    runner: tuple[asyncio.Runner, RunDatabase],
) -> None:
    loop, database = runner
    place = loop.run(database.workflow())

    @settings(
        max_examples=25, derandomize=True, deadline=None, database=None, suppress_health_check=[*HealthCheck]
    )
    @given(queues(), WORKERS, DEPLOYMENTS)
    @example([suspect("isolated", lost=3), suspect("isolated", lost=2)], "free", None)
    @example([suspect(DEPLOYED, lost=2)], "free", SERVING)
    @example([suspect(DEPLOYED, lost=2)], "free", {**SERVING, "observed": ObservedState.STARTING})
    def check(states: Sequence[ReachableRunState], workers: str, deployment: dict[str, Any] | None) -> None:
        now = datetime.now(UTC)
        rows = [state.row(place, rank, now) for rank, state in enumerate(states)]
        for row in rows:
            loop.run(_fill(database, place, rows, workers, deployment))
            explained = loop.run(_explain(database, place, row.id))
            takes = loop.run(_takes(database, place, row, workers))
            assert (not explained.blockers) == takes, (row, explained, workers, deployment)

    check()


async def _fill(
    database: RunDatabase,
    place: OwnedWorkflow,
    rows: Sequence[Execution],
    workers: str,
    deployment: dict[str, Any] | None,
) -> None:
    now = datetime.now(UTC)

    async def work(connection: AsyncConnection) -> None:
        for table in (Execution, WorkerPresence, Deployment):
            await connection.execute(delete(table))
        await connection.execute(insert(Execution), [row.model_dump() for row in rows])
        if workers != "never":
            age = timedelta(seconds=2 * ABSENT_SECONDS if workers == "absent" else 0)
            presence = WorkerPresence(
                owner="worker",
                concurrency=10,
                held_runs=10 if workers == "full" else 1,
                started_at=now,
                seen_at=now - age,
            )
            await connection.execute(insert(WorkerPresence).values(presence.model_dump()))
        if deployment is not None:
            given = {**deployment}
            row = Deployment(
                workflow_id=place.workflow_id,
                organization_id=place.organization.id,
                shard=place.organization.shard,
                definition_hash="0" * 64,
                observed_definition_hash="0" * 64,
                version=1,
                observed_generation=1,
                drain_until=now + timedelta(minutes=1) if given.pop("is_draining") else None,
                stopped_at=now,
                created_at=now,
                updated_at=now,
                **given,
            )
            await connection.execute(insert(Deployment).values(row.model_dump()))

    await database.database.transaction(work)


async def _explain(database: RunDatabase, place: OwnedWorkflow, execution_id: str) -> Explanation:
    caller = ApiCaller(
        organization_id=place.organization.id,
        shard=place.organization.shard,
        user_id=place.user_id,
        role=UserRole.ADMIN,
        key_id="key_1",
        scopes=frozenset(KeyScope),
    )
    async with database.database.read_snapshot() as connection:
        facts = await run_facts.read_run_facts(connection, execution_id, caller)
    assert facts is not None
    return run_explanation.explain_run(facts)


async def _takes(database: RunDatabase, place: OwnedWorkflow, run: Execution, workers: str) -> bool:
    """Return whether a claim of one run, at the turn of the workflow, takes this run."""
    target = {"isolated": "shared"}.get(run.target, run.target)
    if target == place.workflow_id:
        async with database.database.read() as connection:
            row = (await connection.execute(select(Deployment))).mappings().first()
        can_claim = row is not None and row["is_deployed"] and is_ready(Deployment(**row))
    else:
        can_claim = workers == "free" and target == "shared"
    if not can_claim:
        return False
    turns = {place.organization.id: ids.turn_of_workflow(place.workflow_id)}
    found = set[str]()
    for is_trial in (False, True):
        claim = ClaimQuery("worker", 30, 1, turns=turns, target=target, is_trial=is_trial)
        found |= {one.execution_id for one in await database.store.claim(claim)}
    return run.id in found
