"""Boards for Grafana: runs, sleep and wake, and the control plane."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from deploy.monitoring import queries

if TYPE_CHECKING:
    from engine.values import Json

WINDOW: Final = "$__rate_interval"
WIDTH: Final = 12
HEIGHT: Final = 8
DATASOURCE: Final[Mapping[str, str]] = {"type": "prometheus", "uid": "${datasource}"}


@dataclass(frozen=True, slots=True)
class BoardPanel:
    """Panel with one line per query and label."""

    title: str
    unit: str
    """Unit of Grafana: `s`, `short`, `reqps` or `percentunit`."""
    queries: Sequence[tuple[str, str]]
    """PromQL with the legend of its lines."""


@dataclass(frozen=True, slots=True)
class Board:
    """Board with its panels, two in a row."""

    uid: str
    title: str
    panels: Sequence[BoardPanel]


def list_boards() -> list[Board]:
    """Return all Grafana boards."""
    return [_runs(), _sleep_and_wake(), _control_plane()]


def build_board(board: Board) -> str:
    """Return a board as JSON for the import of Grafana."""
    return json.dumps(_document(board), indent=2) + "\n"


def _document(board: Board) -> dict[str, Any]:
    """Return a board as the object that Grafana imports."""
    variable = {"name": "datasource", "type": "datasource", "query": "prometheus", "label": "Data source"}
    return {
        "uid": board.uid,
        "title": board.title,
        "tags": ["pilotflame"],
        "schemaVersion": 39,
        "version": 1,
        "editable": True,
        "refresh": "30s",
        "time": {"from": "now-6h", "to": "now"},
        "templating": {"list": [variable]},
        "panels": [_panel(number, panel) for number, panel in enumerate(board.panels)],
    }


def _panel(number: int, panel: BoardPanel) -> dict[str, Json]:
    """Return a panel as an object of Grafana; `number` counts from 0 and gives its place on the board."""
    targets: list[Json] = [
        {"refId": chr(ord("A") + place), "expr": query, "legendFormat": legend, "datasource": {**DATASOURCE}}
        for place, (query, legend) in enumerate(panel.queries)
    ]
    return {
        "id": number + 1,
        "type": "timeseries",
        "title": panel.title,
        "datasource": {**DATASOURCE},
        "gridPos": {"x": number % 2 * WIDTH, "y": number // 2 * HEIGHT, "w": WIDTH, "h": HEIGHT},
        "fieldConfig": {"defaults": {"unit": panel.unit, "min": 0}, "overrides": []},
        "options": {"legend": {"displayMode": "list", "placement": "bottom"}, "tooltip": {"mode": "multi"}},
        "targets": targets,
    }


def _quantiles(name: str, **labels: str) -> list[tuple[str, str]]:
    """Return the queries of the quantiles 0.5, 0.95 and 0.99 of a histogram, each with its legend."""
    return [
        (queries.quantile(share, name, WINDOW, **labels), f"p{share * 100:g}") for share in (0.5, 0.95, 0.99)
    ]


def _runs() -> Board:
    """Return the board about runs: their rate, durations, waits and failures."""
    return Board(
        "pilotflame-runs",
        "Pilotflame: runs",
        [
            BoardPanel(
                "Accepted executions",
                "reqps",
                [(queries.rate("executions_accepted_total", WINDOW, "trigger"), "{{trigger}}")],
            ),
            BoardPanel(
                "Ends of claims",
                "reqps",
                [(queries.event_rate("execution_duration_seconds", WINDOW, "status"), "{{status}}")],
            ),
            BoardPanel(
                "Unfinished executions",
                "short",
                [(f"max by (status) ({queries.gauge('executions')})", "{{status}}")],
            ),
            BoardPanel(
                "Unfinished executions by reason",
                "short",
                [(f"max by (reason) ({queries.gauge('waiting')}) > 0", "{{reason}}")],
            ),
            BoardPanel("Time in the queue", "s", _quantiles("execution_queue_seconds")),
            BoardPanel(
                "Oldest pending execution",
                "s",
                [(f"max by (target) ({queries.gauge('pending_oldest_seconds')})", "{{target}}")],
            ),
            BoardPanel(
                "Time from claim to end", "s", _quantiles("execution_duration_seconds", status="completed")
            ),
            BoardPanel(
                "Mean time of nodes by type",
                "s",
                [(queries.mean("node_duration_seconds", WINDOW, "node_type"), "{{node_type}}")],
            ),
            BoardPanel(
                "Failed and repeated nodes",
                "reqps",
                [
                    (
                        queries.event_rate("node_duration_seconds", WINDOW, "node_type", outcome="failed"),
                        "{{node_type}} failed",
                    ),
                    (queries.rate("node_retries_total", WINDOW), "retries"),
                ],
            ),
            BoardPanel("Dead letters", "short", [(f"max({queries.gauge('dead_letters')})", "dead letters")]),
        ],
    )


def _sleep_and_wake() -> Board:
    """Return the board about deployments that sleep and wake."""
    saved = queries.rate("pod_seconds_saved_total", "1h")
    used = queries.rate("pod_seconds_total", "1h")
    return Board(
        "pilotflame-sleep",
        "Pilotflame: sleep and wake",
        [
            BoardPanel(
                "Deployments",
                "short",
                [
                    (
                        f"max by (wanted, observed) ({queries.gauge('deployments')}) > 0",
                        "wanted {{wanted}}, {{observed}}",
                    )
                ],
            ),
            BoardPanel(
                "Pod time saved by sleep", "percentunit", [(f"{saved} / ({used} + {saved})", "saved")]
            ),
            BoardPanel("Wakes", "reqps", [(queries.rate("wakes_total", WINDOW, "outcome"), "{{outcome}}")]),
            BoardPanel("From a trigger to its pod", "s", _quantiles("wake_seconds", phase="total")),
            BoardPanel("From the decision to a ready pod", "s", _quantiles("wake_seconds", phase="start")),
            BoardPanel(
                "Requests that wait for a pod",
                "short",
                [(f"sum({queries.gauge('wake_waiters')})", "requests")],
            ),
            BoardPanel(
                "Decisions of lifecycle policies",
                "reqps",
                [(queries.rate("lifecycle_decisions_total", WINDOW, "decision"), "{{decision}}")],
            ),
            BoardPanel(
                "Oldest overdue execution",
                "s",
                [(f"max({queries.gauge('deferred_oldest_overdue_seconds')})", "overdue")],
            ),
        ],
    )


def _control_plane() -> Board:
    """Return the board about the processes of the server and their stores."""
    return Board(
        "pilotflame-control-plane",
        "Pilotflame: control plane",
        [
            BoardPanel(
                "Requests by status",
                "reqps",
                [
                    (
                        queries.event_rate("http_server_request_duration_seconds", WINDOW, "status_class"),
                        "{{status_class}}",
                    )
                ],
            ),
            BoardPanel("Time of requests", "s", _quantiles("http_server_request_duration_seconds")),
            BoardPanel("Time of commits", "s", _quantiles("commit_seconds")),
            BoardPanel(
                "Executions in a commit", "short", [(queries.mean("commit_batch_size", WINDOW), "mean")]
            ),
            BoardPanel("Drift", "short", [(f"max by (class) ({queries.gauge('drift')})", "{{class}}")]),
            BoardPanel(
                "Claims and lost leases",
                "reqps",
                [
                    (queries.rate("claims_total", WINDOW), "claims"),
                    (queries.rate("leases_lost_total", WINDOW), "lost leases"),
                ],
            ),
            BoardPanel(
                "Lag of event loops",
                "s",
                [
                    (
                        f"max by (job, instance) ({queries.gauge('event_loop_lag_seconds')})",
                        "{{job}} {{instance}}",
                    )
                ],
            ),
            BoardPanel(
                "Time of periodic duties",
                "s",
                [(queries.quantile(0.99, "tick_seconds", WINDOW, "duty"), "{{duty}} p99")],
            ),
            BoardPanel(
                "Leaders and workers",
                "short",
                [
                    (f"sum({queries.gauge('leader')})", "leading schedulers"),
                    (f"count({queries.gauge('runs_held')})", "workers and pods"),
                ],
            ),
            BoardPanel(
                "Processes by version",
                "short",
                [(f"count by (version) ({queries.gauge('build_info')})", "{{version}}")],
            ),
            BoardPanel(
                "Late schedules", "s", [(f"max({queries.gauge('schedule_lag_seconds')})", "longest delay")]
            ),
            BoardPanel("Event streams", "short", [(f"sum({queries.gauge('sse_clients')})", "open")]),
        ],
    )
