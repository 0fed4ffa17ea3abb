"""A process that calls models under the budget of a month until no call fits, or is killed within a call."""

from __future__ import annotations

import asyncio
import os
import signal

from engine.model_calls import ModelReservation, ModelSettlement, TokenUsage
from engine.run_errors import NodeError
from engine.services import RunCaller
from execution.stored_model_ledger import StoredModelLedger
from models.database import Database, parse_url

CENT = 10_000_000
"""Nano-dollars."""


def spend_month(url: str, caller: RunCaller, name: str, killed_in: int) -> None:
    """Reserve two cents and settle one for each call until the budget refuses one.

    The process kills itself within call `killed_in`, which is then reserved; 0 never.
    """
    asyncio.run(_spend_month(url, caller, name, killed_in))


async def _spend_month(url: str, caller: RunCaller, name: str, killed_in: int) -> None:
    """Reserve and settle calls until the month's budget is exhausted; die by SIGKILL within call number `killed_in`."""
    ledger = StoredModelLedger(Database(parse_url(url)), is_deferring=True)
    number = 0
    while True:
        number += 1
        key = f"{name} {number}"
        try:
            await ledger.reserve(caller, ModelReservation(key, "ask:", "model_1", 100, 2 * CENT, None))
        except NodeError as error:
            if error.code != "month-budget-exceeded":
                raise
            return
        if number == killed_in:
            os.kill(os.getpid(), signal.SIGKILL)
        settlement = ModelSettlement(key, "ask:", "model_1", TokenUsage(40, 10), CENT)
        await ledger.settle(caller, settlement, is_reserved=True)
