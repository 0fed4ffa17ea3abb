"""What the project has promised itself for two cores, generator included, and whether this run kept it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from statistics import median

Repetitions = Mapping[str, Sequence[Mapping[str, float]]]
"""By what was measured (`production`, `dev`, ...), the figures of each repetition."""


class Bound(StrEnum):
    """On which side of the target a figure must lie."""

    AT_LEAST = ">="
    BELOW = "<"


class Judged(StrEnum):
    """Which of several repetitions decides."""

    EVERY = "in every repetition"
    MEDIAN = "in the median"


@dataclass(frozen=True, slots=True)
class Target:
    """A figure and where it should be."""

    measured: str
    figure: str
    bound: Bound
    limit: float
    judged: Judged = Judged.MEDIAN


@dataclass(frozen=True, slots=True)
class Outcome:
    """A target and what came of it."""

    target: Target
    value: float
    is_reached: bool

    def __str__(self) -> str:
        target = self.target
        wanted = f"{target.figure.replace('_', ' ')} {target.bound} {target.limit:g} {target.judged}"
        return f"target {target.measured}: {wanted}: {self.value:.4g} {'reached' if self.is_reached else 'missed'}"


_BOTH_MODES = (
    ("saturation_p99_ms", Bound.BELOW, 40),
    ("forty_nodes_ms", Bound.BELOW, 15),
    ("write_chains_per_second", Bound.AT_LEAST, 1_000),
)
_LOADS_ON_SLEEPERS = (
    (load, figure, limit)
    for load in ("stopped", "bursts")
    for figure, limit in (("lost", 1), ("failed", 1), ("wake_p99_ms", 3_000))
)
INTAKE_PER_CORE: Mapping[str, int] = {"enqueue": 1_000, "mail": 300, "events": 800, "webhooks": 800}
"""Requests a second by what is sent; half as many are sent to see how long an answer takes."""
_INTAKE = (
    Target("intake", f"{mode}_{kind}_{figure}", bound, limit)
    for mode, core in (("production", "gateway"), ("dev", "dev"))
    for kind, per_core in INTAKE_PER_CORE.items()
    for figure, bound, limit in (
        (f"per_{core}_core", Bound.AT_LEAST, per_core),
        (f"at_{per_core // 2}_per_second_p99_ms", Bound.BELOW, 100),
    )
)
TARGETS = (
    Target("production", "executions_per_second", Bound.AT_LEAST, 2_000, Judged.EVERY),
    Target("production", "executions_per_second", Bound.AT_LEAST, 3_000),
    Target("production", "cpu_ms_per_run", Bound.BELOW, 0.5),
    Target("production", "times_stock_dramatiq", Bound.AT_LEAST, 1.5),
    Target("production", "at_10_per_second_p50_ms", Bound.BELOW, 10),
    Target("production", "at_10_per_second_p99_ms", Bound.BELOW, 20),
    *(Target("production", *line) for line in _BOTH_MODES),
    Target("production", "memory_mb_gateway", Bound.BELOW, 100),
    Target("production", "memory_mb_worker", Bound.BELOW, 100),
    Target("dev", "executions_per_second", Bound.AT_LEAST, 3_000, Judged.EVERY),
    Target("dev", "at_10_per_second_p50_ms", Bound.BELOW, 5),
    Target("dev", "at_10_per_second_p99_ms", Bound.BELOW, 12),
    *(Target("dev", *line) for line in _BOTH_MODES),
    Target("dev", "memory_mb_dev", Bound.BELOW, 120),
    Target("dev", "ready_seconds", Bound.BELOW, 2),
    # A single claim's time varies by a third on a quiet machine; what grows with the table grows a thousandfold.
    Target("claims", "sqlite_of_1_ratio", Bound.BELOW, 1.5),
    Target("claims", "sqlite_of_1000_ratio", Bound.BELOW, 1.5),
    Target("claims", "postgresql_of_1_ratio", Bound.BELOW, 1.5),
    Target("claims", "postgresql_of_1000_ratio", Bound.BELOW, 1.5),
    Target("durability", "answers_lost", Bound.BELOW, 1, Judged.EVERY),
    # Rows through source, map and destination, against the same copy written by hand.
    Target("transfer", "times_by_hand", Bound.BELOW, 3),
    Target("deployed", "warm_above_engine_p50_ms", Bound.BELOW, 10),
    Target("deployed", "cold_p50_ms", Bound.BELOW, 1_500),
    Target("deployed", "starts_for_200_callers", Bound.BELOW, 2, Judged.EVERY),
    *(
        Target("deployed", f"{load}_{figure}", Bound.BELOW, limit, Judged.EVERY)
        for load, figure, limit in _LOADS_ON_SLEEPERS
    ),
    Target("deployed", "bursts_wakes", Bound.AT_LEAST, 8, Judged.EVERY),
    Target("deployed", "pod_ready_ms", Bound.BELOW, 1_000),
    Target("deployed", "pod_memory_mb", Bound.BELOW, 90),
    Target("cluster", "start_p95_ms", Bound.BELOW, 10_000),
    Target("cluster", "start_by_deploy", Bound.BELOW, 1),
    Target("mass_starts", "given_up", Bound.BELOW, 1, Judged.EVERY),
    Target("mass_starts", "requests_per_minute_at_rest", Bound.BELOW, 11, Judged.EVERY),
    Target("mass_starts", "requests_per_stop", Bound.BELOW, 7, Judged.EVERY),
    Target("authoring", "sqlite_slowest_query_p95_ms", Bound.BELOW, 50),
    Target("authoring", "postgresql_slowest_query_p95_ms", Bound.BELOW, 50),
    Target("authoring", "sqlite_slowest_edit_p95_ms", Bound.BELOW, 50),
    Target("authoring", "postgresql_slowest_edit_p95_ms", Bound.BELOW, 50),
    *_INTAKE,
    Target("intake", "production_batched_messages_per_second", Bound.AT_LEAST, 5_000),
    Target("intake", "dev_batched_messages_per_second", Bound.AT_LEAST, 5_000),
)


def judge(repetitions: Repetitions) -> Iterator[Outcome]:
    """Yield an outcome for each target whose figure was taken."""
    for target in TARGETS:
        values = [
            figures[target.figure]
            for figures in repetitions.get(target.measured, ())
            if target.figure in figures
        ]
        if values:
            value = _deciding(target, values)
            yield Outcome(target, value, _holds(target, value))


def _deciding(target: Target, values: Sequence[float]) -> float:
    if target.judged is Judged.MEDIAN:
        return median(values)
    return min(values) if target.bound is Bound.AT_LEAST else max(values)


def _holds(target: Target, value: float) -> bool:
    return value >= target.limit if target.bound is Bound.AT_LEAST else value < target.limit
