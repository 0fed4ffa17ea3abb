"""Waits of nodes for signals, stored or answered at once by an unread signal; and replies of nodes to signals."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from engine.run_errors import NodeError
from execution.retry import until_available
from journal import concurrency_limits
from journal.waits import signals
from messages import wakeups

if TYPE_CHECKING:
    from engine.services import RunCaller, SignalExpectation, SignalRequest
    from messages.broker import Broker
    from models.database import Database


class SignalWaits:
    """Waits for signals; implements `engine.services.SignalWaitService`."""

    def __init__(self, database: Database, broker: Broker) -> None:
        self._database = database
        self._broker = broker

    async def expect(
        self, caller: RunCaller, wanted: SignalRequest, *, node_id: str, iteration: str
    ) -> SignalExpectation:
        """Store that a node waits for a signal, or answer it with the earliest unread signal of the wanted name.

        Return the end of the wait, or the node's answer, which may have been given before this call; neither if it
        waits without a limit, the run is gone, or the node never started. Waits while the database is unavailable.
        """
        add = partial(signals.add_wait, caller=caller, wanted=wanted, node_id=node_id, iteration=iteration)
        expected, answer = await until_available(
            lambda: self._database.transaction(add, locks=caller.execution_id)
        )
        # Only a process that has lost the lease finds the run waiting here.
        if answer.concurrency_key is not None:
            await concurrency_limits.admit_waiting_runs(self._database, answer.concurrency_key)
        if answer.is_woken:
            await wakeups.wake_workers(self._broker)
        return expected

    async def reply(self, caller: RunCaller, node_id: str, iteration: str, value: bytes) -> None:
        """Store a reply (JSON) to the signal that a node has received in this iteration or an enclosing one.

        The first reply counts; without such a signal, nothing happens. Raises `NodeError` above the maximum size;
        waits while the database is unavailable.
        """
        if len(value) > signals.MAX_REPLY_BYTES:
            message = f"The reply to a signal has at most {signals.MAX_REPLY_BYTES:,} bytes"
            raise NodeError(message, code="reply-too-large")
        store = partial(
            signals.store_reply, caller=caller, node_id=node_id, iteration=iteration, reply=value.decode()
        )
        await until_available(lambda: self._database.transaction(store, locks=caller.execution_id))
