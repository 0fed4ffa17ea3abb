"""Tutorial of custom nodes: its file, workflow and commands work as they stand, also after the worker was killed."""

from __future__ import annotations

import json
import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from docs.tables import ROOT
from tests.command_runs import COMMAND
from tests.integration.command_shell import CommandShell, open_shell

pytestmark = pytest.mark.toolchain

PAGE = (ROOT / "docs/own-nodes-tutorial.md").read_text()
PANDAS = '''
"""As much of pandas as the tutorial uses."""

import csv
from statistics import fmean


class Column(list):
    def mean(self):
        return fmean(map(float, self))


class Table:
    def __init__(self, rows):
        self.rows = rows

    def __contains__(self, name):
        return name in self.rows[0]

    def __getitem__(self, name):
        return Column(row[name] for row in self.rows)

    def groupby(self, name):
        for value in sorted({row[name] for row in self.rows}):
            yield value, Table([row for row in self.rows if row[name] == value])


def read_csv(file):
    return Table(list(csv.DictReader(file)))
'''
GROUP_IS_DONE = "pilotflame tasks list --execution $RUN -o json | grep '\"done\": 1' > held"
CONDITIONS = (
    ("import time\n", "import pathlib\nimport time\n"),
    (
        "time.sleep(3)",
        "while pathlib.Path('held').exists() and (done or len(groups) == 1): time.sleep(0.1)",
    ),
    ("RUN=$(", "touch held; RUN=$("),
    ("sleep 4; kill -9 %1", f"until {GROUP_IS_DONE}; do sleep 0.1; done; kill -9 %1; rm held"),
    ("runs cancel $RUN", "runs cancel $RUN; rm held"),
)
"""Waits of the page for some seconds, and waits for conditions, since a busy machine is late for a time.

The worker that is killed computes one group of the table and holds the next one; the canceled run holds its only one.
"""


def read_blocks(kind: str) -> list[str]:
    blocks = re.findall(rf"^```{kind}\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)
    for seconds, condition in CONDITIONS:
        blocks = [one.replace(seconds, condition, 1) for one in blocks]
    return blocks


@pytest.fixture
def shell(tmp_path: Path) -> Iterator[CommandShell]:
    with open_shell(tmp_path) as shell:
        yield shell


def test_every_command_of_the_tutorial_works(shell: CommandShell) -> None:
    (worker,), (workflow,), (shown,) = read_blocks("python"), read_blocks("yaml"), read_blocks("json")
    shell.file("tutorial/summaries.py", worker)
    shell.file("tutorial/pandas.py", PANDAS)
    shell.file("tutorial/workflows/averages.yaml", workflow)
    _, *blocks = read_blocks("text")
    register, run, kill, change = blocks
    end = "kill $!; wait $!"
    printed = run_blocks(shell, [register, run, kill, change, end])
    assert json.loads(printed[1][printed[1].index("{\n") :]) == json.loads(shown)

    # The killed worker still has the task, unless a busy machine shows it after the lease; the next one ends the run.
    assert re.search(r"acme/summary +1\.0\.0 +(leased|delayed|ready)", printed[2]), printed[2]
    assert '"text": "Adelie: 3700.0 g"' in printed[2]
    # Each group is in the log once: the second worker goes on behind the checkpoint of the first.
    groups = re.findall(r"(\w+) is done", printed[2])
    assert groups == ["Adelie", "Chinstrap", "Gentoo"]


def run_blocks(shell: CommandShell, blocks: list[str]) -> list[str]:
    """Run blocks of commands in one shell, and return the output of each."""
    mark = "---- end of a block ----"
    script = "trap 'kill $(jobs -p) 2>/dev/null || true' EXIT\n" + f"\necho '{mark}'\n".join(blocks)
    path = f"{COMMAND.parent}{os.pathsep}{os.environ['PATH']}"
    printed, complained = shell.folder / "printed", shell.folder / "complained"
    # Not pipes: workers in the background would hold them open.
    with printed.open("w") as output, complained.open("w") as errors:
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", script],
            cwd=shell.folder / "tutorial",
            env={**shell.given, "PATH": path, "PYTHONPATH": str(ROOT / "sdk/python")},
            stdout=output,
            stderr=errors,
            check=False,
            timeout=200,
        )
    assert done.returncode == 0, printed.read_text() + complained.read_text()
    return printed.read_text().split(f"{mark}\n")
