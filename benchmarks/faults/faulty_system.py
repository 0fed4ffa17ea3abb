"""Cells of the matrix, and the deployments that they strike."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Final

from tests.system.harness import ManyProcesses, OneProcess

if TYPE_CHECKING:
    from benchmarks.faults.fault_load import FaultLoad
    from tests.preloads import FaultyDisk, ShiftedClock
    from tests.system.harness import SystemUnderTest
    from tests.system.ledger import EffectLedger

ROWS: Final = (
    *("gateway", "worker", "task worker", "scheduler", "Redis", "PostgreSQL", "network", "disk", "clock"),
    *("dev", "upgrade", "roll-back", "dev upgrade", "dev roll-back"),
)
COLUMNS: Final = ("killed", "frozen", "late", "cut off", "slow", "full", "restarted", "moved back")


class PromiseBroken(Exception):
    """A fault has observed a broken promise: its name, such as `P2`, and the observation."""

    def __init__(self, promise: str, observation: str) -> None:
        super().__init__(observation)
        self.promise = promise


@dataclass
class FaultySystem:
    """Deployment, and its parts that can fail."""

    deployment: SystemUnderTest
    clocks: Mapping[str, ShiftedClock]
    disk: FaultyDisk
    """Disk of `dev`, or of PostgreSQL."""
    redis_folder: Path | None = None
    previous: Path | None = None
    """Folder with the code of the previous version."""
    ledger: EffectLedger | None = None
    """Ledger of the current load."""
    load: FaultLoad | None = None
    """Current load."""
    struck_at: float = 0.0
    """Unix time at which the current fault began."""

    @property
    def many(self) -> ManyProcesses:
        """The deployment, which must be the one of several processes."""
        assert isinstance(self.deployment, ManyProcesses)
        return self.deployment

    @property
    def one(self) -> OneProcess:
        """The deployment, which must be `pilotflame dev`."""
        assert isinstance(self.deployment, OneProcess)
        return self.deployment


Strike = Callable[[FaultySystem], Awaitable[None]]


class Stage(StrEnum):
    """Deployment that faults strike one after another."""

    MANY = "many"
    """Gateway, two workers and a scheduler on PostgreSQL and Redis."""
    DEV = "dev"
    """`pilotflame dev` on SQLite."""
    MANY_UPGRADED = "many-upgraded"
    """As `MANY`, beginning with the previous version."""
    DEV_UPGRADED = "dev-upgraded"


UPGRADED_STAGES: Final = frozenset({Stage.MANY_UPGRADED, Stage.DEV_UPGRADED})
STAGES: Final = {
    "disk": Stage.DEV,
    "dev": Stage.DEV,
    "upgrade": Stage.MANY_UPGRADED,
    "roll-back": Stage.MANY_UPGRADED,
    "dev upgrade": Stage.DEV_UPGRADED,
    "dev roll-back": Stage.DEV_UPGRADED,
}
"""Stages by row; all other rows have `MANY`."""


@dataclass(frozen=True, slots=True)
class FaultCell:
    """Fault of the matrix."""

    row: str
    column: str
    strike: Strike
    """Performs the fault, and ends when it is over; may raise `PromiseBroken`, and TimeoutError for P5."""
    recovery_bound: float | None = None
    """Bound of P4 in seconds, from the beginning of the fault; None: recovery is measured from its end."""
    is_quick: bool = False
    """Whether the short run has it."""
    witness_shift: float = 0.0
    """Seconds by which the fault moves the clock with which the database notes commits, as in SQLite."""

    @property
    def place(self) -> tuple[str, str]:
        """Row and column of the matrix."""
        return self.row, self.column

    @property
    def stage(self) -> Stage:
        """Deployment on which the fault is performed."""
        return STAGES.get(self.row, Stage.MANY)
