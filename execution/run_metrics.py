"""Metrics of the executor."""

from prometheus_client import Counter, Gauge

from engine.run_records import RunStatus

ACTIVE_RUNS = Gauge("pilotflame_runs_active", "Runs that this process holds.")
_ENDED = Counter("pilotflame_runs_ended_total", "Attempts at runs that ended, by status.", ["status"])
ENDED_RUNS = {status: _ENDED.labels(status.value) for status in RunStatus}
