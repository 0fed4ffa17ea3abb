"""Bulk inserts of objects beside runs that pages list: workflows, questions, schedules, deployments and others.

They belong to the organization that `tests.many_runs` has filled before.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Final

import msgspec
from sqlalchemy import insert
from sqlmodel import SQLModel

from models import access_store
from models.access import ApiKey, User
from models.ai_model import AiModel
from models.approval import ApprovalVote
from models.blocked_interval import BlockedInterval
from models.data_source import DataSource
from models.deployment import Deployment, LifecycleDecision, ObservedState
from models.execution import SpanRow
from models.ingest import SenderToken
from models.schedule import Schedule
from models.workflow import WorkflowVersion
from tests import many_runs, many_workflows
from tests.integration.input_waits import REQUEST
from tests.many_workflows import WorkflowOwners

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncConnection

    from models.access import Organization
    from tests.many_runs import RunOwner

WORKFLOWS: Final = 10_000
QUESTIONS: Final = 10_000
"""Open questions; as many others are answered."""
FAILED_NODES: Final = 500
"""Nodes of one run that have all failed alike, in the iterations of a loop."""
USERS: Final = 200
KEYS: Final = 1_000
SOURCES: Final = 500
MODELS: Final = 100
TOKENS: Final = 1_000
SCHEDULES: Final = 2_000
DEPLOYMENTS: Final = 500
VERSIONS: Final = 500
DECISIONS: Final = 5_000
"""Starts and stops of the pods of one workflow."""
ROWS_AT_ONCE: Final = 1_000
FAILED_RUN: Final = 1
"""Number of the run with many failed nodes, counted from the middle of all."""
QUESTION_OFFSET: Final = 6
"""The runs with this number and each hundredth after it wait."""


async def fill(connection: AsyncConnection, owner: RunOwner, runs: int) -> None:
    """Insert the objects of all kinds into an organization that has this number of runs, of `many_runs.fill`.

    The caller commits.
    """
    organization = await access_store.find_organization(connection, owner.organization_id)
    assert organization is not None
    now = datetime.now(UTC)
    users = await _insert_users(connection, organization, now)
    admin = await access_store.find_user(connection, organization.id, owner.user_id)
    assert admin is not None
    owners = WorkflowOwners(organization, admin, users[0], users[1])
    workflows = [row["id"] for row in await many_workflows.fill(connection, owners, WORKFLOWS)]
    rows: Mapping[type[SQLModel], Iterable[SQLModel]] = {
        ApiKey: (_build_key(user, number, now) for number, user in _repeat(users, KEYS)),
        DataSource: (_build_source(user, number, now) for number, user in _repeat(users, SOURCES)),
        AiModel: (_build_model(user, number, now) for number, user in _repeat(users, MODELS)),
        SenderToken: (_build_token(owner, number, now) for number in range(TOKENS)),
        Schedule: (_build_schedule(owner, one, now) for one in workflows[:SCHEDULES]),
        Deployment: (_build_deployment(owner, one, now) for one in workflows[-DEPLOYMENTS:]),
        WorkflowVersion: (_build_version(owner, number, now) for number in range(VERSIONS)),
        LifecycleDecision: (_build_decision(owner, number, now) for number in range(DECISIONS)),
        ApprovalVote: (_build_vote(owner, number, now) for number in range(QUESTIONS)),
        BlockedInterval: (_build_interval(owner, one, now) for one in _list_waiting(runs)),
    }
    for table, of_table in rows.items():
        await _insert(connection, table, of_table)
    await _insert(connection, SpanRow, _build_questions(owner, users, _list_waiting(runs), now))
    await _insert(connection, SpanRow, _build_failures(owner, many_runs.run_id(runs // 2 + FAILED_RUN), now))


async def _insert(connection: AsyncConnection, table: type[SQLModel], rows: Iterable[SQLModel]) -> None:
    values = [row.model_dump() for row in rows]
    for start in range(0, len(values), ROWS_AT_ONCE):
        await connection.execute(insert(table), values[start : start + ROWS_AT_ONCE])


def _repeat(users: Sequence[User], number: int) -> Iterable[tuple[int, User]]:
    """Yield each number below `number` with a user, the users in turn."""
    return ((index, users[index % len(users)]) for index in range(number))


def _list_waiting(runs: int) -> Sequence[str]:
    """Return the ids of the waiting runs that ask a question, the oldest first."""
    numbers = range(QUESTION_OFFSET, runs, 100)
    return [many_runs.run_id(number) for number in numbers][:QUESTIONS]


async def _insert_users(
    connection: AsyncConnection, organization: Organization, now: datetime
) -> Sequence[User]:
    """Insert the users of an organization, and return them."""
    users = [
        User(
            id=f"user_many_{number:020}",
            organization_id=organization.id,
            shard=organization.shard,
            email=f"person-{number}@many.example",
            name=f"Person {number}",
            created_at=now + timedelta(microseconds=number),
        )
        for number in range(USERS)
    ]
    await _insert(connection, User, users)
    return users


def _build_key(user: User, number: int, now: datetime) -> ApiKey:
    return ApiKey(
        id=f"key_many_{number:020}",
        organization_id=user.organization_id,
        user_id=user.id,
        shard=user.shard,
        name=f"Key {number}",
        prefix="sk-many",
        hash=f"{number:064}",
        secret_id="none",
        scopes=["workflows:read"],
        created_at=now + timedelta(microseconds=number),
    )


def _build_source(user: User, number: int, now: datetime) -> DataSource:
    return DataSource(
        id=f"ds_many_{number:020}",
        organization_id=user.organization_id,
        shard=user.shard,
        owner_id=user.id,
        name=f"Source {number}",
        type="postgresql",
        settings={"host": "database.example", "port": 5432, "database": "orders", "user": "orders"},
        secret_names=["password"],
        encrypted=b"",
        secret_id="none",
        secrets_set_at=now,
        created_at=now + timedelta(microseconds=number),
        updated_at=now,
    )


def _build_model(user: User, number: int, now: datetime) -> AiModel:
    return AiModel(
        id=f"mdl_many_{number:020}",
        organization_id=user.organization_id,
        shard=user.shard,
        owner_id=user.id,
        name=f"model-{number}",
        type="third-party",
        provider="openai-compatible",
        vendor_model_id="large",
        data_source_id=f"ds_many_{number:020}",
        created_at=now + timedelta(microseconds=number),
        updated_at=now,
    )


def _build_token(owner: RunOwner, number: int, now: datetime) -> SenderToken:
    return SenderToken(
        id=f"tok_many_{number:020}",
        kind="trigger",
        organization_id=owner.organization_id,
        shard=owner.shard,
        workflow_id=many_runs.workflow_id(number % many_runs.WORKFLOWS),
        user_id=owner.user_id,
        hash=f"{number:064}",
        hint="abcd",
        created_at=now + timedelta(microseconds=number),
    )


def _build_schedule(owner: RunOwner, workflow_id: str, now: datetime) -> Schedule:
    return Schedule(
        workflow_id=workflow_id,
        organization_id=owner.organization_id,
        shard=owner.shard,
        node_id="start",
        timing_hash="0" * 64,
        anchor_at=now,
        planned_at=now,
        next_run_at=now + timedelta(days=300),
        due_at=now + timedelta(days=300),
    )


def _build_deployment(owner: RunOwner, workflow_id: str, now: datetime) -> Deployment:
    return Deployment(
        workflow_id=workflow_id,
        organization_id=owner.organization_id,
        shard=owner.shard,
        replicas=1,
        definition_hash="0" * 64,
        version=1,
        observed=ObservedState.RUNNING,
        observed_replicas=1,
        ready_replicas=1,
        ready_addresses=[],
        observed_generation=1,
        last_activity_at=now,
        created_at=now,
        updated_at=now,
    )


def _build_version(owner: RunOwner, number: int, now: datetime) -> WorkflowVersion:
    return WorkflowVersion(
        workflow_id=many_runs.workflow_id(3),
        version=number + 2,
        shard=owner.shard,
        version_tag=f"v{number + 2}",
        snapshot={
            "name": "Million 3",
            "description": "",
            "nodes": [],
            "connections": [],
            "settings": {},
            "config": {},
        },
        created_by=owner.user_id,
        created_at=now + timedelta(microseconds=number),
    )


def _build_decision(owner: RunOwner, number: int, now: datetime) -> LifecycleDecision:
    return LifecycleDecision(
        id=f"dec_many_{number:020}",
        organization_id=owner.organization_id,
        shard=owner.shard,
        workflow_id=many_runs.workflow_id(3),
        at=now - timedelta(minutes=DECISIONS - number),
        action="start" if number % 2 else "stop",
        reason="run-due" if number % 2 else "idle",
        replicas=number % 2,
        inputs={},
    )


def _build_vote(owner: RunOwner, number: int, now: datetime) -> ApprovalVote:
    return ApprovalVote(
        execution_id=many_runs.run_id(number * 100 + 8),
        node_id="approval",
        iteration="",
        voter=owner.user_id,
        shard=owner.shard,
        id=f"vote_many_{number:020}",
        organization_id=owner.organization_id,
        title="Write 120 rows?",
        choice="approve",
        data="null",
        created_at=now + timedelta(microseconds=number),
    )


def _build_interval(owner: RunOwner, execution_id: str, now: datetime) -> BlockedInterval:
    return BlockedInterval(
        execution_id=execution_id,
        started_at=now,
        shard=owner.shard,
        organization_id=owner.organization_id,
        code="awaiting-input",
        node_id="approval",
    )


def _build_questions(
    owner: RunOwner, users: Sequence[User], execution_ids: Sequence[str], now: datetime
) -> Iterable[SpanRow]:
    """Yield the spans of nodes that ask: one question in four is for one of the users, the others are for all."""
    for number, execution_id in enumerate(execution_ids):
        people = {"assignees": [users[number % len(users)].id]} if number % 4 == 0 else {}
        awaits = {"kind": "input", "request": {**REQUEST, **people}, "expired": None}
        yield SpanRow(
            execution_id=execution_id,
            node_id="approval",
            shard=owner.shard,
            id=f"span_many_{number:020}",
            sequence=2,
            label="Approval",
            type="human-input",
            status="waiting",
            started_at=now,
            awaits=msgspec.json.encode(awaits).decode(),
        )


def _build_failures(owner: RunOwner, execution_id: str, now: datetime) -> Iterable[SpanRow]:
    """Yield the spans of a node that has failed in each iteration of a loop."""
    error = '{"code":"http-status","message":"POST https://orders.invalid/ answered 500"}'
    for number in range(FAILED_NODES):
        yield SpanRow(
            execution_id=execution_id,
            node_id="write",
            iteration=str(number),
            shard=owner.shard,
            id=f"span_failed_{number:020}",
            sequence=number + 2,
            label="Write the line",
            type="http-request",
            status="failed",
            started_at=now,
            ended_at=now,
            error=error,
        )
