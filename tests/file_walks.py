"""Walks through the code: the project's files in which functions are entered while a request is served."""

from __future__ import annotations

import asyncio
import inspect
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from types import CodeType
from typing import Any, Final

import pytest

ROOT: Final = Path(__file__).parents[1]
MONITORING: Final[Any] = getattr(sys, "monitoring", None)
"""Events of the interpreter; Python 3.11 has none."""
NOT_OF_THE_PRODUCT: Final = ("tests/", "benchmarks/", "docs/", ".venv/", "models/sqlite_driver.py")
"""Beginnings of paths; the driver's classes are called by SQLAlchemy alone, as those of aiosqlite are."""

_is_ignored: Final[ContextVar[bool]] = ContextVar("is_ignored", default=False)


def ignore_other_tasks() -> None:
    """Let walks pass over all present tasks of this event loop but the current one, and the tasks that they start.

    They belong to earlier tests: a circuit breaker goes on probing a server that one of them ended.
    """
    if sys.version_info < (3, 12):
        return  # nothing records walks
    for task in asyncio.all_tasks() - {asyncio.current_task()}:
        task.get_context().run(_is_ignored.set, True)  # noqa: FBT003 - as `set` is called


class FileWalk:
    """Files of the product in the order in which their first functions were called, each with that function."""

    def __init__(self) -> None:
        self.files: dict[str, str] = {}

    def enter(self, code: CodeType, _offset: int) -> object:
        """Record the file of a function that is called, and ask the interpreter
        for no further event of that function.
        """
        if _is_ignored.get():
            return None  # another task may call it later
        is_function = code.co_flags & inspect.CO_NEWLOCALS and code.co_flags & inspect.CO_OPTIMIZED
        if is_function and code.co_filename.startswith(f"{ROOT}/"):
            path = code.co_filename.removeprefix(f"{ROOT}/")
            if not path.startswith(NOT_OF_THE_PRODUCT):
                self.files.setdefault(path, code.co_qualname)
        disabled: object = MONITORING.DISABLE
        return disabled

    def __str__(self) -> str:
        return "\n".join(
            f"{number:3} {path} {function}" for number, (path, function) in enumerate(self.files.items(), 1)
        )


@contextmanager
def record_walk() -> Iterator[FileWalk]:
    """Record the files of which functions are called during the context, by any thread of this process and any task
    that is not ignored.

    Bodies of modules and classes don't count, nor do coroutines that only continue. Skips the test on Python 3.11.
    """
    if MONITORING is None:
        pytest.skip("Python 3.11 reports no events of functions")
    walk, tool, started = FileWalk(), MONITORING.PROFILER_ID, MONITORING.events.PY_START
    MONITORING.use_tool_id(tool, "file walks")
    try:
        MONITORING.register_callback(tool, started, walk.enter)
        MONITORING.set_events(tool, started)
        MONITORING.restart_events()
        yield walk
    finally:
        MONITORING.set_events(tool, 0)
        MONITORING.register_callback(tool, started, None)
        MONITORING.free_tool_id(tool)
