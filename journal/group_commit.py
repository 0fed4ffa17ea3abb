"""Group commit: items that are submitted during one transaction share the next transaction.

There is no linger time: a lone item is committed at once, and under load batches grow to the arrivals during
a commit.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from contextvars import Context
from typing import Generic, TypeAlias, TypeVar

from models.errors import DatabaseUnavailable, LockWaitTimeout

Item = TypeVar("Item")
Answer = TypeVar("Answer")


SubmittedItem: TypeAlias = tuple[Item, asyncio.Future[Answer], int]
"""Item that waits, the future of its answer, and its weight."""


class GroupCommit(Generic[Item, Answer]):
    """Committer of items in batches; each caller gets the answer to its own item.

    The committing task outlives its callers: a canceled caller loses its answer, not its item. A batch that
    fails for any reason but an unreachable database is retried item by item. So an item that is invalid, or
    needs rows that another transaction has locked, fails alone.
    """

    def __init__(
        self,
        commit: Callable[[Sequence[Item]], Awaitable[Sequence[Answer | Exception]]],
        *,
        max_batch: int = 200,
        weigh: Callable[[Item], int] = lambda _: 0,
        max_weight: int = 0,
    ) -> None:
        """Create a committer of batches; `commit` returns the answers in the order of the items.

        The oldest item is always taken, however heavy; others join it up to `max_weight`. An exception among the
        answers of `commit` is raised to the caller of its item.
        """
        self._commit = commit
        self._max_batch = max_batch
        self._weigh = weigh
        self._max_weight = max_weight
        self._waiting: list[SubmittedItem[Item, Answer]] = []
        self._task: asyncio.Task[None] | None = None

    def submit(self, item: Item) -> asyncio.Future[Answer]:
        """Queue an item for the next commit, and return the future of its answer, which may raise the error of the
        commit.

        It must be called on the event loop. An item whose future is canceled is committed all the same.
        """
        future: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        self._waiting.append((item, future, self._weigh(item)))
        if self._task is None:
            # Without the context of the caller: the batch has items of others too.
            self._task = asyncio.create_task(self._run(), context=Context())
        return future

    @property
    def depth(self) -> int:
        """Number of submitted items that wait for the next commit."""
        return len(self._waiting)

    @property
    def is_idle(self) -> bool:
        """Whether no item waits and no commit is in progress."""
        return self._task is None

    async def drain(self) -> None:
        """Wait until every submitted item is committed or has failed, those submitted meanwhile too; raises
        none of their errors.
        """
        while self._task is not None:
            await asyncio.shield(self._task)

    async def _run(self) -> None:
        """Commit batches until no item waits."""
        try:
            while self._waiting:
                await self._settle(self._next_batch())
        finally:
            self._task = None

    def _next_batch(self) -> list[tuple[Item, asyncio.Future[Answer]]]:
        """Take the next batch from the waiting items, up to a number and a weight; an item over the weight
        goes alone.

        Items that don't fit keep their order, and lighter ones behind them may go first.
        """
        batch: list[tuple[Item, asyncio.Future[Answer]]] = []
        left: list[SubmittedItem[Item, Answer]] = []
        weight = 0
        for one in self._waiting:
            item, future, own_weight = one
            if len(batch) < self._max_batch and (not batch or weight + own_weight <= self._max_weight):
                batch.append((item, future))
                weight += own_weight
            else:
                left.append(one)
        self._waiting = left
        return batch

    async def _settle(self, batch: list[tuple[Item, asyncio.Future[Answer]]]) -> None:
        """Commit a batch, and give each item its answer or the error; after any error but an unreachable database, each
        item is committed alone.
        """
        try:
            answers = await self._commit([item for item, _ in batch])
        except LockWaitTimeout as error:
            if len(batch) == 1:
                _fail_batch(batch, error)
                return
            # Concurrently: each item with a locked row waits for the whole lock timeout again.
            await asyncio.gather(*(self._settle([one]) for one in batch))
        except DatabaseUnavailable as error:
            _fail_batch(batch, error)
        except Exception as error:  # noqa: BLE001 - it belongs to one item, found by committing each alone
            if len(batch) == 1:
                _fail_batch(batch, error)
                return
            for one in batch:
                await self._settle([one])
        else:
            for one, answer in zip(batch, answers, strict=True):
                _resolve_waiter(one, answer)


def _resolve_waiter(waiter: tuple[Item, asyncio.Future[Answer]], answer: Answer | Exception) -> None:
    """Set the answer or error of an item, unless its caller has gone."""
    if isinstance(answer, Exception):
        _fail_batch([waiter], answer)
    elif not waiter[1].done():
        waiter[1].set_result(answer)


def _fail_batch(batch: Sequence[tuple[Item, asyncio.Future[Answer]]], error: Exception) -> None:
    for _, future in batch:
        if not future.done():
            future.set_exception(error)
            future.exception()  # without a caller, the event loop must not log it as never retrieved
