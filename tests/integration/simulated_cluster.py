"""Cluster inside the tests' process: its pods are real runners without a process of their own."""

from __future__ import annotations

import asyncio
import socket
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from ipaddress import IPv4Network
from typing import TYPE_CHECKING, Any

from pydantic import SecretStr
from sqlalchemy import select, update
from sqlmodel import col

from execution.pod_api import PodContact
from gateway import main as gateways
from models import deployment_token, ids
from models.database_time import DatabaseTime
from models.deployment import Deployment, ObservedState
from models.deployment_token import TokenBearer
from runner.gateway_client import GatewayClient
from runner.main import run_executor
from runner.pod_app import PodLifecycle
from runner.settings import RunnerSettings
from tests.integration.gateway_harness import SECRET

if TYPE_CHECKING:
    from models.database import Database
    from tests.integration.gateway_harness import GatewayHarness

TURN_SECONDS = 0.02


class InProcessGatewayServer(gateways.GatewayServer):
    """Server of a gateway within the process of the tests, which leaves signals to them."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


@asynccontextmanager
async def listen_for_pods(harness: GatewayHarness) -> AsyncIterator[str]:
    """Let the gateway of a harness listen on a socket for pods; yield its address."""
    listener = socket.create_server(("127.0.0.1", 0))
    app = gateways.create_app(lambda: nullcontext(harness.gateway))
    server = InProcessGatewayServer(gateways.build_server(app, harness.gateway.settings).config)
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    while not server.started:  # noqa: ASYNC110 - a server has no event for it
        await asyncio.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        await serving


@dataclass
class SimulatedCluster:
    """Stand-in for a deployer and its cluster, which follows the database rows."""

    database: Database
    gateway_url: str
    starts: Counter[str] = field(default_factory=Counter)
    """Number of pod starts by workflow id."""
    broken: dict[str, str] = field(default_factory=dict)
    """Why pods of a workflow can't start."""
    is_held: asyncio.Event = field(default_factory=asyncio.Event)
    """While set, the cluster does nothing."""
    pods: dict[str, AsyncExitStack] = field(default_factory=dict)

    async def run(self) -> None:
        """Follow the rows of deployments, fifty times a second, until canceled."""
        while True:
            await asyncio.sleep(TURN_SECONDS)
            if not self.is_held.is_set():
                await self._turn()

    async def close(self) -> None:
        """Stop all pods."""
        for stack in self.pods.values():
            await stack.aclose()

    async def _turn(self) -> None:
        """Bring the pods of each deployment to its desired state, and record the observed one, once."""
        async with self.database.read() as connection:
            rows = (await connection.execute(select(Deployment))).mappings().all()
        for row in rows:
            await self._reconcile(Deployment(**row))

    async def _reconcile(self, deployment: Deployment) -> None:
        """Start or stop the pod of a deployment as its row desires, and record the observed state."""
        workflow_id = deployment.workflow_id
        is_wanted = deployment.is_deployed and deployment.replicas > 0 and deployment.drain_until is None
        if is_wanted and workflow_id in self.broken:
            await self._record_state(
                deployment, ObservedState.FAILED, observed_reason=self.broken[workflow_id]
            )
        elif is_wanted and workflow_id not in self.pods:
            self.starts[workflow_id] += 1
            await self._record_state(deployment, ObservedState.STARTING)
            self.pods[workflow_id] = await self._start_pod(deployment)
            await self._record_state(deployment, ObservedState.RUNNING)
        elif not is_wanted and workflow_id in self.pods:
            await self.pods.pop(workflow_id).aclose()
            await self._record_state(
                deployment, ObservedState.STOPPED if deployment.is_deployed else ObservedState.ABSENT
            )
        elif is_wanted:
            await self._record_state(deployment, ObservedState.RUNNING)
        else:
            await self._record_state(
                deployment, ObservedState.STOPPED if deployment.is_deployed else ObservedState.ABSENT
            )

    async def _start_pod(self, deployment: Deployment) -> AsyncExitStack:
        """Start a pod of a deployment within this process; return the stack that stops it."""
        stack = AsyncExitStack()
        token = await self.database.transaction(
            lambda connection: deployment_token.ensure_token(
                connection,
                TokenBearer(deployment.workflow_id, deployment.organization_id, deployment.shard),
                secret=SECRET.encode(),
                token_id=deployment_token.new_token_id(),
                now=deployment.created_at,
            )
        )
        settings = RunnerSettings(
            runner_gateway_url=self.gateway_url,
            runner_token=SecretStr(token),
            runner_workflow_id=deployment.workflow_id,
            runner_pod=ids.new_id("pod"),
            runner_drain_seconds=5,
            outbound_allowed_networks=(IPv4Network("127.0.0.1/32"),),
        )
        gateway = GatewayClient(settings)
        stack.push_async_callback(gateway.close)
        contact = await gateway.call("/contact", None, PodContact)
        await stack.enter_async_context(
            run_executor(settings, gateway, contact, PodLifecycle(token, deployment.workflow_id))
        )
        return stack

    async def _record_state(self, deployment: Deployment, observed: ObservedState, **columns: Any) -> None:  # noqa: ANN401 - any column
        """Record an observed state in the row of a deployment, unless it has that already."""
        seen = {"observed": observed, "observed_generation": deployment.generation, **columns}
        if all(getattr(deployment, name) == value for name, value in seen.items()):
            return
        statement = (
            update(Deployment)
            .where(col(Deployment.workflow_id) == deployment.workflow_id)
            .values(observed_definition_hash=deployment.definition_hash, observed_at=DatabaseTime(), **seen)
        )
        await self.database.transaction(lambda connection: connection.execute(statement))


@asynccontextmanager
async def run_simulated_cluster(harness: GatewayHarness) -> AsyncIterator[SimulatedCluster]:
    """Run a cluster for the deployments of a harness during the block; its pods stop after it."""
    async with listen_for_pods(harness) as url:
        cluster = SimulatedCluster(harness.gateway.database, url)
        running = asyncio.create_task(cluster.run())
        try:
            yield cluster
        finally:
            running.cancel()
            with suppress(asyncio.CancelledError):
                await running
            await cluster.close()
