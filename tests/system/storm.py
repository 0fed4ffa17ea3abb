"""Storm of many runs and every kind of fault at once, at times drawn from one seed."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from random import Random
from typing import TYPE_CHECKING

from redis.asyncio import Redis

from tests.system import consistency_checks, workflow_shapes
from tests.system.harness import LEASE_SECONDS, ManyProcesses, OneProcess
from tests.system.wait_conditions import act_after, wait_until

if TYPE_CHECKING:
    from tests.system.client import RetryingClient
    from tests.system.harness import SystemUnderTest
    from tests.system.ledger import EffectLedger
    from tests.system.processes import SystemProcess
    from tests.system.proxy import FaultyProxy

Strike = Callable[[], Awaitable[None]]

PATIENCE_SECONDS = 180.0
SLEEP_SECONDS = 1.5 * LEASE_SECONDS
OUTAGE_SECONDS = 0.5


@dataclass(frozen=True, slots=True)
class StormPlan:
    """Number of runs and faults of a storm, and its duration."""

    runs: int
    seconds: float
    """Duration within which runs are requested and faults strike, each at a random time."""
    seed: int
    rounds: int = 1
    """Number of faults of each kind."""
    pause_seconds: float = SLEEP_SECONDS
    """Duration of a worker's pause: longer than its lease."""


@dataclass(frozen=True, slots=True)
class StormWorkflow:
    """One of the workflows of a storm."""

    workflow_id: str
    expected: str
    weight: int
    is_cancelled: bool = False


@dataclass(frozen=True, slots=True)
class StormReport:
    """Figures of a storm."""

    ended: Counter[str]
    crashed: int
    """Runs that ended as crashed after too many lost workers in a row."""
    repeated_effects: int
    calls: int
    longest_seconds: float
    """From a request to the end of its run, as its client saw it."""
    calm_seconds: float
    """From when everything was up again, after the last fault, to the end of the last run."""


async def run_storm(
    storm: StormPlan, deployment: SystemUnderTest, client: RetryingClient, ledger: EffectLedger
) -> StormReport:
    """Run a storm on a deployment; fails unless every guarantee was kept to every client."""
    chance = Random(storm.seed)
    ledger.delay_seconds = 0.1
    client.patience_seconds = PATIENCE_SECONDS
    kinds = await _create_workflows(client, ledger)
    drawn = chance.choices(kinds, [kind.weight for kind in kinds], k=storm.runs)
    strikes = _list_strikes(deployment, chance, storm.pause_seconds) * storm.rounds
    chance.shuffle(strikes)
    with ledger.refusing("decline"):
        async with deployment.supervised():
            async with asyncio.TaskGroup() as group:
                runs = [group.create_task(_run_to_end(kind, storm, chance, client)) for kind in drawn]
                await _strike_all(strikes, storm, chance)
                await deployment.revive(PATIENCE_SECONDS)
                calm_since = time.monotonic()
            lives = [run.result() for run in runs]
            expected = {life.execution_id: life.expected for life in lives}
            calm_seconds = time.monotonic() - calm_since
            await consistency_checks.assert_consistent(
                deployment, client, ledger, expected, within=PATIENCE_SECONDS
            )
    assert len(expected) == storm.runs
    return StormReport(
        ended=Counter(expected.values()),
        crashed=sum(life.is_crashed for life in lives),
        repeated_effects=consistency_checks.count_repeated(ledger.effects()).total(),
        calls=len(ledger.calls),
        longest_seconds=max(life.seconds for life in lives),
        calm_seconds=calm_seconds,
    )


# ── runs ────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True)
class StormRun:
    """One run, from the request to its end."""

    execution_id: str
    expected: str
    seconds: float
    is_crashed: bool


async def _create_workflows(client: RetryingClient, ledger: EffectLedger) -> Sequence[StormWorkflow]:
    order = workflow_shapes.chain_workflow(
        ledger.reads("look"), workflow_shapes.set_node("pack"), ledger.writes("charge"), ledger.writes("ship")
    )
    patient = workflow_shapes.chain_workflow(
        ledger.writes("before"), workflow_shapes.wait_node("wait", 1.5), ledger.writes("after")
    )
    unlucky = workflow_shapes.chain_workflow(ledger.writes("charge"), ledger.writes("decline"))
    return [
        StormWorkflow(await client.create(order), "completed", weight=14),
        StormWorkflow(await client.create(workflow_shapes.journey_workflow(ledger)), "completed", weight=2),
        StormWorkflow(await client.create(patient), "completed", weight=2),
        StormWorkflow(await client.create(unlucky), "failed", weight=1),
        StormWorkflow(await client.create(patient), "cancelled", weight=1, is_cancelled=True),
    ]


async def _run_to_end(
    kind: StormWorkflow, storm: StormPlan, chance: Random, client: RetryingClient
) -> StormRun:
    key = f"{chance.getrandbits(128):032x}"
    await asyncio.sleep(chance.uniform(0, storm.seconds))
    asked_at = time.monotonic()
    execution_id = await client.execute(kind.workflow_id, key=key)
    expected = kind.expected
    if kind.is_cancelled:
        await asyncio.sleep(chance.uniform(0, 1))
        await client.ask(execution_id, "cancel")
    ended = await client.end(execution_id, PATIENCE_SECONDS)
    if kind.is_cancelled and ended.status == "completed":
        expected = "completed"  # the cancellation was too late
    if ended.error_code == "crashed":
        expected = "failed"  # as it should, where fault upon fault took its workers: `blow` counts these
    return StormRun(
        execution_id, expected, time.monotonic() - asked_at, is_crashed=ended.error_code == "crashed"
    )


# ── faults ──────────────────────────────────────────────────────────────────────────────────────────────────


async def _strike_all(strikes: Sequence[Strike], storm: StormPlan, chance: Random) -> None:
    async def strike_at(moment: float, strike: Strike) -> None:
        await asyncio.sleep(moment)
        await strike()

    async with asyncio.TaskGroup() as group:
        for number, strike in enumerate(strikes):
            # Each fault strikes at a random time within its own share of the storm: some overlap, some don't.
            moment = storm.seconds * (number + chance.random()) / len(strikes)
            group.create_task(strike_at(moment, strike))


def _list_strikes(deployment: SystemUnderTest, chance: Random, pause_seconds: float) -> list[Strike]:
    if isinstance(deployment, ManyProcesses):
        return _strikes_on_many_processes(deployment, chance, pause_seconds)
    assert isinstance(deployment, OneProcess)
    return _strikes_on_one_process(deployment, chance)


def _strikes_on_one_process(deployment: OneProcess, chance: Random) -> list[Strike]:
    dev = deployment.gateway

    async def lock_database() -> None:
        with deployment.database_locked():
            await asyncio.sleep(chance.uniform(0, LEASE_SECONDS / 2))

    # Two of the faults that cost a run its lease: with one process they may follow each other closely.
    return [*[lambda: _kill(dev)] * 2, lambda: _terminate(dev), lock_database]


def _strikes_on_many_processes(
    deployment: ManyProcesses, chance: Random, pause_seconds: float
) -> list[Strike]:
    # A stopped server can't be stopped again.
    database_is_up, redis_is_up = asyncio.Lock(), asyncio.Lock()

    def a_worker() -> SystemProcess:
        return chance.choice(deployment.workers)

    async def crash_database() -> None:
        async with database_is_up, deployment.database_down():
            await asyncio.sleep(chance.uniform(0, OUTAGE_SECONDS))

    async def crash_redis() -> None:
        async with redis_is_up, deployment.redis_down():
            await asyncio.sleep(chance.uniform(0, OUTAGE_SECONDS))

    async def pause_redis() -> None:
        async with redis_is_up:
            with deployment.redis_paused():
                await asyncio.sleep(chance.uniform(0, SLEEP_SECONDS))

    async def flush_redis() -> None:
        async with redis_is_up, Redis.from_url(deployment.redis.url) as server:
            await server.flushall()

    async def lose_answers(way: FaultyProxy) -> None:
        way.keep_answers(b"")
        await act_after(chance.uniform(0, OUTAGE_SECONDS), way.cut)

    ways = deployment.ways
    return [
        *[lambda: _kill(a_worker())] * 4,
        *[lambda: _pause(a_worker(), pause_seconds)] * 3,
        *[lambda: _terminate(a_worker())] * 2,
        *[lambda: _kill(deployment.gateway)] * 2,
        lambda: _kill(deployment.scheduler),
        *[crash_database, crash_redis, pause_redis],
        *[flush_redis] * 2,
        *[lambda: lose_answers(ways.gateway_to_database)] * 2,
        *[lambda: lose_answers(ways.worker_to_database)] * 2,
        lambda: lose_answers(ways.gateway_to_redis),
    ]


async def _kill(process: SystemProcess) -> None:
    await _wait_until_at_work(process)
    process.kill()


async def _terminate(process: SystemProcess) -> None:
    await _wait_until_at_work(process)
    process.terminate()


async def _pause(process: SystemProcess, seconds: float) -> None:
    await _wait_until_at_work(process)
    with process.paused():
        await asyncio.sleep(seconds)


async def _wait_until_at_work(process: SystemProcess) -> None:
    await wait_until(lambda: process.is_at_work, PATIENCE_SECONDS)
