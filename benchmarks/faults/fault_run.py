"""Run of the matrix: deployments, and one cell after another."""

from __future__ import annotations

import asyncio
import os
import tempfile
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Final

from benchmarks.faults import fault_load, promise_checks, upgrades
from benchmarks.faults.fault_cells import LEASE_SECONDS, PROCESS_NAMES, SWEEP_SECONDS
from benchmarks.faults.fault_load import PATIENCE_SECONDS, FaultLoad
from benchmarks.faults.faulty_system import UPGRADED_STAGES, FaultySystem, PromiseBroken, Stage
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
WORTH_A_START: Final = 4
"""Cells for which a second deployment of the same kind is started."""
SETTINGS: Final = {"LEASE_SECONDS": f"{LEASE_SECONDS:g}", "SWEEP_SECONDS": f"{SWEEP_SECONDS:g}"}


class CompilerMissing(Exception):
    """The library for shifted clocks and faulty disks needs a C compiler: `apt-get install gcc libc6-dev`."""


@dataclass(frozen=True, slots=True)
class DamagedClock(ShiftedClock):
    """Clock of a process that may run without one mechanism, or with the code of another version."""

    without: str | None = None
    code: Path | None = None
    """Folder with the code of another version."""

    @property
    def environment(self) -> dict[str, str]:
        """Environment variables with which the process has this clock, damage and code."""
        shifted = ShiftedClock(self.library, self.file).environment
        if self.code is not None:
            return {**shifted, **upgrades.code_environment(self.code)}
        if self.without is None:
            return shifted
        paths = [str(MUTATIONS), *filter(None, [os.environ.get("PYTHONPATH")])]
        return {**shifted, "PYTHONPATH": os.pathsep.join(paths), "PILOTFLAME_FAULTS_WITHOUT": self.without}


@dataclass(frozen=True, slots=True)
class FaultRun:
    """Faults of a run and the load during each; `without` names a mechanism that is removed from the server."""

    cells: Sequence[FaultCell]
    seed: int
    per_second: float
    without: str | None = None


async def run_matrix(run: FaultRun, view: MatrixView) -> list[CellResult]:
    """Strike every cell, on two deployments side by side; return the results in the order of the cells.

    Raises `CompilerMissing` and `NoPreviousVersion` before anything is started.
    """
    _require_tools(run.cells)
    with tempfile.TemporaryDirectory(prefix="pilotflame-faults-") as folder:
        matrix = _RunningMatrix(run, view, Path(folder))
        async with asyncio.TaskGroup() as group:
            for stages in LINES:
                group.create_task(matrix.run_line(stages))
    places = [cell.place for cell in run.cells]
    return sorted(matrix.results, key=lambda result: places.index(result.place))


def _require_tools(cells: Sequence[FaultCell]) -> None:
    _compile(SHIFTED_CLOCK)
    _compile(preloads.FAULTY_DISK)
    if any(cell.stage in UPGRADED_STAGES for cell in cells):
        upgrades.find_previous()


class _RunningMatrix:
    """Faults that are still to be performed, and the results of the others."""

    def __init__(self, run: FaultRun, view: MatrixView, folder: Path) -> None:
        self.results: list[CellResult] = []
        self._run = run
        self._view = view
        self._folder = folder
        self._pending = {stage: deque(cell for cell in run.cells if cell.stage is stage) for stage in Stage}
        self._opened: set[Stage] = set()
        self._starting = asyncio.Lock()
        """Held while a deployment starts: Alembic migrates one database of a process at a time."""

    async def run_line(self, stages: Sequence[Stage]) -> None:
        """Start the deployment of each stage in turn, and perform the pending faults on it.

        A second deployment of a stage is started only if several of its faults are pending.
        """
        for stage in stages:
            cells = self._pending[stage]
            if len(cells) < (WORTH_A_START if stage in self._opened else 1):
                continue
            self._opened.add(stage)
            own = Path(tempfile.mkdtemp(dir=self._folder))
            async with AsyncExitStack() as stack:
                async with self._starting:
                    opened = STAGE_SYSTEMS[stage](own, self._run.without)
                    system = await stack.enter_async_context(opened)
                while cells:
                    await self._strike(cells.popleft(), system)

    async def _strike(self, cell: FaultCell, system: FaultySystem) -> None:
        self._view.begin(cell)
        chance = Random(f"{self._run.seed} {cell.row} {cell.column}")  # whichever line strikes it, and when
        self.results.append(await strike_cell(cell, system, chance, self._run.per_second))
        self._view.add(self.results[-1])


async def strike_cell(cell: FaultCell, system: FaultySystem, chance: Random, per_second: float) -> CellResult:
    """Perform one fault under load, and return the verdicts on the promises after it."""
    began_at = time.time()
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
            await promise_checks.judge(
                result, load, effects, system.deployment, began_at, measured_from, cell
            )
        finally:
            await client.close()
    result.seconds = time.time() - began_at
    return result


async def _strike_under_load(
    cell: FaultCell, system: FaultySystem, load: FaultLoad, result: CellResult
) -> float:
    """Send the load, perform the fault, and wait for all ends; return the Unix time of the end of the fault.

    A process that is not at work in time afterwards breaks promise P5.
    """
    system.load = load
    sending = asyncio.create_task(load.run())
    try:
        await asyncio.sleep(WARM_UP_SECONDS)
        system.struck_at = time.time()
        await cell.strike(system)
        over_at = time.time()
        await system.deployment.revive(RESTART_SECONDS)
        await asyncio.sleep(AFTER_SECONDS)
    except (PromiseBroken, TimeoutError) as error:
        over_at = time.time()
        result.breaches[getattr(error, "promise", "P5")].append(str(error))
    finally:
        load.stop()
        await sending
        await load.drain(PATIENCE_SECONDS)
    return over_at


async def is_lively(client: RetryingClient) -> bool:
    """Return whether a new execution completes within `LIVELY_SECONDS`."""
    workflow = await client.create(workflow_shapes.chain_workflow(workflow_shapes.set_node("done")))
    try:
        return (await client.end(await client.execute(workflow), LIVELY_SECONDS)).status == "completed"
    except TimeoutError:
        return False


@asynccontextmanager
async def open_many(folder: Path, without: str | None = None, **settings: str) -> AsyncIterator[FaultySystem]:
    """Run gateway, two workers and a scheduler on PostgreSQL and Redis of their own during the block.

    Raises `CompilerMissing`.
    """
    disk = _open_disk(folder / "postgres-disk")
    _share_with_postgres(disk.file)
    with (
        services.run_postgres(services.DURABLE, disk.environment) as postgres,
        services.run_redis() as redis,
    ):
        clocks = {name: _open_clock(folder / f"{name}.clock", without) for name in PROCESS_NAMES}
        async with harness.run_many_processes(
            folder, postgres, redis, clocks, **SETTINGS, **settings
        ) as deployment:
            yield FaultySystem(deployment, clocks, disk, redis.folder)


@asynccontextmanager
async def open_dev(folder: Path, without: str | None = None, **settings: str) -> AsyncIterator[FaultySystem]:
    """Run `pilotflame dev` on SQLite during the block. Raises `CompilerMissing`."""
    disk = _open_disk(folder / "dev-disk")
    clock = _open_clock(folder / "dev.clock", without)
    libraries = f"{clock.environment['LD_PRELOAD']}:{disk.environment['LD_PRELOAD']}"
    preload = {**clock.environment, **disk.environment, "LD_PRELOAD": libraries}
    async with harness.run_one_process(folder, preload, **SETTINGS, **settings) as deployment:
        yield FaultySystem(deployment, {"dev": clock}, disk)


@asynccontextmanager
async def open_many_upgraded(folder: Path, _without: str | None) -> AsyncIterator[FaultySystem]:
    """Run the previous version of all processes, on tables of that version, during the block."""
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
    """Run the previous version of `pilotflame dev`, on tables of that version, during the block."""
    code = upgrades.extract(upgrades.find_previous(), folder)
    clock = DamagedClock(_compile(SHIFTED_CLOCK), folder / "clock", code=code)
    clock.set(0)
    async with harness.run_one_process(
        folder, clock.environment, partial(upgrades.migrate_with, code), **SETTINGS
    ) as deployment:
        yield FaultySystem(deployment, {"dev": clock}, _open_disk(folder / "disk"), previous=code)


LINES: Final = ((Stage.MANY,), (Stage.DEV, Stage.DEV_UPGRADED, Stage.MANY_UPGRADED, Stage.MANY))
"""Deployments that run side by side, each line one after another. The second line helps the first at its end."""
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
    return disk


def _share_with_postgres(file: Path) -> None:
    """Let the operating system's user of PostgreSQL read a file."""
    file.chmod(0o644)
    for folder in list(file.parents)[:2]:
        folder.chmod(0o755)


def _compile(source: Path) -> Path:
    library = preloads.compile_library(source)
    if library is None:
        raise CompilerMissing(CompilerMissing.__doc__)
    library.parent.chmod(0o755)
    return library
