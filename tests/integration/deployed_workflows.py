"""Deployed workflows, made by rows alone, with their runs."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

from sqlalchemy import insert, select, update
from sqlmodel import col

from journal.store import ClaimQuery
from messages import wakeups
from messages.deployer_messages import DeployerMessage, PodLogRequest
from models.deployment import Deployment, ObservedState
from models.execution import Execution, ExecutionData
from models.execution_status import ExecutionStatus

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncConnection

    from tests.integration.gateway_harness import GatewayHarness, UserClient

HASH = "0" * 64


async def deploy_with_pod(
    harness: GatewayHarness,
    person: UserClient,
    workflow_id: str,
    **changes: Any,  # noqa: ANN401 - any column
) -> Deployment:
    """Insert the row of a deployment with one running pod, idle for an hour,
    with `changes` of its columns; return it.
    """
    now = datetime.now(UTC)
    deployment = Deployment(
        **{
            "workflow_id": workflow_id,
            "organization_id": person.user.organization_id,
            "shard": person.user.shard,
            "replicas": 1,
            "definition_hash": HASH,
            "version": 1,
            "last_activity_at": now - timedelta(hours=1),
            "observed": ObservedState.RUNNING,
            "observed_replicas": 1,
            "ready_replicas": 1,
            "observed_definition_hash": HASH,
            "observed_generation": 1,
            "observed_at": now,
            "created_at": now,
            "updated_at": now,
            **changes,
        }
    )
    await harness.gateway.database.transaction(
        lambda connection: connection.execute(insert(Deployment).values(deployment.model_dump()))
    )
    return deployment


async def mark_running(harness: GatewayHarness, workflow_id: str) -> None:
    """Record the desired state of a deployment as observed and running, in place of a deployer."""
    seen = {
        "observed": ObservedState.RUNNING,
        "observed_generation": col(Deployment.generation),
        "observed_replicas": col(Deployment.replicas),
        "ready_replicas": col(Deployment.replicas),
        "observed_definition_hash": col(Deployment.definition_hash),
    }
    row = update(Deployment).where(col(Deployment.workflow_id) == workflow_id)
    await harness.gateway.database.transaction(lambda connection: connection.execute(row.values(seen)))


def answer_for_pods(harness: GatewayHarness) -> None:
    """Answer requests for pod logs with no lines from now on, in place of a deployer."""
    broker = harness.gateway.broker

    def answer(message: DeployerMessage) -> None:
        if isinstance(message, PodLogRequest):
            direct_message = {"pod_logs": message.request_id, "lines": "[]"}
            answers.append(asyncio.ensure_future(broker.send(message.channel, direct_message)))

    answers: list[asyncio.Future[None]] = []
    broker.start_deployer(answer)


@asynccontextmanager
async def serve_as_pods(harness: GatewayHarness) -> AsyncIterator[None]:
    """Claim all pending runs of deployments during the block, in place of pods, and notify gateways;
    no run is executed.
    """

    async def take() -> None:
        """Claim the pending runs again and again, and notify their gateways, until canceled."""
        assigned_deployment_ids = (
            select(col(Execution.assigned_deployment_id))
            .where(
                col(Execution.status) == ExecutionStatus.PENDING,
                col(Execution.assigned_deployment_id).is_not(None),
            )
            .distinct()
        )
        while True:
            await asyncio.sleep(0.05)
            async with harness.gateway.database.read() as connection:
                found = [str(one) for one in await connection.scalars(assigned_deployment_ids)]
            for workflow_id in found:
                claim = ClaimQuery(f"pod:{workflow_id}:1", 30, 50, target=workflow_id)
                await wakeups.notify_taken_runs(
                    harness.gateway.broker, await harness.gateway.store.claim(claim)
                )

    task = asyncio.create_task(take())
    try:
        yield
    finally:
        task.cancel()
        await asyncio.wait([task])


async def run(harness: GatewayHarness, person: UserClient, workflow_id: str, **columns: Any) -> str:  # noqa: ANN401 - any column
    """Start a run of a workflow through the API, set columns of its row, by default for its pods, and return its id."""
    response = await person.api.post(f"/api/v1/workflows/{workflow_id}/execute", json={})
    execution_id: str = response.json()["executionId"]
    values = {"target": workflow_id, **columns}
    accepted_at = values.get("created_at")

    async def change(connection: AsyncConnection) -> None:
        row = update(Execution).where(col(Execution.id) == execution_id)
        await connection.execute(row.values(values))
        if accepted_at is not None:
            data = update(ExecutionData).where(col(ExecutionData.execution_id) == execution_id)
            await connection.execute(data.values(created_at=accepted_at))

    await harness.gateway.database.transaction(change)
    return execution_id
