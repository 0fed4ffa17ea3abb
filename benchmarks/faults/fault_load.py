"""Mixed load on a deployment during one fault, and the answers to its clients."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import TYPE_CHECKING, Any, Final

import httpx2

from benchmarks.faults import task_worker
from tests.system import workflow_shapes
from tests.system.client import API_KEY, RetryingClient

if TYPE_CHECKING:
    from engine.values import Json
    from tests.system.ledger import EffectLedger

PATIENCE_SECONDS: Final = 75.0
"""Time within which a run ends after its fault is over; a run without an end by then is stuck."""
TWICE_SHARE: Final = 0.2
"""Share of the requests that are sent twice at once under one key."""
RETRY_SECONDS: Final = 0.3
MAX_WAITING: Final = 60
"""Unanswered requests at once; more would only keep the processor from the server."""


@dataclass(frozen=True, slots=True)
class LoadWorkflow:
    """Workflow of the load, with the expected end of its runs and its share of the requests."""

    workflow_id: str
    expected: str
    weight: int
    is_queue: bool = False


@dataclass(slots=True)
class LoadRun:
    """Run that was accepted by an answer to a client, and the end that the client observed."""

    execution_id: str
    expected: str
    asked_at: float
    """Unix time."""
    ended_at: float | None = None
    """Unix time at which its client saw the end; None: stuck."""
    status: str | None = None
    error_code: str | None = None


@dataclass
class FaultLoad:
    """Requests to a deployment during one fault, and their outcome for the clients."""

    client: RetryingClient
    workflows: Sequence[LoadWorkflow]
    chance: Random
    per_second: float
    runs: list[LoadRun] = field(default_factory=list)
    doubled_keys: list[str] = field(default_factory=list)
    """Keys under which two runs were accepted."""
    faulty_answers: Counter[str] = field(default_factory=Counter)
    """Answers that no client may get, such as 500, by their kind."""
    unanswered: int = 0
    """Requests without an answer within the patience; none of them was accepted as far as their clients know."""
    _is_over: asyncio.Event = field(default_factory=asyncio.Event)
    _tasks: set[asyncio.Task[None]] = field(default_factory=set)
    _followers: set[asyncio.Task[None]] = field(default_factory=set)

    async def run(self) -> None:
        """Send requests at random times until `stop`; then return, without waiting for answers."""
        while not self._is_over.is_set():
            if len(self._tasks) >= MAX_WAITING:
                await asyncio.sleep(RETRY_SECONDS)
                continue
            task = asyncio.create_task(self._request())
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
            await asyncio.sleep(self.chance.expovariate(self.per_second))

    def stop(self) -> None:
        """End `run`: no further request is sent."""
        self._is_over.set()

    async def drain(self, seconds: float) -> None:
        """Wait for answers and ends for up to `seconds`; then give up the others,
        and runs without an end count as stuck.
        """
        until = time.monotonic() + seconds
        for tasks in (self._tasks, self._followers):
            while tasks and (left := until - time.monotonic()) > 0:
                await asyncio.wait(tasks, timeout=left)
        left_over = [*self._tasks, *self._followers]
        for task in left_over:
            task.cancel()
        await asyncio.gather(*left_over, return_exceptions=True)

    async def _request(self) -> None:
        """Request one run, sometimes twice at once under its key, and follow the accepted ones to their end."""
        workflow = self.chance.choices(self.workflows, [one.weight for one in self.workflows])[0]
        key = f"{self.chance.getrandbits(128):032x}"
        count = 2 if self.chance.random() < TWICE_SHARE else 1
        asked_at = time.time()
        answers = await asyncio.gather(*(self._start_run(workflow, key) for _ in range(count)))
        accepted = {execution_id for execution_id in answers if execution_id is not None}
        if len(accepted) > 1:
            self.doubled_keys.append(key)
        for execution_id in accepted:
            self._add_run(execution_id, workflow, asked_at)

    async def start(self, workflow: LoadWorkflow) -> str:
        """Start one run for a fault that needs it, follow it to its end, and return its id."""
        asked_at = time.time()
        execution_id = await self.client.execute(workflow.workflow_id)
        self._add_run(execution_id, workflow, asked_at)
        return execution_id

    def _add_run(self, execution_id: str, workflow: LoadWorkflow, asked_at: float) -> None:
        run = LoadRun(execution_id, workflow.expected, asked_at)
        self.runs.append(run)
        task = asyncio.create_task(self._follow(run))
        self._followers.add(task)
        task.add_done_callback(self._followers.discard)

    async def _start_run(self, workflow: LoadWorkflow, key: str) -> str | None:
        """Return the id of the run that the server accepted; None, and a count of the answer, if there is none."""
        path = f"/workflows/{workflow.workflow_id}/{'enqueue' if workflow.is_queue else 'execute'}"
        body: dict[str, Any] = {"message": {"a": 1}} if workflow.is_queue else {"triggerInputs": {"a": 1}}
        try:
            answer = await self.client.answer("POST", path, body, key=key)
        except httpx2.TransportError:
            self.unanswered += 1
            return None
        if answer.status_code in {httpx2.codes.CREATED, httpx2.codes.OK}:
            return str(answer.json()["executionId"])
        if answer.status_code == httpx2.codes.SERVICE_UNAVAILABLE:
            self.unanswered += 1
        else:
            self.faulty_answers[f"{answer.status_code} to {path.rpartition('/')[2]}"] += 1
        return None

    async def _follow(self, run: LoadRun) -> None:
        try:
            ended = await self.client.end(run.execution_id, PATIENCE_SECONDS * 2)
        except (AssertionError, TimeoutError, httpx2.TransportError) as error:
            if isinstance(error, AssertionError):
                self.faulty_answers[f"refused progress: {str(error)[:100]}"] += 1
            return
        run.ended_at, run.status, run.error_code = time.time(), ended.status, ended.error_code


async def create_workflows(client: RetryingClient, ledger: EffectLedger) -> Sequence[LoadWorkflow]:
    """Create the workflows of the load: chains of writes, long journeys, waits, queues and failures."""
    order = workflow_shapes.chain_workflow(
        ledger.reads("look"), workflow_shapes.set_node("pack"), ledger.writes("charge"), ledger.writes("ship")
    )
    patient = workflow_shapes.chain_workflow(
        ledger.writes("before"), workflow_shapes.wait_node("wait", 1.5), ledger.writes("after")
    )
    unlucky = workflow_shapes.chain_workflow(ledger.writes("charge"), ledger.writes("decline"))
    queue: workflow_shapes.Node = {"id": "start", "nodeId": "queue-trigger"}
    queued = workflow_shapes.build_workflow([queue, ledger.writes("charge")], "start>charge")
    return [
        LoadWorkflow(await client.create(order), "completed", weight=10),
        LoadWorkflow(await client.create(workflow_shapes.journey_workflow(ledger)), "completed", weight=3),
        LoadWorkflow(await client.create(patient), "completed", weight=3),
        LoadWorkflow(await client.create(queued), "completed", weight=3, is_queue=True),
        LoadWorkflow(await client.create(unlucky), "failed", weight=1),
    ]


async def create_step(client: RetryingClient, ledger: EffectLedger, node_id: str) -> LoadWorkflow:
    """Create a workflow with one step of own code that writes to the ledger, and its node type."""
    document = dict(task_worker.worker.definitions[0].document)
    added = await client.answer("POST", "/workflow-nodes", document)
    assert added.status_code in {httpx2.codes.CREATED, httpx2.codes.OK}, added.text
    config: dict[str, Json] = {"url": ledger.url_of(node_id)}
    step: workflow_shapes.Node = {"id": node_id, "nodeId": task_worker.TYPE, "config": config}
    return LoadWorkflow(await client.create(workflow_shapes.chain_workflow(step)), "completed", weight=1)


def open_client(url: str) -> RetryingClient:
    """Return a client that repeats requests for as long as any fault may last."""
    client = RetryingClient(url, PATIENCE_SECONDS, API_KEY)
    client.retry_seconds = client.longest_retry_seconds = RETRY_SECONDS
    return client


def in_flight(runs: Sequence[LoadRun], moment: float) -> list[LoadRun]:
    """Return the runs that were requested before a Unix time, and ended after it or not at all."""
    return [run for run in runs if run.asked_at < moment and (run.ended_at is None or run.ended_at > moment)]


def count_by_status(runs: Sequence[LoadRun]) -> Mapping[str, int]:
    """Return the number of runs by the status that their clients observed at the end; `no end` without any."""
    return Counter(run.status or "no end" for run in runs)
