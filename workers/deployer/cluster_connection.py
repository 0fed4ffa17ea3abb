"""Connection of a deployer to its cluster, opened once it is needed."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING

import structlog

if TYPE_CHECKING:
    from workers.cluster.driver import ClusterDriver

log = structlog.get_logger()

OpenDriver = Callable[[], Awaitable["ClusterDriver"]]


class ClusterConnection:
    """Driver of one cluster, shared by all tasks of a deployer."""

    def __init__(
        self, open_driver: OpenDriver, *, cluster: str, on_open: Callable[[ClusterDriver], None]
    ) -> None:
        self.current: ClusterDriver | None = None
        """Open driver, or None before the first call that opens it."""
        self._open_driver = open_driver
        self._cluster = cluster
        self._on_open = on_open
        self._opening = asyncio.Lock()

    async def driver(self) -> ClusterDriver:
        """Return the driver, opened by the first call that succeeds. Raises `ClusterError`."""
        async with self._opening:
            if self.current is None:
                self.current = await self._open_driver()
                log.info("cluster opened", cluster=self._cluster)
                self._on_open(self.current)
                await asyncio.sleep(0)  # the watch that starts now answers all reads from the first one on
            return self.current
