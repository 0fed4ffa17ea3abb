"""Settings of the worker, read once at the start of the process."""

from __future__ import annotations

import socket

from pydantic import Field

from execution.settings import ExecutionSettings
from models.settings import PUBLIC_URL_DESCRIPTION, ServerSettings


class WorkerSettings(ExecutionSettings, ServerSettings):
    """Settings of a worker, in addition to those of all server processes."""

    worker_name: str = Field(
        default_factory=socket.gethostname,
        pattern=r"^[A-Za-z0-9._-]{1,253}$",
        description=(
            "Name that a worker keeps across restarts: it reclaims the runs of dead processes of its name at"
            " once. Several workers may share a name. Unset: the name of the machine."
        ),
    )
    public_url: str = Field(default="", description=PUBLIC_URL_DESCRIPTION)
    sweep_seconds: float = Field(
        default=2.0,
        gt=0,
        description="Interval at which each worker and the scheduler look for runs without an owner.",
    )
    worker_metrics_port: int | None = Field(
        default=None,
        ge=0,
        le=65_535,
        description="Port of the worker's Prometheus metrics, at `METRICS_ADDRESS`. Unset: no metrics.",
    )

    direct_runs: bool = Field(
        default=True,
        description=(
            "Whether gateways may assign runs to free workers as they accept them. Off: workers claim all runs."
        ),
    )

    @property
    def grants_slots(self) -> bool:
        return self.direct_runs

    @property
    def holds_waiting_runs(self) -> bool:
        return True

    @property
    def seconds_between_sweeps(self) -> float:
        return self.sweep_seconds
