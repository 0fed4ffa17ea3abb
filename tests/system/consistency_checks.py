"""Invariants of every accepted execution, under every fault."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING

from engine.run_records import SpanStatus
from tests.system.journal_records import NoteKind
from tests.system.wait_conditions import PATIENCE_SECONDS

if TYPE_CHECKING:
    from engine.values import Json
    from tests.system.client import RetryingClient
    from tests.system.harness import SystemUnderTest
    from tests.system.journal_records import NodeRecord, WitnessNote
    from tests.system.ledger import EffectLedger, LedgerCall
    from tests.system.processes import InjectedFault

CLOCK_SECONDS = 0.002
"""SQLite's clock shows milliseconds."""
LATE_SECONDS = 5.0
"""Within this time after a pause, a worker has sent its pending request and learned that its lease is lost.
"""


async def assert_consistent(
    deployment: SystemUnderTest,
    client: RetryingClient,
    ledger: EffectLedger,
    expected: Mapping[str, str],
    *,
    within: float = PATIENCE_SECONDS,
    clock_move: ClockMove | None = None,
) -> None:
    """Check that executions end, once and in the expected statuses, and that the ledger agrees with the journal.

    `expected` has the status of each execution. `clock_move` is the move of the clock by which the database noted the
    ends and results, if there was one.
    """
    ends = await asyncio.gather(*(client.end(execution_id, within) for execution_id in expected))
    for (execution_id, status), ended in zip(expected.items(), ends, strict=True):
        assert ended.status == status, (execution_id, ended)
    noted_by_clock = await deployment.records.notes(expected)
    notes = noted_by_clock if clock_move is None else clock_move.correct_times(noted_by_clock)
    results = await deployment.records.results(expected)
    abandoned = {execution_id for process in deployment.processes for execution_id in process.abandoned()}
    account = ExecutionAccount(notes, results, ledger.effects(), deployment.faults, abandoned)
    violations = [violation for execution_id in expected for violation in account.violations(execution_id)]
    assert not violations, "\n".join(violations)
    told = {execution_id: client.ended[execution_id].status for execution_id in expected}
    noted = {note.execution_id: note.status for note in notes if note.kind is NoteKind.ENDED}
    assert noted == told


@dataclass(frozen=True, slots=True)
class ClockMove:
    """Move of the clock of the database by a fault, for a while."""

    began_at: float
    """Unix time at which the load began."""
    seconds: float
    """Shift of the clock; 0: it was not moved. It is far longer than the load."""

    def correct_times(self, notes: Sequence[WitnessNote]) -> Sequence[WitnessNote]:
        """Return notes with the times of the true clock, in their order. Its time tells when a note was made."""
        if not self.seconds:
            return notes
        true_notes = [
            replace(note, noted_at=note.noted_at - self.seconds)
            if note.noted_at < self.began_at + self.seconds / 2
            else note
            for note in notes
        ]
        return sorted(true_notes, key=lambda note: note.noted_at)


@dataclass(frozen=True)
class ExecutionAccount:
    """Records of the same executions in the database and in the ledger."""

    notes: Sequence[WitnessNote]
    results: Sequence[NodeRecord]
    effects: Mapping[tuple[str, str], Sequence[LedgerCall]]
    faults: Sequence[InjectedFault]
    abandoned: Collection[str]
    """Executions with a lost lease: on an overloaded machine a worker may fail to renew it in time."""

    def violations(self, execution_id: str) -> Iterator[str]:
        """Yield a sentence for each guarantee that an execution has broken."""
        notes = [note for note in self.notes if note.execution_id == execution_id]
        ends = [note.status for note in notes if note.kind is NoteKind.ENDED]
        if len(ends) != 1:
            yield f"{execution_id} ended {len(ends)} times: {ends}"
        for note in notes:
            if note.kind is NoteKind.REWRITTEN:
                yield f"{execution_id}: the committed result of {note.node_id} was changed"
        results = {result.node_id: result for result in self.results if result.execution_id == execution_id}
        committed_at = {note.node_id: note.noted_at for note in notes if note.kind is NoteKind.SETTLED}
        for (of_execution, node_id), calls in self.effects.items():
            if of_execution == execution_id:
                yield from self._of_node(calls, results, committed_at.get(node_id))
        yield from self._unseen(results)

    def _of_node(
        self, calls: Sequence[LedgerCall], results: Mapping[str, NodeRecord], committed_at: float | None
    ) -> Iterator[str]:
        """Yield the broken guarantees about the calls of one node to the ledger."""
        first = calls[0]
        name = f"{first.execution_id}: {first.node_id}"
        if (key := f"{first.execution_id}:{first.node_id}:0") != first.key:
            yield f"{name} came with the key {first.key}, not {key}"
        for earlier, call in pairwise(calls):
            if (call.key, call.body) != (earlier.key, earlier.body):
                others = _changed_keys(earlier.carried, call.carried)
                yield f"{name} was repeated with another key ({call.key}) or body, of {others}"
            if first.execution_id not in self.abandoned and not any(
                fault.lies_between(earlier.unread_since, call.arrived_at) for fault in self.faults
            ):
                yield f"{name} was repeated without a reason: {earlier.arrived_at}, then {call.arrived_at}"
        for call in calls:
            after_seconds = call.unread_since - committed_at if committed_at else 0
            if committed_at and after_seconds > CLOCK_SECONDS and not self._is_late(call, committed_at):
                yield f"{name} was repeated {after_seconds:.3f} s after its result was committed"
        result = results[first.node_id]
        recorded = json.loads(result.resolved_config or "{}").get("body", {}).get("nodes", {})
        if others := _changed_keys(first.carried, recorded):
            yield f"{name} was sent what had not been recorded before, of {others}"
        journal = {node_id: json.loads(results[node_id].output or "null") for node_id in first.carried}
        if others := _changed_keys(first.carried, journal):
            yield f"{name} knew what the journal does not know in the end, of {others}"

    def _is_late(self, call: LedgerCall, committed_at: float) -> bool:
        """Return whether the sender was paused just before the call, while another worker took over its run."""
        return any(
            "paused" in fault.what
            and fault.began_at < committed_at
            and fault.ended_at < call.arrived_at < fault.ended_at + LATE_SECONDS
            for fault in self.faults
        )

    def _unseen(self, results: Mapping[str, NodeRecord]) -> Iterator[str]:
        """Yield completed writes with a receipt that the ledger did not give."""
        for result in results.values():
            if result.resolved_config is None or result.status != SpanStatus.COMPLETED:
                continue
            receipt = json.loads(result.output or "null")["body"]["receipt"]
            if receipt not in {
                call.receipt for call in self.effects.get((result.execution_id, result.node_id), ())
            }:
                yield f"{result.execution_id}: {result.node_id} has a receipt that it was not given: {receipt}"


def _changed_keys(one: Mapping[str, Json], other: Mapping[str, Json]) -> list[str]:
    return [key for key in {**one, **other} if one.get(key) != other.get(key)]


def count_repeated(effects: Mapping[tuple[str, str], Sequence[LedgerCall]]) -> Counter[str]:
    """Return the number of repeated effects of nodes, by execution."""
    return Counter(execution_id for (execution_id, _), calls in effects.items() for _ in calls[1:])
