"""Matrix of a run on the terminal while it grows, and as Markdown and JSON at its end."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from benchmarks.faults.faulty_system import COLUMNS, ROWS
from benchmarks.faults.promise_checks import PROMISES, SHOWN_BREACHES

if TYPE_CHECKING:
    from benchmarks.faults.faulty_system import FaultCell
    from benchmarks.faults.promise_checks import CellResult

RUNNING: Final = "…"
NOT_STRUCK: Final = "\u2013"


class MatrixView:
    """Matrix on a terminal; on anything else, one line for each cell."""

    def __init__(self, cells: Sequence[FaultCell]) -> None:
        self._cells = cells
        self._results: list[CellResult] = []
        self._running: tuple[str, str] | None = None
        self._console = Console()
        self._progress = Progress(
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
        )
        self._task = self._progress.add_task("faults", total=len(cells))
        self._live: Live | None = None

    @contextmanager
    def shown(self) -> Iterator[None]:
        """Show the matrix during a block."""
        if not self._console.is_terminal:
            yield
            return
        with Live(self._render(), console=self._console, refresh_per_second=4) as self._live:
            yield

    def begin(self, cell: FaultCell) -> None:
        """Show that a cell is being struck."""
        self._running = cell.row, cell.column
        self._progress.update(self._task, description=f"{cell.row}: {cell.column}")
        self._refresh()

    def add(self, result: CellResult) -> None:
        """Show the result of a cell."""
        self._results.append(result)
        self._running = None
        self._progress.advance(self._task)
        self._refresh()
        if self._live is None:
            print(describe(result), flush=True)

    def _refresh(self) -> None:
        if self._live is not None:
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
        if place == self._running:
            return f"[yellow]{RUNNING}[/]"
        if place in found:
            result = found[place]
            color = "green" if result.is_kept else "red"
            return f"[{color}]{result.verdict}[/] {result.accepted}"
        return "" if place in chosen else f"[dim]{NOT_STRUCK}[/]"


def describe(result: CellResult) -> str:
    """Return one line about a cell, and a line for each of the first breaches."""
    recovery = "" if result.recovery_p50 is None else f", recovery {_recovery(result)}"
    line = (
        f"{result.row:10} {result.column:10} {result.verdict:8} {result.accepted} accepted, {result.lost} lost,"
        f" {result.doubled} doubled, {result.stuck} stuck{recovery}, {result.seconds:.0f} s"
    )
    breaches = [
        f"    {name}: {text}" for name, found in result.breaches.items() for text in found[:SHOWN_BREACHES]
    ]
    return "\n".join([line, *breaches])


def build_markdown(results: Sequence[CellResult], seed: int) -> str:
    """Return the matrix and its figures as Markdown."""
    found = {(result.row, result.column): result for result in results}
    head = [f"| {' | '.join(['', *COLUMNS])} |", f"| --- |{' --- |' * len(COLUMNS)}"]
    rows = [
        f"| {row} | {' | '.join(_cell(found.get((row, column))) for column in COLUMNS)} |" for row in ROWS
    ]
    figures = [
        "",
        "| fault | promises | accepted | lost | doubled | stuck | recovery p50 / p99 |",
        "| --- | --- | --- | --- | --- | --- | --- |",
        *(
            f"| {one.row}, {one.column} | {one.verdict} | {one.accepted} | {one.lost} | {one.doubled} | {one.stuck}"
            f" | {_recovery(one)} |"
            for one in results
        ),
    ]
    total = sum(result.accepted for result in results)
    broken = sum(not result.is_kept for result in results)
    summary = (
        f"{len(results)} faults, {total:,} accepted executions, {broken} with a broken promise, seed {seed}."
    )
    return "\n".join([summary, "", *head, *rows, *figures])


def _cell(result: CellResult | None) -> str:
    return NOT_STRUCK if result is None else result.verdict


def _recovery(result: CellResult) -> str:
    if result.recovery_p50 is None or result.recovery_p99 is None:
        return ""
    return f"{result.recovery_p50:.1f} / {result.recovery_p99:.1f} s"


def build_json(results: Sequence[CellResult], seed: int, without: str | None) -> dict[str, Any]:
    """Return the results for other programs."""
    return {
        "seed": seed,
        "without": without,
        "promises": dict(PROMISES),
        "isKept": all(result.is_kept for result in results),
        "cells": [
            {
                "row": one.row,
                "column": one.column,
                "isKept": one.is_kept,
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
