from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.cluster import cluster_harness
from tests.cluster.cluster_harness import DriverUnderTest
from tests.cluster.fake_api import FakeApiServer

REAL = pytest.mark.skipif(cluster_harness.TEST_KUBECONFIG is None, reason="TEST_KUBECONFIG names no cluster")


@pytest.fixture(params=["local", "fake", pytest.param("real", marks=REAL)])
async def cluster(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[DriverUnderTest]:
    """Yield each driver on its cluster."""
    match request.param:
        case "local":
            async with cluster_harness.open_local_cluster(tmp_path / "pods") as found:
                yield found
        case "fake":
            async with (
                cluster_harness.open_fake_cluster(tmp_path) as (found, _),
                cluster_harness.keep_watch_open(found),
            ):
                yield found
        case "real":
            assert cluster_harness.TEST_KUBECONFIG is not None
            async with (
                cluster_harness.open_real_cluster(Path(cluster_harness.TEST_KUBECONFIG)) as found,
                cluster_harness.keep_watch_open(found),
            ):
                yield found


@pytest.fixture
async def fake_cluster(tmp_path: Path) -> AsyncIterator[tuple[DriverUnderTest, FakeApiServer]]:
    """Yield the Kubernetes driver without a watch, and the fake API server that it uses."""
    async with cluster_harness.open_fake_cluster(tmp_path) as found:
        yield found


@pytest.fixture
async def local_cluster(tmp_path: Path) -> AsyncIterator[DriverUnderTest]:
    """Yield the local driver."""
    async with cluster_harness.open_local_cluster(tmp_path / "pods") as found:
        yield found
