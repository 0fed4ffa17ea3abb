"""Storm of many runs and every kind of fault at once, at times drawn from one seed."""

from __future__ import annotations

import asyncio
import time
from collections import Counter, defaultdict
from collections.abc import Awaitable, Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from random import Random
from typing import TYPE_CHECKING

from redis.asyncio import Redis

from tests.system import consistency_checks, workflow_shapes
from tests.system.consistency_checks import ClockMove
from tests.system.harness import LEASE_SECONDS, ManyProcesses, OneProcess
from tests.system.wait_conditions import act_after, wait_until

if TYPE_CHECKING:
    from tests.system.client import RetryingClient
    from tests.system.harness import SystemUnderTest
    from tests.system.ledger import EffectLedger
    from tests.system.processes import SystemProcess
    from tests.system.proxy import FaultyProxy

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
    strikes: Sequence[StormStrike] | None = None
    """Faults; None: those of `list_strikes`."""


@dataclass(frozen=True, slots=True)
class StormStrike:
    """One fault of a storm."""

    name: str
    perform: Callable[[], Awaitable[None]]
    """Performs the fault, and returns when it is over."""
    part: str = ""
    """Part that one fault at a time may strike: a stopped server can't be stopped again. Empty: any number."""
    witness_shift: float = 0.0
    """Seconds by which it moves the clock with which the database notes commits, as in SQLite."""


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
    strikes: Counter[str]
    """Number of faults by name."""
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
    """Run a storm on a deployment and return its figures; fails unless every guarantee was kept to every client."""
    chance, began_at = Random(storm.seed), time.time()
    ledger.delay_seconds = 0.1
    client.patience_seconds = PATIENCE_SECONDS
    kinds = await _create_workflows(client, ledger)
    drawn = chance.choices(kinds, [kind.weight for kind in kinds], k=storm.runs)
    given = storm.strikes
    strikes = [*(list_strikes(deployment, chance, storm.pause_seconds) if given is None else given)]
    strikes *= storm.rounds
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
                deployment,
                client,
                ledger,
                expected,
                within=PATIENCE_SECONDS,
                clock_move=ClockMove(
                    began_at, min((strike.witness_shift for strike in strikes), default=0.0)
                ),
            )
    assert len(expected) == storm.runs
    return StormReport(
        ended=Counter(expected.values()),
        strikes=Counter(strike.name for strike in strikes),
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
    """Create the workflows of the storm: chains of writes, journeys, waits, failures, and runs to cancel."""
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
    """Start a run at a random time, cancel it if its workflow says so, and wait for its end."""
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


async def _strike_all(strikes: Sequence[StormStrike], storm: StormPlan, chance: Random) -> None:
    """Perform all faults, each at a random time within its share of the storm;
    those of one part one after the other.
    """
    part_is_up: dict[str, asyncio.Lock] = defaultdict(asyncio.Lock)

    async def strike_at(moment: float, strike: StormStrike) -> None:
        await asyncio.sleep(moment)
        async with part_is_up[strike.part] if strike.part else nullcontext():
            await strike.perform()

    async with asyncio.TaskGroup() as group:
        for number, strike in enumerate(strikes):
            # Each fault strikes at a random time within its own share of the storm: some overlap, some don't.
            moment = storm.seconds * (number + chance.random()) / len(strikes)
            group.create_task(strike_at(moment, strike))


def list_strikes(deployment: SystemUnderTest, chance: Random, pause_seconds: float) -> list[StormStrike]:
    """Return the faults of a storm on a deployment; pauses of workers last `pause_seconds`."""
    if isinstance(deployment, ManyProcesses):
        return _strikes_on_many_processes(deployment, chance, pause_seconds)
    assert isinstance(deployment, OneProcess)
    return _strikes_on_one_process(deployment, chance)


def _strikes_on_one_process(deployment: OneProcess, chance: Random) -> list[StormStrike]:
    """Return the faults of `pilotflame dev`: kills, restarts, and a locked database."""
    dev = deployment.gateway

    async def lock_database() -> None:
        with deployment.database_locked():
            await asyncio.sleep(chance.uniform(0, LEASE_SECONDS / 2))

    return [
        # Two of the faults that cost a run its lease: with one process they may follow each other closely.
        *[StormStrike("dev killed", lambda: _kill(dev))] * 2,
        StormStrike("dev restarted", lambda: _terminate(dev)),
        StormStrike("dev cut off", lock_database, "dev cut off"),
    ]


def _strikes_on_many_processes(
    deployment: ManyProcesses, chance: Random, pause_seconds: float
) -> list[StormStrike]:
    """Return the faults of a deployment of several processes."""

    def a_worker() -> SystemProcess:
        return chance.choice(deployment.workers)

    async def crash_database() -> None:
        async with deployment.database_down():
            await asyncio.sleep(chance.uniform(0, OUTAGE_SECONDS))

    async def crash_redis() -> None:
        async with deployment.redis_down():
            await asyncio.sleep(chance.uniform(0, OUTAGE_SECONDS))

    async def pause_redis() -> None:
        with deployment.redis_paused():
            await asyncio.sleep(chance.uniform(0, SLEEP_SECONDS))

    async def flush_redis() -> None:
        async with Redis.from_url(deployment.redis.url) as server:
            await server.flushall()

    async def lose_answers(way: FaultyProxy) -> None:
        way.keep_answers(b"")
        await act_after(chance.uniform(0, OUTAGE_SECONDS), way.cut)

    ways = deployment.ways
    return [
        *[StormStrike("worker killed", lambda: _kill(a_worker()))] * 4,
        *[StormStrike("worker frozen", lambda: _pause(a_worker(), pause_seconds))] * 3,
        *[StormStrike("worker restarted", lambda: _terminate(a_worker()))] * 2,
        *[StormStrike("gateway killed", lambda: _kill(deployment.gateway))] * 2,
        StormStrike("scheduler killed", lambda: _kill(deployment.scheduler)),
        StormStrike("PostgreSQL killed", crash_database, "PostgreSQL"),
        StormStrike("Redis killed", crash_redis, "Redis"),
        StormStrike("Redis frozen", pause_redis, "Redis"),
        *[StormStrike("Redis flushed", flush_redis, "Redis")] * 2,
        *[StormStrike("gateway without answers", lambda: lose_answers(ways.gateway_to_database))] * 2,
        *[StormStrike("worker without answers", lambda: lose_answers(ways.worker_to_database))] * 2,
        StormStrike("gateway without answers", lambda: lose_answers(ways.gateway_to_redis)),
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
