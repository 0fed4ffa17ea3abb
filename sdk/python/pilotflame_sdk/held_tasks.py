"""Attempts that a worker holds, and the reports about them that the server has not answered yet.

An attempt is a task under one lease: a worker can hold an attempt that the server has ended and the next one of the
same task.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from pilotflame_sdk.errors import DeadlineExceeded, LeaseLost, TaskCancelled
from pilotflame_sdk.tasks import Task

FIRST_REPORT_SECONDS: Final = 2.0
"""The first lease is short: the server keeps a task only if a report names it soon after the claim."""
PROGRESS_SECONDS: Final = 1.0
MAX_ITEMS: Final = 200
MAX_LINES: Final = 200
MAX_REPORT_LINES: Final = 20_000
MAX_LOG_CHARACTERS: Final = 1_000_000
"""Lines of one task in one report; the server accepts 1,000 items."""
MAX_REPORT_BYTES: Final = 4_000_000
"""Size from which a report takes no more tasks: the server accepts 10 MB, and one task adds 4 MB at most."""
AttemptKey = tuple[str, str]
"""Id and lease."""
FINAL_KINDS: Final = frozenset({"complete", "fail", "release"})
_LOST: Final = "Another worker may run this task by now"


@dataclass
class HeldTask:
    """Attempt of a task; `reported` is its final report, until the server has answered that."""

    id: str
    lease: str
    lease_seconds: float
    task: Task
    claimed_at: float
    renewed_at: float
    """Begin of the last request that has renewed the lease, by the monotonic clock."""
    deadline_at: float
    """By the monotonic clock; infinite for a server that doesn't tell the timeout."""
    is_acknowledged: bool = False
    reported: Mapping[str, Any] | None = None
    output_bytes: int = 0
    """Size of the output in the final report."""
    told_at: float = 0.0
    on_end: list[Callable[[], None]] = field(default_factory=list)
    """Calls that end the function: for a coroutine or a process."""
    thread_id: int | None = None
    """Thread that runs the function."""

    @property
    def key(self) -> AttemptKey:
        return self.id, self.lease

    @property
    def report_due(self) -> float:
        """Time of the next report that has to name the task, by the monotonic clock.

        Two seconds after the claim at first, then after a third of the lease.
        """
        if not self.is_acknowledged:
            return self.claimed_at + FIRST_REPORT_SECONDS
        return self.renewed_at + self.lease_seconds / 3

    def end(self, reason: TaskCancelled | None = None) -> None:
        """Ask the function of the task to stop, for a reason other than that its run was cancelled."""
        self.task.cancel(reason)
        for call in self.on_end:
            call()


class HeldTasks:
    """Tasks of a worker, shared by the threads that claim, run and report; every method is safe to call from any."""

    def __init__(self, slots: int) -> None:
        self.slots = slots
        self.changed = threading.Condition()
        self._tasks: dict[AttemptKey, HeldTask] = {}
        self._running = 0
        self._claimed: str | None = None
        self._is_urgent = False

    @property
    def free(self) -> int:
        """Number of slots without a running function; a slot is room for one task."""
        return max(0, self.slots - self._running)

    @property
    def is_empty(self) -> bool:
        """Whether every task's result is reported and answered, so that the worker may end."""
        return not self._tasks

    @property
    def is_running(self) -> bool:
        """Whether any function runs."""
        return self._running > 0

    def add(self, request_id: str, claimed: Iterable[Mapping[str, Any]]) -> list[HeldTask]:
        """Store the tasks of an answered claim, and return those that weren't held yet, to be started.

        `request_id` is the id of the claim, which the next report acknowledges.
        """
        now = time.monotonic()
        added = []
        with self.changed:
            self._claimed = request_id
            for fields in claimed:
                held = HeldTask(
                    str(fields["id"]),
                    str(fields["lease"]),
                    float(fields.get("leaseSeconds", 30)),
                    Task(fields, self.wake),
                    now,
                    now,
                    now + float(fields.get("timeoutSeconds", math.inf)),
                )
                if held.key not in self._tasks:
                    self._tasks[held.key] = held
                    self._running += 1
                    added.append(held)
            self.changed.notify_all()
        return added

    def wake(self) -> None:
        """Let the next report be sent soon, because there is something that must not be lost, such as a checkpoint."""
        with self.changed:
            self._is_urgent = True
            self.changed.notify_all()

    def wait_for_change(self, seconds: float) -> None:
        """Wait until a task begins, ends or is answered, at most for these seconds."""
        with self.changed:
            self.changed.wait(seconds)

    def finish(self, held: HeldTask, report: Mapping[str, Any]) -> None:
        """Store the final report of a task after the end of its function, which frees its slot;
        a second report is ignored.
        """
        with self.changed:
            if held.reported is None:
                held.reported = report
                self._running -= 1
            self.changed.notify_all()

    def replace_report(self, key: AttemptKey, report: Mapping[str, Any]) -> None:
        """Replace the final report of a held attempt by another one, since the server does not take it;
        unknown keys are ignored.
        """
        with self.changed:
            held = self._tasks.get(key)
            if held is not None:
                held.reported = report
            self.changed.notify_all()

    def list_running(self) -> list[HeldTask]:
        """Return the tasks with a function that still runs."""
        with self.changed:
            return [held for held in self._tasks.values() if held.reported is None]

    def cancel(self, task_ids: Iterable[str]) -> None:
        """Ask the functions of cancelled tasks to stop, since these get no new attempt; unknown ids are ignored."""
        ids = set(task_ids)
        with self.changed:
            cancelled = [held for held in self._tasks.values() if held.id in ids]
        for held in cancelled:
            held.end()

    def end_overdue(self) -> list[HeldTask]:
        """End the attempts whose deadlines have passed since the last call, and return those."""
        now = time.monotonic()
        overdue = [
            held for held in self.list_running() if held.deadline_at <= now and not held.task.is_cancelled
        ]
        for held in overdue:
            held.end(DeadlineExceeded("The task has exceeded its timeout"))
        return overdue

    # ── reports ───────────────────────────────────────────────────────────────────────────────────────────

    def wait_for_report(self) -> None:
        """Wait until a report is due or urgent, at most a second."""
        with self.changed:
            seconds = self._seconds_left()
            if seconds > 0:
                self.changed.wait(seconds)

    def _seconds_left(self) -> float:
        """Return the seconds until the next report, 0 to 1; 0 for urgent news and final reports."""
        now = time.monotonic()
        if self._is_urgent or any(held.reported for held in self._tasks.values()):
            return 0.0
        due = min((held.report_due for held in self._tasks.values()), default=now + PROGRESS_SECONDS)
        return min(max(due - now, 0.0), PROGRESS_SECONDS)

    def build_report(self) -> tuple[list[Mapping[str, Any]], list[AttemptKey], str | None]:
        """Return the items of the next report (at most about 200), the keys of all held attempts, and the last
        answered claim.

        Without items, a report of the keys renews the leases; nothing is due if the keys are empty too.
        """
        now = time.monotonic()
        with self.changed:
            self._is_urgent = False
            items: list[Mapping[str, Any]] = []
            is_due, size = False, 0
            for held in self._tasks.values():
                if len(items) >= MAX_ITEMS or size >= MAX_REPORT_BYTES:
                    break
                added = list(_items_of(held, now))
                size += held.output_bytes if held.reported is not None else 0
                size += sum(len(line["message"]) for one in added for line in one.get("lines", ()))
                items += added
                is_due = is_due or held.report_due <= now
            if not items and not is_due:
                return [], [], None
            return items, list(self._tasks), self._claimed

    def take_results(
        self,
        items: Sequence[Mapping[str, Any]],
        keys: Iterable[AttemptKey],
        results: Sequence[Mapping[str, Any]],
        begun: float,
    ) -> list[tuple[Mapping[str, Any], Mapping[str, Any]]]:
        """Apply the answer to a report; return the items that the server has refused, each with its answer.

        Answered final reports end their attempts. The functions of lost and cancelled ones are asked to stop. `begun`
        is the time of the report, by the monotonic clock, from which renewed leases count.
        """
        refused = []
        final: set[AttemptKey] = set()
        gone: dict[tuple[str, str | None], str] = {}
        """Statuses of ended attempts; older servers name the task alone."""
        for place, result in enumerate(results):
            item = items[place] if place < len(items) else {"lease": None, **result, "kind": "heartbeat"}
            status = result["status"]
            if status == "refused":
                refused.append((item, result))
            if item["kind"] in FINAL_KINDS and not _is_unchanged(result):
                final.add((item["id"], item["lease"]))
            elif status in {"lost", "cancelled"}:
                gone[item["id"], item["lease"]] = status
        with self.changed:
            ended = [
                (held, status)
                for held in self._tasks.values()
                if (status := gone.get(held.key) or gone.get((held.id, None)))
            ]
            for held in (self._tasks[key] for key in keys if key in self._tasks):
                if (held.id, None) not in gone and held.key not in gone:
                    held.is_acknowledged = True
                    held.renewed_at = begun
            for key in final:
                self._tasks.pop(key, None)
            self.changed.notify_all()
        for held, status in ended:
            held.end(LeaseLost(_LOST) if status == "lost" else None)
        return refused

    def end_expired(self) -> None:
        """Ask functions to stop if their leases have expired, because no report reached the server."""
        now = time.monotonic()
        with self.changed:
            expired = [held for held in self._tasks.values() if now - held.renewed_at > held.lease_seconds]
        for held in expired:
            held.end(LeaseLost(_LOST))


def _items_of(held: HeldTask, now: float) -> Iterable[Mapping[str, Any]]:
    """Yield the items of a report about a task: log lines, progress and checkpoint, and at last its final report.

    Yielded lines and news are removed from the task. They come at most once a second, 200 lines an item, about 1 MB a
    report; the final report follows after the last lines.
    """
    name = {"id": held.id, "lease": held.lease}
    if held.reported is not None or now - held.told_at >= PROGRESS_SECONDS:
        held.told_at = now
        lines = held.task.take_lines(MAX_REPORT_LINES, MAX_LOG_CHARACTERS)
        for start in range(0, len(lines), MAX_LINES):
            yield {**name, "kind": "log", "lines": lines[start : start + MAX_LINES]}
        news = held.task.take_news()
        # The checkpoint of an attempt that has failed is for the next one.
        if news and (held.reported is None or held.reported["kind"] != "complete"):
            yield {**name, "kind": "heartbeat", **news}
    if held.reported is not None and not held.task.has_lines:
        yield {**name, **held.reported}


def _is_unchanged(result: Mapping[str, Any]) -> bool:
    """Return whether a final report was refused for a missing output, which changes nothing:
    another report must follow.
    """
    error = result.get("error") or {}
    return result["status"] == "refused" and error.get("code") == "output-missing"
