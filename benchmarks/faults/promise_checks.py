"""Verdict on the promises P1 to P8 after one fault, from the clients, the ledger and the database's own witnesses."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Final

from benchmarks.faults import fault_load
from models.execution_status import TERMINAL_STATUSES
from tests.system.consistency_checks import ClockMove, ExecutionAccount
from tests.system.journal_records import NoteKind

if TYPE_CHECKING:
    from benchmarks.faults.fault_load import FaultLoad, LoadRun
    from benchmarks.faults.faulty_system import FaultCell
    from tests.system.harness import SystemUnderTest
    from tests.system.journal_records import WitnessNote
    from tests.system.ledger import EffectLedger

PROMISES: Final[Mapping[str, str]] = {
    "P1": "Accepted is durable",
    "P2": "One outcome",
    "P3": "Finished nodes never again",
    "P4": "Bounded recovery",
    "P5": "No wedge",
    "P6": "No death spiral",
    "P7": "Honest status",
    "P8": "Retried calls act once",
}
LATE_AFTER_COMMIT: Final = re.compile(
    r"after its result was committed|was changed|another key|another .*body"
)
SHOWN_BREACHES: Final = 5


class PromiseVerdict(StrEnum):
    """Verdict on one promise in one cell."""

    KEPT = "kept"
    BROKEN = "broken"
    NOT_JUDGED = "not judged"


@dataclass
class CellResult:
    """Figures of one fault, and the observations that break promises."""

    row: str
    column: str
    accepted: int = 0
    lost: int = 0
    """Accepted executions that the database does not have."""
    doubled: int = 0
    """Executions with two ends, keys with two executions, and nodes that ran again after their commit."""
    stuck: int = 0
    """Accepted executions without an end within the patience."""
    recovery_p50: float | None = None
    recovery_p99: float | None = None
    """Seconds until the executions in flight went on, and the latter: all but one of a hundred."""
    is_recovery_judged: bool = False
    """Whether the fault has a bound of P4, and executions were in flight."""
    seconds: float = 0.0
    breaches: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    """Observations by the promise that each breaks."""

    @property
    def place(self) -> tuple[str, str]:
        """Row and column of the matrix."""
        return self.row, self.column

    @property
    def is_kept(self) -> bool:
        """Whether no promise was broken."""
        return not self.breaches

    @property
    def verdict(self) -> str:
        """Short verdict: the broken promises, or `kept`."""
        return ", ".join(sorted(self.breaches)) if self.breaches else "kept"

    def judge_promise(self, promise: str) -> PromiseVerdict:
        """Return the verdict on one promise, such as `P4`."""
        if promise in self.breaches:
            return PromiseVerdict.BROKEN
        if promise == "P4" and not self.is_recovery_judged:
            return PromiseVerdict.NOT_JUDGED
        return PromiseVerdict.KEPT


async def judge(
    result: CellResult,
    load: FaultLoad,
    ledger: EffectLedger,
    deployment: SystemUnderTest,
    began_at: float,
    measured_from: float,
    cell: FaultCell,
) -> None:
    """Fill in the figures and verdicts of `result`.

    `began_at` is the Unix time at which the load began, and recovery is measured from `measured_from`.
    """
    runs = load.runs
    ids = [run.execution_id for run in runs]
    result.accepted = len(runs)
    require_executions(result, runs)
    rows = await deployment.records.fetch("SELECT id, status FROM execution") if ids else []
    stored = dict(rows)
    clock_move = ClockMove(began_at, cell.witness_shift)
    notes = clock_move.correct_times(await deployment.records.notes(ids))
    judge_ends(result, runs, stored, notes)
    _judge_requests(result, load)
    account = ExecutionAccount(
        notes,
        await deployment.records.results(ids),
        ledger.effects(),
        deployment.faults,
        {execution_id for process in deployment.processes for execution_id in process.abandoned()},
    )
    for run in runs:
        for violation in account.violations(run.execution_id):
            if " ended " in violation:
                continue  # judged above
            result.breaches["P3"].append(violation)
            result.doubled += LATE_AFTER_COMMIT.search(violation) is not None
    _judge_recovery(result, runs, ledger, measured_from, cell.recovery_bound)
    result.breaches = {name: found for name, found in result.breaches.items() if found}


def require_executions(result: CellResult, runs: Sequence[LoadRun]) -> None:
    """Record a breach of P5 if no execution was accepted, because that shows nothing about the other promises."""
    if not runs:
        result.breaches["P5"].append("no execution was accepted")


def judge_ends(
    result: CellResult, runs: Sequence[LoadRun], stored: Mapping[str, str], notes: Sequence[WitnessNote]
) -> None:
    """Record runs that are lost, stuck, ended twice, or ended otherwise than their client was answered.

    `stored` has the present status by execution id.
    """
    ends: dict[str, list[str]] = defaultdict(list)
    for note in notes:
        if note.kind is NoteKind.ENDED:
            ends[note.execution_id].append(note.status)
    for run in runs:
        noted, now = ends[run.execution_id], stored.get(run.execution_id)
        if now is None:
            result.lost += 1
            result.breaches["P1"].append(f"{run.execution_id} was accepted and is gone")
        elif now not in TERMINAL_STATUSES:
            result.stuck += 1
            result.breaches["P5"].append(f"{run.execution_id} is still {now}")
        if len(noted) > 1:
            result.doubled += 1
            result.breaches["P2"].append(f"{run.execution_id} ended {len(noted)} times: {noted}")
        _judge_answers(result, run, noted)


def _judge_answers(result: CellResult, run: LoadRun, noted: Sequence[str]) -> None:
    """Record an answer to a client with another end than the first recorded one, with `crashed`, or unexpected."""
    if run.status is None:
        return
    if noted and run.status != noted[0]:
        result.breaches["P7"].append(f"{run.execution_id} was told to be {run.status}, and ended {noted[0]}")
    if run.error_code == "crashed":
        result.breaches["P6"].append(f"{run.execution_id} ended as crashed by one fault")
    elif run.status != run.expected:
        result.breaches["P1"].append(f"{run.execution_id} ended {run.status} ({run.error_code})")


def _judge_requests(result: CellResult, load: FaultLoad) -> None:
    """Record keys under which two runs were accepted, and answers that no client may get."""
    for key in load.doubled_keys:
        result.doubled += 1
        result.breaches["P8"].append(f"two executions under the key {key}")
    for kind, count in load.faulty_answers.items():
        result.breaches["P7"].append(f"{count} answers {kind}")


def _judge_recovery(
    result: CellResult,
    runs: Sequence[LoadRun],
    ledger: EffectLedger,
    measured_from: float,
    bound: float | None,
) -> None:
    """Measure the time until each execution in flight called the ledger again or ended,
    and judge P4 if there is a bound.
    """
    calls: dict[str, list[float]] = defaultdict(list)
    for call in ledger.calls:
        calls[call.execution_id].append(call.arrived_at)
    seconds = []
    for run in fault_load.in_flight(runs, measured_from):
        moments = [*calls[run.execution_id], *([run.ended_at] if run.ended_at else [])]
        later = [moment - measured_from for moment in moments if moment > measured_from]
        if later:
            seconds.append(min(later))
    if not seconds:
        return
    seconds.sort()
    result.recovery_p50, result.recovery_p99 = _quantile(seconds, 0.5), _quantile(seconds, 0.99)
    result.is_recovery_judged = bound is not None
    if bound is not None and result.recovery_p99 > bound:
        result.breaches["P4"].append(f"recovery took {result.recovery_p99:.1f} s at p99, bound {bound:g} s")


def _quantile(ordered: Sequence[float], share: float) -> float:
    return ordered[min(int(share * len(ordered)), len(ordered) - 1)]
