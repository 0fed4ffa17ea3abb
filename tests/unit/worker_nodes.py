"""Functions that a worker runs in processes: these import them by name."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from pilotflame_sdk import Task, TaskError


@dataclass
class Counted:
    """Config of `count`."""

    number: int = 3


def count(config: Counted, task: Task) -> dict[str, Any]:
    """Count up with progress and checkpoints; return the process id, input and config."""
    for number in task.track(range(config.number), message="counting"):
        task.checkpoint = number
        task.log(f"at {number}")
    return {"process": os.getpid(), "input": task.input, "config": task.config}


def hang() -> None:
    """Never end."""
    time.sleep(600)


def hang_once(task: Task) -> int:
    """Return the number of the attempt; the first one never ends."""
    if task.attempt == 1:
        hang()
    return task.attempt


def die() -> None:
    """Die as a crash would."""
    os.kill(os.getpid(), signal.SIGKILL)


def give_odd_values(task: Task) -> None:
    """Report values that no report can hold, and raise `TaskError` with the names of their errors."""
    found = []
    calls: list[Callable[[], object]] = [
        lambda: setattr(task, "checkpoint", object()),
        lambda: setattr(task, "checkpoint", float("nan")),
        lambda: setattr(task, "checkpoint", "x" * 70_000),
        lambda: task.progress(float("inf")),
        lambda: TaskError("later", "Later.", retry=-1),
    ]
    for call in calls:
        try:
            call()
        except (TypeError, ValueError) as error:
            found.append(type(error).__name__)
    done = {"done": [1]}
    task.checkpoint = done
    done["done"].append(2)  # The checkpoint stays as it was set.
    task.log("a\udc80b")
    raise TaskError("odd", " ".join(found), retry=False)
