"""The build context of the images has what they are built from, and the same bytes each time."""

from __future__ import annotations

import tarfile
from pathlib import Path

from deploy.release import build_context


def test_the_context_has_the_project_and_nothing_of_this_machine(tmp_path: Path) -> None:
    archive = build_context.write_context(tmp_path / "dist")
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


def test_two_archives_of_the_same_files_are_equal(tmp_path: Path) -> None:
    one, other = (
        build_context.write_context(tmp_path / "one"),
        build_context.write_context(tmp_path / "other"),
    )
    assert one.read_bytes() == other.read_bytes()
