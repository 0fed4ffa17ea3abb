"""What a worker counts."""

from prometheus_client import Counter, Gauge

from engine.run_records import RunStatus

ACTIVE_RUNS = Gauge("pilotflame_runs_active", "Runs that this process holds.")
_ENDED = Counter("pilotflame_runs_ended_total", "Stretches of work that ended, by how.", ["status"])
ENDED_RUNS = {status: _ENDED.labels(status.value) for status in RunStatus}
