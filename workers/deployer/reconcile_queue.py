"""Schedule of reconciliations: queue, retries, budget of refused changes, and starts of pods in progress.

Each workflow has one task and at most one retry timer. If the cluster refuses its changes, it may send at most six
requests a minute. Organizations share the limit of starts in turn.
"""

from __future__ import annotations

import asyncio
import random
from collections import Counter, deque
from collections.abc import Callable, Mapping
from datetime import datetime
from typing import TYPE_CHECKING, Final

from msgspec import Struct

from models.deployment import BLOCKING_REASONS
from telemetry import instruments
from workers.cluster.driver import ClusterForbidden, ClusterRefused, PodStage

if TYPE_CHECKING:
    from models.deployment import Deployment
    from workers.cluster.driver import ObservedDeployment

MAX_DOUBLINGS: Final = 16
JITTER: Final = 0.25
"""Share of a delay that is added at random, so that retries of many workflows spread out."""
MIN_DELAY_SECONDS: Final = 0.05

SECONDS_PER_REQUEST: Final = 10.0
"""Time without another attempt for each request that a refused attempt has cost."""

Refusal = ClusterForbidden | ClusterRefused


class RetryBackoff(Struct, frozen=True):
    """Delays between retries, in seconds: the first one, doubled by each retry, up to the longest."""

    first_seconds: float
    longest_seconds: float

    def delay(self, retries: int) -> float:
        """Return the seconds before the next retry after `retries` earlier ones: doubled by each, up to the
        longest.

        Up to a quarter is added at random.
        """
        seconds: float = min(self.first_seconds * 2 ** min(retries, MAX_DOUBLINGS), self.longest_seconds)
        return seconds * random.uniform(1, 1 + JITTER)  # noqa: S311 - spreads retries, no secret


class ScheduledRetry(Struct, frozen=True):
    """Reconciliation that is due after a delay, unless an event triggers it before."""

    backoff: RetryBackoff
    within_seconds: float | None = None
    """Upper bound of this delay, such as the time until a start is overdue; None for the back-off alone."""


class _QueueEntry(Struct):
    generation: int | None = None
    """Generation of the row at the last reconciliation; None before it."""
    is_queued: bool = False
    is_taken: bool = False
    is_asked_again: bool = False
    """Another reconciliation was requested while a task held the workflow."""
    is_urgent: bool = False
    retries: int = 0
    timer: asyncio.TimerHandle | None = None

    def stop_timer(self) -> None:
        if self.timer is not None:
            self.timer.cancel()
            self.timer = None


class ReconcileQueue:
    """Workflows in the order of their reconciliation: urgent ones, for which requests wait, come first.

    It belongs to one event loop.
    """

    def __init__(self) -> None:
        self._entries: dict[str, _QueueEntry] = {}
        self._urgent: deque[str] = deque()
        self._routine: deque[str] = deque()
        self._is_filled = asyncio.Event()

    def count_queued(self) -> int:
        """Return the number of workflows that wait to be reconciled, without those that are being reconciled."""
        return sum(entry.is_queued for entry in self._entries.values())

    def add(self, workflow_id: str) -> None:
        """Queue a workflow as routine work, as after an event of the cluster; a queued one is not added twice.

        One that is being reconciled is queued again after that.
        """
        self._enqueue(workflow_id, is_urgent=False)

    def add_urgent(self, workflow_id: str) -> None:
        """Queue a workflow before all routine ones, with a fresh back-off, since its desired state may have
        changed.
        """
        entry = self._entries.get(workflow_id)
        if entry is not None:
            entry.retries = 0
            entry.stop_timer()
        self._enqueue(workflow_id, is_urgent=True)

    def add_unless_scheduled(self, workflow_id: str, generation: int) -> None:
        """Queue a workflow, unless it is being reconciled or a retry of it is scheduled.

        If `generation` is not that of its last reconciliation, it is queued as urgent, in spite of a retry.
        """
        entry = self._entries.get(workflow_id)
        if entry is None:
            self.add(workflow_id)
        elif entry.is_taken:
            return
        elif entry.generation is not None and entry.generation != generation:
            self.add_urgent(workflow_id)
        elif entry.timer is None:
            self.add(workflow_id)

    async def take(self) -> str:
        """Wait for the next workflow, urgent ones first, and keep it from other tasks until `finish`."""
        while True:
            while not (queue := self._urgent or self._routine):
                self._is_filled.clear()
                await self._is_filled.wait()
            workflow_id = queue.popleft()
            entry = self._entries.get(workflow_id)
            if entry is not None and entry.is_queued:
                entry.is_queued, entry.is_urgent, entry.is_taken = False, False, True
                return workflow_id
            # It was in both queues, and has been taken from the urgent one.

    def finish(
        self, workflow_id: str, retry: ScheduledRetry | None, *, generation: int | None = None
    ) -> None:
        """End the reconciliation of a taken workflow: schedule the retry, or (None) forget it, since no change is
        expected.

        `generation` is that of the row which was read. If the workflow was added meanwhile, it is queued again at once.
        """
        entry = self._entries[workflow_id]
        entry.is_taken = False
        entry.generation = generation
        if retry is None:
            entry.retries = 0
            entry.stop_timer()
        else:
            self._schedule(workflow_id, entry, retry)
        if entry.is_asked_again:
            entry.is_asked_again = False
            self._enqueue(workflow_id, is_urgent=entry.is_urgent)
        elif retry is None:
            del self._entries[workflow_id]

    def close(self) -> None:
        """Stop the retry timers of all workflows."""
        for entry in self._entries.values():
            entry.stop_timer()

    def _enqueue(self, workflow_id: str, *, is_urgent: bool) -> None:
        """Queue a workflow, or note that it is to be queued after its reconciliation in progress."""
        entry = self._entries.setdefault(workflow_id, _QueueEntry())
        if entry.is_taken:
            entry.is_asked_again = True
            entry.is_urgent |= is_urgent
        elif not entry.is_queued or (is_urgent and not entry.is_urgent):
            entry.is_queued, entry.is_urgent = True, is_urgent
            (self._urgent if is_urgent else self._routine).append(workflow_id)
            self._is_filled.set()

    def _schedule(self, workflow_id: str, entry: _QueueEntry, retry: ScheduledRetry) -> None:
        """Start the timer of a retry, at most `within_seconds` from now; a running timer remains if it ends
        earlier.
        """
        loop = asyncio.get_running_loop()
        delay = retry.backoff.delay(entry.retries)
        if retry.within_seconds is not None:
            delay = min(delay, max(retry.within_seconds, MIN_DELAY_SECONDS))
        if entry.timer is not None:
            if entry.timer.when() <= loop.time() + delay:
                return
            entry.timer.cancel()
        entry.timer = loop.call_later(delay, self._retry, workflow_id)

    def _retry(self, workflow_id: str) -> None:
        """Queue a workflow whose retry is due, and count the retry."""
        entry = self._entries[workflow_id]
        entry.timer = None
        entry.retries += 1
        self.add(workflow_id)


class AttemptDeferred(Exception):
    """The budget does not allow another attempt yet."""

    def __init__(self, refusal: Refusal, seconds: float) -> None:
        super().__init__(str(refusal))
        self.refusal = refusal
        self.seconds = seconds
        """Time until another attempt is allowed."""


class _ChargedRefusal(Struct, frozen=True):
    generation: int | None
    refusal: Refusal
    paid_at: float
    """Time of the event loop from which another attempt is allowed."""


class RefusalBudget:
    """Last refusal of each workflow with refused changes."""

    def __init__(self) -> None:
        self._charged: dict[str, _ChargedRefusal] = {}

    def require(self, workflow_id: str, generation: int | None) -> None:
        """Raise `AttemptDeferred` while a workflow is barred from changes after a refusal.

        A refusal of another generation of the row does not count.
        """
        charged = self._charged.get(workflow_id)
        if charged is None or charged.generation != generation:
            return
        seconds = charged.paid_at - asyncio.get_running_loop().time()
        if seconds > 0:
            raise AttemptDeferred(charged.refusal, seconds)

    def charge(self, workflow_id: str, generation: int | None, refusal: Refusal) -> None:
        """Bar this generation of a workflow from changes for ten seconds for each request that the refused attempt has
        sent.
        """
        paid_at = asyncio.get_running_loop().time() + refusal.requests * SECONDS_PER_REQUEST
        self._charged[workflow_id] = _ChargedRefusal(generation, refusal, paid_at)

    def forget(self, workflow_id: str) -> None:
        """Forget the refusal of a workflow that needs no change."""
        self._charged.pop(workflow_id, None)


def choose_next_start(waiting: Mapping[str, str], starting: Mapping[str, str], limit: int) -> str | None:
    """Return the workflow that may start next; None if all have to wait.

    `waiting` (in the order of requests) and `starting` map workflows to their organizations. The organization with the
    fewest starts has precedence. While an organization has less than its share of `limit`, up to twice the limit may
    start, so that slow starts of one organization delay no other.
    """
    if not waiting:
        return None
    counts = Counter(starting.values())
    organizations = {*counts, *waiting.values()}
    share = max(1, limit // len(organizations))
    chosen = min(waiting, key=lambda workflow_id: counts[waiting[workflow_id]])
    is_below_share = counts[waiting[chosen]] < share and len(starting) < 2 * limit
    return chosen if len(starting) < limit or is_below_share else None


class StartGate:
    """Waiting starts of this deployer, and all starts that it sees, including those of other deployers."""

    def __init__(self, limit: int, on_admit: Callable[[str], None]) -> None:
        self._limit = limit
        self._on_admit = on_admit
        self._waiting: dict[str, str] = {}
        self._starting: dict[str, str] = {}

    def admit(self, workflow_id: str, organization_id: str) -> bool:
        """Return whether a workflow may start now; if not, it waits, and `on_admit` is called with it once it may.

        A workflow that is starting already may; one that waits already keeps its turn.
        """
        if workflow_id in self._starting:
            return True
        self._waiting.setdefault(workflow_id, organization_id)
        self._admit_more(but=workflow_id)
        return workflow_id in self._starting

    def mark_starting(self, workflow_id: str, organization_id: str) -> None:
        """Count a start that the cluster shows, also one of another deployer; it takes a place of the limit."""
        self._waiting.pop(workflow_id, None)
        self._starting[workflow_id] = organization_id

    def release(self, workflow_id: str) -> None:
        """Free the place of a start that has ended or is stuck, and admit waiting workflows to it; a workflow that
        itself waits is admitted no more.
        """
        self._waiting.pop(workflow_id, None)
        if self._starting.pop(workflow_id, None) is not None:
            self._admit_more()

    def _admit_more(self, *, but: str | None = None) -> None:
        while (chosen := choose_next_start(self._waiting, self._starting, self._limit)) is not None:
            self._starting[chosen] = self._waiting.pop(chosen)
            if chosen != but:
                self._on_admit(chosen)


class _StartProgress(Struct):
    generation: int
    stage: PodStage
    """Furthest stage of any of its pods."""
    since: datetime


class StartClock:
    """Progress of all starts that this deployer has seen, by the database's time of the observation.

    A restarted deployer gives each start its full time again, so a restart fails no start.
    """

    def __init__(self) -> None:
        self._starts: dict[str, _StartProgress] = {}

    def stalled_since(
        self, deployment: Deployment, observed: ObservedDeployment, now: datetime
    ) -> datetime | None:
        """Return the time of the last progress of a start, from which its time limit counts; None if no limit applies
        now.

        No limit applies without a start, and while the cluster has not scheduled its pods and gives no reason. A change
        of the desired state and a lack of capacity begin anew. Phases of the start are measured.
        """
        coming = [pod for pod in observed.pods if not pod.is_terminating and not pod.is_ready]
        if not observed.is_starting:
            start = self._starts.pop(deployment.workflow_id, None)
            if start is not None and start.stage is PodStage.STARTED and observed.ready_pods:
                _observe_phase("ready", start.since, now)
            return None
        stage = max((pod.stage for pod in coming), default=PodStage.CREATED)
        start = self._starts.get(deployment.workflow_id)
        is_blocked = observed.failure is not None and observed.failure.reason in BLOCKING_REASONS
        if start is None or start.generation != deployment.generation or is_blocked:
            start = self._starts[deployment.workflow_id] = _StartProgress(deployment.generation, stage, now)
        elif stage > start.stage:
            if start.stage is PodStage.CREATED:
                # The row has changed last with the decision to start.
                _observe_phase("schedule", deployment.updated_at, now)
            # Lower stages don't count: a program that crashes and is restarted makes no progress.
            start.stage, start.since = stage, now
        is_timed = start.stage >= PodStage.SCHEDULED or observed.failure is not None
        return start.since if is_timed else None

    def waiting_since(self, workflow_id: str) -> datetime | None:
        """Return the time of the last progress of a start, scheduled or not; None if none is in progress."""
        start = self._starts.get(workflow_id)
        return None if start is None else start.since

    def forget(self, workflow_id: str) -> None:
        """Forget the start of a workflow, because none of its pods is starting any more."""
        self._starts.pop(workflow_id, None)


def _observe_phase(phase: str, since: datetime, now: datetime) -> None:
    """Add the time of one phase of a start to the metrics."""
    if instruments.is_exposed:
        instruments.histogram("wake_seconds", phase).observe(max((now - since).total_seconds(), 0.0))
