"""Open polls of the task workers of one organization, at one gateway."""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Iterable, Sequence
from heapq import heapify, heappop, heappush
from itertools import count
from time import monotonic
from typing import TYPE_CHECKING, Final, TypeAlias

from msgspec import Struct

if TYPE_CHECKING:
    from gateway.http.shared_allowance import SharedPlace
    from journal.tasks.task_polls import ClaimedTask, TaskPoll

SERVED_TOGETHER: Final = 50
"""Polls that share one claim."""
KEPT_OVER: Final = 100
"""Polls that are over and may stay in memory."""


class PollAnswer(Struct, frozen=True):
    """Answer to a poll."""

    tasks: Sequence[ClaimedTask] = ()
    cancelling: Sequence[str] = ()
    is_draining: bool = False
    is_stopped: bool = False


EMPTY_ANSWER: Final = PollAnswer()


class ParkedPoll:
    """Open poll of a worker."""

    __slots__ = (
        "_changed",
        "_error",
        "_is_closed",
        "_result",
        "_timer",
        "has_heartbeats",
        "key_id",
        "place",
        "poll",
        "seconds",
        "since",
    )

    def __init__(
        self, poll: TaskPoll, seconds: float, *, key_id: str = "", has_heartbeats: bool = False
    ) -> None:
        """Create the poll; it waits `seconds` for tasks, after the gateway has looked for some once.

        It ends as soon as the API key is no longer valid. With heartbeats, `wait` also returns, without an answer,
        whenever one is due.
        """
        self.poll = poll
        self.key_id = key_id
        self.place: SharedPlace | None = None
        """Place among the open polls of the gateway."""
        self.seconds = seconds
        self.has_heartbeats = has_heartbeats
        self.since = monotonic()
        self._result: PollAnswer | None = None
        self._error: Exception | None = None
        self._is_closed = False
        self._timer: asyncio.TimerHandle | None = None
        self._changed: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    @property
    def is_over(self) -> bool:
        """Whether the poll has its answer or an error, or its client has gone."""
        return self._is_closed or self._result is not None or self._error is not None

    async def wait(self) -> PollAnswer | None:
        """Return the answer as soon as there is one; None as soon as a heartbeat is due.

        Raises the error with which the first look for tasks has failed; later looks don't fail the poll.
        """
        await self._changed
        if self._error is not None:
            raise self._error
        if self._result is None:
            self._changed = asyncio.get_running_loop().create_future()
        return self._result

    def resolve(self, answer: PollAnswer) -> bool:
        """Answer the poll of a task worker; return False, without effect, if it is over already."""
        if self.is_over:
            return False
        self._result = answer
        self.beat()
        return True

    def beat(self) -> None:
        """Let `wait` return now: a heartbeat is due, or the poll has its answer."""
        if not self._changed.done():
            self._changed.set_result(None)

    def leave(self) -> None:
        """End the poll without tasks: its time is over, or its client has disconnected."""
        self.resolve(EMPTY_ANSWER)

    def begin_waiting(self) -> None:
        """Let the time of the poll begin, since the first look for its tasks has ended."""
        if self._timer is None and not self.is_over:
            self._timer = asyncio.get_running_loop().call_later(self.seconds, self.leave)

    def fail(self, error: Exception) -> None:
        """Fail the poll with the error of its first look, unless it is over."""
        if not self.is_over:
            self._error = error
            self.beat()

    def close(self) -> None:
        """End the poll and its timer, because its caller no longer waits."""
        self._is_closed = True
        if self._timer is not None:
            self._timer.cancel()

    @property
    def order(self) -> tuple[int, float]:
        """Key by which polls are sorted to get tasks: the most free slots first, then the longest wait."""
        return -self.poll.limit, self.since


PollHeap: TypeAlias = list[tuple[tuple[int, float], int, ParkedPoll]]
"""Polls with their order and a number that makes it unique."""


class OrganizationPolls:
    """Open polls of one organization."""

    def __init__(self) -> None:
        self.all: set[ParkedPoll] = set()
        self._by_request: dict[tuple[str, str], ParkedPoll] = {}
        """Open polls by the ids of their worker and request."""
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
        self.likely_queue: str | None = None
        """Queue of the last claimed task, in which the next one probably is."""
        self.may_guess = False
        """Whether a notification has come while no task was known: one in the likely queue is probably new."""
        self.admits = False
        """Whether tasks may wait for free places."""
        self.serving: asyncio.Task[None] | None = None
        self.delay: asyncio.TimerHandle | None = None

    def add(self, parked: ParkedPoll) -> None:
        """Add a new poll; it takes part in claims once the gateway has looked for tasks for it.

        An open poll with the same request ends: its client has lost the connection, and would lose its tasks.
        """
        key = parked.poll.worker_id, parked.poll.request_id
        if (earlier := self._by_request.get(key)) is not None:
            earlier.leave()
        self._by_request[key] = parked
        self.all.add(parked)
        self._new.append(parked)

    def discard(self, parked: ParkedPoll) -> None:
        """Remove a poll that is over; now and then, drop all that are over from the queues of waiting polls."""
        self.all.discard(parked)
        key = parked.poll.worker_id, parked.poll.request_id
        if self._by_request.get(key) is parked:
            del self._by_request[key]
        self._over += 1
        if self._over > len(self.all) + KEPT_OVER:
            self._over = 0
            self._idle = {key: _without_over(heap) for key, heap in self._idle.items()}

    def take_new(self) -> list[ParkedPoll]:
        """Return the polls that were added since the last call and are not over; the caller looks for their
        tasks next.
        """
        new, self._new = [one for one in self._new if not one.is_over], []
        return new

    def enqueue(self, polls: Iterable[ParkedPoll]) -> None:
        """Put polls into the queues of those that wait for tasks, unless they are over or have no free slot."""
        for one in polls:
            if one.poll.limit > 0 and not one.is_over:
                heappush(
                    self._idle.setdefault(one.poll.service_group, []), (one.order, next(self._numbers), one)
                )

    @property
    def viewer_ids(self) -> Sequence[str]:
        """Users whose visible runs alone some waiting polls perform, behind the empty text for all runs."""
        return sorted({"", *(str(key[-1]) for key in self._idle)})

    def take_fitting(self, queues: Sequence[str], viewer_id: str = "") -> list[ParkedPoll]:
        """Remove and return the next waiting polls of a viewer, at most 50, with equal types and pools, that can
        perform tasks of these queues.

        A queue is named by type, version and pool. Empty if no poll fits.
        """
        fitting: list[tuple[tuple[int, float], PollHeap]] = []
        for key, heap in list(self._idle.items()):
            if key[-1] != viewer_id:
                continue
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
        """Return the open polls of these task workers."""
        return [one for one in self.all if one.poll.worker_id in worker_ids]


def _without_over(heap: PollHeap) -> PollHeap:
    kept = [entry for entry in heap if not entry[2].is_over]
    heapify(kept)
    return kept
