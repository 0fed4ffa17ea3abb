"""Trials: a suspect, a run that has lost several workers, runs apart from other unproven runs.

If the process dies then, the suspect is the cause: the other runs have proved harmless or have not begun.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Final

from models.loss_limits import MAX_ISOLATION_LOSSES

if TYPE_CHECKING:
    from execution.settings import ExecutionSettings
    from journal.store import RunStore

TRIAL_SECONDS: Final = 5.0
"""Time after which a run counts as proven in this process; a new recorded result proves it earlier."""
POLL_SECONDS: Final = 0.01


class SuspectSearch:
    """Periodic search for suspects that this process may put on trial."""

    def __init__(self, store: RunStore, settings: ExecutionSettings, target: str = "shared") -> None:
        self._store = store
        self._every_seconds = settings.seconds_between_sweeps
        self._target = target
        self._next_at = time.monotonic()
        self._outlived_at = self._next_at + settings.lease_seconds

    @property
    def is_due(self) -> bool:
        """Whether it is time for the next search for suspects, runs that have lost several workers."""
        return time.monotonic() >= self._next_at

    async def find(self) -> int | None:
        """Search for suspects if a search is due; return how many workers a suspect may have lost in trials to be
        claimed here.

        It is 0 until this process has outlived a lease, so that a process that always crashes costs a suspect one
        trial. None if no search is due or no such suspect waits. Raises `DatabaseUnavailable`.
        """
        if not self.is_due:
            return None
        self.pause()
        max_isolation_losses = MAX_ISOLATION_LOSSES if time.monotonic() >= self._outlived_at else 0
        return (
            max_isolation_losses
            if await self._store.has_suspects(max_isolation_losses, self._target)
            else None
        )

    def pause(self) -> None:
        """Postpone the next search for suspects by the interval of sweeps, so that other runs are claimed before."""
        self._next_at = time.monotonic() + self._every_seconds


class TrialGate:
    """Gate that stops claims in one process during a trial; one trial at a time."""

    def __init__(self) -> None:
        self._is_open = asyncio.Event()
        self._is_open.set()
        self._turn = asyncio.Lock()
        self._are_proven: list[Callable[[], bool]] = []

    def join(self, is_proven: Callable[[], bool]) -> None:
        """Register an executor of the process: trials wait until `is_proven()` is true, for its held runs and
        claims in progress.
        """
        self._are_proven.append(is_proven)

    @property
    def is_open(self) -> bool:
        """Whether no trial is in progress, so that other runs may be claimed."""
        return self._is_open.is_set()

    async def pass_gate(self) -> None:
        """Wait until no trial is in progress; executors await this before each claim."""
        while not self._is_open.is_set():  # it may be closed again by the time this wakes up
            await self._is_open.wait()

    @asynccontextmanager
    async def run_trial(self) -> AsyncIterator[None]:
        """Stop claims of this process, wait until all held runs are proven, and keep claims stopped until the
        block ends.

        Trials take turns.
        """
        async with self._turn:
            self._is_open.clear()
            try:
                # This ends: a run is proven once it has lasted long enough.
                while not all(is_proven() for is_proven in self._are_proven):  # noqa: ASYNC110 - time proves it, too
                    await asyncio.sleep(POLL_SECONDS)
                yield
            finally:
                self._is_open.set()
