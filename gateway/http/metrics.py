"""Metrics of refused senders, closed connections and dropped bodies; the layers of a request count its answer."""

from __future__ import annotations

from prometheus_client import Counter

_not_let_in = Counter(
    "pilotflame_intake_refusals",
    "Refused requests of senders without a delivery",
    ["route", "reason"],
)

_closed = Counter("pilotflame_connections_closed", "Connections closed by the server", ["reason"])
_given_up = Counter("pilotflame_bodies_given_up", "Request bodies dropped in favor of others")


def count_rejected(route: str, reason: str) -> None:
    """Count a refused request of a sender; `reason` is the error code of the answer."""
    _not_let_in.labels(route, reason).inc()


def count_closed_connection(reason: str) -> None:
    """Count a connection that the server closed, by its phase or the missed time limit."""
    _closed.labels(reason).inc()


def count_abandoned_body() -> None:
    """Count a request body that was dropped in favor of others."""
    _given_up.inc()
