"""Ledger of calls of language models in the database, with the budgets of nodes, runs and months."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import datetime
from decimal import Decimal
from typing import TYPE_CHECKING, Any, Final, TypeAlias

import msgspec
import structlog
from msgspec import Struct
from sqlalchemy import and_, delete, func, select
from sqlalchemy.dialects import postgresql, sqlite
from sqlmodel import col

from concurrency.ttl_cache import TTLCache
from engine.model_calls import ModelBudget
from engine.model_prices import show_cost
from engine.month_budget import month_number
from engine.run_errors import NodeError
from execution import organization_budgets
from execution.deferred_writes import DeferredWrites
from execution.model_hours import SUM_COLUMNS, ModelHourCounts, count_settlement
from execution.retry import until_available
from journal.concurrency_limits import advisory_lock_id
from json_text import decoding
from models import ids
from models.errors import DatabaseUnavailable
from models.execution import Execution
from models.model_spending import ModelCharge, ModelCost
from models.workflow import Definition

if TYPE_CHECKING:
    from sqlalchemy import ColumnElement
    from sqlalchemy.ext.asyncio import AsyncConnection

    from engine.model_calls import FailedModelCall, ModelReservation, ModelSettlement
    from engine.services import RunCaller
    from models.database import Database

log = structlog.get_logger()

_MonthRow: TypeAlias = "tuple[str, int, str, str]"
"""Organization, number of the month, workflow and model."""

MAX_CACHED_BUDGETS: Final = 1_000
CACHE_SECONDS: Final = 3_600.0
"""A run keeps its settings, so its budget never changes."""
MONTH_SECONDS: Final = 1.0
"""Time after which a process notices that an organization has got a budget, or has none any more."""


class RunBudgets(Struct, frozen=True):
    """Budgets of a run and of the runs above it, which count the calls of their sub-workflows too."""

    root_id: str
    budgets: Mapping[str, ModelBudget]
    """By execution id, only of runs with a budget."""


class _SettledCall(Struct, frozen=True):
    """Answered call with its charge."""

    caller: RunCaller
    settlement: ModelSettlement
    charge: Mapping[str, Any]


class _UnansweredCall(Struct, frozen=True):
    """Call without an answer, and the time of its failure."""

    organization_id: str
    failed: FailedModelCall
    ended_at: datetime


class StoredModelLedger:
    """Ledger of calls of language models in the database; implements `nodes.ai.model_ledger.ModelLedger`."""

    def __init__(self, database: Database, *, is_deferring: bool = False) -> None:
        """With `is_deferring`, costs that no budget counts are stored together about once a second."""
        self._database = database
        self._deferred = DeferredWrites(self._store_calls) if is_deferring else None
        self._budgets: TTLCache[str, RunBudgets] = TTLCache(CACHE_SECONDS, MAX_CACHED_BUDGETS)
        self._has_month: TTLCache[str, bool] = TTLCache(MONTH_SECONDS, MAX_CACHED_BUDGETS)
        """Whether organizations have a budget of the month."""

    async def reserve(self, caller: RunCaller, reservation: ModelReservation) -> bool:
        """Reserve the most that a call may cost, in one transaction that counts all charges of the budgets; again with
        the same key, nothing more is reserved.

        Returns whether a budget counts the call; without one, nothing is stored. Calls of one run reserve one after
        another, and so do those of an organization with a budget of the month. Waits while the database is unavailable.
        Raises `NodeError`: `model-budget-exceeded`, `month-budget-exceeded` (retryable if that budget says to wait),
        and `model-price-unknown` if a budget limits the cost.
        """
        run = await until_available(lambda: self._find_run_budgets(caller))
        has_month = await until_available(lambda: self._has_month_budget(caller.organization_id))
        budgets = [*run.budgets.values(), *([] if reservation.budget is None else [reservation.budget])]
        if not budgets and not has_month:
            return False
        if reservation.cost is None and any(budget.max_cost is not None for budget in budgets):
            message = f"{reservation.model_id}: a budget with maxCost needs the price of the model"
            raise NodeError(message, code="model-price-unknown")

        async def work(connection: AsyncConnection) -> None:
            if budgets and connection.dialect.name == "postgresql":
                # A statement of its own, so that the next one sees the commit of the previous holder.
                lock = advisory_lock_id(f"model budget {run.root_id}")
                await connection.execute(select(func.pg_advisory_xact_lock(lock)))
            others = col(ModelCharge.key) != reservation.key
            of_root = (col(ModelCharge.root_id) == run.root_id, others)
            of_node = (
                col(ModelCharge.execution_id) == caller.execution_id,
                col(ModelCharge.node) == reservation.node,
                others,
            )
            await _require_rest(connection, reservation, "node", reservation.budget, of_node)
            for execution_id, budget in run.budgets.items():
                owner = "run" if execution_id == caller.execution_id else f"run {execution_id}"
                charges: tuple[ColumnElement[bool], ...] = of_root
                if execution_id != run.root_id:
                    charges += (_is_of_run_or_below(execution_id, run.root_id),)
                await _require_rest(connection, reservation, owner, budget, charges)
            charge = self._build_charge(caller, run, reservation.key, reservation.node)
            if has_month:
                # The last lock, since all calls of the organization wait for it until the commit.
                await organization_budgets.require_rest(
                    connection, caller.organization_id, reservation, charge["created_at"]
                )
            charge |= {"tokens": reservation.tokens, "cost": reservation.cost, "is_settled": False}
            await connection.execute(_insert(connection, ModelCharge).values(charge).on_conflict_do_nothing())

        locks = f"model budget {caller.organization_id if has_month else run.root_id}"
        await until_available(lambda: self._database.transaction(work, locks=locks))
        return True

    async def settle(self, caller: RunCaller, settlement: ModelSettlement, *, is_reserved: bool) -> None:
        """Replace a reservation with the real cost, and add it to the month, in one transaction.

        A charge that is settled already stays. If the database is unavailable, the reservation stays, which costs at
        least as much: the answer is worth more than the exact sum. A call without a reservation (`is_reserved` False)
        counts in no budget, so that its cost may be stored later, with those of others.
        """
        try:
            run = await self._find_run_budgets(caller)
            charge = self._build_charge(caller, run, settlement.key, settlement.node)
            settled = _SettledCall(caller, settlement, charge)
            if self._deferred is not None and not is_reserved:
                self._deferred.add(settled)
            else:
                await self._store_calls([settled])
        except DatabaseUnavailable as error:
            log.warning("model charge not settled", execution_id=caller.execution_id, error=str(error))

    async def count_failure(self, caller: RunCaller, failed: FailedModelCall) -> None:
        """Count a call without an answer in the hour of its model; not while the database is unavailable.

        A batch whose commit is not confirmed may count twice: the metrics of a model are no bill.
        """
        call = _UnansweredCall(caller.organization_id, failed, self._database.clock.now())
        if self._deferred is not None:
            self._deferred.add(call)
            return
        with suppress(DatabaseUnavailable):
            await self._store_calls([call])

    async def close(self) -> None:
        """Store the costs that wait."""
        if self._deferred is not None:
            await self._deferred.close()

    async def _store_calls(self, calls: Sequence[_SettledCall | _UnansweredCall]) -> None:
        """Store the costs of answered calls, and count all, in one transaction; raises `DatabaseUnavailable`."""
        # One order for all processes: each holds the locks of its months and hours until its commit.
        ordered = sorted((call for call in calls if isinstance(call, _SettledCall)), key=_find_month_row)

        async def work(connection: AsyncConnection) -> None:
            months: dict[_MonthRow, Counter[str]] = {}
            hours = ModelHourCounts()
            for call in calls:
                if isinstance(call, _UnansweredCall):
                    hours.add_failure(call.organization_id, call.failed, call.ended_at)
            for each, created_at in await _settle(connection, ordered):
                # That of the reservation, whose budget has admitted the call.
                row = (each.caller.organization_id, month_number(created_at), *_find_month_row(each)[1:])
                months.setdefault(row, Counter()).update(count_settlement(each.settlement))
                hours.add_answer(row[0], each.settlement, each.charge["created_at"])
            await _add_to_months(connection, months)
            await hours.store(connection)

        await self._database.transaction(work)

    async def release(self, caller: RunCaller, key: str) -> None:
        """Remove the reservation of the call with this key in the caller's run; a settled charge stays, and so does a
        reservation while the database is unavailable.
        """
        statement = delete(ModelCharge).where(
            col(ModelCharge.execution_id) == caller.execution_id,
            col(ModelCharge.key) == key,
            col(ModelCharge.is_settled).is_(False),
        )

        async def work(connection: AsyncConnection) -> None:
            await connection.execute(statement)

        try:
            await self._database.transaction(work)
        except DatabaseUnavailable as error:
            log.warning("model charge not released", execution_id=caller.execution_id, error=str(error))

    def _build_charge(self, caller: RunCaller, run: RunBudgets, key: str, node: str) -> dict[str, Any]:
        """Return the columns of a charge but its amounts."""
        now = self._database.clock.now()
        return {
            "execution_id": caller.execution_id,
            "key": key,
            "shard": ids.shard_of(caller.organization_id),
            "root_id": run.root_id,
            "node": node,
            "organization_id": caller.organization_id,
            "month": month_number(now),
            "created_at": now,
        }

    async def _has_month_budget(self, organization_id: str) -> bool:
        """Return whether an organization has a budget of the month, cached for `MONTH_SECONDS`; raises
        `DatabaseUnavailable`.
        """
        found = self._has_month.get(organization_id)
        if found is None:
            async with self._database.read() as connection:
                found = await organization_budgets.find(connection, organization_id) is not None
            self._has_month.put(organization_id, found)
        return found

    async def _find_run_budgets(self, caller: RunCaller) -> RunBudgets:
        """Return the budgets of a run and of the runs above it, by the settings in their definition snapshots.

        Raises `DatabaseUnavailable`.
        """
        found = self._budgets.get(caller.execution_id)
        if found is not None:
            return found
        columns = (
            *(col(Execution.id), col(Execution.parent_id), col(Execution.root_id)),
            *(col(Execution.organization_id), col(Execution.definition_hash)),
        )
        run = select(*columns).where(col(Execution.id) == caller.execution_id).cte("line", recursive=True)
        line = run.union(select(*columns).join(run, col(Execution.id) == run.c.parent_id))
        statement = select(line.c.id, line.c.root_id, col(Definition.body)).join(
            Definition,
            and_(
                col(Definition.hash) == line.c.definition_hash,
                col(Definition.organization_id) == line.c.organization_id,
            ),
            isouter=True,
        )
        async with self._database.read() as connection:
            rows = (await connection.execute(statement)).all()
        roots = [row.root_id for row in rows if row.id == caller.execution_id and row.root_id is not None]
        read = {row.id: _read_budget(row.body) for row in rows}
        budgets = {execution_id: budget for execution_id, budget in read.items() if budget is not None}
        result = RunBudgets(roots[0] if roots else caller.execution_id, budgets)
        self._budgets.put(caller.execution_id, result)
        return result


def _is_of_run_or_below(execution_id: str, root_id: str) -> ColumnElement[bool]:
    """Return the SQL condition for the charges of a run and of all runs below it; `root_id` is the first run
    of its tree.
    """
    run = select(col(Execution.id)).where(col(Execution.id) == execution_id).cte("below", recursive=True)
    children = select(col(Execution.id)).join(run, col(Execution.parent_id) == run.c.id)
    below = run.union(children.where(col(Execution.root_id) == root_id))
    return col(ModelCharge.execution_id).in_(select(below.c.id))


def _read_budget(body: str | None) -> ModelBudget | None:
    """Return the budget in the settings of a definition; None without one."""
    definition = {} if body is None else decoding.decode(body)
    settings = definition.get("settings") if isinstance(definition, dict) else None
    stored = settings.get("aiBudget") if isinstance(settings, dict) else None
    return msgspec.convert(stored, ModelBudget) if isinstance(stored, Mapping) else None


async def _require_rest(
    connection: AsyncConnection,
    reservation: ModelReservation,
    owner: str,
    budget: ModelBudget | None,
    charges: tuple[ColumnElement[bool], ...],
) -> None:
    """Raise a `NodeError` unless a budget suffices for a call beside the reserved and settled charges that satisfy
    `charges`.

    Without a budget (None) every call passes. `owner` names the budget's owner in the error.
    """
    if budget is None:
        return
    tokens = func.sum(col(ModelCharge.tokens))
    cost = func.sum(col(ModelCharge.cost))
    sums = (await connection.execute(select(tokens, cost).where(*charges))).one()
    spent_tokens, spent_cost = (int(amount or 0) for amount in sums)
    problem = ""
    if budget.max_tokens is not None and spent_tokens + reservation.tokens > budget.max_tokens:
        problem = (
            f"the call may need {reservation.tokens:,} tokens, and {spent_tokens:,} of {budget.max_tokens:,}"
        )
    if budget.max_cost is not None and reservation.cost is not None:
        limit = int(Decimal(budget.max_cost).scaleb(9))
        if spent_cost + reservation.cost > limit:
            may, spent = show_cost(reservation.cost), show_cost(spent_cost)
            problem = f"the call may cost ${may}, and ${spent} of ${budget.max_cost}"
    if problem:
        message = f"The budget of the {owner} doesn't suffice: {problem} are spent or reserved"
        raise NodeError(message, code="model-budget-exceeded")


async def _settle(
    connection: AsyncConnection, calls: Sequence[_SettledCall]
) -> Sequence[tuple[_SettledCall, datetime]]:
    """Settle the charges of calls in one statement, which inserts missing ones; return the calls that were not settled
    before, each with the time of its charge.
    """
    by_key: dict[tuple[str, str], _SettledCall] = {}
    for call in calls:
        by_key.setdefault((call.caller.execution_id, call.settlement.key), call)
    if not by_key:
        return ()
    statement = _insert(connection, ModelCharge)
    statement = statement.on_conflict_do_update(
        index_elements=["execution_id", "key"],
        set_={name: statement.excluded[name] for name in ("tokens", "cost", "is_settled")},
        where=col(ModelCharge.is_settled).is_(False),
    ).returning(col(ModelCharge.execution_id), col(ModelCharge.key), col(ModelCharge.created_at))
    rows = [_build_settled_charge(call) for call in by_key.values()]
    settled = (await connection.execute(statement, rows)).all()
    return [(by_key[row.execution_id, row.key], row.created_at) for row in settled]


def _build_settled_charge(call: _SettledCall) -> dict[str, Any]:
    """Return the columns of a charge with the amounts of an answered call."""
    usage = call.settlement.usage
    tokens = usage.input_tokens + usage.output_tokens
    return {**call.charge, "tokens": tokens, "cost": call.settlement.cost, "is_settled": True}


def _find_month_row(call: _SettledCall) -> tuple[str, str, str]:
    return call.caller.organization_id, call.caller.workflow_id, call.settlement.model_id


async def _add_to_months(connection: AsyncConnection, months: Mapping[_MonthRow, Mapping[str, int]]) -> None:
    """Add settled calls to the sums of their months in one statement, in the order of the rows."""
    if not months:
        return
    columns = ModelCost.__table__.c  # type: ignore[attr-defined]  # SQLModel doesn't declare it
    statement = _insert(connection, ModelCost)
    rows = [
        {
            "organization_id": organization_id,
            "month": month,
            "workflow_id": workflow_id,
            "model_id": model_id,
            "shard": ids.shard_of(organization_id),
            **{name: sums[name] for name in SUM_COLUMNS},
        }
        for (organization_id, month, workflow_id, model_id), sums in sorted(months.items())
    ]
    await connection.execute(
        statement.on_conflict_do_update(
            index_elements=["organization_id", "month", "workflow_id", "model_id"],
            set_={name: columns[name] + statement.excluded[name] for name in SUM_COLUMNS},
        ),
        rows,
    )


def _insert(connection: AsyncConnection, table: type[Any]) -> Any:  # noqa: ANN401 - of the dialect
    insert = postgresql.insert if connection.dialect.name == "postgresql" else sqlite.insert
    return insert(table)
