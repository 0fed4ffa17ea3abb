"""Load and every fault at random, minute after minute: `python -m benchmarks soak --hours 1 [--one-process]`.

Each minute is a storm of the system tests. Its faults, those of the matrix (`benchmarks.faults`) and of the storm, are
dealt like cards, so that each kind comes again and again. The first three quarters of the time have processes of their
own on PostgreSQL and Redis, the last quarter has `pilotflame dev` on SQLite. After each minute `GET /admin/drift`
examines the stores and must find nothing, and so must `pilotflame doctor` at the end of each part. Exit code 1: an
execution was lost, doubled or stuck, or there is a finding; 2: the run could not be made.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Final

from benchmarks.faults import fault_cells, fault_run
from benchmarks.faults.fault_cells import LEASE_SECONDS, SWEEP_SECONDS
from benchmarks.faults.fault_run import CompilerMissing
from benchmarks.faults.faulty_system import FaultySystem, Stage
from tests.command_runs import COMMAND
from tests.system import ledger, storm
from tests.system.client import RetryingClient
from tests.system.storm import StormPlan, StormReport, StormStrike

if TYPE_CHECKING:
    from benchmarks.faults.faulty_system import FaultCell
    from tests.system.harness import SystemUnderTest

STORM_SECONDS: Final = 60
FAULTS_PER_STORM: Final = {Stage.MANY: 14, Stage.DEV: 4}
"""Faults of each minute: processes that are restarted take most of it on a busy machine."""
PAUSE_SECONDS: Final = LEASE_SECONDS + SWEEP_SECONDS + 1
STAGE_ENDS: Final = {Stage.MANY: 0.75, Stage.DEV: 1.0}
"""Deployments in their order, each with the share of the time after which it begins no further storm."""
SLOW_DISK: Final = ("disk", "slow")
SHOWN_LINES: Final = 30
RETRY_SECONDS: Final = 1.0
LONGEST_RETRY_SECONDS: Final = 10.0
"""Pauses before an unanswered request is repeated.

Faster clients keep this process from serving the links that a gateway needs for its start.
"""
API_KEY: Final = "sk-Vq7mZ0kXw3Lr9TbN"
SETTINGS: Final = {
    # Values that the doctor takes for generated ones; the server lives for the run alone.
    "BOOTSTRAP_API_KEY": API_KEY,
    "SECRET_KEY": "k3J9x-Qw7_zLm2Pv8RtYc1Bn5Dg4Hf6S",
}


@dataclass(frozen=True, slots=True)
class SoakRequest:
    """Parsed command line."""

    minutes: float
    runs_per_second: int
    seed: int
    is_one_process: bool


class FindingAfterLoad(Exception):
    """The doctor reported a finding, or could not check something; the text is its report."""


def main() -> None:
    try:
        asyncio.run(_soak(_parse_request()))
    except asyncio.CancelledError:
        sys.exit(2)
    except CompilerMissing as error:
        sys.stderr.write(f"{error}\n")
        sys.exit(2)


async def _soak(request: SoakRequest) -> None:
    """Run storms on each deployment in turn, for its share of the time; a broken guarantee raises."""
    soak = asyncio.current_task()
    assert soak is not None
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, soak.cancel)  # ends all that was started
    ends = {Stage.DEV: 1.0} if request.is_one_process else STAGE_ENDS
    reports: list[StormReport] = []
    began_at = time.monotonic()
    for stage, share in ends.items():
        reports += await _soak_stage(request, stage, began_at, share)
    print(_summarize(reports, (time.monotonic() - began_at) / 60), flush=True)


async def _soak_stage(request: SoakRequest, stage: Stage, began_at: float, share: float) -> list[StormReport]:
    """Run storms on one deployment until this share of the whole time since `began_at` is over; at least one.

    Raises `FindingAfterLoad` if the doctor reports a finding after a storm.
    """
    until = began_at + 60 * request.minutes * share
    reports: list[StormReport] = []
    async with AsyncExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="pilotflame-soak-")))
        opened = fault_run.open_dev if stage is Stage.DEV else fault_run.open_many
        system = await stack.enter_async_context(opened(folder, None, **SETTINGS))
        stack.push(partial(_show_logs, system.deployment))
        chance = Random(request.seed)
        faults = list_faults(system, stage, chance)
        deck = deal_endlessly(faults, chance)
        while not reports or time.monotonic() < until:
            seed = request.seed + len(reports)
            drawn = list(islice(deck, FAULTS_PER_STORM[stage]))
            reports.append(await _run_storm(request, seed, system, drawn))
            await _require_no_finding(system.deployment)
            minutes = (time.monotonic() - began_at) / 60
            print(
                _describe(reports[-1], f"minute {minutes:.0f} of {request.minutes:g}, seed {seed}"),
                flush=True,
            )
        await _require_clean(system.deployment)
        if never := {fault.name for fault in faults} - {*_count_strikes(reports)}:
            print(f"faults for which {stage} had no time: {', '.join(sorted(never))}", flush=True)
    return reports


def list_faults(system: FaultySystem, stage: Stage, chance: Random) -> list[StormStrike]:
    """Return the faults of the matrix that can strike a deployment, and those of a storm."""
    cells = [
        StormStrike(
            f"{cell.row} {cell.column}", partial(cell.strike, system), _part(cell, stage), cell.witness_shift
        )
        for cell in fault_cells.list_cells()
        # The disk of the processes is PostgreSQL's, and that has a row of its own for a full one.
        if cell.stage is stage or (stage is Stage.MANY and cell.place == SLOW_DISK)
    ]
    return [*cells, *storm.list_strikes(system.deployment, chance, PAUSE_SECONDS)]


def _part(cell: FaultCell, stage: Stage) -> str:
    """Return the name of the part that the fault strikes, which no other fault may strike at the same time."""
    return "PostgreSQL" if cell.place == SLOW_DISK and stage is Stage.MANY else cell.row


def deal_endlessly(faults: Sequence[StormStrike], chance: Random) -> Iterator[StormStrike]:
    """Yield all faults in random order, then again in another order, without end."""
    while True:
        yield from chance.sample(faults, k=len(faults))


def _describe(report: StormReport, heading: str) -> str:
    """Return the printed line about one storm."""
    return "; ".join(
        [
            heading,
            f"{report.ended.total()} runs ended once each",
            ", ".join(f"{count} {status}" for status, count in report.ended.most_common()),
            f"{report.repeated_effects} of {report.calls} calls repeated, all for a reason",
            f"longest {report.longest_seconds:.1f} s",
            f"{report.strikes.total()} faults ({_format_counts(report.strikes)})",
            "0 findings of the doctor",
        ]
    )


def _summarize(reports: Sequence[StormReport], minutes: float) -> str:
    """Return the last printed line, with the figures of all storms."""
    strikes = _count_strikes(reports)
    return "; ".join(
        [
            f"{minutes:.0f} minutes of load and faults",
            f"{sum(report.ended.total() for report in reports):,} runs ended once each",
            f"{sum(report.crashed for report in reports)} of them as crashed, by several faults in a row",
            f"{strikes.total():,} faults of {len(strikes)} kinds ({_format_counts(strikes)})",
            "pilotflame doctor: 0 findings",
        ]
    )


def _count_strikes(reports: Sequence[StormReport]) -> Counter[str]:
    return sum((report.strikes for report in reports), start=Counter())


def _format_counts(counts: Counter[str]) -> str:
    return ", ".join(f"{name} {count}" if count > 1 else name for name, count in sorted(counts.items()))


def _show_logs(deployment: SystemUnderTest, failure: type[BaseException] | None, *_: object) -> None:
    """Print the ends of all processes' logs if the block failed, before their folder is deleted."""
    if failure is None:
        return
    for process in deployment.processes:
        state = "lives" if process.is_alive else "has ended"
        print(f"{process.name}, which {state}:", *process.log().splitlines()[-SHOWN_LINES:], sep="\n")


async def _run_storm(
    request: SoakRequest, seed: int, system: FaultySystem, faults: Sequence[StormStrike]
) -> StormReport:
    """Run a storm with these faults, and return its report."""
    plan = StormPlan(
        runs=request.runs_per_second * STORM_SECONDS, seconds=STORM_SECONDS, seed=seed, strikes=faults
    )
    system.deployment.faults.clear()  # those of earlier storms: nothing of theirs runs any more
    client = RetryingClient(system.deployment.url, key=API_KEY)
    client.retry_seconds, client.longest_retry_seconds = RETRY_SECONDS, LONGEST_RETRY_SECONDS
    try:
        # A ledger for each, so that memory doesn't grow with the minutes.
        async with ledger.run_ledger() as effects:
            system.ledger = effects
            return await storm.run_storm(plan, system.deployment, client, effects)
    finally:
        await client.close()


async def _require_no_finding(deployment: SystemUnderTest) -> None:
    """Raise `FindingAfterLoad` if `GET /admin/drift` reports a finding, or could not check something."""
    client = RetryingClient(deployment.url, key=API_KEY)
    try:
        report = (await client.answer("GET", "/admin/drift")).json()
        if not report["clean"]:
            raise FindingAfterLoad(json.dumps(report, indent=2))
    finally:
        await client.close()


async def _require_clean(deployment: SystemUnderTest) -> None:
    """Raise `FindingAfterLoad` unless `pilotflame doctor` exits with 0."""
    process = await asyncio.create_subprocess_exec(
        str(COMMAND),
        "doctor",
        env=deployment.gateway.environment,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    output, _ = await process.communicate()
    print(output.decode(), end="", flush=True)
    if process.returncode:
        raise FindingAfterLoad(f"pilotflame doctor exited with {process.returncode}")


def _parse_request() -> SoakRequest:
    parser = argparse.ArgumentParser(prog="python -m benchmarks soak", description=__doc__)
    parser.add_argument("--minutes", type=float, default=10, help="default: %(default)s")
    parser.add_argument("--hours", type=float, help="in place of --minutes")
    parser.add_argument("--runs-per-second", type=int, default=6, help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=1, help="of the first storm; each later one adds 1")
    parser.add_argument("--one-process", action="store_true", help="`pilotflame dev`, on SQLite")
    given = parser.parse_args()
    minutes = given.minutes if given.hours is None else given.hours * 60
    return SoakRequest(minutes, given.runs_per_second, given.seed, given.one_process)


if __name__ == "__main__":
    main()
