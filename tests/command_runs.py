"""Runs of the `pilotflame` command in separate processes, isolated from the settings of this one.

They are forked from a process that has loaded the command, except in tests about the start itself.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory

import psutil

from tests import relays
from tests.forks import ForkedCommand, ForkedProcess, ForkedProgram

COMMAND = Path(sys.executable).with_name("pilotflame")
PATIENCE_SECONDS = 60.0
POLL_SECONDS = 0.01


def command_environment(folder: Path, **variables: str) -> dict[str, str]:
    """Return the environment of a command: this process's without settings, a data folder, and the given settings.

    Names of `variables` are without `PILOTFLAME_`.
    """
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PILOTFLAME_")}
    given = {f"PILOTFLAME_{name}": value for name, value in variables.items()}
    own = {"PILOTFLAME_DATA_DIR": str(folder), "PILOTFLAME_CONFIG": str(folder / "profiles.json")}
    return {**kept, **own, **given}


def run(
    *arguments: str, given: Mapping[str, str], typed: str | None = None
) -> subprocess.CompletedProcess[str]:
    """Run a command to its end, within a minute, and return its exit code and outputs.

    `given` is its whole environment, `typed` the text on its standard input.
    """
    with TemporaryDirectory() as folder:
        outputs = Path(folder, "stdout"), Path(folder, "stderr")
        source = Path(folder, "stdin")
        if typed is not None:
            source.write_text(typed)
        process = ForkedCommand(COMMAND, arguments, given, outputs, source=source if typed else None)
        return _complete(process, arguments, outputs)


def run_program(
    file: Path, *, given: Mapping[str, str], folder: Path | None = None
) -> subprocess.CompletedProcess[str]:
    """Run a Python file to its end, within a minute, and return its exit code and outputs.

    `given` is its whole environment, `folder` its working folder.
    """
    with TemporaryDirectory() as outputs_folder:
        outputs = Path(outputs_folder, "stdout"), Path(outputs_folder, "stderr")
        return _complete(ForkedProgram(file, given, outputs, folder), [str(file)], outputs)


def _complete(
    process: ForkedProcess, arguments: Sequence[str], outputs: tuple[Path, Path]
) -> subprocess.CompletedProcess[str]:
    """Wait up to a minute for the end of a process, and return its exit code and outputs."""
    try:
        code = process.wait(PATIENCE_SECONDS)
    finally:
        process.kill()
    printed, complained = (output.read_text() for output in outputs)
    return subprocess.CompletedProcess(arguments, code, printed, complained)


def run_output(*arguments: str, given: Mapping[str, str]) -> str:
    """Return the standard output of a command, stripped; an exit code other than 0 fails the test."""
    done = run(*arguments, given=given)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


class RunningCommand:
    """Running command with the output that it has written so far to stdout and stderr."""

    def __init__(self, process: ForkedCommand | subprocess.Popen[bytes], log: Path) -> None:
        self.process = process
        self._log = log
        self._family: list[psutil.Process] = []

    def log(self) -> str:
        """Return the output so far, of stdout and stderr together."""
        return self._log.read_text(errors="replace")

    def says(self, pattern: str) -> re.Match[str]:
        """Wait until the output matches `pattern`, and return the match;
        fails if the command ends before, or after a minute.
        """
        deadline = time.monotonic() + PATIENCE_SECONDS
        searched_bytes = -1
        while True:
            has_ended = self.process.poll() is not None
            # Most looks find no more output than the last one.
            if (size := self._log.stat().st_size) != searched_bytes:
                if (found := re.search(pattern, self.log(), re.DOTALL)) is not None:
                    return found
                searched_bytes = size
            assert not has_ended, self.log()
            assert time.monotonic() < deadline, f"{pattern} is not in: {self.log()}"
            time.sleep(POLL_SECONDS)

    def ends(self) -> int:
        """Wait up to a minute for the end of the command, and return its exit code."""
        return self.process.wait(PATIENCE_SECONDS)

    def stop(self) -> int:
        """Send SIGTERM to the command, as a supervisor does, wait for its end, and return its exit code."""
        self.process.send_signal(signal.SIGTERM)
        return self.ends()

    def kill(self) -> None:
        """Kill the command with SIGKILL, as a crash would, and wait for its end; its children go on."""
        self._note_family()
        self.process.kill()
        self.process.wait()

    def end_family(self) -> None:
        """Kill the command and its descendants, also those of an earlier `kill`.

        Survivors would keep the tests from ending.
        """
        self.kill()
        for one in self._family:
            with suppress(psutil.NoSuchProcess):
                one.kill()

    def _note_family(self) -> None:
        """Remember the present descendants of the command, which can't be found any more after its end."""
        with suppress(psutil.NoSuchProcess):
            self._family += psutil.Process(self.process.pid).children(recursive=True)


@contextmanager
def run_command(
    *arguments: str,
    given: Mapping[str, str],
    log: Path,
    folder: Path | None = None,
    anew: bool = False,
    starts_anew: bool = False,
    leaves_children: bool = False,
) -> Iterator[RunningCommand]:
    """Run a command during a block, its output in the file `log`; kill it and its descendants at the end.

    With `anew` it is a fresh process, so that its memory and its time are its own; so are the pods and migrations that
    it starts, and with `starts_anew` only those. With `leaves_children` its descendants go on, for a test about those.
    """
    log.write_bytes(b"")
    if anew:
        typed = ["setpriv", "--pdeathsig=KILL", str(COMMAND), *arguments]
        with log.open("ab") as sink:
            process: ForkedCommand | subprocess.Popen[bytes] = subprocess.Popen(
                typed, env=given, stdout=sink, stderr=sink, cwd=folder
            )
    else:
        has_relays = arguments[0] in {"deployer", "dev"} and not starts_anew
        process = ForkedCommand(
            COMMAND,
            arguments,
            given,
            (log, log),
            folder,
            relay=relays.find_command() if has_relays else None,
        )
    running = RunningCommand(process, log)
    try:
        yield running
    finally:
        if leaves_children:
            running.kill()
        else:
            running.end_family()
