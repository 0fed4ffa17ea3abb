"""The Makefile installs with uv where it is present, and with pip where it is not."""

import os
import subprocess

from docs.tables import ROOT


def dry_run_make(*variables: str) -> str:
    """Return the commands that a first `make run` would execute."""
    return subprocess.run(
        ["make", "--dry-run", "--always-make", "run", *variables],
        cwd=ROOT,
        env={**os.environ, "MAKEFLAGS": ""},
        capture_output=True,
        text=True,
        check=True,
    ).stdout


def test_uv_installs_the_same_lock_by_hash() -> None:
    commands = dry_run_make("UV=/opt/uv")
    assert "/opt/uv venv" in commands
    assert "/opt/uv pip install" in commands
    assert "--require-hashes --requirement requirements.lock" in commands
    assert "-m pip" not in commands


def test_pip_installs_without_uv() -> None:
    commands = dry_run_make("UV=")
    assert "-m venv" in commands
    assert "-m pip" in commands
    assert "--require-hashes --requirement requirements.lock" in commands
    assert "uv " not in commands


def test_make_run_loads_the_example() -> None:
    assert "dev --example docs/examples/penguins.json" in dry_run_make()
