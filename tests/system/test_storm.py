import pytest

from tests.system import storm
from tests.system.client import RetryingClient
from tests.system.harness import RECOVERY_SECONDS, SystemUnderTest, on_many_processes, on_one_process
from tests.system.ledger import EffectLedger
from tests.system.storm import StormPlan

LONGEST_RUN_SECONDS = 30.0
"""Duration of a run of the storm without faults, its wait included, on a busy machine."""
FEW = 3
"""Runs that may end as crashed because several faults in a row hit them without progress in between."""


@on_many_processes
@pytest.mark.timeout(600)
async def test_many_runs_end_once_each_though_every_part_fails_meanwhile(
    deployment: SystemUnderTest, client: RetryingClient, ledger: EffectLedger, *, is_thorough: bool
) -> None:
    plan = StormPlan(runs=200 if is_thorough else 80, seconds=12, seed=7)
    report = await storm.run_storm(plan, deployment, client, ledger)
    assert report.calm_seconds < LONGEST_RUN_SECONDS + RECOVERY_SECONDS, report
    assert report.crashed <= FEW, report


@on_one_process
async def test_many_runs_end_once_each_though_their_only_process_fails_again_and_again(
    deployment: SystemUnderTest, client: RetryingClient, ledger: EffectLedger, *, is_thorough: bool
) -> None:
    plan = StormPlan(runs=100 if is_thorough else 40, seconds=6, seed=11)
    report = await storm.run_storm(plan, deployment, client, ledger)
    assert report.calm_seconds < LONGEST_RUN_SECONDS + RECOVERY_SECONDS, report
    assert report.crashed <= FEW, report
