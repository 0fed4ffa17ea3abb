"""Faults of every part under load, and the promises that they must not break: `python -m benchmarks.faults`.

Exit code 0: every promise was kept; 1: one was broken; 2: the run could not be made. With `--without`, a mechanism is
removed from the server first: the exit code must be 1.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import signal
import sys
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from benchmarks.faults import fault_cells, faulty_system, matrix_view
from benchmarks.faults.fault_run import CompilerMissing, FaultRun, run_matrix
from benchmarks.faults.matrix_view import MatrixView, RunConditions
from benchmarks.faults.promise_checks import CellResult
from benchmarks.faults.upgrades import NoPreviousVersion
from docs.tables import ROOT, replace_table

PUBLISHED: Final = ROOT / "docs/promises.md"
FOUND_BY: Final = {
    "fence": [("worker", "late")],
    "lease": [("task worker", "frozen")],
    "confirmation": [("task worker", "frozen")],
    "sweep": [("worker", "killed")],
    "journal": [("worker", "killed")],
}
"""Cells that find the absence of a mechanism."""


@dataclass(frozen=True, slots=True)
class FaultRequest:
    """Parsed command line."""

    run: FaultRun
    markdown: Path | None
    json: Path | None
    publishes: bool


def main() -> None:
    """Run the matrix, report it, and exit with the code that the module describes."""
    request = _parse_request()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(2))  # as for Ctrl-C: everything that was started ends
    run = request.run
    view = MatrixView(run.cells)
    began_at = time.monotonic()
    try:
        with view.shown():
            results = asyncio.run(run_matrix(run, view))
    except (CompilerMissing, NoPreviousVersion) as error:
        sys.stderr.write(f"{error}\n")
        sys.exit(2)
    except Exception:  # noqa: BLE001 - an exit code of 1 would accuse the server
        traceback.print_exc()
        sys.exit(2)
    report(
        request, results, RunConditions(run.seed, run.per_second, run.without, time.monotonic() - began_at)
    )
    sys.exit(0 if all(result.is_kept for result in results) else 1)


def report(request: FaultRequest, results: Sequence[CellResult], conditions: RunConditions) -> None:
    """Write the requested files, and print the matrix and each broken promise."""
    markdown = matrix_view.build_markdown(results, conditions)
    if request.markdown is not None:
        request.markdown.write_text(markdown + "\n")
    if request.json is not None:
        found = matrix_view.build_json(results, conditions)
        request.json.write_text(json.dumps(found, indent=2) + "\n")
    if request.publishes:
        PUBLISHED.write_text(replace_table(PUBLISHED.read_text(), "faults", markdown))
    print("", markdown, sep="\n")
    broken = [result for result in results if not result.is_kept]
    for result in broken:
        print(matrix_view.describe(result))
    if conditions.without is not None:
        print(f"without the {conditions.without}: {'found' if broken else 'not found'}")


def _parse_request() -> FaultRequest:
    parser = argparse.ArgumentParser(
        prog="make faults ARGUMENTS=", description=(__doc__ or "").partition("\n")[0]
    )
    add = parser.add_argument
    add("--quick", action="store_true", help="the most telling faults, in two minutes")
    add("--only", action="append", metavar="ROW[:COLUMN]", help="part that fails: worker, or worker:killed")
    add("--seed", type=int, default=1, help="of the load (default: %(default)s)")
    add("--per-second", type=float, default=8.0, help="requests per second (default: %(default)s)")
    add("--without", choices=FOUND_BY, help="remove a mechanism, to show that its absence is found")
    add("--markdown", type=Path, metavar="FILE", help="write the matrix there")
    add("--json", type=Path, metavar="FILE", help="write the figures there")
    add("--publish", action="store_true", help="replace the table in docs/promises.md")
    given = parser.parse_args()
    cells = [cell for cell in fault_cells.list_cells() if cell.is_quick or not given.quick]
    if given.without is not None:
        cells = [cell for cell in cells if (cell.row, cell.column) in FOUND_BY[given.without]]
    if given.only:
        cells = [cell for cell in cells if {cell.row, f"{cell.row}:{cell.column}"} & {*given.only}]
    if given.publish and (given.quick or given.only or given.without):
        parser.error("--publish needs the whole matrix: leave out --quick, --only and --without")
    if not cells:
        parser.error(f"no fault matches; rows: {', '.join(faulty_system.ROWS)}")
    run = FaultRun(cells, given.seed, given.per_second, given.without)
    return FaultRequest(run, given.markdown, given.json, given.publish)


if __name__ == "__main__":
    main()
