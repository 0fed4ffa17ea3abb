"""Work that turns out to be long: begun on the event loop, and done over in a thread where others would wait for it.

Whoever measures its own effort asks `allowed` how much it may take. Beyond that it raises `TakesLong` if it was begun
by `quick`, and nothing of it must have had an effect by then.
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

Given = ParamSpec("Given")
Made = TypeVar("Made")

SWITCH_SECONDS: Final = 0.001
"""So long the loop waits for the thread whenever it has something to do, where Python would have it wait for five."""
_is_inline: Final = ContextVar("is_brief", default=False)
# One: work of Python's own is no faster in several, and each more would keep the loop waiting.
_thread: Final = ThreadPoolExecutor(
    max_workers=1,
    thread_name_prefix="long-work",
    initializer=lambda: sys.setswitchinterval(SWITCH_SECONDS),
)


class BudgetExceeded(Exception):
    """More is to be done than others should wait for."""


def budget(most: int, brief: int) -> int:
    """Return how much may be done: `brief` where others wait, and otherwise `most`."""
    return min(most, brief) if _is_inline.get() else most


def require_offloaded() -> None:
    """Raise `TakesLong` where others wait: what goes on is long."""
    if _is_inline.get():
        raise BudgetExceeded


def try_inline(function: Callable[Given, Made], *args: Given.args, **kwargs: Given.kwargs) -> Made:
    """Call a function while others wait; raises `TakesLong`."""
    before = _is_inline.set(True)
    try:
        return function(*args, **kwargs)
    finally:
        _is_inline.reset(before)


async def run_in_thread(function: Callable[Given, Made], *args: Given.args, **kwargs: Given.kwargs) -> Made:
    """Call a function in the thread for long work."""
    return await asyncio.wrap_future(_thread.submit(function, *args, **kwargs))


async def run(function: Callable[Given, Made], *args: Given.args, **kwargs: Given.kwargs) -> Made:
    """Call a function here, or in the thread where it turns out to take long."""
    try:
        return try_inline(function, *args, **kwargs)
    except BudgetExceeded:
        return await run_in_thread(function, *args, **kwargs)


async def run_coroutine(begin: Callable[[], Coroutine[Any, Any, Made]]) -> Made:
    """Run a coroutine that waits for nothing but its turns here, or all over in the thread, turn by turn."""
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
            if ended := await asyncio.wrap_future(step):
                return ended[0]
        except BaseException:
            # It may be at work still: then it is closed when it comes to the end of its turn.
            step.add_done_callback(lambda _: coroutine.close())
            raise


def _advance(coroutine: Coroutine[Any, Any, Made]) -> tuple[Made] | None:
    """Take a coroutine to its next turn, or to its end."""
    try:
        coroutine.send(None)
    except StopIteration as end:
        return (end.value,)
    return None


# ── turns on the loop ───────────────────────────────────────────────────────────────────────────────────────


class _LoopQueue:
    """Those that wait on one loop for their next turn: in each pass of the loop, one has it."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._waiting: deque[asyncio.Future[None]] = deque()

    def join(self) -> asyncio.Future[None]:
        turn = self._loop.create_future()
        self._waiting.append(turn)
        if len(self._waiting) == 1:
            self._loop.call_soon(self._call_next)
        return turn

    def _call_next(self) -> None:
        while self._waiting and self._waiting[0].done():
            self._waiting.popleft()
        if self._waiting:
            self._waiting[0].set_result(None)
            self._loop.call_soon(self._call_next)


_loop_queues: WeakKeyDictionary[asyncio.AbstractEventLoop, _LoopQueue] = WeakKeyDictionary()


async def yield_to_loop() -> None:
    """End a stretch of work on the loop: however many have much to do, the others wait for one stretch at a time."""
    try:
        loop = asyncio.get_running_loop()
    except RuntimeError:
        await asyncio.sleep(0)  # whoever drives this takes it up again
        return
    line = _loop_queues.get(loop)
    if line is None:
        line = _loop_queues[loop] = _LoopQueue(loop)
    await line.join()
