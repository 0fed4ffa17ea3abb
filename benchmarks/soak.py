"""The storm of the system tests, minute after minute: `python -m benchmarks.soak --hours 1 [--one-process]`.

After each minute the doctor examines the stores, and must find nothing.
"""

from __future__ import annotations

import argparse
import asyncio
import tempfile
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path

from tests import services
from tests.system import harness, ledger, storm
from tests.system.client import RetryingClient
from tests.system.harness import SystemUnderTest
from tests.system.storm import StormPlan

STORM_SECONDS = 60
STRIKES_EVERY_SECONDS = 30
"""Within this time each kind of fault strikes."""


@dataclass(frozen=True, slots=True)
class SoakRequest:
    """Parsed command line."""

    minutes: int
    runs_per_second: int
    seed: int
    is_one_process: bool


def main() -> None:
    asyncio.run(_soak(_parse_request()))


async def _soak(request: SoakRequest) -> None:
    """Run one storm after another on the same deployment; stop at the first broken guarantee."""
    async with AsyncExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="pilotflame-soak-")))
        deployment = await _run_deployment(request, folder, stack)
        for minute in range(request.minutes):
            seed = request.seed + minute
            report = await _run_storm(request, seed, deployment)
            await _require_no_finding(deployment)
            print(
                f"minute {minute + 1}, seed {seed}: {report.ended.total()} runs ended once each",
                ", ".join(f"{count} {status}" for status, count in report.ended.most_common()),
                f"{report.repeated_effects} of {report.calls} calls repeated, all for a reason",
                f"longest {report.longest_seconds:.1f} s",
                "0 findings of the doctor",
                sep="; ",
                flush=True,
            )


async def _run_deployment(request: SoakRequest, folder: Path, stack: AsyncExitStack) -> SystemUnderTest:
    if request.is_one_process:
        return await stack.enter_async_context(harness.run_one_process(folder))
    postgres = stack.enter_context(services.run_postgres(services.DURABLE))
    redis = stack.enter_context(services.run_redis())
    return await stack.enter_async_context(harness.run_many_processes(folder, postgres, redis))


async def _run_storm(request: SoakRequest, seed: int, deployment: SystemUnderTest) -> storm.StormReport:
    one = StormPlan(
        runs=request.runs_per_second * STORM_SECONDS,
        seconds=STORM_SECONDS,
        seed=seed,
        rounds=STORM_SECONDS // STRIKES_EVERY_SECONDS,
    )
    client = RetryingClient(deployment.url)
    try:
        # A ledger for each, so that memory doesn't grow with the minutes.
        async with ledger.run_ledger() as effects:
            return await storm.run_storm(one, deployment, client, effects)
    finally:
        await client.close()


async def _require_no_finding(deployment: SystemUnderTest) -> None:
    """Raise AssertionError if `GET /admin/drift` finds anything, or could not look."""
    client = RetryingClient(deployment.url)
    try:
        report = (await client.answer("GET", "/admin/drift")).json()
        assert report["clean"], report
    finally:
        await client.close()


def _parse_request() -> SoakRequest:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.soak", description=__doc__)
    parser.add_argument("--minutes", type=int, default=10, help="default: %(default)s")
    parser.add_argument("--hours", type=float, help="in place of --minutes")
    parser.add_argument("--runs-per-second", type=int, default=25)
    parser.add_argument("--seed", type=int, default=1, help="of the first minute; each later one adds 1")
    parser.add_argument("--one-process", action="store_true", help="`pilotflame dev`, on SQLite")
    given = parser.parse_args()
    minutes = given.minutes if given.hours is None else round(given.hours * 60)
    return SoakRequest(minutes, given.runs_per_second, given.seed, given.one_process)


if __name__ == "__main__":
    main()
