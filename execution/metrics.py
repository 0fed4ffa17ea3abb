"""What a worker counts."""

from prometheus_client import Counter, Gauge

from engine.run_records import RunStatus

ACTIVE = Gauge("pilotflame_runs_active", "Runs that this process holds.")
_ENDED = Counter("pilotflame_runs_ended_total", "Stretches of work that ended, by how.", ["status"])
ENDED = {status: _ENDED.labels(status.value) for status in RunStatus}
