"""The build context of the images has what they are built from, and the same bytes each time."""

from __future__ import annotations

import tarfile
from pathlib import Path

import pytest

from deploy.release import build_context


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_context.write_context(tmp_path_factory.mktemp("context") / "dist")


def test_the_context_has_the_project_and_nothing_of_this_machine(archive: Path) -> None:
    with tarfile.open(archive) as opened:
        members = opened.getmembers()
    names = [member.name for member in members]
    assert names == sorted({*names})
    assert {"deploy/Dockerfile", "deploy/runner.Dockerfile", "requirements.lock", "pyproject.toml"} <= {
        *names
    }
    assert "pilotflame/cli.py" in names
    assert not [name for name in names if "__pycache__" in name or name.startswith(("tests", ".", "docs"))]
    assert {(member.uid, member.mtime, member.uname) for member in members} == {(0, 0, "")}


def test_two_archives_of_the_same_files_are_equal(archive: Path, tmp_path: Path) -> None:
    other = build_context.write_context(tmp_path / "other")
    assert archive.read_bytes() == other.read_bytes()
