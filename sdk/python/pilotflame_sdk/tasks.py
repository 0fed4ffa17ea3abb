"""Task of a node: the run that it belongs to, progress, checkpoints, log lines, and cancellation."""

from __future__ import annotations

import json
import logging
import math
import sys
import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import Any, Final, Generic, TypeVar

from pilotflame_sdk.errors import TaskCancelled
from pilotflame_sdk.schemas import to_json

T = TypeVar("T")

CURRENT_TASK: ContextVar[Task | None] = ContextVar("pilotflame_task", default=None)
LEVELS: Final = frozenset({"debug", "info", "warning", "error"})
MAX_CHECKPOINT_BYTES: Final = 65_536
MAX_LINE_CHARACTERS: Final = 20_000
MAX_PROGRESS_CHARACTERS: Final = 500


@dataclass(frozen=True)
class PortOutput(Generic[T]):
    """Output at a port other than `output`; made by `Task.port`."""

    port: str
    value: T


class Task:
    """Task that a node's function works on."""

    def __init__(self, fields: Mapping[str, Any], changed: Callable[[], None] = lambda: None) -> None:
        self.id = str(fields["id"])
        self.type = str(fields["type"])
        self.version = str(fields["version"])
        self.attempt = int(fields.get("attempt", 1))
        """Number of this attempt, from 1."""
        self.execution_id = str(fields.get("executionId", ""))
        self.node_id = str(fields.get("nodeId", ""))
        self.idempotency_key = str(fields.get("idempotencyKey", ""))
        """Key for requests to other systems: the same in every attempt."""
        self.deadline: str | None = fields.get("deadline")
        """Time at which the server gives the task up, by the clock of its database."""
        self.config: Any = fields.get("config")
        """Config of the node as JSON; the function gets it as the class of its parameter."""
        self.input: Any = fields.get("input")
        """Data that arrived at the node."""
        self.traceparent: str | None = fields.get("traceparent")
        """Span of the node in the trace of its run; the current span, where OpenTelemetry is installed."""
        self._checkpoint: Any = fields.get("checkpoint")
        self._changed = changed
        self._lock = threading.Lock()
        self._news: dict[str, Any] = {}
        self._lines: list[dict[str, str]] = []
        self._end = threading.Event()
        self.end_reason: TaskCancelled = TaskCancelled("The task was cancelled")

    def __repr__(self) -> str:
        return f"<Task {self.id} {self.type} of {self.execution_id}, attempt {self.attempt}>"

    # ── for functions of nodes ────────────────────────────────────────────────────────────────────────────

    @property
    def is_cancelled(self) -> bool:
        """Whether the function should stop; long loops ask, or call `raise_if_cancelled`."""
        return self._end.is_set()

    def raise_if_cancelled(self) -> None:
        """Raise `TaskCancelled` once the function should stop: `LeaseLost` if another worker may have the task, and
        `DeadlineExceeded` after the timeout.
        """
        if self._end.is_set():
            raise self.end_reason

    def sleep(self, seconds: float) -> None:
        """Wait for these seconds, and raise `TaskCancelled` as soon as the function should stop."""
        if self._end.wait(seconds):
            raise self.end_reason

    def track(self, items: Iterable[T], *, total: int | None = None, message: str = "") -> Iterator[T]:
        """Yield the items, report after each the number of those done, and raise `TaskCancelled` between them.

        `total` is counted if the items have a length, and unknown otherwise.
        """
        known = len(items) if total is None and isinstance(items, Collection) else total
        for done, item in enumerate(items, start=1):
            self.raise_if_cancelled()
            yield item
            self.progress(done, known, message)

    def progress(self, done: float, total: float | None = None, message: str = "") -> None:
        """Report progress; the server shows the last one, and at most one a second is sent.

        `total` is None if it isn't known. Raises `TypeError` and `ValueError` for values that are no finite numbers.
        """
        shown = plain_text(message, MAX_PROGRESS_CHARACTERS)
        self._note(
            "progress",
            {"done": _number(done), "total": None if total is None else _number(total), "message": shown},
        )

    @property
    def checkpoint(self) -> Any:  # noqa: ANN401 - any JSON
        """Value for the next attempt, such as the last item done: JSON of at most 64 kB.

        An attempt begins with the checkpoint of the one before, or with None. Setting it raises `TypeError` and
        `ValueError` for a value that is no JSON, or too large.
        """
        return self._checkpoint

    @checkpoint.setter
    def checkpoint(self, value: Any) -> None:  # noqa: ANN401 - any JSON
        # A copy: the function may go on with the value while a report is sent.
        encoded = json.dumps(to_json(value), allow_nan=False)
        if len(encoded) > MAX_CHECKPOINT_BYTES:
            raise ValueError(f"A checkpoint has at most {MAX_CHECKPOINT_BYTES:,} bytes, not {len(encoded):,}")
        self._checkpoint = value
        self._note("checkpoint", json.loads(encoded))

    def _note(self, name: str, value: Any) -> None:  # noqa: ANN401 - any JSON
        """Keep progress or a checkpoint for the next report, which a checkpoint causes at once."""
        with self._lock:
            self._news[name] = value
        if name == "checkpoint":
            self._changed()

    def log(self, message: str, level: str = "info") -> None:
        """Write a line to the log of the execution: `debug`, `info`, `warning` or `error`; other levels count
        as `info`.
        """
        at = datetime.now(timezone.utc).isoformat(timespec="milliseconds")
        text = plain_text(message, MAX_LINE_CHARACTERS)
        line = {"level": level if level in LEVELS else "info", "at": at, "message": text}
        with self._lock:
            self._lines.append(line)

    def port(self, name: str, value: T) -> PortOutput[T]:
        """Return an output for another port of the node than `output`; the function has to return it."""
        return PortOutput(name, value)

    # ── for workers ───────────────────────────────────────────────────────────────────────────────────────

    def cancel(self, reason: TaskCancelled | None = None) -> None:
        """Ask the function to stop, for the first reason that is given; called by the worker."""
        if reason is not None and not self._end.is_set():
            self.end_reason = reason
        self._end.set()

    def wait_for_end(self, seconds: float) -> bool:
        """Wait until the function should stop, at most these seconds; return whether it should."""
        return self._end.wait(seconds)

    def take_news(self) -> dict[str, Any]:
        """Return progress and checkpoint set since the last call; empty without news. Called by the worker."""
        with self._lock:
            news, self._news = self._news, {}
            return news

    def take_lines(
        self, max_lines: int = sys.maxsize, max_characters: int = sys.maxsize
    ) -> list[dict[str, str]]:
        """Return the oldest log lines that were not taken, at least one if there is any; called by the worker."""
        with self._lock:
            count = size = 0
            for line in self._lines[:max_lines]:
                size += len(line["message"])
                if count and size > max_characters:
                    break
                count += 1
            lines, self._lines = self._lines[:count], self._lines[count:]
            return lines

    @property
    def has_lines(self) -> bool:
        """Whether there are log lines that were not taken."""
        return bool(self._lines)


def plain_text(value: object, most: int) -> str:
    """Return a text that JSON can hold, cut to a number of characters: names of files may have lone surrogates."""
    return str(value)[:most].encode("utf-8", "replace").decode()


def _number(value: Any) -> float:  # noqa: ANN401 - also numbers of numpy
    """Return a number as JSON has it; raises `TypeError` and `ValueError`."""
    number = float(value)
    if not math.isfinite(number):
        raise ValueError(f"{value!r} is no progress: use finite numbers")
    return int(number) if number.is_integer() else number


class TaskLogHandler(logging.Handler):
    """Sends records of `logging` that a node's function makes to the log of its execution."""

    def emit(self, record: logging.LogRecord) -> None:
        """Add a log record to the task that the current context works on; do nothing outside of a task.

        Records of the SDK and its HTTP library are left out.
        """
        task = CURRENT_TASK.get()
        if task is not None and not record.name.startswith(("httpx2", "httpcore2", "pilotflame_sdk")):
            level = "error" if record.levelno >= logging.ERROR else record.levelname.lower()
            task.log(self.format(record), level)
