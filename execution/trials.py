"""Trials: a run that has lost several workers is run apart from whatever else a process has just begun.

Should the process die then, it is known for whose sake: the others have proved harmless, or have not begun.
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
"""A run is proven, to this process, once it has run for so long or has recorded a new result."""
POLL_SECONDS: Final = 0.01


class SuspectSearch:
    """Looks now and then whether suspects wait that this process may put on trial."""

    def __init__(self, store: RunStore, settings: ExecutionSettings, target: str = "shared") -> None:
        self._store = store
        self._every_seconds = settings.seconds_between_sweeps
        self._target = target
        self._next_at = time.monotonic()
        self._outlived_at = self._next_at + settings.lease_seconds

    @property
    def is_due(self) -> bool:
        """Whether it is time to look again."""
        return time.monotonic() >= self._next_at

    async def find(self) -> int | None:
        """Return how many workers a suspect may have lost on trial; None where there is none to be taken now.

        One whose trial has ended a process is left to processes that have outlived a lease: where they are ended from
        outside, moments after each start, it is not tried at all. Raises `DatabaseUnavailable`.
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
        """Let others be claimed before the next trials."""
        self._next_at = time.monotonic() + self._every_seconds


class TrialGate:
    """One process's trials: one at a time, with a gate that those who claim runs pass."""

    def __init__(self) -> None:
        self._is_open = asyncio.Event()
        self._is_open.set()
        self._turn = asyncio.Lock()
        self._are_proven: list[Callable[[], bool]] = []

    def join(self, is_proven: Callable[[], bool]) -> None:
        """Have trials wait until `is_proven` tells that all runs of a claimer are, claims under way included."""
        self._are_proven.append(is_proven)

    @property
    def is_open(self) -> bool:
        """Whether no trial goes on."""
        return self._is_open.is_set()

    async def pass_gate(self) -> None:
        """Wait until no trial goes on; to be awaited before each claim."""
        while not self._is_open.is_set():  # it may be closed again by the time that this wakes up
            await self._is_open.wait()

    @asynccontextmanager
    async def run_trial(self) -> AsyncIterator[None]:
        """Keep others from claiming, from when all that they hold is proven until the block is left."""
        async with self._turn:
            self._is_open.clear()
            try:
                # It ends: whatever runs for long enough is proven.
                while not all(is_proven() for is_proven in self._are_proven):  # noqa: ASYNC110 - time proves it, too
                    await asyncio.sleep(POLL_SECONDS)
                yield
            finally:
                self._is_open.set()
