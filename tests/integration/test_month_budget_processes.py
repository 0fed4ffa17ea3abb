"""The budget of a month between processes: never passed, and kept by a call whose process was killed."""

from __future__ import annotations

import asyncio
import signal

import pytest

from engine.month_budget import MonthSpending, month_number
from engine.run_errors import NodeError
from engine.services import RunCaller
from execution import organization_budgets
from execution.stored_model_ledger import StoredModelLedger
from journal import run_deletion
from tests.forks import ForkedProcess
from tests.integration.run_database import MigratedDatabase, OwnedWorkflow, RunDatabase
from tests.integration.spends_month import CENT, spend_month
from tests.integration.test_model_ledger import (
    accept_run,
    call,
    migrated_database,
    owned_workflow,
    set_month_budget,
)

__all__ = ("migrated_database", "owned_workflow")  # fixtures

pytestmark = pytest.mark.anyio

PATIENCE_SECONDS = 120.0
BUDGET = 60 * CENT


async def read_spending(run_database: RunDatabase, caller: RunCaller) -> MonthSpending:
    """Return what the organization has spent and reserved in the present month."""
    month = month_number(run_database.database.clock.now())
    async with run_database.database.read() as connection:
        return await organization_budgets.read_spending(connection, caller.organization_id, month)


async def watch_spending(
    run_database: RunDatabase, caller: RunCaller, processes: list[ForkedProcess]
) -> list[int]:
    """Wait for the end of processes, and return all that was spent and reserved at any look meanwhile."""
    seen = []
    async with asyncio.timeout(PATIENCE_SECONDS):
        while any(process.poll() is None for process in processes):
            spending = await read_spending(run_database, caller)
            seen.append(spending.spent_cost + spending.reserved_cost)
            await asyncio.sleep(0.02)
    return seen


@pytest.mark.timeout(300)
async def test_two_processes_never_pass_the_budget_and_a_killed_one_keeps_its_reservation(
    run_database: RunDatabase, migrated_database: MigratedDatabase, owned_workflow: OwnedWorkflow
) -> None:
    first, second = [await accept_run(run_database, owned_workflow, None) for _ in range(2)]
    await set_month_budget(run_database, first, {"maxCost": "0.60"})
    doomed = ForkedProcess(spend_month, migrated_database.url, first, "doomed", 5)
    await watch_spending(run_database, first, [doomed])
    others = [ForkedProcess(spend_month, migrated_database.url, second, name, 0) for name in ("a", "b")]
    seen = await watch_spending(run_database, first, others)
    assert max(seen, default=0) <= BUDGET
    assert [process.poll() for process in (doomed, *others)] == [-signal.SIGKILL, 0, 0]
    spending = await read_spending(run_database, first)
    # One reservation of the killed process; the others have stopped since no further call of two cents fits.
    assert (spending.reserved_cost, spending.spent_cost) == (2 * CENT, 57 * CENT)
    charges = await run_database.query("SELECT sum(cost) AS cost, count(*) AS calls FROM model_charge")
    assert (charges[0]["cost"], charges[0]["calls"]) == (59 * CENT, 58)

    ledger = StoredModelLedger(run_database.database)
    with pytest.raises(NodeError) as refused:
        await ledger.reserve(second, call("later", 2 * CENT))
    assert refused.value.code == "month-budget-exceeded"
    await end_and_delete(run_database, first)
    assert (await read_spending(run_database, first)).reserved_cost == 0
    assert await ledger.reserve(second, call("later", 2 * CENT))


async def end_and_delete(run_database: RunDatabase, caller: RunCaller) -> None:
    """Delete a run, as its retention does, which alone ends the reservation of a killed process."""
    await run_database.query(
        "UPDATE execution SET status = 'failed', ended_at = 1, completion_action = NULL WHERE id = :id",
        id=caller.execution_id,
    )
    await run_deletion.delete_runs(run_database.database, [caller.execution_id])
