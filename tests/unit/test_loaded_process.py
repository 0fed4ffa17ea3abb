"""Forks of a process that has loaded the tests."""

from __future__ import annotations

import shlex
import subprocess
from pathlib import Path

import pytest

from tests import loaded_process

PROGRAM = "import os, sys; print(os.getppid(), 'test_one' in sys.modules, sys.stdin.readline())"


@pytest.mark.parametrize(
    ("source", "is_loaded"), [("def test_nothing(): ...", True), ("import nothing_of_this_name", False)]
)
def test_a_program_runs_in_a_fork_which_has_the_tests_unless_one_cannot_be_imported(
    tmp_path: Path, source: str, *, is_loaded: bool
) -> None:
    file = tmp_path / "test_one.py"
    file.write_text(source)
    arguments = [str(file), f"--rootdir={tmp_path}", f"--config-file={tmp_path / 'pytest.ini'}"]
    (tmp_path / "pytest.ini").touch()
    process, command = loaded_process.start_process(arguments)
    try:
        started = subprocess.run(
            [*shlex.split(command), "-u", "-c", PROGRAM],
            input="a line",
            capture_output=True,
            text=True,
            check=True,
        )
        assert started.stdout.split() == [str(process.pid), str(is_loaded), "a", "line"]
    finally:
        process.kill()
        process.wait()
