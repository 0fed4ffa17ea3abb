"""Settings of the scheduler, read once at the start of the process."""

from __future__ import annotations

from pydantic import Field

from models.settings import ServerSettings


class SchedulerSettings(ServerSettings):
    """Settings of the scheduler, in addition to those of all server processes."""

    sweep_seconds: float = Field(
        default=2.0,
        gt=0,
        description="Interval at which each worker and the scheduler look for runs without an owner.",
    )
    lifecycle_seconds: float = Field(
        default=10.0,
        gt=0,
        description="Interval at which deployments are started and stopped by their lifecycle policies.",
    )
    schedule_seconds: float = Field(
        default=0.5,
        gt=0,
        description="Interval at which due schedules and delayed runs are started: their maximum delay.",
    )
    retention_days: int = Field(
        default=14, ge=1, le=36_500, description="Days that an execution is kept after its end."
    )
    retention_runs: int = Field(
        default=10_000,
        ge=1,
        description=(
            "Maximum number of ended executions that are kept for one workflow; the oldest beyond it are"
            " deleted once they are a day old."
        ),
    )
    retention_event_days: int = Field(
        default=14,
        ge=7,
        le=36_500,
        description="Days that events and deliveries are kept after their arrival.",
    )
    leadership_seconds: float = Field(
        default=10.0,
        gt=0,
        description=(
            "Lifetime of the lease of the leading scheduler: another one takes over after it. It is renewed"
            " every third of it."
        ),
    )

    scheduler_metrics_port: int | None = Field(
        default=None,
        ge=0,
        le=65_535,
        description="Port of the scheduler's Prometheus metrics, at `METRICS_ADDRESS`. Unset: no metrics.",
    )

    def check_for_production(self) -> None:
        """Raise `InvalidSettings` if the address of the broker is missing, which only `pilotflame dev` can omit.

        No duty needs the secret.
        """
        self.require_broker()
