"""Collector for tests: takes OTLP over HTTP on loopback, and decodes it with the protobuf messages of OpenTelemetry."""

from __future__ import annotations

import gzip
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)
from opentelemetry.proto.trace.v1.trace_pb2 import Span, Status


@dataclass(frozen=True)
class ReceivedSpan:
    """Span as the collector got it; ids are hexadecimal."""

    process: str
    name: str
    kind: str
    trace_id: str
    span_id: str
    parent_id: str
    links: tuple[tuple[str, str], ...]
    """Trace and span ids."""
    attributes: Mapping[str, Any]
    began_at: float
    """Unix time, as the end."""
    ended_at: float
    is_error: bool


@dataclass
class OtlpReceiver:
    """Received spans, in the order of their arrival, and the raw requests."""

    url: str = ""
    spans: list[ReceivedSpan] = field(default_factory=list)
    bodies: list[bytes] = field(default_factory=list)

    def named(self, name: str) -> list[ReceivedSpan]:
        """Return the received spans of one name, in the order of their arrival."""
        return [span for span in self.spans if span.name == name]

    def of_run(self, execution_id: str) -> list[ReceivedSpan]:
        """Return the received spans with the id of a run in their attributes."""
        return [span for span in self.spans if span.attributes.get("pilotflame.execution.id") == execution_id]

    async def _receive(self, request: web.Request) -> web.Response:
        """Decode a request of OTLP and record its spans."""
        body = await request.read()
        if request.headers.get("Content-Encoding") == "gzip":
            body = gzip.decompress(body)
        assert request.headers["Content-Type"] == "application/x-protobuf"
        self.bodies.append(body)
        message = ExportTraceServiceRequest()
        message.ParseFromString(body)
        for resource in message.resource_spans:
            process = _attributes(resource.resource.attributes)["service.name"]
            for scope in resource.scope_spans:
                self.spans += [_decode(process, span) for span in scope.spans]
        return web.Response(
            body=ExportTraceServiceResponse().SerializeToString(), content_type="application/x-protobuf"
        )


def _decode(process: str, span: Any) -> ReceivedSpan:  # noqa: ANN401 - a generated message
    return ReceivedSpan(
        process,
        span.name,
        Span.SpanKind.Name(span.kind).removeprefix("SPAN_KIND_").lower(),
        span.trace_id.hex(),
        span.span_id.hex(),
        span.parent_span_id.hex(),
        tuple((link.trace_id.hex(), link.span_id.hex()) for link in span.links),
        _attributes(span.attributes),
        span.start_time_unix_nano / 1e9,
        span.end_time_unix_nano / 1e9,
        span.status.code == Status.StatusCode.STATUS_CODE_ERROR,
    )


def _attributes(pairs: Any) -> dict[str, Any]:  # noqa: ANN401 - generated messages
    return {pair.key: _decode_value(pair.value) for pair in pairs}


def _decode_value(value: Any) -> Any:  # noqa: ANN401 - generated messages
    found = getattr(value, value.WhichOneof("value"))
    return [_decode_value(one) for one in found.values] if hasattr(found, "values") else found


@asynccontextmanager
async def run_otlp_receiver() -> AsyncIterator[OtlpReceiver]:
    """Serve a collector on a free port during the block."""
    receiver = OtlpReceiver()
    app = web.Application()
    app.router.add_post("/v1/traces", receiver._receive)  # noqa: SLF001 - its own server
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    receiver.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
    try:
        yield receiver
    finally:
        await runner.cleanup()
