"""Processes of pods that hold runs, and those that hold none any more."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest

from models.pod_identity import PodProcess
from workers.cluster.driver import ObservedDeployment, ObservedPod
from workers.deployer import reconcile

NOON = datetime(2025, 1, 15, 12, 0, 0, 250_000, UTC)
SECOND = timedelta(seconds=1)


def test_a_process_is_known_again_by_its_name() -> None:
    for process in (PodProcess("workflow-wf-1-x", NOON), PodProcess.new("a")):
        assert PodProcess.from_name(process.name) == process


@pytest.mark.parametrize(
    "name", ["", "a", "a/", "a/1", "a b/1736942400250", "a/1736942400250/", "/1736942400250"]
)
def test_invalid_pod_process_names_are_refused(name: str) -> None:
    assert PodProcess.from_name(name) is None


@pytest.mark.parametrize(
    ("pod", "ended_at", "is_gone"),
    [
        ("a", None, False),
        ("a", NOON - SECOND, False),
        ("a", NOON, False),
        ("a", NOON + SECOND, True),
        ("another", None, True),
    ],
)
def test_a_process_is_gone_with_its_pod_or_at_its_end(
    pod: str, ended_at: datetime | None, *, is_gone: bool
) -> None:
    found = ObservedPod(pod, "", None, is_ready=True, is_terminating=False, ended_at=ended_at)
    observed = ObservedDeployment("wf_1", exists=True, pods=(found,))
    process = PodProcess("a", NOON)
    assert list(reconcile.lost_processes([process], observed)) == ([process] if is_gone else [])
