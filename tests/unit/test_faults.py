"""The matrix of faults: its cells, its table, and the damage that it must find."""

from __future__ import annotations

import runpy
from types import SimpleNamespace

from benchmarks.faults import __main__ as command
from benchmarks.faults import fault_cells, matrix_view, promise_checks
from benchmarks.faults.fault_run import MUTATIONS
from benchmarks.faults.faulty_system import COLUMNS, ROWS, STAGES
from benchmarks.faults.promise_checks import CellResult
from journal.postgresql import postgresql_store
from tests.system.journal_records import NoteKind, WitnessNote


def test_every_cell_has_a_place_of_its_own_in_the_matrix() -> None:
    places = [(cell.row, cell.column) for cell in fault_cells.list_cells()]
    assert len({*places}) == len(places)
    assert {row for row, _ in places} == {*ROWS}
    assert {column for _, column in places} == {*COLUMNS}
    assert {*STAGES} <= {*ROWS}
    assert all(place in places for found_by in command.FOUND_BY.values() for place in found_by)


def test_the_fence_that_is_removed_for_a_check_exists_in_every_statement() -> None:
    damage = runpy.run_path(str(MUTATIONS / "sitecustomize.py"))
    module = SimpleNamespace(
        __name__=damage["STORE"],
        _RECORD=dict(postgresql_store._RECORD),  # noqa: SLF001 - the statements to damage
        _RECORD_ALONE=dict(postgresql_store._RECORD_ALONE),  # noqa: SLF001 - as above
    )
    damage["remove_fence"](module)
    assert all("write.token\n" not in statement for statement in module._RECORD.values())  # noqa: SLF001 - as above
    assert {*damage["DAMAGE"]} == {*command.FOUND_BY}


def test_a_second_end_a_lost_row_and_a_wrong_answer_break_their_promises() -> None:
    result = CellResult("worker", "killed")
    runs = [
        SimpleNamespace(execution_id="twice", status="completed", expected="completed", error_code=None),
        SimpleNamespace(execution_id="gone", status=None, expected="completed", error_code=None),
        SimpleNamespace(execution_id="stuck", status=None, expected="completed", error_code=None),
        SimpleNamespace(execution_id="crashed", status="failed", expected="completed", error_code="crashed"),
    ]
    notes = [
        WitnessNote(NoteKind.ENDED, execution_id, None, status, 0.0)
        for execution_id, status in [("twice", "failed"), ("twice", "completed"), ("crashed", "failed")]
    ]
    stored = {"twice": "completed", "stuck": "running", "crashed": "failed"}
    promise_checks.judge_ends(result, runs, stored, notes)  # type: ignore[arg-type]  # fields of runs that are read
    assert {*result.breaches} == {"P1", "P2", "P5", "P6", "P7"}
    assert (result.lost, result.doubled, result.stuck) == (1, 1, 1)


def test_the_table_names_each_broken_promise() -> None:
    kept, broken = CellResult("gateway", "killed", accepted=5), CellResult("Redis", "full", accepted=7)
    broken.breaches["P3"].append("a node ran twice")
    table = matrix_view.build_markdown([kept, broken], seed=1)
    assert "2 faults, 12 accepted executions, 1 with a broken promise, seed 1." in table
    assert "| Redis, full | P3 | 7 |" in table
    assert matrix_view.build_json([kept, broken], 1, None)["isKept"] is False
    assert "P3: a node ran twice" in matrix_view.describe(broken)
