"""Remaining work of a run: nodes to restore, to begin, in progress and asleep."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from heapq import heapify, heappush
from typing import TYPE_CHECKING

from engine.run_records import SETTLED_STATUSES

if TYPE_CHECKING:
    from engine.frames import NodeVisit, SectionFrame, SleepingNode


@dataclass(slots=True)
class Worklist:
    """Remaining work in all frames of a run."""

    settled_before: list[tuple[int, str, SectionFrame]] = field(default_factory=list)
    """Heap of ready nodes that settled in an earlier attempt, in the order in which they settled."""
    ready: deque[tuple[SectionFrame, str]] = field(default_factory=deque)
    tasks: dict[asyncio.Task[None], NodeVisit] = field(default_factory=dict)
    sleeping: dict[NodeVisit, SleepingNode] = field(default_factory=dict)

    def add(self, frame: SectionFrame, node_ids: Sequence[str]) -> None:
        """Add ready nodes."""
        frame.open += len(node_ids)
        if not frame.recorded:
            for node_id in node_ids:
                self.ready.append((frame, node_id))
            return
        for node_id in node_ids:
            recorded = frame.recorded.get(node_id)
            if recorded is not None and recorded.status in SETTLED_STATUSES:
                heappush(self.settled_before, (recorded.sequence, node_id, frame))
            else:
                self.ready.append((frame, node_id))

    def drop_frames(self, frames: Collection[SectionFrame]) -> list[NodeVisit]:
        """Remove unbegun nodes of frames and cancel their reads in progress; returns their sleeping visits."""
        dropped = [frame for frame, _ in self.ready if frame in frames]
        dropped += [frame for _, _, frame in self.settled_before if frame in frames]
        if dropped:
            self.ready = deque(entry for entry in self.ready if entry[0] not in frames)
            self.settled_before = [entry for entry in self.settled_before if entry[2] not in frames]
            heapify(self.settled_before)
        asleep = [visit for visit in self.sleeping if visit.frame in frames]
        for visit in asleep:
            del self.sleeping[visit]
        for frame in (*dropped, *(visit.frame for visit in asleep)):
            frame.open -= 1
        for task, visit in self.tasks.items():
            if visit.frame in frames and not visit.is_write:
                task.cancel()
        return asleep

    @property
    def has_write_at_work(self) -> bool:
        return any(visit.is_write for visit in self.tasks.values())

    @property
    def next_wake(self) -> float | None:
        """Earliest wake time of the sleeping nodes, by `time.monotonic`."""
        return min((one.wakes_at for one in self.sleeping.values() if one.wakes_at is not None), default=None)
