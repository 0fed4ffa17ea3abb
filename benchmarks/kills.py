"""Hundreds of kills of workers: `python -m benchmarks.kills [dev|poison|recovery ...] [--kills 500]`.

`dev`: `pilotflame dev` is killed again and again under load; every run must complete. `poison`: a run kills
`pilotflame dev` whenever it runs, beside a hundred others. It must end as crashed, and the others must
complete. `recovery`: one of two workers is killed during a run. Measures the time until the run continues, by
the kind of kill.
"""

from __future__ import annotations

import argparse
import asyncio
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from random import Random
from statistics import median
from typing import Any

import psutil

from models.loss_limits import MAX_LOST_ATTEMPTS
from tests import services
from tests.system import harness, ledger, workflow_shapes
from tests.system.client import ExecutionEnd, RetryingClient
from tests.system.harness import ManyProcesses, SystemUnderTest
from tests.system.ledger import EffectLedger, LedgerCall
from tests.system.processes import SystemProcess

DEFAULTS = {"LEASE_SECONDS": "10", "SWEEP_SECONDS": "2"}
"""Defaults of the product, in place of the short intervals of the tests."""
PATIENCE_SECONDS = 1_800.0
AT_ONCE = 20
"""Concurrent runs of the clients."""
BESIDE = 100
NODE_SECONDS = 0.05


@dataclass(frozen=True, slots=True)
class KillRequest:
    """Parsed command line."""

    parts: Sequence[str]
    kills: int
    longest_life_seconds: float
    trials: int
    seed: int


def main() -> None:
    request = _read_request()
    for name, part in PARTS.items():
        if name in request.parts:
            asyncio.run(part(request))


# ── pilotflame dev ────────────────────────────────────────────────────────────────────────────────────────


async def _kill_dev(request: KillRequest) -> None:
    """Kill `pilotflame dev` at random times after each start while clients run a workflow; every run must complete."""
    chance = Random(request.seed)
    async with _run_one_process() as (deployment, client, effects):
        effects.delay_seconds = NODE_SECONDS
        workflow = await client.create(workflow_shapes.journey_workflow(effects))
        ends: list[ExecutionEnd] = []
        is_over = asyncio.Event()

        async def keep_running() -> None:
            while not is_over.is_set():
                ends.append(await client.end(await client.execute(workflow), PATIENCE_SECONDS))

        clients = [asyncio.create_task(keep_running()) for _ in range(AT_ONCE)]
        began_at = time.monotonic()
        for number in range(request.kills):
            await asyncio.sleep(chance.uniform(0, request.longest_life_seconds))
            deployment.gateway.kill()
            await deployment.revive()
            if (number + 1) % 50 == 0:
                print(f"{number + 1} kills, {len(ends)} runs ended, {_describe_ends(ends)}", flush=True)
        is_over.set()
        await asyncio.gather(*clients)
        seconds = time.monotonic() - began_at
        print(
            f"dev: {request.kills} kills in {seconds:.0f} s, {len(ends)} runs ended, {_describe_ends(ends)}"
        )
        assert all(one.status == "completed" for one in ends)


async def _run_poison(_request: KillRequest) -> None:
    """Kill the process whenever a node of one run starts: that run must end as crashed, and all others complete."""
    async with _run_one_process() as (deployment, client, effects):
        effects.delay_seconds = NODE_SECONDS
        poison = await client.create(
            workflow_shapes.chain_workflow(effects.reads("look"), effects.writes("poison"))
        )
        journey = await client.create(workflow_shapes.journey_workflow(effects))

        def kill(call: LedgerCall) -> None:
            deployment.sender(call).kill()

        with effects.on_arrival("poison", kill):
            async with deployment.supervised():
                others = await asyncio.gather(*(client.execute(journey) for _ in range(BESIDE)))
                began_at = time.monotonic()
                run = await client.execute(poison)
                ended, *ends = await asyncio.gather(
                    *(client.end(one, PATIENCE_SECONDS) for one in (run, *others))
                )
        deaths = len(effects.of("poison"))
        print(
            f"poison: ended {ended.status} ({ended.error_code}) after {deaths} deaths,"
            f" all over after {time.monotonic() - began_at:.0f} s; beside it {_describe_ends(ends)}"
        )
        assert (ended.status, ended.error_code) == ("failed", "crashed")
        assert deaths <= MAX_LOST_ATTEMPTS
        assert all(one.status == "completed" for one in ends)


def _describe_ends(ends: Sequence[ExecutionEnd]) -> str:
    counted = Counter(one.status if one.error_code is None else one.error_code for one in ends)
    return ", ".join(f"{count} {end}" for end, count in counted.most_common()) or "none"


@asynccontextmanager
async def _run_one_process() -> AsyncIterator[tuple[SystemUnderTest, RetryingClient, EffectLedger]]:
    with tempfile.TemporaryDirectory(prefix="pilotflame-kills-") as folder:
        async with (
            harness.run_one_process(Path(folder), **DEFAULTS) as deployment,
            ledger.run_ledger() as effects,
        ):
            client = RetryingClient(deployment.url, PATIENCE_SECONDS)
            try:
                yield deployment, client, effects
            finally:
                await client.close()


# ── workers ───────────────────────────────────────────────────────────────────────────────────────────────


async def _measure_recovery(request: KillRequest) -> None:
    """Kill the process that executes a run, in several ways, and print the time until the run continues."""
    ways: Sequence[tuple[str, Callable[[SystemProcess], Awaitable[None]], float]] = (
        ("child killed, parent lives", _kill_child, 5.0),
        ("both killed, started again", _kill_and_start, 5.0),
        ("both killed, as with their machine", _kill_for_good, 15.0),
    )
    with (
        services.run_postgres(services.DURABLE) as postgres,
        services.run_redis() as redis,
        tempfile.TemporaryDirectory(prefix="pilotflame-kills-") as folder,
    ):
        async with (
            harness.run_many_processes(Path(folder), postgres, redis, None, **DEFAULTS) as deployment,
            ledger.run_ledger() as effects,
        ):
            client = RetryingClient(deployment.url, PATIENCE_SECONDS)
            workflow = await client.create(workflow_shapes.chain_workflow(effects.writes("charge")))
            for name, kill, bound_seconds in ways:
                seconds = sorted(
                    [
                        await _seconds_to_recover(deployment, client, effects, workflow, kill)
                        for _ in range(request.trials)
                    ]
                )
                print(
                    f"recovery, {name}: median {median(seconds):.2f} s,"
                    f" longest of {len(seconds)} {seconds[-1]:.2f} s (bound: {bound_seconds:g} s)",
                    flush=True,
                )
            await client.close()


async def _seconds_to_recover(
    deployment: ManyProcesses,
    client: RetryingClient,
    effects: EffectLedger,
    workflow: str,
    kill: Callable[[SystemProcess], Awaitable[None]],
) -> float:
    """Return the seconds from a kill of the executing process until another one repeats the same call."""
    with effects.holding("charge") as held:
        run = await client.execute(workflow)
        call = await held.next_call()
        killed_at = time.monotonic()
        await kill(deployment.sender(call))
        again = await held.next_call()
        seconds = time.monotonic() - killed_at
        assert (again.execution_id, again.key) == (call.execution_id, call.key)
    await client.end(run, PATIENCE_SECONDS)
    await deployment.revive()
    return seconds


async def _kill_child(worker: SystemProcess) -> None:
    (child,) = psutil.Process(worker.process_id).children()[:1]
    child.kill()
    await worker.exit_code()
    worker.start()


async def _kill_and_start(worker: SystemProcess) -> None:
    worker.kill()
    worker.start()


async def _kill_for_good(worker: SystemProcess) -> None:
    worker.kill()


PARTS: dict[str, Callable[[KillRequest], Coroutine[Any, Any, None]]] = {
    "dev": _kill_dev,
    "poison": _run_poison,
    "recovery": _measure_recovery,
}


def _read_request() -> KillRequest:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.kills", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("parts", nargs="*", choices=[*PARTS, []], help="default: all")
    parser.add_argument("--kills", type=int, default=500, help="of `dev` (default: %(default)s)")
    parser.add_argument("--longest-life", type=float, default=2.0, help="seconds (default: %(default)s)")
    parser.add_argument("--trials", type=int, default=20, help="of each recovery (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=1)
    given = parser.parse_args()
    return KillRequest(given.parts or list(PARTS), given.kills, given.longest_life, given.trials, given.seed)


if __name__ == "__main__":
    main()
