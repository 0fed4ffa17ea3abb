"""Start and end of the tracer of a process."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib.util import find_spec
from typing import TYPE_CHECKING

import structlog

from telemetry import tracing
from telemetry.tracing import Tracer

if TYPE_CHECKING:
    from telemetry.trace_settings import TraceSettings

log = structlog.get_logger()


class TracingUnavailable(Exception):
    """The OpenTelemetry SDK is not installed; the text says which extra brings it."""


@asynccontextmanager
async def run_tracer(settings: TraceSettings, process: str) -> AsyncIterator[None]:
    """Send the traces of this process to the configured OTLP address during the block; without an address, do nothing.

    `process` is the service name in the traces. On exit, queued spans get three seconds. Raises `TracingUnavailable` if
    OpenTelemetry is not installed.
    """
    if not settings.otlp_url:
        yield
        return
    if find_spec("opentelemetry") is None or find_spec("opentelemetry.exporter") is None:
        raise TracingUnavailable(
            "PILOTFLAME_OTLP_URL needs OpenTelemetry: install the extra `pilotflame[otel]`, or unset the variable"
        )
    from telemetry.otlp_exporter import OtlpExporter  # noqa: PLC0415 - loads the SDK, an extra

    exporter = await asyncio.to_thread(OtlpExporter, settings.otlp_url, process)
    hosts = [host.strip() for host in settings.trace_hosts.split(",") if host.strip()]
    tracing.tracer = Tracer(
        exporter.send, sample=settings.trace_sample, hosts=hosts, sends_content=settings.trace_content
    )
    log.info("traces sent", url=settings.otlp_url, sample=settings.trace_sample)
    try:
        yield
    finally:
        tracing.tracer = None
        await asyncio.to_thread(exporter.close)
