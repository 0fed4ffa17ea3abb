"""Run of the matrix: deployments, and one cell after another."""

from __future__ import annotations

import asyncio
import os
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Final

from benchmarks.faults import fault_load, promise_checks, upgrades
from benchmarks.faults.fault_cells import LEASE_SECONDS, PROCESS_NAMES, SWEEP_SECONDS
from benchmarks.faults.fault_load import PATIENCE_SECONDS, FaultLoad
from benchmarks.faults.faulty_system import FaultySystem, Stage
from benchmarks.faults.promise_checks import CellResult
from tests import preloads, services
from tests.preloads import SHIFTED_CLOCK, FaultyDisk, ShiftedClock
from tests.system import harness, ledger, workflow_shapes

if TYPE_CHECKING:
    from benchmarks.faults.faulty_system import FaultCell
    from benchmarks.faults.matrix_view import MatrixView
    from tests.system.client import RetryingClient

MUTATIONS: Final = Path(__file__).parent / "mutations"
WARM_UP_SECONDS: Final = 1.5
AFTER_SECONDS: Final = 1.0
LIVELY_SECONDS: Final = 30.0
RESTART_SECONDS: Final = 180.0
"""Time for starts on a machine that other work keeps busy."""
NODE_SECONDS: Final = 0.15
SETTINGS: Final = {"LEASE_SECONDS": f"{LEASE_SECONDS:g}", "SWEEP_SECONDS": f"{SWEEP_SECONDS:g}"}


class CompilerMissing(Exception):
    """Clocks and disks that fail need a C compiler: `apt-get install gcc libc6-dev`."""


@dataclass(frozen=True, slots=True)
class DamagedClock(ShiftedClock):
    """Clock of a process, with the damage that its code gets."""

    without: str | None = None
    code: Path | None = None
    """Folder with the code of another version."""

    @property
    def environment(self) -> dict[str, str]:
        """Environment variables of the process."""
        shifted = ShiftedClock(self.library, self.file).environment
        if self.code is not None:
            return {**shifted, **upgrades.code_environment(self.code)}
        if self.without is None:
            return shifted
        paths = [str(MUTATIONS), *filter(None, [os.environ.get("PYTHONPATH")])]
        return {**shifted, "PYTHONPATH": os.pathsep.join(paths), "PILOTFLAME_FAULTS_WITHOUT": self.without}


@dataclass(frozen=True, slots=True)
class FaultRun:
    """Run of the matrix."""

    cells: Sequence[FaultCell]
    seed: int
    per_second: float
    without: str | None = None


async def run_matrix(run: FaultRun, view: MatrixView) -> list[CellResult]:
    """Strike every cell, one deployment after another."""
    results: list[CellResult] = []
    chance = Random(run.seed)
    with tempfile.TemporaryDirectory(prefix="pilotflame-faults-") as folder:
        for stage, open_system in STAGE_SYSTEMS.items():
            cells = [cell for cell in run.cells if cell.stage is stage]
            if not cells:
                continue
            own = Path(tempfile.mkdtemp(dir=folder))
            async with open_system(own, run.without) as system:
                for cell in cells:
                    view.begin(cell)
                    results.append(await strike_cell(cell, system, Random(chance.random()), run.per_second))
                    view.add(results[-1])
    return results


async def strike_cell(cell: FaultCell, system: FaultySystem, chance: Random, per_second: float) -> CellResult:
    """Perform one fault under load, and judge the promises after it."""
    began_at = time.monotonic()
    result = CellResult(cell.row, cell.column)
    system.deployment.faults.clear()
    async with ledger.run_ledger() as effects:
        effects.delay_seconds = NODE_SECONDS
        system.ledger = effects
        client = fault_load.open_client(system.deployment.url)
        try:
            workflows = await fault_load.create_workflows(client, effects)
            load = FaultLoad(client, workflows, chance, per_second)
            with effects.refusing("decline"):
                over_at = await _strike_under_load(cell, system, load, result)
            if not await is_lively(client):
                result.breaches["P5"].append("a fresh execution does not end")
            measured_from = over_at if cell.recovery_bound is None else system.struck_at
            await promise_checks.judge(result, load, effects, system.deployment, measured_from, cell)
        finally:
            await client.close()
    result.seconds = time.monotonic() - began_at
    return result


async def _strike_under_load(
    cell: FaultCell, system: FaultySystem, load: FaultLoad, result: CellResult
) -> float:
    """Send the load, perform the fault and wait for all ends; return the Unix time at which the fault was over."""
    sending = asyncio.create_task(load.run())
    try:
        await asyncio.sleep(WARM_UP_SECONDS)
        system.struck_at = time.time()
        await cell.strike(system)
        over_at = time.time()
        await system.deployment.revive(RESTART_SECONDS)
        await asyncio.sleep(AFTER_SECONDS)
    except TimeoutError as error:
        over_at = time.time()
        result.breaches["P5"].append(str(error))
    finally:
        load.stop()
        await sending
        await load.drain(PATIENCE_SECONDS)
    return over_at


async def is_lively(client: RetryingClient) -> bool:
    """Return whether a fresh execution completes."""
    workflow = await client.create(workflow_shapes.chain_workflow(workflow_shapes.set_node("done")))
    try:
        return (await client.end(await client.execute(workflow), LIVELY_SECONDS)).status == "completed"
    except TimeoutError:
        return False


@asynccontextmanager
async def open_many(folder: Path, without: str | None) -> AsyncIterator[FaultySystem]:
    """Run gateway, two workers and a scheduler on PostgreSQL and Redis of their own."""
    disk = _open_disk(folder / "postgres-disk")
    with (
        services.run_postgres(services.DURABLE, disk.environment) as postgres,
        services.run_redis() as redis,
    ):
        clocks = {name: _open_clock(folder / f"{name}.clock", without) for name in PROCESS_NAMES}
        async with harness.run_many_processes(folder, postgres, redis, clocks, **SETTINGS) as deployment:
            yield FaultySystem(deployment, clocks, disk, redis.folder)


@asynccontextmanager
async def open_dev(folder: Path, without: str | None) -> AsyncIterator[FaultySystem]:
    """Run `pilotflame dev` on SQLite."""
    disk = _open_disk(folder / "dev-disk")
    clock = _open_clock(folder / "dev.clock", without)
    libraries = f"{clock.environment['LD_PRELOAD']}:{disk.environment['LD_PRELOAD']}"
    preload = {**clock.environment, **disk.environment, "LD_PRELOAD": libraries}
    async with harness.run_one_process(folder, preload, **SETTINGS) as deployment:
        yield FaultySystem(deployment, {"dev": clock}, disk)


@asynccontextmanager
async def open_many_upgraded(folder: Path, _without: str | None) -> AsyncIterator[FaultySystem]:
    """Run the previous version of all processes, on its own tables."""
    code = upgrades.extract(upgrades.find_previous(), folder)
    clocks = {name: DamagedClock(_compile(SHIFTED_CLOCK), folder / name, code=code) for name in PROCESS_NAMES}
    for clock in clocks.values():
        clock.set(0)
    with services.run_postgres(services.DURABLE) as postgres, services.run_redis() as redis:
        async with harness.run_many_processes(
            folder, postgres, redis, clocks, partial(upgrades.migrate_with, code), **SETTINGS
        ) as deployment:
            yield FaultySystem(deployment, clocks, _open_disk(folder / "disk"), previous=code)


@asynccontextmanager
async def open_dev_upgraded(folder: Path, _without: str | None) -> AsyncIterator[FaultySystem]:
    """Run the previous version of `pilotflame dev`, on its own tables."""
    code = upgrades.extract(upgrades.find_previous(), folder)
    clock = DamagedClock(_compile(SHIFTED_CLOCK), folder / "clock", code=code)
    clock.set(0)
    async with harness.run_one_process(
        folder, clock.environment, partial(upgrades.migrate_with, code), **SETTINGS
    ) as deployment:
        yield FaultySystem(deployment, {"dev": clock}, _open_disk(folder / "disk"), previous=code)


STAGE_SYSTEMS: Final[
    Mapping[Stage, Callable[[Path, str | None], AbstractAsyncContextManager[FaultySystem]]]
] = {
    Stage.MANY: open_many,
    Stage.DEV: open_dev,
    Stage.MANY_UPGRADED: open_many_upgraded,
    Stage.DEV_UPGRADED: open_dev_upgraded,
}


def _open_clock(file: Path, without: str | None) -> ShiftedClock:
    clock = DamagedClock(_compile(SHIFTED_CLOCK), file, without)
    clock.set(0)
    return clock


def _open_disk(file: Path) -> FaultyDisk:
    disk = FaultyDisk(_compile(preloads.FAULTY_DISK), file)
    disk.mend()
    file.chmod(0o644)
    for folder in list(file.parents)[:2]:
        folder.chmod(0o755)  # PostgreSQL has a user of its own
    return disk


def _compile(source: Path) -> Path:
    library = preloads.compile_library(source)
    if library is None:
        raise CompilerMissing(CompilerMissing.__doc__)
    library.parent.chmod(0o755)
    return library
