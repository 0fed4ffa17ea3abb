"""The wheel contains everything that a process reads at run time."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from zipfile import ZipFile

import pytest

from docs.tables import ROOT
from gateway.documentation import site


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> frozenset[str]:
    """Return the paths of the files in a newly built wheel."""
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (wheel,) = folder.glob("*.whl")
    with ZipFile(wheel) as archive:
        return frozenset(archive.namelist())


def relative_paths(paths: Iterable[Path]) -> set[str]:
    return {path.relative_to(ROOT).as_posix() for path in paths if path.is_file()}


def test_the_wheel_contains_what_modules_read(packed: frozenset[str]) -> None:
    read = [*ROOT.glob("nodes/library/*.toml"), *ROOT.glob("gateway/openapi/*.[jms]*")]
    assert len(read) > 40
    assert relative_paths(read) <= packed
    assert not [path for path in packed if path.startswith(("docs/", "tests/", "benchmarks/"))]


@pytest.mark.skipif(not (site.BUILT / site.MANIFEST).exists(), reason="`make docs` builds the site")
def test_the_wheel_contains_the_documentation_site(packed: frozenset[str]) -> None:
    built = relative_paths(site.BUILT.rglob("*"))
    assert "gateway/documentation/built/api/index.html" in built
    assert built <= packed
