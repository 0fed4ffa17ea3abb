"""The repetition of failed tests: which runs pass, and how often each test is run."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TEST = """
from pathlib import Path


def test_fails():
    runs = Path(f"runs-{{Path(__file__).stem}}")
    earlier = len(runs.read_text()) if runs.exists() else 0
    runs.write_text("x" * (earlier + 1))
    assert earlier >= {failures}


def test_passes():
    with Path("passing").open("a") as passing:
        passing.write("x")
"""


@pytest.mark.parametrize(
    ("files", "failures", "exit_code", "runs"),
    [
        pytest.param(3, 1, 0, 2, id="failed-once"),
        pytest.param(1, 2, 1, 2, id="failed-twice"),
        pytest.param(4, 1, 1, 1, id="too-many"),
        pytest.param(1, 0, 0, 1, id="passed"),
    ],
)
def test_failed_tests_of_few_files_are_repeated_once(
    tmp_path: Path, files: int, failures: int, exit_code: int, runs: int
) -> None:
    for number in range(files):
        (tmp_path / f"test_sample{number}.py").write_text(TEST.format(failures=failures))
    command = [sys.executable, "-m", "tests.tools.repeated_run", "-p", "xdist.plugin", "--rootdir", ".", "."]
    ended = subprocess.run(
        command,
        cwd=tmp_path,
        # The samples need no plugin but the one whose option the repetition passes.
        env={"PYTHONPATH": str(ROOT), "PATH": "", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == exit_code, ended.stdout + ended.stderr
    assert {len(path.read_text()) for path in tmp_path.glob("runs-*")} == {runs}
    assert (tmp_path / "passing").read_text() == "x" * files, "a test that passed is not repeated"
    assert ("Unsteady tests" in ended.stdout) == (exit_code == 0 and failures > 0)
