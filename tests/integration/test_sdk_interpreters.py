"""Python SDK with a real server, on the oldest and the newest Python at hand, each with its own packages."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from zipfile import ZipFile

import pytest

from docs.tables import ROOT
from tests import interpreters
from tests.integration.command_shell import KEY, CommandShell, open_shell
from tests.tools.environments import TOOLS, ToolEnvironment

NAME = "sdk_interpreters"
pytestmark = [pytest.mark.timeout(300), pytest.mark.toolchain]
"""The environment of an interpreter is built where it is missing."""


@pytest.fixture(scope="module")
def shell(tmp_path_factory: pytest.TempPathFactory) -> Iterator[CommandShell]:
    with open_shell(tmp_path_factory.mktemp("shell")) as shell:
        yield shell


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with the content of the SDK's wheel."""
    folder = tmp_path_factory.mktemp("wheel")
    command = ["hatchling", "build", "--target", "wheel", "--directory", str(folder)]
    subprocess.run([sys.executable, "-m", *command], cwd=ROOT / "sdk/python", check=True, capture_output=True)
    (wheel,) = folder.glob("pilotflame_sdk-*.whl")
    with ZipFile(wheel) as archive:
        archive.extractall(folder / "content")
    return folder / "content"


def test_the_oldest_python_uses_every_part(shell: CommandShell, package: Path) -> None:
    oldest = interpreters.find_oldest()
    if oldest is None:
        pytest.skip(
            "the oldest Python of the SDK is neither on PATH nor in pyenv; its types are checked anyway"
        )
    use_sdk(oldest, shell, package)


@pytest.mark.thorough  # the interpreter of the suite is mostly as new
def test_the_newest_python_uses_every_part(shell: CommandShell, package: Path) -> None:
    use_sdk(interpreters.find_newest(), shell, package)


def use_sdk(interpreter: str, shell: CommandShell, package: Path) -> None:
    """Run the program that uses the SDK, in an environment with its dependencies alone."""
    environment = ToolEnvironment(NAME, interpreter=interpreter)
    program = TOOLS / NAME / "use_sdk.py"
    done = subprocess.run(
        [
            str(environment.python),
            "-W",
            "error::DeprecationWarning",
            str(program),
            shell.given["PILOTFLAME_URL"],
            KEY,
        ],
        env={**os.environ, **shell.given, "PYTHONPATH": str(package)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "has used the SDK" in done.stdout
