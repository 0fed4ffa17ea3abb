"""Ledger of calls of models in memory."""

from __future__ import annotations

from engine.model_calls import FailedModelCall, ModelReservation, ModelSettlement
from engine.services import RunCaller


class MemoryLedger:
    """Ledger without budgets."""

    def __init__(self) -> None:
        self.reserved: dict[str, ModelReservation] = {}
        """Calls whose reservation stands."""
        self.settled: dict[str, ModelSettlement] = {}
        self.failed: list[FailedModelCall] = []

    async def reserve(self, _caller: RunCaller, reservation: ModelReservation) -> bool:
        self.reserved[reservation.key] = reservation
        return True

    async def settle(self, _caller: RunCaller, settlement: ModelSettlement, *, is_reserved: bool) -> None:
        assert is_reserved
        del self.reserved[settlement.key]
        self.settled[settlement.key] = settlement

    async def release(self, _caller: RunCaller, key: str) -> None:
        del self.reserved[key]

    async def count_failure(self, _caller: RunCaller, failed: FailedModelCall) -> None:
        self.failed.append(failed)

    async def close(self) -> None:
        """Do nothing: everything is stored."""
