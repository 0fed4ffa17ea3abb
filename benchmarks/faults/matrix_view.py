"""Matrix of a run on the terminal while it grows, and as Markdown and JSON at its end."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, timedelta
from typing import TYPE_CHECKING, Any, Final

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table

from benchmarks.faults.faulty_system import COLUMNS, ROWS
from benchmarks.faults.promise_checks import PROMISES, SHOWN_BREACHES, PromiseVerdict

if TYPE_CHECKING:
    from benchmarks.faults.faulty_system import FaultCell
    from benchmarks.faults.promise_checks import CellResult

RUNNING: Final = "…"
NOT_STRUCK: Final = "\u2013"
SIGNS: Final = {PromiseVerdict.KEPT: "✓", PromiseVerdict.BROKEN: "✗", PromiseVerdict.NOT_JUDGED: NOT_STRUCK}
TYPICAL_SECONDS: Final = 12.0
"""Share of a cell in the duration of a run, until there are results: two cells are struck at once."""


class MatrixView:
    """Matrix on a terminal; on anything else, one line for each cell."""

    def __init__(self, cells: Sequence[FaultCell]) -> None:
        self._cells = cells
        self._results: list[CellResult] = []
        self._running: set[tuple[str, str]] = set()
        self._began_at = time.monotonic()
        self._console = Console()
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[left]}"),
        )
        self._task = self._progress.add_task("faults", total=len(cells), left=self.describe_left())
        self._live: Live | None = None

    @contextmanager
    def shown(self) -> Iterator[None]:
        """Show the matrix during the block, if the output is a terminal."""
        if not self._console.is_terminal:
            yield
            return
        with Live(self._render(), console=self._console, refresh_per_second=4) as self._live:
            yield

    def begin(self, cell: FaultCell) -> None:
        """Show that a fault is in progress."""
        self._running.add(cell.place)
        self._refresh()

    def add(self, result: CellResult) -> None:
        """Show the result of a fault."""
        self._results.append(result)
        self._running.discard(result.place)
        self._progress.advance(self._task)
        self._refresh()
        if self._live is None:
            print(
                f"{len(self._results):2}/{len(self._cells)} {describe(result)}; {self.describe_left()}",
                flush=True,
            )

    def describe_left(self) -> str:
        """Return the expected time until the end of the run, from the average of the faults so far."""
        passed, done = time.monotonic() - self._began_at, len(self._results)
        share = (passed + TYPICAL_SECONDS) / (done + 1)
        left = round(share * (len(self._cells) - done))
        return f"about {timedelta(seconds=left)} left" if left else "done"

    def _refresh(self) -> None:
        if self._live is not None:
            struck = ", ".join(" ".join(place) for place in sorted(self._running))
            self._progress.update(self._task, description=struck, left=self.describe_left())
            self._live.update(self._render())

    def _render(self) -> Group:
        table = Table(title="Promises under faults")
        table.add_column("")
        for column in COLUMNS:
            table.add_column(column)
        found = {(result.row, result.column): result for result in self._results}
        chosen = {(cell.row, cell.column) for cell in self._cells}
        for row in ROWS:
            table.add_row(row, *(self._text(found, chosen, (row, column)) for column in COLUMNS))
        return Group(table, self._progress)

    def _text(
        self,
        found: Mapping[tuple[str, str], CellResult],
        chosen: set[tuple[str, str]],
        place: tuple[str, str],
    ) -> str:
        """Return the content of a cell: its verdict, a sign while the fault is in progress, or empty."""
        if place in self._running:
            return f"[yellow]{RUNNING}[/]"
        if place in found:
            result = found[place]
            color = "green" if result.is_kept else "red"
            return f"[{color}]{result.verdict}[/] {result.accepted}"
        return "" if place in chosen else f"[dim]{NOT_STRUCK}[/]"


def describe(result: CellResult) -> str:
    """Return a line about the result of a fault, and a line for each of the first breaches."""
    recovery = "" if result.recovery_p50 is None else f", recovery {_recovery(result)}"
    line = (
        f"{result.row:10} {result.column:10} {result.verdict:8} {result.accepted} accepted, {result.lost} lost,"
        f" {result.doubled} doubled, {result.stuck} stuck{recovery}, {result.seconds:.0f} s"
    )
    breaches = [
        f"    {name}: {text}" for name, found in result.breaches.items() for text in found[:SHOWN_BREACHES]
    ]
    return "\n".join([line, *breaches])


@dataclass(frozen=True, slots=True)
class RunConditions:
    """Circumstances of a run, without which its figures mean little."""

    seed: int
    per_second: float
    """Requests per second to each deployment."""
    without: str | None
    seconds: float
    """Duration of the run."""
    load: float = field(default_factory=lambda: os.getloadavg()[2])
    """Load of the machine in the last 15 minutes."""
    processors: int = field(default_factory=lambda: os.cpu_count() or 1)
    day: date = field(default_factory=lambda: datetime.now(UTC).date())

    def describe(self) -> str:
        """Return these conditions as one sentence."""
        removed = f" without the {self.without}" if self.without else ""
        return (
            f"It took {self.seconds / 60:.1f} minutes on {self.day}, on {self.processors} processors with a load of"
            f" {self.load:.0f}{removed}; {self.per_second:g} requests per second to each deployment, seed {self.seed}."
        )


def build_markdown(results: Sequence[CellResult], conditions: RunConditions) -> str:
    """Return the matrix and its figures as Markdown."""
    found = {(result.row, result.column): result for result in results}
    head = [f"| {' | '.join(['', *COLUMNS])} |", f"| --- |{' --- |' * len(COLUMNS)}"]
    rows = [
        f"| {row} | {' | '.join(_cell(found.get((row, column))) for column in COLUMNS)} |" for row in ROWS
    ]
    figures = [
        "",
        f"| fault | {' | '.join(PROMISES)} | accepted | lost | doubled | stuck | recovery p50 / p99 |",
        f"| --- |{' --- |' * (len(PROMISES) + 5)}",
        *(
            f"| {one.row}, {one.column} | {' | '.join(SIGNS[one.judge_promise(name)] for name in PROMISES)}"
            f" | {one.accepted} | {one.lost} | {one.doubled} | {one.stuck} | {_recovery(one)} |"
            for one in results
        ),
    ]
    total = sum(result.accepted for result in results)
    broken = sum(not result.is_kept for result in results)
    summary = f"{len(results)} faults, {total:,} accepted executions; a promise was broken by {broken}."
    return "\n".join([summary, conditions.describe(), "", *head, *rows, *figures])


def _cell(result: CellResult | None) -> str:
    return NOT_STRUCK if result is None else result.verdict


def _recovery(result: CellResult) -> str:
    if result.recovery_p50 is None or result.recovery_p99 is None:
        return ""
    return f"{result.recovery_p50:.1f} / {result.recovery_p99:.1f} s"


def build_json(results: Sequence[CellResult], conditions: RunConditions) -> dict[str, Any]:
    """Return the conditions and all results as JSON."""
    return {
        "seed": conditions.seed,
        "requestsPerSecond": conditions.per_second,
        "without": conditions.without,
        "seconds": round(conditions.seconds, 1),
        "processors": conditions.processors,
        "load": round(conditions.load, 1),
        "day": conditions.day.isoformat(),
        "promises": dict(PROMISES),
        "isKept": all(result.is_kept for result in results),
        "cells": [
            {
                "row": one.row,
                "column": one.column,
                "isKept": one.is_kept,
                "promises": {name: one.judge_promise(name).value for name in PROMISES},
                "accepted": one.accepted,
                "lost": one.lost,
                "doubled": one.doubled,
                "stuck": one.stuck,
                "recoveryP50Seconds": one.recovery_p50,
                "recoveryP99Seconds": one.recovery_p99,
                "seconds": round(one.seconds, 1),
                "breaches": dict(one.breaches),
            }
            for one in results
        ],
    }
