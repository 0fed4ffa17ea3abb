"""Count of processes that the kernel killed for lack of memory.

A higher count after the death of a process by SIGKILL shows that memory was the reason. The count is that of
the control group of this process, or of the whole machine without one.
"""

from __future__ import annotations

import signal
import time
from pathlib import Path
from typing import Final

LOOK_SECONDS: Final = 2.0
_ROOT = Path("/")


def count_kills(root: Path = _ROOT) -> int | None:
    """Return the total number of processes killed for lack of memory in this cgroup or system; None if it is not
    reported.

    `root` is the root of the file system, another one in tests.
    """
    for file in _list_oom_counter_files(root):
        try:
            lines = file.read_text(encoding="ascii").splitlines()
        except OSError:
            continue
        for line in lines:
            name, _, value = line.partition(" ")
            if name == "oom_kill" and value.isdecimal():
                return int(value)
    return None


class OomKillWatch:
    """Watch that recognizes deaths of child processes by lack of memory."""

    def __init__(self) -> None:
        # Keeps two counts: the kernel counts a kill at once, and the process ends only after its memory is
        # released.
        self._earlier = self._latest = count_kills()
        self._look_at = time.monotonic() + LOOK_SECONDS

    def refresh(self) -> None:
        """Read the kernel's count, at most every two seconds, so that earlier kills of other processes are forgotten.

        Call it periodically.
        """
        if time.monotonic() >= self._look_at:
            self._earlier, self._latest = self._latest, count_kills()
            self._look_at = time.monotonic() + LOOK_SECONDS

    def was_oom_kill(self, exit_code: int | None) -> bool:
        """Return whether a child that has just ended with `exit_code` was killed for lack of memory.

        True for SIGKILL if the kernel's count of such kills has grown since the reading before the last one. False if
        the kernel reports no count.
        """
        if exit_code != -signal.SIGKILL or self._earlier is None:
            return False
        return (count_kills() or 0) > self._earlier


def _list_oom_counter_files(root: Path) -> list[Path]:
    """Return the files that may have the count of OOM kills: those of the cgroup (v1, then v2), and `/proc/vmstat`.

    They need not exist. A container that sees the whole cgroup hierarchy finds its cgroup by path, a container with
    its own cgroup namespace at the top.
    """
    groups = root / "sys/fs/cgroup"
    first: list[Path] = []
    last: list[Path] = []
    try:
        lines = (root / "proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if "memory" in controllers.split(","):
            first += [top / "memory.oom_control" for top in (groups / f"memory{path}", groups / "memory")]
        elif not controllers:
            last += [top / "memory.events" for top in (groups / path.lstrip("/"), groups)]
    return [*first, *last, root / "proc/vmstat"]
