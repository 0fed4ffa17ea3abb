"""Performance targets of the project for two cores, generator included, and the outcome of a run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from statistics import median

Repetitions = Mapping[str, Sequence[Mapping[str, float]]]
"""Figures of each repetition, by part (`production`, `dev`, ...)."""


class TargetSide(StrEnum):
    """Comparison of a figure with the limit of its target."""

    AT_LEAST = ">="
    BELOW = "<"


class TargetJudgment(StrEnum):
    """Value of several repetitions that is compared."""

    EVERY = "in every repetition"
    MEDIAN = "in the median"


@dataclass(frozen=True, slots=True)
class FigureTarget:
    """Target of a figure, `figure`, of a part, `measured`."""

    measured: str
    figure: str
    bound: TargetSide
    limit: float
    judged: TargetJudgment = TargetJudgment.MEDIAN


@dataclass(frozen=True, slots=True)
class TargetOutcome:
    """Target with its measured figure."""

    target: FigureTarget
    value: float
    is_reached: bool

    def __str__(self) -> str:
        target = self.target
        wanted = f"{target.figure.replace('_', ' ')} {target.bound} {target.limit:g} {target.judged}"
        return f"target {target.measured}: {wanted}: {self.value:.4g} {'reached' if self.is_reached else 'missed'}"


_BOTH_MODES = (
    ("saturation_p99_ms", TargetSide.BELOW, 40),
    ("forty_nodes_ms", TargetSide.BELOW, 15),
    ("write_chains_per_second", TargetSide.AT_LEAST, 1_000),
)
_LOADS_ON_SLEEPERS = (
    (load, figure, limit)
    for load in ("stopped", "bursts")
    for figure, limit in (("lost", 1), ("failed", 1), ("wake_p99_ms", 3_000))
)
INTAKE_PER_CORE: Mapping[str, int] = {"enqueue": 1_000, "mail": 300, "events": 800, "webhooks": 800}
"""Requests per second by kind. Latencies are measured at half that rate."""
_INTAKE = (
    FigureTarget("intake", f"{mode}_{kind}_{figure}", bound, limit)
    for mode, core in (("production", "gateway"), ("dev", "dev"))
    for kind, per_core in INTAKE_PER_CORE.items()
    for figure, bound, limit in (
        (f"per_{core}_core", TargetSide.AT_LEAST, per_core),
        (f"at_{per_core // 2}_per_second_p99_ms", TargetSide.BELOW, 100),
    )
)
TARGETS = (
    FigureTarget("production", "executions_per_second", TargetSide.AT_LEAST, 2_000, TargetJudgment.EVERY),
    FigureTarget("production", "executions_per_second", TargetSide.AT_LEAST, 3_000),
    FigureTarget("production", "cpu_ms_per_run", TargetSide.BELOW, 0.5),
    FigureTarget("production", "times_stock_dramatiq", TargetSide.AT_LEAST, 1.5),
    FigureTarget("production", "at_10_per_second_p50_ms", TargetSide.BELOW, 10),
    FigureTarget("production", "at_10_per_second_p99_ms", TargetSide.BELOW, 20),
    *(FigureTarget("production", *line) for line in _BOTH_MODES),
    FigureTarget("production", "memory_mb_gateway", TargetSide.BELOW, 100),
    FigureTarget("production", "memory_mb_worker", TargetSide.BELOW, 100),
    FigureTarget("dev", "executions_per_second", TargetSide.AT_LEAST, 3_000, TargetJudgment.EVERY),
    FigureTarget("dev", "at_10_per_second_p50_ms", TargetSide.BELOW, 5),
    FigureTarget("dev", "at_10_per_second_p99_ms", TargetSide.BELOW, 12),
    *(FigureTarget("dev", *line) for line in _BOTH_MODES),
    FigureTarget("dev", "memory_mb_dev", TargetSide.BELOW, 120),
    FigureTarget("dev", "ready_seconds", TargetSide.BELOW, 2),
    *(
        FigureTarget("start", f"{name}_import_cpu_seconds", TargetSide.BELOW, seconds)
        for name, seconds in (("gateway", 0.6), ("worker", 0.6), ("scheduler", 0.45), ("runner", 0.35))
    ),
    FigureTarget("start", "dev_ready_seconds", TargetSide.BELOW, 0.7),
    FigureTarget("start", "gateway_memory_mb", TargetSide.BELOW, 70),
    FigureTarget("start", "worker_memory_mb", TargetSide.BELOW, 70),
    FigureTarget("start", "dev_memory_mb", TargetSide.BELOW, 90),
    # A single claim's time varies by a third on a quiet machine; a cost that grows with the table grows a
    # thousandfold.
    FigureTarget("claims", "sqlite_of_1_ratio", TargetSide.BELOW, 1.5),
    FigureTarget("claims", "sqlite_of_1000_ratio", TargetSide.BELOW, 1.5),
    FigureTarget("claims", "postgresql_of_1_ratio", TargetSide.BELOW, 1.5),
    FigureTarget("claims", "postgresql_of_1000_ratio", TargetSide.BELOW, 1.5),
    FigureTarget("durability", "answers_lost", TargetSide.BELOW, 1, TargetJudgment.EVERY),
    # Rows through source, map and destination, against the same copy written by hand.
    FigureTarget("transfer", "times_by_hand", TargetSide.BELOW, 3),
    FigureTarget("deployed", "warm_above_engine_p50_ms", TargetSide.BELOW, 10),
    FigureTarget("deployed", "cold_p50_ms", TargetSide.BELOW, 1_500),
    FigureTarget("deployed", "starts_for_200_callers", TargetSide.BELOW, 2, TargetJudgment.EVERY),
    *(
        FigureTarget("deployed", f"{load}_{figure}", TargetSide.BELOW, limit, TargetJudgment.EVERY)
        for load, figure, limit in _LOADS_ON_SLEEPERS
    ),
    FigureTarget("deployed", "bursts_wakes", TargetSide.AT_LEAST, 8, TargetJudgment.EVERY),
    FigureTarget("deployed", "pod_ready_ms", TargetSide.BELOW, 1_000),
    FigureTarget("deployed", "pod_memory_mb", TargetSide.BELOW, 90),
    FigureTarget("cluster", "start_p95_ms", TargetSide.BELOW, 10_000),
    FigureTarget("cluster", "start_by_deploy", TargetSide.BELOW, 1),
    FigureTarget("mass_starts", "given_up", TargetSide.BELOW, 1, TargetJudgment.EVERY),
    FigureTarget("mass_starts", "requests_per_minute_at_rest", TargetSide.BELOW, 11, TargetJudgment.EVERY),
    FigureTarget("mass_starts", "requests_per_stop", TargetSide.BELOW, 7, TargetJudgment.EVERY),
    FigureTarget("node_loss", "serves_again_seconds", TargetSide.BELOW, 60, TargetJudgment.EVERY),
    FigureTarget("authoring", "sqlite_slowest_query_p95_ms", TargetSide.BELOW, 50),
    FigureTarget("authoring", "postgresql_slowest_query_p95_ms", TargetSide.BELOW, 50),
    FigureTarget("authoring", "sqlite_slowest_edit_p95_ms", TargetSide.BELOW, 50),
    FigureTarget("authoring", "postgresql_slowest_edit_p95_ms", TargetSide.BELOW, 50),
    FigureTarget("million", "sqlite_slowest_p95_ms", TargetSide.BELOW, 50),
    FigureTarget("million", "postgresql_slowest_p95_ms", TargetSide.BELOW, 50),
    FigureTarget("million", "postgresql_sequential_scans", TargetSide.BELOW, 1),
    FigureTarget("tasks", "sdk_tasks_per_second_batch_50", TargetSide.AT_LEAST, 2_000),
    FigureTarget("tasks", "sdk_tasks_per_second_batch_1", TargetSide.AT_LEAST, 600),
    FigureTarget("tasks", "begin_p50_ms", TargetSide.BELOW, 5),
    FigureTarget("tasks", "idle_cores_for_10000", TargetSide.BELOW, 0.1),
    FigureTarget("tasks", "idle_kb_per_poll", TargetSide.BELOW, 30),
    FigureTarget("agents", "transactions_per_turn", TargetSide.BELOW, 2.5),
    FigureTarget("agents", "worker_ms_per_turn", TargetSide.BELOW, 5),
    FigureTarget("agents", "streams_at_once", TargetSide.AT_LEAST, 100),
    FigureTarget("agents", "worker_mb_with_100_streams", TargetSide.BELOW, 150),
    FigureTarget("metrics", "percent_of_a_run", TargetSide.BELOW, 2),
    FigureTarget("dashboard", "streams_200_core_percent", TargetSide.BELOW, 5),
    FigureTarget("dashboard", "100_nodes_first_paint_ms", TargetSide.BELOW, 400),
    FigureTarget("dashboard", "2000_nodes_ready_ms", TargetSide.BELOW, 1_000),
    FigureTarget("dashboard", "map_of_2000_nodes_ready_ms", TargetSide.BELOW, 1_000),
    FigureTarget("dashboard", "change_visible_p95_ms", TargetSide.BELOW, 500),
    FigureTarget("dashboard", "idle_times_off_executions_per_second", TargetSide.AT_LEAST, 0.95),
    FigureTarget("dashboard", "idle_times_off_cpu_per_run", TargetSide.BELOW, 1.05),
    *_INTAKE,
    FigureTarget("intake", "production_batched_messages_per_second", TargetSide.AT_LEAST, 5_000),
    FigureTarget("intake", "dev_batched_messages_per_second", TargetSide.AT_LEAST, 5_000),
)


def judge_targets(repetitions: Repetitions) -> Iterator[TargetOutcome]:
    """Yield the outcome of each target with a measured figure."""
    for target in TARGETS:
        values = [
            figures[target.figure]
            for figures in repetitions.get(target.measured, ())
            if target.figure in figures
        ]
        if values:
            value = _deciding_value(target, values)
            yield TargetOutcome(target, value, _holds(target, value))


def _deciding_value(target: FigureTarget, values: Sequence[float]) -> float:
    if target.judged is TargetJudgment.MEDIAN:
        return median(values)
    return min(values) if target.bound is TargetSide.AT_LEAST else max(values)


def _holds(target: FigureTarget, value: float) -> bool:
    return value >= target.limit if target.bound is TargetSide.AT_LEAST else value < target.limit
