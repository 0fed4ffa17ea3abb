"""Budgets of language models in both databases: reserved before each call, settled after it, and never passed."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from engine.model_calls import ModelBudget, ModelReservation, ModelSettlement, TokenUsage
from engine.run_errors import NodeError
from engine.services import RunCaller
from execution.stored_model_ledger import StoredModelLedger
from tests.integration.run_database import MigratedDatabase, OwnedWorkflow, RunDatabase

pytestmark = [pytest.mark.every_database, pytest.mark.anyio]

CENT = 10_000_000
"""Nano-dollars."""


@pytest.fixture(scope="module", params=["on_sqlite", "on_postgres"])
def migrated_database(request: pytest.FixtureRequest) -> MigratedDatabase:
    found: MigratedDatabase = request.getfixturevalue(request.param)
    return found


@pytest.fixture
async def owned_workflow(run_database: RunDatabase) -> OwnedWorkflow:
    return await run_database.workflow()


async def accept_run(
    run_database: RunDatabase,
    owned: OwnedWorkflow,
    budget: dict[str, Any] | None,
    root_id: str | None = None,
    parent_id: str | None = None,
) -> RunCaller:
    """Accept a run with a budget, in a sub-workflow of another one if a root is given, and of its parent if not of
    the root.
    """
    settings = {} if budget is None else {"aiBudget": budget}
    definition = {"nodes": [{"id": "start", "type": "manual"}], "connections": [], "settings": settings}
    key = await run_database.accept(owned, definition=json.dumps(definition))
    if root_id is not None:
        await run_database.query(
            "UPDATE execution SET root_id = :root, parent_id = :parent WHERE id = :id",
            root=root_id,
            parent=parent_id or root_id,
            id=key.execution_id,
        )
    organization = owned.organization.id
    workflow = (await run_database.row(key.execution_id))["workflow_id"]
    return RunCaller(organization, owned.user_id, workflow, key.execution_id, key.execution_id)


def call(
    key: str, cost: int | None, *, tokens: int = 100, node: str = "ask:", budget: ModelBudget | None = None
) -> ModelReservation:
    return ModelReservation(key, node, "model_1", tokens, cost, budget)


def answer(key: str, cost: int | None) -> ModelSettlement:
    return ModelSettlement(key, "ask:", "model_1", TokenUsage(40, 10), cost)


async def require_exceeded(ledger: StoredModelLedger, caller: RunCaller, refused: ModelReservation) -> str:
    with pytest.raises(NodeError) as failed:
        await ledger.reserve(caller, refused)
    assert (failed.value.code, failed.value.retryable) == ("model-budget-exceeded", False)
    return failed.value.message


async def test_a_reservation_counts_until_the_real_cost_replaces_it(
    run_database: RunDatabase, owned_workflow: OwnedWorkflow
) -> None:
    ledger = StoredModelLedger(run_database.database)
    caller = await accept_run(run_database, owned_workflow, {"maxCost": "0.10"})
    await ledger.reserve(caller, call("1", 6 * CENT))
    message = await require_exceeded(ledger, caller, call("2", 5 * CENT))
    assert message.endswith("the call may cost $0.05, and $0.06 of $0.10 are spent or reserved")
    await ledger.reserve(caller, call("1", 6 * CENT))
    await ledger.settle(caller, answer("1", 1 * CENT), is_reserved=True)
    await ledger.reserve(caller, call("2", 5 * CENT))
    await ledger.reserve(caller, call("3", 4 * CENT))
    await require_exceeded(ledger, caller, call("4", 1))
    await ledger.release(caller, "3")
    await ledger.release(caller, "1")
    await ledger.reserve(caller, call("4", 4 * CENT))


async def test_the_reservation_of_a_killed_process_stands(
    run_database: RunDatabase, owned_workflow: OwnedWorkflow
) -> None:
    caller = await accept_run(run_database, owned_workflow, {"maxTokens": 250})
    await StoredModelLedger(run_database.database).reserve(caller, call("exec:ask::0:1", None))
    # Another process continues the run with the next attempt; the first call may have been billed.
    successor = StoredModelLedger(run_database.database)
    await successor.reserve(caller, call("exec:ask::0:2", None))
    await successor.settle(caller, answer("exec:ask::0:2", None), is_reserved=True)
    await successor.reserve(caller, call("exec:ask::1:2", None))
    await require_exceeded(successor, caller, call("exec:ask::2:2", None, tokens=1))


async def test_concurrent_calls_never_pass_the_budget_of_their_run(
    run_database: RunDatabase, owned_workflow: OwnedWorkflow
) -> None:
    root = await accept_run(run_database, owned_workflow, {"maxCost": "0.05"})
    child = await accept_run(run_database, owned_workflow, {"maxCost": "100"}, root.execution_id)
    ledgers = [StoredModelLedger(run_database.database) for _ in range(2)]
    results = await asyncio.gather(
        *(
            ledgers[number % 2].reserve((root, child)[number % 2], call(str(number), 1 * CENT))
            for number in range(12)
        ),
        return_exceptions=True,
    )
    assert sum(result is True for result in results) == 5
    assert {getattr(result, "code", None) for result in results} == {None, "model-budget-exceeded"}


async def test_a_sub_workflow_keeps_its_own_budget_and_those_above_it(
    run_database: RunDatabase, owned_workflow: OwnedWorkflow
) -> None:
    ledger = StoredModelLedger(run_database.database)
    root = await accept_run(run_database, owned_workflow, {"maxCost": "0.05"})
    child = await accept_run(run_database, owned_workflow, {"maxCost": "0.03"}, root.execution_id)
    below = (root.execution_id, child.execution_id)
    grandchild = await accept_run(run_database, owned_workflow, None, *below)
    await ledger.reserve(grandchild, call("1", 2 * CENT))
    await ledger.reserve(child, call("2", 1 * CENT))
    message = await require_exceeded(ledger, grandchild, call("3", 1))
    assert f"The budget of the run {child.execution_id} " in message
    assert "The budget of the run doesn't" in await require_exceeded(ledger, child, call("4", 1))
    await ledger.reserve(root, call("5", 2 * CENT))
    await require_exceeded(ledger, root, call("6", 1))


async def test_a_node_has_a_budget_of_its_own(
    run_database: RunDatabase, owned_workflow: OwnedWorkflow
) -> None:
    ledger, budget = StoredModelLedger(run_database.database), ModelBudget("0.03", 1_000)
    caller = await accept_run(run_database, owned_workflow, None)
    await ledger.reserve(caller, call("1", 2 * CENT, budget=budget))
    assert "of the node" in await require_exceeded(ledger, caller, call("2", 2 * CENT, budget=budget))
    await ledger.reserve(caller, call("3", 2 * CENT, node="ask:1", budget=budget))
    with pytest.raises(NodeError) as failed:
        await ledger.reserve(caller, call("4", None, budget=budget))
    assert failed.value.code == "model-price-unknown"


async def set_month_budget(run_database: RunDatabase, caller: RunCaller, budget: dict[str, Any]) -> None:
    await run_database.query(
        "INSERT INTO ai_settings (organization_id, shard, month_budget, updated_at) VALUES (:id, 0, :budget, 0)"
        " ON CONFLICT (organization_id) DO UPDATE SET month_budget = excluded.month_budget",
        id=caller.organization_id,
        budget=json.dumps(budget),
    )


async def test_the_budget_of_a_month_is_shared_by_all_runs_and_processes_and_never_passed(
    run_database: RunDatabase, owned_workflow: OwnedWorkflow
) -> None:
    ledgers = [StoredModelLedger(run_database.database, is_deferring=True) for _ in range(2)]
    callers = [await accept_run(run_database, owned_workflow, None) for _ in range(4)]
    # Spent before the organization has a budget, and without a reservation.
    await ledgers[0].settle(callers[0], answer("0", 2 * CENT), is_reserved=False)
    await ledgers[0].close()
    await set_month_budget(run_database, callers[0], {"maxCost": "0.10"})

    async def ask(number: int) -> None:
        ledger, caller, key = ledgers[number % 2], callers[number % 4], f"call {number}"
        assert await ledger.reserve(caller, call(key, 2 * CENT))
        if number % 3:
            await ledger.settle(caller, answer(key, 2 * CENT), is_reserved=True)

    results = await asyncio.gather(*(ask(number) for number in range(16)), return_exceptions=True)
    codes = [getattr(result, "code", None) for result in results]
    assert (codes.count(None), codes.count("month-budget-exceeded")) == (4, 12)
    message = next(str(result) for result in results if result is not None)
    assert message.endswith("the call may cost $0.02, and $0.1 of $0.10 are spent or reserved")


async def test_the_budget_of_a_month_is_read_anew_for_each_call_and_may_let_runs_wait(
    run_database: RunDatabase, owned_workflow: OwnedWorkflow
) -> None:
    ledger = StoredModelLedger(run_database.database)
    caller = await accept_run(run_database, owned_workflow, None)
    await set_month_budget(run_database, caller, {"maxTokens": 150, "onLimit": "wait"})
    for _ in range(2):  # The answer to a commit may be lost.
        await ledger.reserve(caller, call("1", None))
    with pytest.raises(NodeError) as waiting:
        await ledger.reserve(caller, call("2", None))
    assert (waiting.value.code, waiting.value.retryable) == ("month-budget-exceeded", True)
    assert waiting.value.retry_after_seconds is not None
    await ledger.release(caller, "1")
    await ledger.reserve(caller, call("2", None))
    await set_month_budget(run_database, caller, {"maxTokens": 260, "maxCost": "1"})
    with pytest.raises(NodeError) as unpriced:
        await ledger.reserve(caller, call("3", None))
    assert unpriced.value.code == "model-price-unknown"
    await ledger.reserve(caller, call("3", CENT))
    with pytest.raises(NodeError) as refused:
        await ledger.reserve(caller, call("4", CENT))
    assert (refused.value.retryable, refused.value.retry_after_seconds) == (False, None)
    # A reservation of an earlier month counts there, also once its call is answered.
    await run_database.query("UPDATE model_charge SET month = 200001, created_at = 946684800000000")
    await ledger.settle(caller, answer("3", CENT), is_reserved=True)
    await ledger.reserve(caller, call("4", CENT, tokens=260))
    months = await run_database.query("SELECT month FROM model_cost")
    assert [row["month"] for row in months] == [200001]


async def test_the_costs_of_a_month_count_each_answer_once(
    run_database: RunDatabase, owned_workflow: OwnedWorkflow
) -> None:
    ledger = StoredModelLedger(run_database.database)
    caller = await accept_run(run_database, owned_workflow, {"maxCost": "1"})
    await ledger.reserve(caller, call("1", 5 * CENT))
    for key, cost in (("1", 2 * CENT), ("1", 2 * CENT), ("2", 1 * CENT), ("3", None)):
        await ledger.settle(caller, answer(key, cost), is_reserved=True)
    (row,) = await run_database.query(
        "SELECT * FROM model_cost WHERE workflow_id = :id", id=caller.workflow_id
    )
    assert (row["organization_id"], row["model_id"]) == (caller.organization_id, "model_1")
    assert (row["calls"], row["unpriced_calls"], row["cost"]) == (3, 1, 3 * CENT)
    assert (row["input_tokens"], row["output_tokens"]) == (120, 30)


async def test_costs_that_no_budget_counts_are_stored_together_and_once(
    run_database: RunDatabase, owned_workflow: OwnedWorkflow, monkeypatch: pytest.MonkeyPatch
) -> None:
    ledger = StoredModelLedger(run_database.database, is_deferring=True)
    caller = await accept_run(run_database, owned_workflow, None)
    free, limited = call("1", 5 * CENT), call("2", 5 * CENT, budget=ModelBudget("1"))
    assert [await ledger.reserve(caller, each) for each in (free, limited)] == [False, True]
    stored, transaction = [], run_database.database.transaction

    async def count(work: Any, *given: Any, **named: Any) -> Any:  # noqa: ANN401 - as the method has them
        stored.append(work)
        return await transaction(work, *given, **named)

    monkeypatch.setattr(run_database.database, "transaction", count)
    await ledger.settle(caller, answer("2", 2 * CENT), is_reserved=True)
    assert len(stored) == 1
    query = "SELECT calls, cost FROM model_cost WHERE workflow_id = :id"
    (at_once,) = await run_database.query(query, id=caller.workflow_id)
    assert (at_once["calls"], at_once["cost"]) == (1, 2 * CENT)
    for key in ("1", "1", "3", "4"):
        await ledger.settle(caller, answer(key, 1 * CENT), is_reserved=False)
    await ledger.close()
    (in_all,) = await run_database.query(query, id=caller.workflow_id)
    assert (in_all["calls"], in_all["cost"]) == (4, 5 * CENT)
