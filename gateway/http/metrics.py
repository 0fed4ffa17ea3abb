"""Metrics of refused senders, closed connections and dropped bodies; the layers of a request count its answer."""

from __future__ import annotations

from telemetry import instruments

instruments.declare(
    *("http_server_request_duration_seconds", "intake_refusals_total", "connections_closed_total"),
    *("bodies_given_up_total", "sse_clients", "sse_resyncs_total", "wake_waiters", "wake_seconds"),
)


def count_rejected(route: str, reason: str) -> None:
    """Count a refused request of a sender as a metric; `reason` is the error code of the answer."""
    instruments.counter("intake_refusals_total", route, reason).inc()


def count_closed_connection(reason: str) -> None:
    """Count a connection that the server closed as a metric, by its phase or the missed time limit."""
    instruments.counter("connections_closed_total", reason).inc()


def count_abandoned_body() -> None:
    """Count a request body that was dropped in favor of others as a metric."""
    instruments.counter("bodies_given_up_total").inc()
