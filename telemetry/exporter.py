"""Exposition of a process's metrics over HTTP, on an address and port of its own."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib import metadata

import structlog

from telemetry import instruments

log = structlog.get_logger()


@asynccontextmanager
async def serve_metrics(address: str, port: int | None) -> AsyncIterator[None]:
    """Serve the metrics of this process for Prometheus over HTTP during the block; without a port, do nothing.

    A port that can't be opened is logged, and the process continues without metrics. Port 0 chooses a free
    one, which the log shows.
    """
    if port is None:
        yield
        return
    from prometheus_client import start_http_server  # noqa: PLC0415 - loads a web server

    from telemetry import exposition  # noqa: PLC0415 - loads the client of Prometheus
    from telemetry.loop_lag import LoopLagMeter  # noqa: PLC0415 - for processes with a port alone

    exposition.register()
    instruments.expose()
    instruments.gauge("build_info", metadata.version("pilotflame")).set(1)
    try:
        server, thread = start_http_server(port, addr=address)
    except OSError as error:
        log.warning("metrics not served", address=address, port=port, error=str(error))
        yield
        return
    log.info("metrics served", address=address, port=server.server_port)
    shown = instruments.gauge("event_loop_lag_seconds")
    lag = asyncio.create_task(LoopLagMeter().measure_forever(shown.set))
    try:
        yield
    finally:
        lag.cancel()
        await asyncio.to_thread(server.shutdown)
        server.server_close()
        thread.join()
