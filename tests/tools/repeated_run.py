"""Runs pytest, and repeats the failed tests of up to three files alone: a test must fail twice to fail the run.

``python -m tests.tools.repeated_run ARGUMENTS`` takes the arguments of pytest and ends with its exit code. The tests of
servers depend on the scheduling of dozens of processes, so one of ten thousand can fail on a machine that stalls. A
test that passes alone is printed as unsteady, since a race in the product looks the same. The tests of a file share
their servers, so that they fail together. Failures in more files are not repeated.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

FAILURES = Path(".pytest_cache/v/cache/lastfailed")
MAX_FILES = 3
ALL_PASSED, SOME_FAILED = 0, 1
"""Exit codes of pytest, which this process does not load."""


def run_tests(arguments: Sequence[str]) -> int:
    """Run pytest and return its exit code, or that of the repetition if tests of only a few files failed."""
    FAILURES.unlink(missing_ok=True)
    exit_code = _run_pytest(*arguments)
    failed = sorted(json.loads(FAILURES.read_text())) if FAILURES.exists() else []
    files = {test.partition("::")[0] for test in failed}
    if exit_code != SOME_FAILED or not 0 < len(files) <= MAX_FILES:
        return exit_code
    _write("Repeating failed tests, alone:", failed)
    exit_code = _run_pytest(*arguments, "--last-failed", "--numprocesses", "0")
    if exit_code == ALL_PASSED:
        _write("Unsteady tests, which failed once and passed alone:", failed)
    return exit_code


def _run_pytest(*arguments: str) -> int:
    """Run pytest in a process of its own, in the present folder, and return its exit code."""
    return subprocess.run([sys.executable, "-m", "pytest", *arguments], check=False).returncode


def _write(heading: str, tests: Sequence[str]) -> None:
    sys.stdout.write("\n  ".join((heading, *tests)) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(run_tests(sys.argv[1:]))
