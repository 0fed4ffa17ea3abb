"""The storm of the system tests, again and again: `python -m benchmarks soak --hours 1 [--one-process]`.

After each storm of a minute `GET /admin/drift` examines the stores and must find nothing, and so must `pilotflame
doctor` at the end. Exit code 1: an execution was lost, doubled or stuck, or there is a finding.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import signal
import sys
import tempfile
import time
from contextlib import AsyncExitStack
from dataclasses import dataclass
from functools import partial
from itertools import count
from pathlib import Path
from typing import Final

from benchmarks.faults.fault_cells import LEASE_SECONDS, PROCESS_NAMES, SWEEP_SECONDS
from tests import preloads, services
from tests.command_runs import COMMAND
from tests.preloads import ShiftedClock
from tests.system import harness, ledger, storm
from tests.system.client import RetryingClient
from tests.system.harness import SystemUnderTest
from tests.system.storm import StormPlan

STORM_SECONDS: Final = 60
SHOWN_LINES: Final = 30
RETRY_SECONDS: Final = 1.0
"""Pause before an unanswered request is repeated.

Faster clients keep this process from serving the links that a gateway needs for its start.
"""
API_KEY: Final = "sk-Vq7mZ0kXw3Lr9TbN"
SETTINGS: Final = {
    # Values that the doctor takes for generated ones; the server lives for the run alone.
    "BOOTSTRAP_API_KEY": API_KEY,
    "SECRET_KEY": "k3J9x-Qw7_zLm2Pv8RtYc1Bn5Dg4Hf6S",
    "LEASE_SECONDS": f"{LEASE_SECONDS:g}",
    "SWEEP_SECONDS": f"{SWEEP_SECONDS:g}",
}


@dataclass(frozen=True, slots=True)
class SoakRequest:
    """Parsed command line."""

    minutes: int
    runs_per_second: int
    seed: int
    is_one_process: bool


class FindingAfterLoad(Exception):
    """The doctor found something, or could not look; the text is its report."""


def main() -> None:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(2))  # as for Ctrl-C: everything that was started ends
    asyncio.run(_soak(_parse_request()))


async def _soak(request: SoakRequest) -> None:
    """Run one storm after another on the same deployment; stop at the first broken guarantee."""
    began_at, ended = time.monotonic(), 0
    async with AsyncExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="pilotflame-soak-")))
        deployment = await _run_deployment(request, folder, stack)
        stack.push(partial(_show_logs, deployment))
        minutes = 0.0
        for seed in count(request.seed):
            report = await _run_storm(request, seed, deployment)
            ended += report.ended.total()
            await _require_no_finding(deployment)
            minutes = (time.monotonic() - began_at) / 60
            print(
                f"minute {minutes:.0f} of {request.minutes}, seed {seed}",
                f"{report.ended.total()} runs ended once each",
                ", ".join(f"{count} {status}" for status, count in report.ended.most_common()),
                f"{report.repeated_effects} of {report.calls} calls repeated, all for a reason",
                f"longest {report.longest_seconds:.1f} s",
                "0 findings of the doctor",
                sep="; ",
                flush=True,
            )
            if minutes >= request.minutes:
                break
        await _require_clean(deployment)
    print(
        f"{minutes:.0f} minutes of load and faults: {ended:,} runs ended once each; pilotflame doctor: 0 findings"
    )


def _show_logs(deployment: SystemUnderTest, failure: type[BaseException] | None, *_: object) -> None:
    """Print the ends of the logs of all processes after a failure, before their folder is deleted."""
    if failure is None:
        return
    for process in deployment.processes:
        state = "lives" if process.is_alive else "has ended"
        print(f"{process.name}, which {state}:", *process.log().splitlines()[-SHOWN_LINES:], sep="\n")


async def _run_deployment(request: SoakRequest, folder: Path, stack: AsyncExitStack) -> SystemUnderTest:
    if request.is_one_process:
        return await stack.enter_async_context(harness.run_one_process(folder, **SETTINGS))
    postgres = stack.enter_context(services.run_postgres(services.DURABLE))
    redis = stack.enter_context(services.run_redis())
    # With clocks that could be moved, each process is executed anew, as a supervisor does it, and not forked.
    library = preloads.compile_library(preloads.SHIFTED_CLOCK)
    clocks = (
        {name: ShiftedClock(library, folder / f"{name}.clock") for name in PROCESS_NAMES} if library else {}
    )
    for clock in clocks.values():
        clock.set(0)
    return await stack.enter_async_context(
        harness.run_many_processes(folder, postgres, redis, clocks, **SETTINGS)
    )


async def _run_storm(request: SoakRequest, seed: int, deployment: SystemUnderTest) -> storm.StormReport:
    one = StormPlan(
        runs=request.runs_per_second * STORM_SECONDS,
        seconds=STORM_SECONDS,
        seed=seed,
        pause_seconds=LEASE_SECONDS + SWEEP_SECONDS + 1,
    )
    client = RetryingClient(deployment.url, key=API_KEY)
    client.retry_seconds = RETRY_SECONDS
    try:
        # A ledger for each, so that memory doesn't grow with the minutes.
        async with ledger.run_ledger() as effects:
            return await storm.run_storm(one, deployment, client, effects)
    finally:
        await client.close()


async def _require_no_finding(deployment: SystemUnderTest) -> None:
    """Raise `FindingAfterLoad` if `GET /admin/drift` finds anything, or could not look."""
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
    parser.add_argument("--minutes", type=int, default=10, help="default: %(default)s")
    parser.add_argument("--hours", type=float, help="in place of --minutes")
    parser.add_argument("--runs-per-second", type=int, default=10, help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=1, help="of the first storm; each later one adds 1")
    parser.add_argument("--one-process", action="store_true", help="`pilotflame dev`, on SQLite")
    given = parser.parse_args()
    minutes = given.minutes if given.hours is None else round(given.hours * 60)
    return SoakRequest(minutes, given.runs_per_second, given.seed, given.one_process)


if __name__ == "__main__":
    main()
