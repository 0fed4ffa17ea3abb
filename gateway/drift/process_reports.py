"""Facts that other processes alone know, by their reports: queues, leases, and failures of servers that they use."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from gateway.http.wire import Instant, WireStruct, instant
from models.process_presence import ProcessPresence
from models.worker_presence import WorkerPresence
from models.worker_processes import ALL_IN_ONE_OWNER
from telemetry.process_activity import CLUSTER_CONNECTIONS

if TYPE_CHECKING:
    from gateway.drift.server_figures import QueueFigure

ALL_IN_ONE = "all-in-one"
ProcessReport: TypeAlias = ProcessPresence | WorkerPresence
"""Last report of a process."""


class ProcessQueue(WireStruct):
    """Queue from which a process takes work."""

    name: str
    """`workers`, `intake` and `isolated` are shared by all workers; a deployer reconciles its own `deployments`."""
    length: int | None
    """Number that waits, at most 10,000; null for a queue that is not counted."""


class ConnectionFailure(WireStruct):
    """Last failure of a server that processes use."""

    at: Instant
    message: str
    """Error without credentials, in one line."""
    role: str
    """Role of the process that met it."""
    host: str | None


class ClusterHealth(WireStruct):
    """Cluster of the pods, by the reports of deployers."""

    kind: Literal["kubernetes", "local"]
    latency_ms: float | None
    """Time of the last answer; null before the first."""
    answered_at: Instant | None
    last_failure: ConnectionFailure | None


def name_role(one: ProcessReport) -> str:
    """Return the role of a process; `all-in-one` for the workers of `pilotflame dev`, which have all roles."""
    if isinstance(one, ProcessPresence):
        return one.role
    return ALL_IN_ONE if one.owner.startswith(ALL_IN_ONE_OWNER) else "worker"


def find_time(one: ProcessReport, age: float | None) -> datetime | None:
    """Return the time of an event that happened `age` seconds before a report; None for None."""
    return None if age is None else one.seen_at - timedelta(seconds=age)


def list_queues(one: ProcessReport, figures: Iterable[QueueFigure]) -> Sequence[ProcessQueue]:
    """Return the queues of a process, with the numbers of shared ones from the figures; none for a gateway."""
    if name_role(one) == "gateway":
        return []
    shared = {figure.target: figure.count for figure in figures}
    queues: Mapping[str, int | None] = (one.activity or {}).get("queues") or {}
    return [
        ProcessQueue(name=name, length=shared.get(name) if length is None else length)
        for name, length in queues.items()
    ]


def find_failure(reports: Iterable[ProcessReport], connection: str) -> ConnectionFailure | None:
    """Return the newest failure of a connection, such as that to the broker, by the processes' last reports; None
    without one.
    """
    failures = [
        (at, noted["failure"], one)
        for one, noted in _list_notes(reports, connection)
        if (at := find_time(one, noted.get("failureAge"))) is not None
    ]
    if not failures:
        return None
    at, message, one = max(failures, key=lambda failure: failure[0])
    return ConnectionFailure(at=instant(at), message=message, role=name_role(one), host=one.host)


def find_cluster(reports: Sequence[ProcessReport]) -> ClusterHealth | None:
    """Return the cluster that deployers use, Kubernetes rather than local processes; None if none has used one, as
    without deployments.
    """
    kind: Literal["kubernetes", "local"]
    for kind in ("kubernetes", "local"):
        connection = CLUSTER_CONNECTIONS[kind]
        failure = find_failure(reports, connection)
        answers = [
            (at, noted["ms"])
            for one, noted in _list_notes(reports, connection)
            if (at := find_time(one, noted.get("age"))) is not None
        ]
        if answers or failure:
            answered_at, latency_ms = max(answers, default=(None, None))
            return ClusterHealth(
                kind=kind,
                latency_ms=latency_ms,
                answered_at=None if answered_at is None else instant(answered_at),
                last_failure=failure,
            )
    return None


def _list_notes(
    reports: Iterable[ProcessReport], connection: str
) -> Iterable[tuple[ProcessReport, Mapping[str, Any]]]:
    """Yield the processes that use a connection, such as `broker`, each with its last report about that connection."""
    for one in reports:
        noted = ((one.activity or {}).get("connections") or {}).get(connection)
        if noted is not None:
            yield one, noted
