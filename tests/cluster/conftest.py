from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.cluster import world
from tests.cluster.fake_api import FakeApi
from tests.cluster.world import Cluster

REAL = pytest.mark.skipif(world.TEST_KUBECONFIG is None, reason="TEST_KUBECONFIG names no cluster")


@pytest.fixture(params=["local", "fake", pytest.param("real", marks=REAL)])
async def cluster(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Cluster]:
    """Every driver on its cluster."""
    match request.param:
        case "local":
            async with world.on_this_machine(tmp_path / "pods") as found:
                yield found
        case "fake":
            async with world.on_fake(tmp_path) as (found, _), world.watched(found):
                yield found
        case "real":
            assert world.TEST_KUBECONFIG is not None
            async with world.on_real(Path(world.TEST_KUBECONFIG)) as found, world.watched(found):
                yield found


@pytest.fixture
async def fake(tmp_path: Path) -> AsyncIterator[tuple[Cluster, FakeApi]]:
    """The Kubernetes driver without a watch, and the API server that it speaks to."""
    async with world.on_fake(tmp_path) as found:
        yield found


@pytest.fixture
async def machine(tmp_path: Path) -> AsyncIterator[Cluster]:
    """The local driver."""
    async with world.on_this_machine(tmp_path / "pods") as found:
        yield found
