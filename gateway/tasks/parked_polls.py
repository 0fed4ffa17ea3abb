"""Open polls of the task workers of one organization, at one gateway."""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from heapq import heapify, heappop, heappush
from itertools import count
from time import monotonic
from typing import TYPE_CHECKING, Final, TypeAlias

if TYPE_CHECKING:
    from journal.tasks.task_polls import ClaimedTask, TaskPoll

SERVED_TOGETHER: Final = 50
"""Polls that share one claim."""
KEPT_OVER: Final = 100
"""Polls that are over and may stay in memory."""


@dataclass(frozen=True, slots=True)
class PollAnswer:
    """Answer to a poll."""

    tasks: Sequence[ClaimedTask] = ()
    cancelling: Sequence[str] = ()
    is_draining: bool = False
    is_stopped: bool = False


EMPTY_ANSWER: Final = PollAnswer()


@dataclass(slots=True, eq=False)
class ParkedPoll:
    """Open poll of a worker."""

    poll: TaskPoll
    since: float = field(default_factory=monotonic)
    answer: asyncio.Future[PollAnswer] = field(
        default_factory=lambda: asyncio.get_running_loop().create_future()
    )
    looked: asyncio.Future[None] | None = field(
        default_factory=lambda: asyncio.get_running_loop().create_future()
    )
    """Done after the first look; None after the poll has seen that."""

    @property
    def is_over(self) -> bool:
        """Whether it has its answer, or its client is gone."""
        return self.answer.done()

    def resolve(self, answer: PollAnswer) -> bool:
        """Answer the poll; returns False if it is over."""
        self.end_look()
        if self.answer.done():
            return False
        self.answer.set_result(answer)
        return True

    async def wait_for_look(self) -> None:
        """Wait until the first look, which may have answered the poll; raises its error."""
        if self.looked is not None:
            await self.looked
            self.looked = None

    def end_look(self, error: Exception | None = None) -> None:
        """Let the poll wait for its answer, or fail by the error of its first look."""
        if self.looked is None or self.looked.done():
            return
        if error is None:
            self.looked.set_result(None)
        else:
            self.looked.set_exception(error)
            self.looked.exception()  # without a caller, the event loop must not log it as never retrieved

    @property
    def order(self) -> tuple[int, float]:
        """Order in which polls get tasks: most free slots, then longest idle."""
        return -self.poll.limit, self.since


PollHeap: TypeAlias = list[tuple[tuple[int, float], int, ParkedPoll]]
"""Polls with their order and a number that makes it unique."""


class OrganizationPolls:
    """Open polls of one organization."""

    def __init__(self) -> None:
        self.all: set[ParkedPoll] = set()
        self._new: list[ParkedPoll] = []
        self._numbers = count()
        self._over = 0
        self._idle: dict[tuple[object, ...], PollHeap] = {}
        """Polls that wait for a task, by types and pools; those that are over leave late."""
        self.is_quiet = False
        """Whether the last look has found no task, and a notification will tell of the next one."""
        self.is_wanted = False
        """Whether a look should follow."""
        self.has_leaving = False
        """Whether workers of old polls may stop or be asked to."""
        self.admits = False
        """Whether tasks may wait for free places."""
        self.serving: asyncio.Task[None] | None = None
        self.delay: asyncio.TimerHandle | None = None

    def add(self, parked: ParkedPoll) -> None:
        """Add a poll, which takes part in claims after a look."""
        self.all.add(parked)
        self._new.append(parked)

    def discard(self, parked: ParkedPoll) -> None:
        """Remove a poll that is over."""
        self.all.discard(parked)
        self._over += 1
        if self._over > len(self.all) + KEPT_OVER:
            self._over = 0
            self._idle = {key: _without_over(heap) for key, heap in self._idle.items()}

    def take_new(self) -> list[ParkedPoll]:
        """Return the polls without a look, which follows."""
        new, self._new = [one for one in self._new if not one.is_over], []
        return new

    def await_tasks(self, polls: Iterable[ParkedPoll]) -> None:
        """Let polls wait for tasks, unless they are over or have no free slot."""
        for one in polls:
            if one.poll.limit > 0 and not one.is_over:
                heappush(self._idle.setdefault(one.poll.served, []), (one.order, next(self._numbers), one))

    def take_fitting(self, queues: Sequence[str]) -> list[ParkedPoll]:
        """Return the next polls that share types and pools, and perform tasks of any of these queues."""
        fitting: list[tuple[tuple[int, float], PollHeap]] = []
        for key, heap in list(self._idle.items()):
            while heap and heap[0][2].is_over:
                heappop(heap)
            if not heap:
                del self._idle[key]
            elif any(map(heap[0][2].poll.serves, queues)):
                fitting.append((heap[0][0], heap))
        if not fitting:
            return []
        heap = min(fitting, key=lambda one: one[0])[1]
        taken: list[ParkedPoll] = []
        while heap and len(taken) < SERVED_TOGETHER:
            one = heappop(heap)[2]
            if not one.is_over:
                taken.append(one)
        return taken

    def of_workers(self, worker_ids: Collection[str]) -> Sequence[ParkedPoll]:
        """Return the polls of workers."""
        return [one for one in self.all if one.poll.worker_id in worker_ids]


def _without_over(heap: PollHeap) -> PollHeap:
    kept = [entry for entry in heap if not entry[2].is_over]
    heapify(kept)
    return kept
