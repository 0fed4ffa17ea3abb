"""Table of metric families: the only names, labels and label values that processes emit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from enum import StrEnum
from typing import Final

from msgspec import Struct, field

PREFIX: Final = "pilotflame_"
FAST_BUCKETS: Final = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 1, 2.5, 10, 30)
SLOW_BUCKETS: Final = (0.005, 0.025, 0.1, 0.5, 1, 2.5, 5, 10, 30, 60, 300, 1_800, 7_200)
SIZE_BUCKETS: Final = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1_000, 2_000)


class MetricKind(StrEnum):
    """Type of a metric family."""

    COUNTER = "counter"
    GAUGE = "gauge"
    HISTOGRAM = "histogram"


class MetricFamily(Struct, frozen=True):
    """Metric with its labels; its full name begins with `pilotflame_`."""

    name: str
    kind: MetricKind
    help: str
    process: str
    """Processes that emit it; `leader` is the leading scheduler. `dev` emits all but those of pods."""
    labels: Mapping[str, Sequence[str]] = field(default_factory=dict)
    """Allowed values by label. An empty list: values that the code or the catalog of nodes defines."""
    buckets: Sequence[float] = FAST_BUCKETS

    @property
    def full_name(self) -> str:
        """Name of the metric for Prometheus: `pilotflame_` and the name of the family."""
        return PREFIX + self.name


BY_WORKFLOW: Final = "By workflow"
"""Group of the families that are only exposed with `METRICS_WORKFLOWS`."""
GROUPS: Final[Mapping[str, Sequence[MetricFamily]]] = {
    "Intake": (
        MetricFamily(
            "deliveries_total",
            MetricKind.COUNTER,
            "Inbound requests, by route and outcome.",
            "gateway",
            {"route": (), "outcome": ()},
        ),
        MetricFamily(
            "executions_accepted_total",
            MetricKind.COUNTER,
            "Accepted executions, by kind of trigger.",
            "gateway",
            {"trigger": ("api", "manual", "webhook", "queue", "event", "email", "schedule", "other")},
        ),
        MetricFamily(
            "idempotent_replays_total",
            MetricKind.COUNTER,
            "Requests with a known idempotency key, which got the first answer again.",
            "gateway",
        ),
        MetricFamily(
            "intake_refusals_total",
            MetricKind.COUNTER,
            "Refused requests of senders without a delivery.",
            "gateway",
            {"route": (), "reason": ()},
        ),
        MetricFamily(
            "http_server_request_duration_seconds",
            MetricKind.HISTOGRAM,
            "Time from the request's head to the end of the answer.",
            "gateway",
            {"route": (), "method": (), "status_class": ("1xx", "2xx", "3xx", "4xx", "5xx")},
        ),
        MetricFamily(
            "connections_closed_total",
            MetricKind.COUNTER,
            "Connections that the server closed.",
            "gateway",
            {"reason": ()},
        ),
        MetricFamily(
            "bodies_given_up_total",
            MetricKind.COUNTER,
            "Request bodies that were dropped in favor of others.",
            "gateway",
        ),
    ),
    "Queue": (
        MetricFamily(
            "executions",
            MetricKind.GAUGE,
            "Unfinished executions, up to 10,000 for each reason.",
            "leader",
            {"status": ("pending", "running", "waiting")},
        ),
        MetricFamily(
            "pending_oldest_seconds",
            MetricKind.GAUGE,
            "Time for which the oldest pending execution could be claimed.",
            "leader",
            {"target": ("shared", "pod")},
        ),
        MetricFamily(
            "waiting",
            MetricKind.GAUGE,
            "Unfinished executions by the code of `GET /why`.",
            "leader",
            {"reason": ()},
        ),
        MetricFamily(
            "dead_letters",
            MetricKind.GAUGE,
            "Dead letters: failed executions of inbound requests that wait for a person, without muted groups.",
            "leader",
        ),
        MetricFamily(
            "schedule_lag_seconds", MetricKind.GAUGE, "Delay of the schedule that is longest due.", "leader"
        ),
        MetricFamily(
            "deferred_oldest_overdue_seconds",
            MetricKind.GAUGE,
            "Time since which the oldest waiting execution is due.",
            "leader",
        ),
    ),
    "Work": (
        MetricFamily("runs_held", MetricKind.GAUGE, "Executions that the process holds.", "worker, pod"),
        MetricFamily(
            "execution_queue_seconds",
            MetricKind.HISTOGRAM,
            "Time from acceptance to the first claim.",
            "worker, pod",
            {"target": ("shared", "pod")},
            SLOW_BUCKETS,
        ),
        MetricFamily(
            "execution_duration_seconds",
            MetricKind.HISTOGRAM,
            "Time from the first claim to the end, or to the wait or release, by status.",
            "worker, pod",
            {"status": ("completed", "failed", "stopped", "cancelled", "waiting", "released")},
            SLOW_BUCKETS,
        ),
        MetricFamily(
            "node_duration_seconds",
            MetricKind.HISTOGRAM,
            "Time of nodes, all attempts included.",
            "worker, pod",
            {"node_type": (), "outcome": ("completed", "failed")},
            SLOW_BUCKETS,
        ),
        MetricFamily("node_retries_total", MetricKind.COUNTER, "Repeated attempts of nodes.", "worker, pod"),
        MetricFamily("claims_total", MetricKind.COUNTER, "Claimed executions.", "worker, pod"),
        MetricFamily(
            "leases_lost_total",
            MetricKind.COUNTER,
            "Executions whose lease the process lost.",
            "worker, pod",
        ),
        MetricFamily(
            "commit_batch_size",
            MetricKind.HISTOGRAM,
            "Executions with records in one commit.",
            "worker, pod",
            buckets=SIZE_BUCKETS,
        ),
        MetricFamily("commit_seconds", MetricKind.HISTOGRAM, "Time of commits of records.", "worker, pod"),
    ),
    BY_WORKFLOW: (
        MetricFamily(
            "workflow_claims_total",
            MetricKind.COUNTER,
            "Claimed executions, by id of the workflow.",
            "worker, pod",
            {"workflow": ()},
        ),
        MetricFamily(
            "workflow_queue_seconds_total",
            MetricKind.COUNTER,
            "Sum of the times from acceptance to the first claim.",
            "worker, pod",
            {"workflow": ()},
        ),
        MetricFamily(
            "workflow_ends_total",
            MetricKind.COUNTER,
            "Executions that have left the process, by id of the workflow and status.",
            "worker, pod",
            {
                "workflow": (),
                "status": ("completed", "failed", "stopped", "cancelled", "waiting", "released"),
            },
        ),
        MetricFamily(
            "workflow_run_seconds_total",
            MetricKind.COUNTER,
            "Sum of the times from the first claim to these ends.",
            "worker, pod",
            {"workflow": ()},
        ),
    ),
    "Sleep and wake": (
        MetricFamily(
            "wakes_total",
            MetricKind.COUNTER,
            "Deployments whose waiting executions were handled, by outcome.",
            "worker, leader",
            {"outcome": ("woken", "released", "deferred", "left-to-workers")},
        ),
        MetricFamily(
            "wake_seconds",
            MetricKind.HISTOGRAM,
            "Time of wakes: `start` from the decision to a ready pod, `total` from a trigger to its pod. Parts:"
            " `decide` from a trigger to the decision, `schedule` from the decision to a scheduled pod, `ready` from"
            " its program to its readiness, `forward` from a trigger to a pod that was ready before.",
            "deployer, gateway",
            {"phase": ("decide", "schedule", "ready", "start", "forward", "total")},
            SLOW_BUCKETS,
        ),
        MetricFamily(
            "wake_waiters", MetricKind.GAUGE, "Requests that wait for a pod to take their run.", "gateway"
        ),
        MetricFamily(
            "deployments",
            MetricKind.GAUGE,
            "Deployed workflows by desired and observed state.",
            "leader",
            {
                "wanted": ("up", "down"),
                "observed": (
                    *("absent", "stopped", "starting", "running"),
                    *("stopping", "failed", "outdated", "unknown"),
                ),
            },
        ),
        MetricFamily(
            "lifecycle_decisions_total",
            MetricKind.COUNTER,
            "Decisions that changed a deployment, by action and reason.",
            "gateway, worker, leader",
            {"decision": ("start", "wake", "drain", "stop"), "reason": ()},
        ),
        MetricFamily("pod_seconds_total", MetricKind.COUNTER, "Time of ready pods.", "leader"),
        MetricFamily(
            "pod_seconds_saved_total",
            MetricKind.COUNTER,
            "Time of pods that deployed workflows did not need while they slept.",
            "leader",
        ),
    ),
    "Health": (
        MetricFamily(
            "drift",
            MetricKind.GAUGE,
            "Overdue rows and deployments, by class of `pilotflame doctor`, up to 100 rows of each.",
            "leader",
            {"class": ()},
        ),
        MetricFamily(
            "doctor_fixes_total",
            MetricKind.COUNTER,
            "Findings that `pilotflame doctor --fix` has fixed, by class.",
            "leader",
            {"class": ()},
        ),
        MetricFamily("leader", MetricKind.GAUGE, "1 while the scheduler leads, otherwise 0.", "scheduler"),
        MetricFamily(
            "tick_seconds",
            MetricKind.HISTOGRAM,
            "Time of one turn of a periodic duty.",
            "scheduler",
            {"duty": ()},
        ),
        MetricFamily(
            "event_loop_lag_seconds",
            MetricKind.GAUGE,
            "Delay of a timer of one second, the longest of the last ten seconds.",
            "all",
        ),
        MetricFamily("sse_clients", MetricKind.GAUGE, "Open event streams.", "gateway"),
        MetricFamily(
            "sse_resyncs_total", MetricKind.COUNTER, "Event streams that continued after an event.", "gateway"
        ),
        MetricFamily(
            "build_info", MetricKind.GAUGE, "1, with the version of the program.", "all", {"version": ()}
        ),
    ),
}
"""Families by subject."""
FAMILIES: Final[Mapping[str, MetricFamily]] = {
    family.name: family for families in GROUPS.values() for family in families
}
"""Families by name, without the prefix."""
