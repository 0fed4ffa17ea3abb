"""Python files with workers, and documents of node types."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from pilotflame.command_error import CommandError

if TYPE_CHECKING:
    from pilotflame_sdk import Worker

LOOK_SECONDS: Final = 0.3
DRAIN_SECONDS: Final = 10.0
SKIPPED: Final = frozenset({"__pycache__", "node_modules", "site-packages"})
"""Folders whose changes restart no worker."""


def read_documents(file: Path) -> Sequence[Mapping[str, Any]]:
    """Return the documents of the node types of a Python file with workers, or the one of a JSON or YAML file.

    A Python file is executed. Raises `CommandError`, and `OSError` for a document that can't be read.
    """
    if file.suffix == ".py":
        return [one.document for worker in load_workers(file) for one in worker.definitions]
    from pilotflame.commands.workflow_definitions import read_value

    document = read_value(file)
    if not isinstance(document, dict) or not {"type", "version"} <= document.keys():
        raise CommandError(f"{file} is no node type: it needs a type and a version")
    return [document]


def load_workers(file: Path) -> Sequence[Worker]:
    """Execute a Python file and return the workers that it defines at its top level, at least one.

    Raises `CommandError` without any, and for an error of the file.
    """
    from pilotflame_sdk import Worker

    if not file.is_file():
        raise CommandError(f"{file}: no such file")
    spec = importlib.util.spec_from_file_location(file.stem, file)
    if spec is None or spec.loader is None:
        raise CommandError(f"{file} is no Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[file.stem] = module
    sys.path.insert(0, str(file.parent.resolve()))
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise CommandError(_describe_error(file, error)) from error
    workers = [one for one in vars(module).values() if isinstance(one, Worker)]
    if not workers:
        raise CommandError(f"{file} has no worker: assign `worker = Worker(...)` at its top level")
    return workers


def _describe_error(file: Path, error: Exception) -> str:
    """Return the text for an error of a worker's file, with the innermost line of code in the folder of the file."""
    if isinstance(error, ModuleNotFoundError) and error.name is not None:
        return (
            f"{file} needs the module {error.name}, which {sys.executable} does not have: install it there. Or use the"
            f" Python of the worker: `worker.register()` adds the node types, and `python {file}` runs the worker"
        )
    if isinstance(error, SyntaxError):
        return f"{error.filename}, line {error.lineno}: SyntaxError: {error.msg}"
    folder = file.resolve().parent
    own = [
        f"{one.filename}, line {one.lineno}"
        for one in traceback.extract_tb(error.__traceback__)
        if Path(one.filename).is_relative_to(folder) and not SKIPPED.intersection(Path(one.filename).parts)
    ]
    return f"{own[-1] if own else file}: {type(error).__name__}: {error}"


def run_again_after_changes(file: Path, remark: Callable[[str], None]) -> None:
    """Run the worker of a file in a child process, and restart it after changes of Python files beside it.

    Never returns by itself: an interrupt or SIGTERM ends it with its child. `remark` gets a text about each restart.
    """
    # A supervisor ends this command by SIGTERM: the worker must end with it.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    command = [sys.executable, "-m", "pilotflame", "workers", "run", "--register", str(file)]
    # Python compares the whole second and the size of a module with those of its compiled file: a second change within
    # a second would run the code before it.
    environment = os.environ | {"PYTHONDONTWRITEBYTECODE": "1"}
    child = subprocess.Popen(command, env=environment)
    seen = _read_change_times(file)
    try:
        while True:
            time.sleep(LOOK_SECONDS)
            if (now := _read_change_times(file)) == seen:
                continue
            seen = now
            remark("the code has changed: the worker starts again")
            _end_worker(child)
            child = subprocess.Popen(command, env=environment)
    finally:
        _end_worker(child)


def _read_change_times(file: Path) -> Mapping[Path, int]:
    """Return the times of change, in nanoseconds, of the Python files in the folder of a file and below.

    Hidden folders, caches and virtual environments are left out.
    """
    found = {}
    for folder, below, names in os.walk(file.resolve().parent):
        # Neither hidden folders nor environments, which have thousands of files.
        below[:] = [one for one in below if one not in SKIPPED and not one.startswith(".")]
        if "pyvenv.cfg" in names:
            below.clear()
            continue
        for name in names:
            if name.endswith(".py"):
                path = Path(folder, name)
                with contextlib.suppress(FileNotFoundError):  # An editor is replacing it.
                    found[path] = path.stat().st_mtime_ns
    return found


def _end_worker(child: subprocess.Popen[bytes]) -> None:
    """End the process of a worker and wait: its tasks get ten seconds, then it is killed,
    and they are given to other workers.
    """
    child.terminate()
    try:
        child.wait(DRAIN_SECONDS)
    except subprocess.TimeoutExpired:
        child.kill()
        child.wait()
