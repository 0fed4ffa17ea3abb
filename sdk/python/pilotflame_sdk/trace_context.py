"""Trace context of a task: the current context of OpenTelemetry while its function runs, where that is installed."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pilotflame_sdk.tasks import Task


def attach(task: Task) -> None:
    """Make the span of a task's node the parent of the function's spans, within the present `contextvars` context.

    Does nothing without `opentelemetry-api`, and for a server without traces.
    """
    if task.traceparent is None:
        return
    try:
        from opentelemetry import context
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
    except ImportError:
        return
    context.attach(TraceContextTextMapPropagator().extract({"traceparent": task.traceparent}))
