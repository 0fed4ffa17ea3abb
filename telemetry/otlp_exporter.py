"""Export of finished spans by OTLP over HTTP, in a thread of the OpenTelemetry SDK.

Spans wait in a bounded queue. While the collector is away, they are dropped, and the loss is logged: nothing waits
for it.
"""

from __future__ import annotations

from importlib import metadata
from typing import TYPE_CHECKING, Final

from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.sdk.util.instrumentation import InstrumentationScope
from opentelemetry.trace import Link, SpanContext, SpanKind, Status, StatusCode, TraceFlags

if TYPE_CHECKING:
    from datetime import datetime

    from telemetry.tracing import FinishedSpan, TraceContext

TRACES_PATH: Final = "/v1/traces"
QUEUE_SPANS: Final = 16_384
BATCH_SPANS: Final = 512
SEND_EVERY_MILLISECONDS: Final = 1_000
SHUTDOWN_MILLISECONDS: Final = 3_000
"""Time for the last spans at the end of a process."""
_KINDS: Final = {kind.name.lower(): kind for kind in SpanKind}


class OtlpExporter:
    """Exporter of one process. Headers and certificates come from the environment: `OTEL_EXPORTER_OTLP_HEADERS`."""

    def __init__(self, url: str, process: str) -> None:
        version = metadata.version("pilotflame")
        self._resource = Resource.create(
            {
                "service.namespace": "pilotflame",
                "service.name": f"pilotflame-{process}",
                "service.version": version,
            }
        )
        self._scope = InstrumentationScope("pilotflame", version)
        exporter = OTLPSpanExporter(endpoint=url.rstrip("/") + TRACES_PATH)
        self._processor = BatchSpanProcessor(exporter, QUEUE_SPANS, SEND_EVERY_MILLISECONDS, BATCH_SPANS)

    def send(self, span: FinishedSpan) -> None:
        """Queue a finished span for sending if its trace is sampled; never blocks.

        The queue holds 16,384 spans; while it is full, spans are dropped.
        """
        if not span.context.is_sampled:
            return
        attributes = dict(span.attributes)
        status = Status()
        if span.error is not None:
            attributes["error.type"] = span.error
            status = Status(StatusCode.ERROR, span.error)
        self._processor.on_end(
            ReadableSpan(
                name=span.name,
                context=_to_span_context(span.context),
                parent=None if span.parent is None else _to_span_context(span.parent),
                resource=self._resource,
                attributes=attributes,
                links=[Link(_to_span_context(link)) for link in span.links],
                kind=_KINDS[span.kind],
                status=status,
                start_time=_to_nanoseconds(span.started_at),
                end_time=_to_nanoseconds(span.ended_at),
                instrumentation_scope=self._scope,
            )
        )

    def close(self) -> None:
        """Send the queued spans within 3 seconds, and end the thread that sends; later spans are lost."""
        # The public `shutdown` waits for half a minute.
        self._processor._batch_processor.shutdown(SHUTDOWN_MILLISECONDS)  # noqa: SLF001 - see above


def _to_span_context(context: TraceContext) -> SpanContext:
    flags = TraceFlags(TraceFlags.SAMPLED if context.is_sampled else TraceFlags.DEFAULT)
    return SpanContext(
        int(context.trace_id, 16), int(context.span_id, 16), is_remote=False, trace_flags=flags
    )


def _to_nanoseconds(moment: datetime) -> int:
    seconds = int(moment.replace(microsecond=0).timestamp())
    return seconds * 1_000_000_000 + moment.microsecond * 1_000
