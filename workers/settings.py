"""The worker's settings: read once, when the process starts."""

from __future__ import annotations

import socket

from pydantic import Field

from execution.settings import ExecutionSettings
from models.settings import Settings


class WorkerSettings(ExecutionSettings, Settings):
    """What a worker reads besides what all processes share."""

    worker_name: str = Field(
        default_factory=socket.gethostname,
        pattern=r"^[A-Za-z0-9._-]{1,253}$",
        description=(
            "Name that a worker keeps when it is started again: it takes back at once what dead processes of its name"
            " held. The machine's unless set; several workers may share it."
        ),
    )
    sweep_seconds: float = Field(
        default=2.0, gt=0, description="How often each worker looks for runs that nobody holds."
    )
    worker_metrics_port: int | None = Field(
        default=None, ge=0, le=65_535, description="Port of the worker's Prometheus metrics on 127.0.0.1."
    )

    @property
    def seconds_between_sweeps(self) -> float:
        return self.sweep_seconds
