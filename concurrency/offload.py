"""Offload long computations: run them inline on the event loop, or in a thread beyond a budget.

A function that measures its own effort calls `budget` for the amount that it may use. Beyond that it
raises `BudgetExceeded` if `try_inline` called it. It must have had no side effect by then.
"""

from __future__ import annotations

import asyncio
import sys
from collections import deque
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar
from typing import Any, Final, ParamSpec, TypeVar
from weakref import WeakKeyDictionary

P = ParamSpec("P")
T = TypeVar("T")

SWITCH_SECONDS: Final = 0.001
"""Time that the loop waits for the thread to release the interpreter's lock; Python's default is 0.005."""
_is_inline: Final = ContextVar("is_inline", default=False)
# One thread: pure Python code is no faster in several, and each additional thread would delay the loop.
_thread: Final = ThreadPoolExecutor(
    max_workers=1,
    thread_name_prefix="long-work",
    initializer=lambda: sys.setswitchinterval(SWITCH_SECONDS),
)


class BudgetExceeded(Exception):
    """Inline computation that would block the event loop for too long."""


def budget(most: int, brief: int) -> int:
    """Return the permitted amount of work: at most `brief` inside `try_inline`, `most` otherwise.

    The unit is the caller's, such as bytes or steps.
    """
    return min(most, brief) if _is_inline.get() else most


def require_offloaded() -> None:
    """Raise `BudgetExceeded` inside `try_inline`: the work that follows is too long for the event loop."""
    if _is_inline.get():
        raise BudgetExceeded


def try_inline(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Call a function on the event loop with the brief budget, and return its result.

    Raises `BudgetExceeded` if the function finds that its work is too long for the loop (it asks by `budget`
    or `require_offloaded`), and the errors of the function.
    """
    before = _is_inline.set(True)
    try:
        return function(*args, **kwargs)
    finally:
        _is_inline.reset(before)


async def run_in_thread(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Call a function in the process's one thread for long work; return its result or raise its error.

    Calls wait for each other in order. A cancellation does not stop a function that has begun.
    """
    return await asyncio.wrap_future(_thread.submit(function, *args, **kwargs))


async def run(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Call a function on the event loop; if it exceeds the brief budget, call it again from its beginning in
    the thread.

    So the function must be repeatable. Returns its result or raises its error.
    """
    try:
        return try_inline(function, *args, **kwargs)
    except BudgetExceeded:
        return await run_in_thread(function, *args, **kwargs)


async def run_coroutine(begin: Callable[[], Coroutine[Any, Any, T]]) -> T:
    """Run the coroutine that `begin` creates, which awaits only `yield_to_loop`; return its result or raise its error.

    It runs on the event loop. If it exceeds the brief budget, `begin` is called again, and the second coroutine runs
    from its beginning in the thread, step by step, so that other calls get the thread in between.
    """
    before = _is_inline.set(True)
    try:
        return await begin()
    except BudgetExceeded:
        pass
    finally:
        _is_inline.reset(before)
    coroutine = begin()
    while True:
        step = _thread.submit(_advance, coroutine)
        try:
            if result := await asyncio.wrap_future(step):
                return result[0]
        except BaseException:
            # The thread may still execute a step: close the coroutine after that step.
            step.add_done_callback(lambda _: coroutine.close())
            raise


def _advance(coroutine: Coroutine[Any, Any, T]) -> tuple[T] | None:
    """Advance a coroutine to its next yield; return None, or its result in a tuple when it has ended."""
    try:
        coroutine.send(None)
    except StopIteration as end:
        return (end.value,)
    return None


# ── yielding to the loop ────────────────────────────────────────────────────────────────────────────────────


class _LoopQueue:
    """Queue of the coroutines that wait for their next step on one loop: one per pass of the loop."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._waiting: deque[asyncio.Future[None]] = deque()

    def join(self) -> asyncio.Future[None]:
        """Return a future that is done in a later pass of the event loop: one per pass, in the order of calls."""
        turn = self._loop.create_future()
        self._waiting.append(turn)
        if len(self._waiting) == 1:
            self._loop.call_soon(self._call_next)
        return turn

    def _call_next(self) -> None:
        """Resume the coroutine that has waited longest, and schedule the next one for the next pass of the
        event loop.
        """
        while self._waiting and self._waiting[0].done():
            self._waiting.popleft()
        if self._waiting:
            self._waiting[0].set_result(None)
            self._loop.call_soon(self._call_next)


_loop_queues: WeakKeyDictionary[asyncio.AbstractEventLoop, _LoopQueue] = WeakKeyDictionary()


async def yield_to_loop() -> None:
    """Let other work of the event loop run; one waiting coroutine is resumed per pass, so a long queue delays
    little.

    Without a running loop, the thread that drives the coroutine resumes it.
    """
    try:
        loop = asyncio.get_running_loop()
    except RuntimeError:
        await asyncio.sleep(0)  # the thread that drives this coroutine resumes it
        return
    queue = _loop_queues.get(loop)
    if queue is None:
        queue = _loop_queues[loop] = _LoopQueue(loop)
    await queue.join()
