"""Functions that a worker runs in processes: these import them by name."""

from __future__ import annotations

import os
import signal
import time
from dataclasses import dataclass
from typing import Any

from pilotflame_sdk import Task


@dataclass
class Counted:
    """Config of `count`."""

    number: int = 3


def count(config: Counted, task: Task) -> dict[str, Any]:
    """Count up with progress and a checkpoint."""
    for number in task.track(range(config.number), message="counting"):
        task.checkpoint = number
        task.log(f"at {number}")
    return {"process": os.getpid(), "input": task.input, "config": task.config}


def hang() -> None:
    """Never end."""
    time.sleep(600)


def die() -> None:
    """Die as a crash would."""
    os.kill(os.getpid(), signal.SIGKILL)
