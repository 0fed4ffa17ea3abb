"""Tasks that a worker holds, and the reports about them that the server has not answered yet."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

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
FINAL_KINDS: Final = frozenset({"complete", "fail", "release"})


@dataclass
class HeldTask:
    """Task with its lease; `reported` is its final report, until the server has answered that."""

    id: str
    lease: str
    lease_seconds: float
    task: Task
    claimed_at: float
    renewed_at: float
    """Begin of the last request that has renewed the lease, by the monotonic clock."""
    is_acknowledged: bool = False
    reported: Mapping[str, Any] | None = None
    output_bytes: int = 0
    """Size of the output in the final report."""
    told_at: float = 0.0
    on_end: list[Callable[[], None]] = field(default_factory=list)
    """Calls that end the function: for a coroutine or a process."""

    @property
    def report_due(self) -> float:
        """Time of the next report that has to name the task, by the monotonic clock.

        Two seconds after the claim at first, then after a third of the lease.
        """
        if not self.is_acknowledged:
            return self.claimed_at + FIRST_REPORT_SECONDS
        return self.renewed_at + self.lease_seconds / 3

    def end(self, *, is_lost: bool = False) -> None:
        """Ask the function of the task to stop; `is_lost`: because another worker may have the task."""
        self.task.cancel(is_lost=is_lost)
        for call in self.on_end:
            call()


class HeldTasks:
    """Tasks of a worker, shared by the threads that claim, run and report; every method is safe to call from any."""

    def __init__(self, slots: int) -> None:
        self.slots = slots
        self.changed = threading.Condition()
        self._tasks: dict[str, HeldTask] = {}
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
                )
                if held.id not in self._tasks:
                    self._tasks[held.id] = held
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

    def replace_report(self, task_id: str, report: Mapping[str, Any]) -> None:
        """Replace the final report of a held task by another one, since the server does not take it;
        unknown ids are ignored.
        """
        with self.changed:
            held = self._tasks.get(task_id)
            if held is not None:
                held.reported = report
            self.changed.notify_all()

    def list_running(self) -> list[HeldTask]:
        """Return the tasks with a function that still runs."""
        with self.changed:
            return [held for held in self._tasks.values() if held.reported is None]

    def end_tasks(self, ids: Iterable[str], *, is_lost: bool = False) -> None:
        """Ask the functions of these tasks to stop; unknown ids are ignored.

        `is_lost`: because other workers may have the tasks.
        """
        with self.changed:
            found = [self._tasks[one] for one in ids if one in self._tasks]
        for held in found:
            held.end(is_lost=is_lost)

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

    def build_report(self) -> tuple[list[Mapping[str, Any]], list[str], str | None]:
        """Return the items of the next report (at most about 200), the ids of all held tasks, and the last
        answered claim.

        Without items, a report of the ids renews the leases; nothing is due if the ids are empty too.
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
        held_ids: Iterable[str],
        results: Sequence[Mapping[str, Any]],
        begun: float,
    ) -> list[tuple[Mapping[str, Any], Mapping[str, Any]]]:
        """Apply the answer to a report; return the items that the server has refused, each with its answer.

        Answered final reports end their tasks. Lost and cancelled tasks are asked to stop. `begun` is the
        time of the report, by the monotonic clock, from which renewed leases count.
        """
        refused = []
        gone: set[str] = set()
        final: set[str] = set()
        for place, result in enumerate(results):
            item = items[place] if place < len(items) else {"id": result["id"], "kind": "heartbeat"}
            status = result["status"]
            if status == "refused":
                refused.append((item, result))
            if item["kind"] in FINAL_KINDS and not _is_unchanged(result):
                final.add(str(item["id"]))
            elif status in {"lost", "cancelled"}:
                gone.add(str(result["id"]))
        lost = {str(one["id"]) for one in results if one["status"] == "lost"}
        with self.changed:
            for task_id in held_ids:
                held = self._tasks.get(task_id)
                if held is not None and task_id not in gone:
                    held.is_acknowledged = True
                    held.renewed_at = begun
            for task_id in final:
                self._tasks.pop(task_id, None)
            self.changed.notify_all()
        self.end_tasks(gone - lost)
        self.end_tasks(gone & lost, is_lost=True)
        return refused

    def end_overdue(self) -> None:
        """Ask functions to stop if their leases have expired, because no report reached the server."""
        now = time.monotonic()
        with self.changed:
            over = [held.id for held in self._tasks.values() if now - held.renewed_at > held.lease_seconds]
        self.end_tasks(over, is_lost=True)


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
