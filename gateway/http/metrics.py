"""Metrics of the gateway's requests; each labeled child is looked up once and cached."""

from __future__ import annotations

from functools import cache

from prometheus_client import Counter, Histogram

METHODS = frozenset({"DELETE", "GET", "HEAD", "OPTIONS", "PATCH", "POST", "PUT"})

_requests = Counter("pilotflame_http_requests", "Requests answered", ["method", "route", "status"])
_seconds = Histogram(
    "pilotflame_http_request_seconds",
    "Time from the request's head to the end of the answer",
    ["method", "route"],
    buckets=(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 1, 2.5, 10, 30),
)

_not_let_in = Counter(
    "pilotflame_intake_refusals",
    "Refused requests of senders without a delivery",
    ["route", "reason"],
)

_closed = Counter("pilotflame_connections_closed", "Connections closed by the server", ["reason"])
_given_up = Counter("pilotflame_bodies_given_up", "Request bodies dropped in favor of others")


def count_answer(method: str, route: str, status: int, seconds: float) -> None:
    """Count one answered request; `route` is the template of its path."""
    requests, durations = _children(method if method in METHODS else "other", route, status)
    requests.inc()
    durations.observe(seconds)


def count_rejected(route: str, reason: str) -> None:
    """Count a refused request of a sender; `reason` is the error code of the answer."""
    _not_let_in.labels(route, reason).inc()


def count_closed_connection(reason: str) -> None:
    """Count a connection that the server closed, by its phase or the missed time limit."""
    _closed.labels(reason).inc()


def count_abandoned_body() -> None:
    """Count a request body that was dropped in favor of others."""
    _given_up.inc()


@cache
def _children(method: str, route: str, status: int) -> tuple[Counter, Histogram]:
    return _requests.labels(method, route, status), _seconds.labels(method, route)
