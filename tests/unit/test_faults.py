"""The matrix of faults: its cells, its table, and the damage that it must find."""

from __future__ import annotations

import runpy
from datetime import date
from itertools import islice
from pathlib import Path
from random import Random
from types import SimpleNamespace

import pytest

from benchmarks import soak
from benchmarks.faults import __main__ as command
from benchmarks.faults import fault_cells, matrix_view, promise_checks
from benchmarks.faults.fault_run import MUTATIONS
from benchmarks.faults.faulty_system import COLUMNS, ROWS, STAGES
from benchmarks.faults.matrix_view import MatrixView, RunConditions
from benchmarks.faults.promise_checks import CellResult
from journal.postgresql import postgresql_store
from journal.tasks import task_moves
from tests.system.consistency_checks import ClockMove
from tests.system.journal_records import NoteKind, WitnessNote
from tests.system.processes import SystemProcess
from tests.system.storm import StormStrike
from workers.settings import WorkerSettings


def test_every_cell_has_a_place_of_its_own_in_the_matrix() -> None:
    places = [(cell.row, cell.column) for cell in fault_cells.list_cells()]
    assert len({*places}) == len(places)
    assert {row for row, _ in places} == {*ROWS}
    assert {column for _, column in places} == {*COLUMNS}
    assert {*STAGES} <= {*ROWS}
    quick = [(cell.row, cell.column) for cell in fault_cells.list_cells() if cell.is_quick]
    assert all(place in quick for found_by in command.FOUND_BY.values() for place in found_by)


def test_the_fence_that_is_removed_for_a_check_exists_in_every_statement() -> None:
    damage = runpy.run_path(str(MUTATIONS / "sitecustomize.py"))
    module = SimpleNamespace(
        _RECORD=dict(postgresql_store._RECORD),  # noqa: SLF001 - the statements to damage
        _RECORD_ALONE=dict(postgresql_store._RECORD_ALONE),  # noqa: SLF001 - as above
    )
    damage["remove_fence"](module)
    assert all("write.token\n" not in statement for statement in module._RECORD.values())  # noqa: SLF001 - as above
    assert {*damage["DAMAGE"]} == {*command.FOUND_BY}
    damage["remove_lease"](SimpleNamespace(**vars(task_moves)))


async def test_a_process_loads_the_code_that_its_environment_names(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text("print('damaged')")
    environment = {"PYTHONPATH": str(tmp_path), "PATH": ""}
    process = SystemProcess("damaged", ["--version"], environment, tmp_path, [])
    process.start()
    assert await process.exit_code() == 0
    assert "damaged" in process.log()


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
    conditions = RunConditions(1, 8.0, None, seconds=90, load=3.2, processors=2, day=date(2026, 11, 28))
    table = matrix_view.build_markdown([kept, broken], conditions)
    assert "2 faults, 12 accepted executions; a promise was broken by 1." in table
    assert "It took 1.5 minutes on 2026-11-28, on 2 processors with a load of 3; 8 requests" in table
    assert "| fault | P1 | P2 | P3 | P4 | P5 | P6 | P7 | P8 | accepted |" in table
    not_judged = matrix_view.NOT_STRUCK
    assert f"| gateway, killed | ✓ | ✓ | ✓ | {not_judged} | ✓ | ✓ | ✓ | ✓ | 5 |" in table
    assert f"| Redis, full | ✓ | ✓ | ✗ | {not_judged} | ✓ | ✓ | ✓ | ✓ | 7 |" in table
    found = matrix_view.build_json([kept, broken], conditions)
    assert found["isKept"] is False
    assert found["cells"][1]["promises"]["P3"] == "broken"
    assert "P3: a node ran twice" in matrix_view.describe(broken)


def test_the_view_counts_cells_and_tells_the_time_that_is_left(capsys: pytest.CaptureFixture[str]) -> None:
    first, second = fault_cells.list_cells()[:2]
    view = MatrixView([first, second])
    with view.shown():
        view.begin(first)
        view.add(CellResult(first.row, first.column, accepted=5))
        view.add(CellResult(second.row, second.column, accepted=5))
    before, after = capsys.readouterr().out.splitlines()
    assert before.startswith(" 1/2 gateway    killed")
    assert "left" in before
    assert after.endswith("; done")


def test_notes_of_a_moved_clock_are_judged_by_the_true_time() -> None:
    began_at, shift = 1_000_000.0, -fault_cells.HOUR
    notes = [
        WitnessNote(NoteKind.SETTLED, "exec", "during", "completed", began_at + 5 + shift),
        WitnessNote(NoteKind.SETTLED, "exec", "before", "completed", began_at + 1),
        WitnessNote(NoteKind.SETTLED, "exec", "after", "completed", began_at + 9),
    ]
    moved = ClockMove(began_at, shift).correct_times(notes)
    found = [(note.node_id, note.noted_at - began_at) for note in moved]
    assert found == [("before", 1), ("during", 5), ("after", 9)]
    assert ClockMove(began_at, 0).correct_times(notes) == notes


def test_a_cell_without_accepted_executions_proves_nothing() -> None:
    result = CellResult("gateway", "killed")
    promise_checks.require_executions(result, [])
    assert result.verdict == "P5"


def test_a_published_table_is_that_of_the_whole_matrix(monkeypatch: pytest.MonkeyPatch) -> None:
    for partial_run in ("--quick", "--only=worker", "--without=fence"):
        monkeypatch.setattr("sys.argv", ["faults", "--publish", partial_run])
        with pytest.raises(SystemExit, match="2"):
            command.main()


def test_lease_and_sweep_are_the_defaults_of_the_product() -> None:
    assert WorkerSettings.model_fields["sweep_seconds"].default == fault_cells.SWEEP_SECONDS
    assert WorkerSettings.model_fields["lease_seconds"].default == fault_cells.LEASE_SECONDS


def test_a_soak_deals_every_fault_before_it_repeats_one() -> None:
    faults = [StormStrike(str(number), _do_nothing) for number in range(9)]
    dealt = [fault.name for fault in islice(soak.deal_endlessly(faults, Random(1)), 27)]
    turns = [dealt[:9], dealt[9:18], dealt[18:]]
    assert all({*turn} == {fault.name for fault in faults} for turn in turns)
    assert turns[0] != turns[1]


async def _do_nothing() -> None:
    pass
