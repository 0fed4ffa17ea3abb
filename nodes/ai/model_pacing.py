"""Pacing of calls of language models by the limits of their organization, within one process.

A short wait passes in the process. A longer one is a failure with a time, for which the run waits without a slot.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from heapq import heappop, heappush
from math import ceil
from time import monotonic
from typing import TYPE_CHECKING, Final

from engine.model_calls import ModelCallFailed

if TYPE_CHECKING:
    from engine.model_limits import ModelLimitShare
    from nodes.ai.model_connection import ModelConnection

LIMIT_REACHED: Final = "model-limit-reached"
WINDOW_SECONDS: Final = 60.0
LONGEST_WAIT_IN_PROCESS: Final = 5.0
LONGEST_WAIT: Final = 86_400.0
MAX_REMEMBERED_MODELS: Final = 1_000
ASSUMED_CALL_SECONDS: Final = 5.0
"""Duration of a call of a model that has answered none yet."""
AVERAGED_CALLS: Final = 8
"""Number of recent calls from which the duration of the next ones is estimated."""


class RateWindow:
    """Requests or tokens of the last minute, by the time at which each entry leaves it.

    An entry over the limit stays for longer than a minute, in proportion, so that the rate holds for it too.
    """

    def __init__(self) -> None:
        self._entries: list[tuple[float, int, list[float]]] = []
        self._total = 0.0
        self._added = 0

    def count_wait_seconds(self, now: float, weight: float, limit: float) -> float:
        """Return the seconds until an entry of this weight fits under the limit; 0 if it does, as any entry in an empty
        window.

        `now` is a time of the pacer's clock, in seconds. Entries that have left the window are removed.
        """
        self.forget(now)
        left = self._total
        if not self._entries or left + weight <= limit:
            return 0.0
        for ends_at, _, (heft,) in sorted(self._entries):
            left -= heft
            if left + weight <= limit:
                return ends_at - now
        return max(entry[0] for entry in self._entries) - now

    def add(self, now: float, weight: float, limit: float) -> list[float]:
        """Add an entry, which counts for a minute, or longer in proportion if it exceeds the limit by itself.

        Returns the handle of the entry for `change`: a list with the weight.
        """
        heft = [weight]
        self._added += 1
        heappush(self._entries, (now + WINDOW_SECONDS * max(weight / limit, 1.0), self._added, heft))
        self._total += weight
        return heft

    def change(self, heft: list[float], weight: float) -> None:
        """Replace the weight of the entry with the handle `heft`; ignored if the entry has left the window."""
        if any(entry[2] is heft for entry in self._entries):
            self._total += weight - heft[0]
            heft[0] = weight

    def forget(self, now: float) -> None:
        """Remove the entries that have left the window."""
        while self._entries and self._entries[0][0] <= now:
            self._total -= heappop(self._entries)[2][0]

    @property
    def is_empty(self) -> bool:
        """Whether the window has no entries."""
        return not self._entries


class AdmittedCall:
    """Call that the limits of its model admit."""

    def __init__(self, tokens: RateWindow | None = None, heft: list[float] | None = None) -> None:
        self._tokens = tokens
        self._heft = heft

    def note_tokens(self, tokens: int) -> None:
        """Count the tokens that the call has used, in place of the estimate."""
        if self._tokens is not None and self._heft is not None:
            self._tokens.change(self._heft, tokens)


class _ModelPace:
    """Calls of one model by this process."""

    def __init__(self) -> None:
        self.requests = RateWindow()
        self.tokens = RateWindow()
        self.calls = 0
        self.ended = asyncio.Event()
        self.call_seconds: float | None = None
        """Moving average of the duration of calls; None before the first end."""
        self.booked_until = 0.0
        """Time for which the last waiting run was told to come back."""

    def is_idle(self, now: float) -> bool:
        self.requests.forget(now)
        self.tokens.forget(now)
        return not self.calls and self.requests.is_empty and self.tokens.is_empty

    def count_wait_seconds(self, share: ModelLimitShare, tokens: int, now: float) -> float:
        """Return the seconds until the rate limits in `share`, the limits of this process, admit a call of so many
        tokens; 0 if they do.

        The limit of concurrent calls doesn't count here. `now` is a time of the pacer's clock.
        """
        waits = [0.0]
        if share.requests_per_minute is not None:
            waits.append(self.requests.count_wait_seconds(now, 1, share.requests_per_minute))
        if share.tokens_per_minute is not None:
            waits.append(self.tokens.count_wait_seconds(now, tokens, share.tokens_per_minute))
        return max(waits)

    def end_call(self, seconds: float) -> None:
        """Record the end of a call that took so many seconds, and wake the calls that wait in this process."""
        self.calls -= 1
        mean = seconds if self.call_seconds is None else self.call_seconds
        self.call_seconds = mean + (seconds - mean) / AVERAGED_CALLS
        self.ended.set()
        self.ended = asyncio.Event()

    def compute_return(self, now: float, wait: float) -> float:
        """Return the seconds after which a refused run should come back: `wait`, or more if earlier runs have booked
        that time, but a day at most.
        """
        return min(max(wait, self.booked_until - now), LONGEST_WAIT)

    def book(self, share: ModelLimitShare, tokens: int, now: float, wait: float) -> float:
        """Book the time at which a refused run comes back, and return the seconds until then: at least `wait`, a day at
        most.

        Runs booked later come back later, by the time that the limits in `share` need for this call.
        """
        wait = self.compute_return(now, wait)
        steps = [0.0]
        if share.requests_per_minute is not None:
            steps.append(WINDOW_SECONDS / share.requests_per_minute)
        if share.tokens_per_minute is not None:
            steps.append(WINDOW_SECONDS * tokens / share.tokens_per_minute)
        if share.concurrency is not None:
            seconds = ASSUMED_CALL_SECONDS if self.call_seconds is None else self.call_seconds
            steps.append(seconds / share.concurrency)
        self.booked_until = now + wait + max(steps)
        return wait


class ModelPacer:
    """Paces the calls of all models by this process."""

    def __init__(
        self, clock: Callable[[], float] = monotonic, longest_wait_in_process: float = LONGEST_WAIT_IN_PROCESS
    ) -> None:
        """`clock` returns seconds that only increase. A call waits up to `longest_wait_in_process` seconds here."""
        self._clock = clock
        self._longest_wait = longest_wait_in_process
        self._paces: dict[str, _ModelPace] = {}

    @asynccontextmanager
    async def admit(self, model: ModelConnection, tokens: int) -> AsyncIterator[AdmittedCall]:
        """Wait until the limits of a model admit a call of at most so many tokens, input and answer together, and count
        it while the block runs.

        Raises `ModelCallFailed`, with the time after which the call may be admitted, if the limits don't admit it
        within five seconds; at once if the rate limits say so. A model without limits admits every call.
        """
        share = model.limits
        if share is None:
            yield AdmittedCall()
            return
        pace = self._find_pace(model.id)
        await self._wait_for_turn(pace, share, tokens)
        now = self._clock()
        if share.requests_per_minute is not None:
            pace.requests.add(now, 1, share.requests_per_minute)
        admitted = AdmittedCall()
        if share.tokens_per_minute is not None:
            admitted = AdmittedCall(pace.tokens, pace.tokens.add(now, tokens, share.tokens_per_minute))
        pace.calls += 1
        try:
            yield admitted
        finally:
            pace.end_call(self._clock() - now)

    async def _wait_for_turn(self, pace: _ModelPace, share: ModelLimitShare, tokens: int) -> None:
        """Wait until a call is admitted; raises `ModelCallFailed` after five seconds, or at once if the rate limits
        take longer.
        """
        began = self._clock()
        while True:
            now = self._clock()
            left = began + self._longest_wait - now
            wait = pace.count_wait_seconds(share, tokens, now)
            is_full = share.concurrency is not None and pace.calls >= share.concurrency
            if not wait and not is_full:
                return
            if wait and wait > left:
                raise self._build_failure(pace, share, tokens, wait)
            if is_full and left <= 0:
                # Nobody knows when a call ends. Each further run comes back later, by the time that a call takes.
                spread = LONGEST_WAIT_IN_PROCESS * (1 + 2 * random.random())  # noqa: S311 - jitter
                raise self._build_failure(pace, share, tokens, spread)
            if is_full:
                with suppress(TimeoutError):
                    await asyncio.wait_for(pace.ended.wait(), left)
            else:
                await asyncio.sleep(wait)

    def _build_failure(
        self, pace: _ModelPace, share: ModelLimitShare, tokens: int, wait: float
    ) -> ModelCallFailed:
        """Return the failure of a call that isn't admitted for `wait` seconds; its `book_return` books the time at
        which the run comes back.

        A run that gets its answer from another model books nothing: times that nobody uses would add up.
        """
        refused_at = self._clock()
        seconds = pace.compute_return(refused_at, wait)

        def book_return() -> float:
            now = self._clock()
            return pace.book(share, tokens, now, max(wait - (now - refused_at), 0.0))

        return ModelCallFailed(
            f"The limits of the model admit the call in {ceil(seconds):,} s",
            code=LIMIT_REACHED,
            retryable=True,
            can_fall_back=True,
            retry_after_seconds=seconds,
            book_return=book_return,
        )

    def _find_pace(self, model_id: str) -> _ModelPace:
        found = self._paces.get(model_id)
        if found is None:
            if len(self._paces) >= MAX_REMEMBERED_MODELS:
                now = self._clock()
                self._paces = {name: pace for name, pace in self._paces.items() if not pace.is_idle(now)}
            found = self._paces[model_id] = _ModelPace()
        return found
