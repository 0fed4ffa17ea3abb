"""The wheels contain everything that a process reads at run time, and are installed by one line of the README."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import sysconfig
import urllib.request
from collections.abc import Iterable, Sequence
from pathlib import Path
from zipfile import ZipFile

import pytest
from pilotflame_sdk import Client

from docs.tables import ROOT
from gateway.documentation import site
from tests.command_runs import RunningCommand, command_environment

pytestmark = pytest.mark.toolchain

LISTED_MODULES = (
    "import json, sys; print(json.dumps([each.__file__ for each in map(__import__, sys.argv[1:])]))"
)
PACKAGES = ("gateway", "workers", "engine", "models", "pilotflame_sdk")


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with the wheels in `dist/`, where a wheel of an earlier release was."""
    folder = tmp_path_factory.mktemp("release")
    dist = folder / "dist"
    dist.mkdir()
    (dist / "pilotflame-0.1.0-py3-none-any.whl").touch()
    run_command(["make", "wheels", f"DIST={dist}"], ROOT)
    assert sorted(wheel.name.partition("-")[0] for wheel in dist.iterdir()) == [
        "pilotflame",
        "pilotflame_sdk",
    ]
    return folder


def run_command(command: Sequence[str], folder: Path, **variables: str) -> None:
    """Run a command to its end, with further environment variables; fails with its output."""
    done = subprocess.run(
        command, cwd=folder, env={**os.environ, **variables}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def packed(release: Path) -> frozenset[str]:
    """Return the paths of the files in a newly built wheel of the server."""
    (wheel,) = release.glob("dist/pilotflame-*.whl")
    with ZipFile(wheel) as archive:
        return frozenset(archive.namelist())


@pytest.fixture(scope="module")
def installed_python(release: Path) -> Path:
    """Return the interpreter of an environment with the wheels and their dependencies, but without the checkout."""
    (line,) = re.findall(r"^python3 -m venv .*dist/.*$", (ROOT / "README.md").read_text(), re.MULTILINE)
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    # The dependencies are those of the tests, so that nothing is downloaded.
    run_command(["sh", "-c", line], release, PATH=path, PIP_NO_INDEX="1", PIP_NO_DEPS="1")
    folder = release / "pilotflame"
    paths = sysconfig.get_paths(vars={"base": str(folder), "platbase": str(folder)})
    site_packages = Path(paths["purelib"])
    # A folder that is named in such a file takes part without its own `.pth` files, one of which names the checkout.
    (site_packages / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return folder / "bin/python"


def relative_paths(paths: Iterable[Path]) -> set[str]:
    return {path.relative_to(ROOT).as_posix() for path in paths if path.is_file()}


def test_the_wheel_contains_the_data_files_of_modules(packed: frozenset[str]) -> None:
    read = [*ROOT.glob("nodes/library/*.toml"), *ROOT.glob("gateway/openapi/*.[jms]*")]
    assert len(read) > 40
    assert relative_paths(read) <= packed
    assert not [path for path in packed if path.startswith(("docs/", "tests/", "benchmarks/"))]


@pytest.mark.skipif(not (site.BUILT / site.MANIFEST).exists(), reason="`make docs` builds the site")
def test_the_wheel_contains_the_documentation_site(packed: frozenset[str]) -> None:
    built = relative_paths(site.BUILT.rglob("*"))
    assert "gateway/documentation/built/api/index.html" in built
    assert built <= packed


def test_the_wheel_contains_compiled_modules(packed: frozenset[str]) -> None:
    modules = [path for path in packed if path.endswith(".py")]
    tag = sys.implementation.cache_tag
    assert len(modules) > 500
    for path in modules:
        folder, _, name = path.rpartition("/")
        assert f"{folder}/__pycache__/{name.removesuffix('.py')}.{tag}.pyc" in packed


def test_the_installed_wheel_runs_outside_of_the_checkout(installed_python: Path, tmp_path: Path) -> None:
    environment = command_environment(tmp_path / "data", PORT="0")
    for name in ("PYTHONPATH", "PYTHONDONTWRITEBYTECODE"):
        environment.pop(name, None)
    listed = subprocess.run(
        [installed_python, "-c", LISTED_MODULES, *PACKAGES],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        check=True,
    )
    assert all(
        Path(file).is_relative_to(installed_python.parent.parent) for file in json.loads(listed.stdout)
    )
    log = tmp_path / "dev.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [installed_python, "-m", "pilotflame", "dev"],
            cwd=tmp_path,
            env=environment,
            stdout=output,
            stderr=output,
        )
    running = RunningCommand(process, log)
    try:
        said = running.says(r"Pilotflame runs on (\S+).*?(sk-\S+)")
        workflow = {
            "name": "Installed",
            "nodes": [
                {"id": "start", "nodeId": "manual"},
                {"id": "greet", "nodeId": "template", "config": {"text": "Hello, {{ data.body.name }}!"}},
            ],
            "connections": [{"source": "start", "target": "greet"}],
        }
        with Client(said[1], said[2]) as client:
            run = client.run(client.workflows.put(workflow), {"name": "wheel"}, wait=60)
        assert run.outputs["greet"]["text"] == "Hello, wheel!"
        for path in ["/openapi.json", *(["/docs/"] if (site.BUILT / site.MANIFEST).exists() else [])]:
            with urllib.request.urlopen(f"{said[1]}{path}", timeout=60) as answer:  # noqa: S310 - its own server
                assert answer.status == 200
        assert running.stop() == 0
    finally:
        running.kill()
