"""The scheduler's settings: read once, when the process starts."""

from __future__ import annotations

from pydantic import Field

from models.settings import Settings


class SchedulerSettings(Settings):
    """What the scheduler reads besides what all processes share."""

    sweep_seconds: float = Field(
        default=2.0,
        gt=0,
        description="How often the scheduler looks for runs that nobody holds, as each worker does.",
    )
    lifecycle_seconds: float = Field(
        default=10.0,
        gt=0,
        description="How often deployments are started and stopped as their lifecycle policies say.",
    )
    schedule_seconds: float = Field(
        default=0.5,
        gt=0,
        description="How often due schedules and delayed runs are looked for: they start that much late, at most.",
    )
    retention_days: int = Field(
        default=14, ge=1, le=36_500, description="Executions are kept for so many days after their end."
    )
    retention_runs: int = Field(
        default=10_000,
        ge=1,
        description="Executions of one workflow that are kept: beyond them, the oldest go after a day.",
    )
    retention_event_days: int = Field(
        default=14,
        ge=7,
        le=36_500,
        description="Events, and what is noted of deliveries, are kept for so many days after they came.",
    )
    leadership_seconds: float = Field(
        default=10.0,
        gt=0,
        description="How long a scheduler that has died keeps others from its duties; renewed every third of it.",
    )

    def check_for_production(self) -> None:
        """Raise `InvalidSettings` for what only `pilotflame dev` does without; no duty here needs the secret."""
        self.require_redis()
