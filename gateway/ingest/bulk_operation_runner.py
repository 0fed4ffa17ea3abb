"""Bulk operations of a gateway: those that no other gateway performs, each in a task of its own."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from functools import partial
from typing import TYPE_CHECKING, Final

import structlog

from models import bulk_operation
from models.bulk_operation import LEASE_SECONDS
from models.errors import DatabaseUnavailable

if TYPE_CHECKING:
    from gateway.ingest.bulk_services import BulkServices
    from models.bulk_operation import BulkOperation

log = structlog.get_logger()

LOOK_SECONDS: Final = 5.0
"""Interval at which a gateway looks for operations of other gateways that have died."""
AT_ONCE: Final = 4
"""Operations that one gateway performs at the same time."""


class BulkOperationRunner:
    """Runner of bulk operations in one gateway: claims those without a live lease, and performs up to four at once."""

    def __init__(self, services: BulkServices) -> None:
        self._services = services
        self._changed = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()

    def wake(self) -> None:
        """Make `run_forever` claim operations now instead of at its next interval; return at once."""
        self._changed.set()

    async def run_forever(self) -> None:
        """Claim and perform operations until the task is canceled; then release those in progress for other gateways.

        Operations are claimed every five seconds, and after each `wake`. Errors are logged, and claims continue all the
        same.
        """
        try:
            await self._claim_forever()
        finally:
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _claim_forever(self) -> None:
        while True:
            self._changed.clear()
            try:
                await self._take_operations()
            except DatabaseUnavailable as error:
                log.debug("bulk operations not claimed", reason=str(error))
            except Exception:
                log.exception("bulk operations not claimed")
            with suppress(TimeoutError):
                async with asyncio.timeout(LOOK_SECONDS):
                    await self._changed.wait()

    async def _take_operations(self) -> None:
        """Claim due operations that no gateway performs, and start a task for each; this gateway performs at most four
        at once.
        """
        room = AT_ONCE - len(self._tasks)
        if room <= 0:
            return
        async with self._services.database.read() as connection:
            due = (await connection.scalars(bulk_operation.due_statement(room))).all()
        if not due:
            return  # no write transaction, while there is nothing to do
        claim = partial(bulk_operation.claim_operations, limit=room, lease_seconds=LEASE_SECONDS)
        for operation in await self._services.database.transaction(claim):
            task = asyncio.create_task(self._perform(operation))
            self._tasks.add(task)
            task.add_done_callback(self._forget_task)

    def _forget_task(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        self._changed.set()

    async def _perform(self, operation: BulkOperation) -> None:
        """Perform a claimed operation to its end; log and return early if its lease is lost or the database
        unavailable.

        On cancellation, its lease is released, so that another gateway continues at once.
        """
        from gateway.ingest.bulk_operation_steps import (  # noqa: PLC0415 - loaded by the first operation
            OperationLeaseLost,
            OperationPerformance,
        )

        performance = OperationPerformance(self._services, operation)
        try:
            await performance.run()
        except OperationLeaseLost:
            log.info("bulk operation left to another gateway", operation_id=operation.id)
        except DatabaseUnavailable as error:
            log.warning("bulk operation interrupted", operation_id=operation.id, reason=str(error))
        except asyncio.CancelledError:
            with suppress(DatabaseUnavailable):
                await performance.release()
            raise


@asynccontextmanager
async def run_bulk_operations(services: BulkServices) -> AsyncIterator[BulkOperationRunner]:
    """Yield a runner that performs bulk operations in the background until the block ends; then release them."""
    runner = BulkOperationRunner(services)
    running = asyncio.create_task(runner.run_forever())
    try:
        yield runner
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
