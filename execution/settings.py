"""Settings of whoever runs executions: read once, when the process starts."""

from __future__ import annotations

import os
from abc import abstractmethod
from typing import Literal

from pydantic import Field
from pydantic_settings import BaseSettings

from engine.limits import Limits
from nodes.code.backend import Backend

MAX_CPU_PROCESSES = 64


class ExecutionSettings(BaseSettings):
    """What workers and pods read alike."""

    concurrency: int = Field(
        default=100,
        ge=1,
        le=10_000,
        description="Runs that one process holds at once; up to twice as many while several organisations share it.",
    )
    lease_seconds: float = Field(
        default=10.0,
        gt=0,
        description="Lease of a run; a lost process keeps its runs for so long. Renewed every third of it.",
    )
    commit_seconds: float = Field(
        default=1.0, gt=0, description="How long results of nodes without side effects may wait for a commit."
    )
    max_row_output_bytes: int = Field(
        default=262_144,
        ge=1_024,
        description="Inputs and outputs of nodes with more bytes are kept as blobs, outside of the database.",
    )
    max_output_bytes: int = Field(
        default=Limits.max_output_bytes,
        ge=1_024,
        le=10_000_000,
        description="Bytes of one node's output as JSON; nodes that build lists stop at 10,000,000 in any case.",
    )
    max_log_lines: int = Field(
        default=Limits.max_log_lines, ge=0, le=1_000_000, description="Lines of one run's log."
    )
    max_loop_items: int = Field(
        default=Limits.max_loop_items, ge=1, le=1_000_000, description="Items of one loop."
    )
    max_iterations: int = Field(
        default=Limits.max_iterations, ge=1, le=10_000_000, description="Turns of all loops of one run."
    )
    cpu_processes: int = Field(
        default_factory=lambda: min(os.cpu_count() or 1, MAX_CPU_PROCESSES),
        ge=1,
        le=MAX_CPU_PROCESSES,
        description=(
            "Processes for nodes that compute for long, as many for code nodes, as many for SQL on SQLite files; up "
            "to twice as many while several organisations share them. As many as the machine has processors unless set."
        ),
    )
    code_nodes: Literal["on", "pods-only", "off"] = Field(
        default="on",
        description="Where code nodes run: on the workers that all organisations share, in pods only, or nowhere.",
    )
    code_backend: Backend = Field(
        default=Backend.MONTY,
        description=(
            "What runs code nodes: `monty`, an interpreter of a part of Python, or `subprocess`, which is all of it."
        ),
    )

    @property
    @abstractmethod
    def seconds_between_sweeps(self) -> float:
        """How often to look for runs that nobody holds."""

    @property
    def limits(self) -> Limits:
        """What one run may take."""
        return Limits(
            max_output_bytes=self.max_output_bytes,
            max_log_lines=self.max_log_lines,
            max_loop_items=self.max_loop_items,
            max_iterations=self.max_iterations,
        )
