"""Circuit breaker for a database server.

During an outage, calls fail within seconds, then at once until the server answers again. A slow call is no
proof of an outage, since a statement may take its time. So a late call triggers a probe of the server, and
calls fail only if the probe gets no answer either.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from time import monotonic
from typing import TYPE_CHECKING, Final

import structlog

from models.errors import DatabaseUnavailable

if TYPE_CHECKING:
    from types import TracebackType

log = structlog.get_logger()

LATE_SECONDS: Final = 0.75
"""Age of a call without an answer that triggers a probe."""
CHECK_SECONDS: Final = 0.25
PROBE_STEPS: Final = 6
PROBE_STEP_SECONDS: Final = 0.25
"""A probe fails after `PROBE_STEPS` of this length; steps that a busy or frozen event loop has lengthened
don't count.
"""
BUSY_SECONDS: Final = 20.0
"""Maximum duration of a probe, even on a busy event loop."""
PAUSE_SECONDS: Final = 0.5
"""Pause between two probes."""
GRACE_SECONDS: Final = 0.05
"""Time for calls to fail by themselves after their connections were terminated."""
INTEREST_SECONDS: Final = 60.0
"""Time after the last call at which probing stops: the next call is let through and watched."""
OUTAGE_MESSAGE: Final = "The database does not answer"


class CircuitBreaker:
    """Circuit breaker for the calls of one event loop to one server."""

    def __init__(self, probe: Callable[[], Awaitable[object]], terminate: Callable[[], None]) -> None:
        """Create a closed breaker.

        `probe` returns after any answer of the server, and raises without one; `terminate` breaks all connections.
        """
        self._probe = probe
        self._terminate = terminate
        self._calls: dict[GuardedCall, None] = {}
        """Calls in progress, oldest first."""
        self._is_open = False
        """Whether calls fail at once."""
        self._last_call_at = 0.0
        self._next_probe_at = 0.0
        self._check: asyncio.TimerHandle | None = None
        self._probing: asyncio.Task[None] | None = None

    def guard(self) -> GuardedCall:
        """Return the context manager for one call to the server, in the task that enters it.

        It raises `DatabaseUnavailable` on entry during an outage, and on exit if an outage has interrupted the call.
        """
        return GuardedCall(self)

    def begin(self, call: GuardedCall) -> None:
        """Register a call, which is watched until `end`; raises `DatabaseUnavailable` during an outage."""
        self._last_call_at = monotonic()
        if self._is_open:
            raise DatabaseUnavailable(OUTAGE_MESSAGE)
        self._calls[call] = None
        if self._check is None:
            self._check = asyncio.get_running_loop().call_later(CHECK_SECONDS, self._check_oldest_call)

    def end(self, call: GuardedCall) -> None:
        """Unregister a call; does nothing if it is not registered."""
        self._calls.pop(call, None)

    def _check_oldest_call(self) -> None:
        """Start a probe of the server if the oldest call takes over 0.75 seconds; repeat the check while calls are in
        progress.
        """
        self._check = None
        if not self._calls:
            return
        now = monotonic()
        oldest = next(iter(self._calls))
        if self._probing is None and now >= max(oldest.begun_at + LATE_SECONDS, self._next_probe_at):
            self._probing = asyncio.create_task(self._probe_once())
        self._check = asyncio.get_running_loop().call_later(CHECK_SECONDS, self._check_oldest_call)

    async def _probe_once(self) -> None:
        """Probe the server; without an answer, interrupt all calls and refuse new ones until it answers, or nobody has
        called for a minute.
        """
        try:
            if not await self._probe_in_time():
                await self._open()
        finally:
            self._is_open = False
            self._next_probe_at = monotonic() + PAUSE_SECONDS
            self._probing = None

    async def _open(self) -> None:
        """Interrupt all calls, terminate the connections, and probe every half second until the server answers.

        It also returns, without an answer, once no new call was made for a minute. The caller lets calls pass again.
        """
        log.warning("database does not answer", calls=len(self._calls))
        self._is_open = True
        self._terminate()
        await asyncio.sleep(GRACE_SECONDS)
        for call in list(self._calls):
            call.give_up()
        while monotonic() < self._last_call_at + INTEREST_SECONDS:
            await asyncio.sleep(PAUSE_SECONDS)
            if await self._probe_in_time():
                log.info("database answers again")
                return

    async def _probe_in_time(self) -> bool:
        """Return whether the server answers a probe within 1.5 seconds, even by an error; time in which the event loop
        was busy is not counted.
        """
        probe = asyncio.ensure_future(self._probe())
        now = begun_at = monotonic()
        steps = 0
        try:
            while steps < PROBE_STEPS and now < begun_at + BUSY_SECONDS:
                done, _ = await asyncio.wait({probe}, timeout=PROBE_STEP_SECONDS)
                if done:
                    return probe.exception() is None
                before, now = now, monotonic()
                # The answer may have arrived while the loop was too busy to see it.
                steps += now - before < 2 * PROBE_STEP_SECONDS
            return False
        finally:
            probe.cancel()


class GuardedCall:
    """Context of one guarded call."""

    __slots__ = ("_breaker", "_is_given_up", "_task", "begun_at")

    def __init__(self, breaker: CircuitBreaker) -> None:
        self._breaker = breaker
        self._task: asyncio.Task[object] | None = None
        self._is_given_up = False
        self.begun_at = 0.0

    def __enter__(self) -> None:
        self._task = asyncio.current_task()
        self.begun_at = monotonic()
        self._breaker.begin(self)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._breaker.end(self)
        if self._is_given_up and self._task is not None:
            self._task.uncancel()
            if kind is not None and issubclass(kind, asyncio.CancelledError):
                raise DatabaseUnavailable(OUTAGE_MESSAGE) from error

    def give_up(self) -> None:
        """Cancel the task in the context because of an outage; then leaving the context raises `DatabaseUnavailable`.

        Does nothing if no task is in the context, and in later calls.
        """
        if self._task is not None and not self._is_given_up:
            self._is_given_up = True
            self._task.cancel()
