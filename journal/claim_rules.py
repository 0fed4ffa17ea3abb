"""Conditions under which a claim takes a run, as SQL for both stores and for explanations of runs."""

from __future__ import annotations

from typing import Final

from models.loss_limits import SUSPECT_LOSSES

IS_NO_SUSPECT_SQL: Final = f"attempt < {SUSPECT_LOSSES}"
"""Condition of claims for normal execution, where suspects have the same target as other runs."""
# In the index, started runs are apart from runs that have never started.
IS_SUSPECT_SQL: Final = f"NOT is_fresh AND attempt >= {SUSPECT_LOSSES}"
CLAIM_ORDER: Final = ("is_fresh", "rank")
"""Order of the runs of one workflow at one target: runs that have started, then the oldest."""
TRIAL_ORDER: Final = ("isolation_losses", "attempt", "rank")
"""Order of suspects at one target, of all organizations."""


def pending_sql(target: str) -> str:
    """Return the condition that a run is pending at a target, which is an SQL expression."""
    return f"status = 'pending' AND target = {target}"


def suspect_sql(max_isolation_losses: str) -> str:
    """Return the condition that a trial takes a pending run."""
    return f"{IS_SUSPECT_SQL} AND isolation_losses <= {max_isolation_losses}"
