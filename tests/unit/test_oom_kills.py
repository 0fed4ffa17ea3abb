"""Out-of-memory kills: distinguished from other deaths, and reported by the parent of a worker."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from models import oom_kills
from models.pod_identity import PodProcess
from tests.unit.test_pod_processes import NOON, SECOND
from workers.cluster import pod_status
from workers.deployer import reconcile

V1, V2 = "9:cpu:/a\n4:memory:/a/b\n0::/\n", "0::/a/b\n"
PARENT = """
import os, pathlib, signal, sys
from models import oom_kills
from pilotflame import worker_parent

counted = pathlib.Path(sys.argv[1])
oom_kills.count_kills = lambda: int(counted.read_text())
announce = worker_parent.fork_worker(print)
announce("worker:a/1")
counted.write_text(sys.argv[2])
os.kill(os.getpid(), int(sys.argv[3]))
"""


@pytest.mark.parametrize(
    ("groups", "file"),
    [
        (V1, "sys/fs/cgroup/memory/a/b/memory.oom_control"),
        (V1, "sys/fs/cgroup/memory/memory.oom_control"),
        (V2, "sys/fs/cgroup/a/b/memory.events"),
        (V2, "sys/fs/cgroup/memory.events"),
        (V2, "proc/vmstat"),
        ("", "proc/vmstat"),
    ],
)
def test_out_of_memory_kills_are_counted_with_either_cgroup_version(
    tmp_path: Path, groups: str, file: str
) -> None:
    for name, text in (
        ("proc/self/cgroup", groups),
        ("proc/vmstat", "oom_kill 9\n"),
        (file, "low 0\noom_kill 7\n"),
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert oom_kills.count_kills(tmp_path) == 7


def test_where_nothing_is_told_nothing_is_taken_for_a_kill(tmp_path: Path) -> None:
    assert oom_kills.count_kills(tmp_path) is None


@pytest.mark.parametrize(
    ("counted_then", "number", "is_out_of_memory"), [("4", 9, True), ("3", 9, False), ("4", 15, False)]
)
def test_a_parent_tells_a_child_killed_for_memory_from_others(
    tmp_path: Path, counted_then: str, number: int, *, is_out_of_memory: bool
) -> None:
    (tmp_path / "count").write_text("3")
    command = [sys.executable, "-c", PARENT, str(tmp_path / "count"), counted_then, str(number)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.stderr == ""
    assert done.returncode == 128 + number
    death = f"ChildDeath(owner='worker:a/1', exit_code=-{number}, is_out_of_memory={is_out_of_memory})"
    assert done.stdout == f"{death}\n"


def test_a_process_of_a_pod_that_ran_out_of_memory_is_distinguished() -> None:
    status = {"state": {}, "lastState": {"terminated": {"reason": "OOMKilled"}}}
    listed = [
        {"metadata": {"name": name}, "spec": {}, "status": {"containerStatuses": [one]}}
        for name, one in (("a", status), ("b", {"state": {"terminated": {"reason": "Error"}}}))
    ]
    observed = pod_status.summarize_deployment("wf_1", None, listed, port=1)
    gone = [PodProcess(name, NOON - SECOND) for name in ("a", "b", "c")]
    assert reconcile.out_of_memory_processes(gone, observed) == {gone[0]}
