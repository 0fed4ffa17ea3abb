"""Budgets of computations on the event loop, for functions that measure their own effort.

Such a function calls `budget` for the amount that it may use. Beyond that it raises `BudgetExceeded` if `try_inline`
called it. It must have had no side effect by then. Processes without an event loop load this module alone.
"""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from typing import Final, ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")

is_inline: Final = ContextVar("is_inline", default=False)
"""Whether the code runs on the event loop under the brief budget."""


class BudgetExceeded(Exception):
    """Inline computation that would block the event loop for too long."""


def budget(most: int, brief: int) -> int:
    """Return the permitted amount of work: at most `brief` inside `try_inline`, `most` otherwise.

    The unit is the caller's, such as bytes or steps.
    """
    return min(most, brief) if is_inline.get() else most


def require_offloaded() -> None:
    """Raise `BudgetExceeded` inside `try_inline`: the work that follows is too long for the event loop."""
    if is_inline.get():
        raise BudgetExceeded


def try_inline(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Call a function on the event loop with the brief budget, and return its result.

    Raises `BudgetExceeded` if the function finds that its work is too long for the loop (it asks by `budget`
    or `require_offloaded`), and the errors of the function.
    """
    before = is_inline.set(True)
    try:
        return function(*args, **kwargs)
    finally:
        is_inline.reset(before)
