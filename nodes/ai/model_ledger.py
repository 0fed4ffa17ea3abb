"""Ledger of calls of language models: their maximum cost is reserved before each call, the real one settled after."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from engine.model_calls import FailedModelCall, ModelReservation, ModelSettlement
    from engine.services import RunCaller


class ModelLedger(Protocol):
    """Ledger of the calls of an organization."""

    async def reserve(self, caller: RunCaller, reservation: ModelReservation) -> bool:
        """Reserve the highest possible cost of a call, durably, in the budgets of its node, its run and the month;
        again with the same key, nothing more is reserved.

        Returns False if no budget counts the call, so that nothing is stored; True if one does, or that is unknown.
        While the database is unavailable, it waits, or raises a retryable `NodeError`. Raises `NodeError`
        `model-budget-exceeded` if that of a node or run doesn't suffice, `month-budget-exceeded` if that of the
        organization doesn't, with the seconds for which the run waits if it is to wait, and `model-price-unknown` if a
        budget limits the cost and the price is unknown.
        """

    async def settle(self, caller: RunCaller, settlement: ModelSettlement, *, is_reserved: bool) -> None:
        """Replace the reservation of a call with the real cost, and add that to the costs of the month.

        A second settlement with the same key changes nothing. Without a reservation (not `is_reserved`), the cost may
        be stored later. If the database is unavailable, the reservation stays, and nothing is raised.
        """

    async def release(self, caller: RunCaller, key: str) -> None:
        """Remove the reservation `key` of a call that costs nothing, since the provider has refused it.

        A settled or missing one is ignored. If the database is unavailable, it stays, and nothing is raised.
        """

    async def count_failure(self, caller: RunCaller, failed: FailedModelCall) -> None:
        """Count a failed call in the metrics of its model; the count may be stored later.

        It is not counted while the database is unavailable, and nothing is raised then.
        """

    async def close(self) -> None:
        """Store the costs that are not stored yet."""
