"""Settings of processes that execute runs: read once, at the start."""

from __future__ import annotations

import os
from abc import abstractmethod
from typing import Literal

from pydantic import Field

from engine.run_limits import RunLimits
from nodes.sandbox.code.code_backend import CodeBackend
from telemetry.trace_settings import TraceSettings

MAX_CPU_PROCESSES = 64


class ExecutionSettings(TraceSettings):
    """Settings that workers and pods share."""

    concurrency: int = Field(
        default=100,
        ge=1,
        le=10_000,
        description=(
            "Maximum number of runs that one process holds at once; up to twice as many while several"
            " organizations share it."
        ),
    )
    lease_seconds: float = Field(
        default=10.0,
        gt=0,
        description=(
            "Lifetime of the lease on a run. The runs of a lost process are free after it; a lease is"
            " renewed every third of it."
        ),
    )
    metrics_address: str = Field(
        default="127.0.0.1",
        description="Address at which metrics are served. In containers, `0.0.0.0`, which no client may reach.",
    )
    metrics_workflows: int = Field(
        default=0,
        ge=0,
        le=1_000,
        description=(
            "Number of workflows with metrics of their own in one process, the first ones that run in it; the"
            " others count together as `other`. 0: no metrics by workflow."
        ),
    )
    runner_metrics_port: int | None = Field(
        default=None,
        ge=0,
        le=65_535,
        description="Port of the pods' Prometheus metrics, at `METRICS_ADDRESS`. Unset: no metrics.",
    )
    commit_seconds: float = Field(
        default=1.0, gt=0, description="Maximum delay of a commit of results of nodes without side effects."
    )
    max_row_output_bytes: int = Field(
        default=262_144,
        ge=1_024,
        description=(
            "Size in bytes above which the input or output of a node is kept as a blob instead of in the"
            " database."
        ),
    )
    max_output_bytes: int = Field(
        default=RunLimits.max_output_bytes,
        ge=1_024,
        le=10_000_000,
        description=(
            "Maximum size in bytes of the output of one node, as JSON. Nodes that build lists stop at"
            " 10,000,000 in any case."
        ),
    )
    max_log_lines: int = Field(
        default=RunLimits.max_log_lines,
        ge=0,
        le=1_000_000,
        description="Maximum number of log lines of one run.",
    )
    max_loop_items: int = Field(
        default=RunLimits.max_loop_items,
        ge=1,
        le=1_000_000,
        description="Maximum number of items of one loop.",
    )
    max_iterations: int = Field(
        default=RunLimits.max_iterations,
        ge=1,
        le=10_000_000,
        description="Maximum number of iterations of all loops of one run.",
    )
    cpu_processes: int = Field(
        default_factory=lambda: min(os.cpu_count() or 1, MAX_CPU_PROCESSES),
        ge=1,
        le=MAX_CPU_PROCESSES,
        description=(
            "Child processes for nodes that compute for long; as many again for code nodes, and for SQL on"
            " SQLite files. Up to twice as many while several organizations share them. Unset: the number of"
            " processors."
        ),
    )
    code_nodes: Literal["on", "pods-only", "off"] = Field(
        default="on",
        description=(
            "Place where code nodes run: `on` for shared workers and pods, `pods-only` for pods, `off` for"
            " nowhere."
        ),
    )
    code_backend: CodeBackend = Field(
        default=CodeBackend.MONTY,
        description=(
            "Interpreter of code nodes: `monty`, a subset of Python, or `subprocess`, all of Python."
        ),
    )

    @property
    @abstractmethod
    def seconds_between_sweeps(self) -> float:
        """Seconds between two searches for runs without an owner and for due runs."""

    @property
    def grants_slots(self) -> bool:
        """Whether the process lets gateways assign runs to its free slots; False unless a subclass says otherwise."""
        return False

    @property
    def holds_waiting_runs(self) -> bool:
        """Whether runs may stay for up to a second while they wait for a new task or sub-workflow run; False
        unless a subclass says otherwise.
        """
        return False

    @property
    def limits(self) -> RunLimits:
        """Limits of a single run: bytes of an output, log lines, items of a loop, and iterations in total."""
        return RunLimits(
            max_output_bytes=self.max_output_bytes,
            max_log_lines=self.max_log_lines,
            max_loop_items=self.max_loop_items,
            max_iterations=self.max_iterations,
        )
