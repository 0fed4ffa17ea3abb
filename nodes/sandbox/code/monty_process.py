"""Execution of user code in Monty, an interpreter of a subset of Python, in an equally confined child of this process.

The code gets nothing that would lead out of it: no files, no functions, no modules of the project.
"""

from __future__ import annotations

import os
import re
import resource
import stat
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Final

from pydantic_monty import (
    Monty,
    MontyCrashedError,
    MontyError,
    MontyRuntimeError,
    MontySyntaxError,
    ResourceLimits,
)

from engine.run_errors import NodeError
from json_text import decoding
from nodes.sandbox.children import confinement, landlock, system_calls
from nodes.sandbox.code import script_output
from nodes.sandbox.code.script_output import PrintedLines
from nodes.sandbox.frames import CodeJob

if TYPE_CHECKING:
    from engine.values import Json
    from nodes.sandbox.children.child import JobReporter, PerformJob

MEMORY_BYTES: Final = 2 << 30
"""Memory limit of each of the two processes; more than any limit of the code."""
OPEN_FILES: Final = 64
PROCESSES: Final = 64
"""Its threads count too."""
MAX_RECURSION_DEPTH: Final = 500
MAX_SUSPENSIONS: Final = 1_000
LOADERS: Final = ("ld-linux", "ld-musl", "ld64")
LIBRARIES_OF_C: Final = ("libc.", "libc-", "libgcc_s.", "libm.", "libm-")
FDINFO: Final = "/proc/self/fdinfo"
PROCESS_ID: Final = re.compile(rb"^Pid:\s*([1-9]\d*)$", re.MULTILINE)
TIMEOUT_MESSAGES: Final = ("feed time limit exceeded", "sleep limit exceeded")

_decode = decoding.build_decoder(CodeJob).decode


def load() -> PerformJob:
    return MontyInterpreter(_find_interpreter()).perform


def confine(parent: int) -> None:
    del parent
    # The pipe signals the parent's end instead: a signal to this process alone would not end the interpreter.
    confinement.limit_process(memory_bytes=MEMORY_BYTES, open_files=OPEN_FILES)
    if _is_world_executable(_find_interpreter()) and confinement.switch_user():
        confinement.limit_processes(PROCESSES)
    confinement.give_up_rights()
    landlock.restrict_files(_list_needed_files(_find_interpreter()))
    system_calls.refuse_changes(system_calls.REACHING_OUT_CALLS)
    confinement.die_with_pipe()


def _find_interpreter() -> Path:
    """Return the interpreter, which is installed beside Python; raises `FileNotFoundError`."""
    return Path(sys.executable).with_name("monty").resolve(strict=True)


def _list_needed_files(binary: Path) -> Mapping[str, int]:
    """Return the Landlock rights, by path, with which the interpreter `binary` can start: itself, the loader, and the
    folders of the C libraries.

    `/proc/self/fdinfo` is readable too. Without `/proc`, the loader is missing, and the interpreter does not start.
    """
    allowed = {str(binary): landlock.RUN_RIGHTS, "/etc/ld.so.cache": landlock.READ_FILE}
    with suppress(OSError):  # Without /proc, the interpreter doesn't start, so nothing runs unconfined.
        for line in Path("/proc/self/maps").read_text(encoding="utf-8").splitlines():
            library = Path(line.split(maxsplit=5)[-1])
            if library.name.startswith(LOADERS):
                allowed[str(library)] = landlock.RUN_RIGHTS
            elif library.name.startswith(LIBRARIES_OF_C):
                allowed[str(library.parent)] = landlock.READ_FILE
    allowed[FDINFO] = landlock.READ_RIGHTS  # For `_forbid_processes`.
    return allowed


def _is_world_executable(program: Path) -> bool:
    """Return whether every user may execute a program and enter all its folders; raises `OSError` if it is missing."""
    return all(path.stat().st_mode & stat.S_IXOTH for path in (program, *program.parents))


class MontyInterpreter:
    """Monty process that never serves two organizations: another organization gets a new process."""

    def __init__(self, binary: Path) -> None:
        self._binary = binary
        self._organization_id = ""
        self._pool: Monty | None = None
        self._has_forbidden_processes = False

    def perform(self, raw: bytes, reporter: JobReporter) -> Json:
        """Run the script of an encoded `CodeJob` and return its result as JSON; printed lines go to the reporter.

        Raises `NodeError` for a failing script and at its limits.
        """
        job = _decode(raw)
        printed = PrintedLines(reporter)
        try:
            return script_output.encode_result(self._run(job, printed))
        except MontyCrashedError as error:
            self._stop()
            if error.timed_out:
                raise script_output.script_timeout(job.timeout_seconds) from error
            raise NodeError("The interpreter of the code ended unexpectedly", code="crashed") from error
        except MontyError as error:
            raise _translate_error(error, job) from error
        finally:
            printed.end()

    def _run(self, job: CodeJob, printed: PrintedLines) -> object:
        limits = ResourceLimits(
            max_feed_duration_secs=job.timeout_seconds,
            max_memory=job.max_memory_bytes,
            max_recursion_depth=MAX_RECURSION_DEPTH,
            max_suspensions=MAX_SUSPENSIONS,
            max_total_sleep_secs=job.timeout_seconds,
        )
        inputs = decoding.decode(job.inputs)
        with self._pool_of(job.organization_id).checkout(limits=limits) as session:
            if not self._has_forbidden_processes:
                _forbid_processes()
                self._has_forbidden_processes = True
            return session.feed_run(job.source, inputs=inputs, print_callback=printed.write)

    def _pool_of(self, organization_id: str) -> Monty:
        if self._pool is None or organization_id != self._organization_id:
            self._stop()
            self._pool = Monty(binary_path=self._binary, max_processes=1).__enter__()
            self._organization_id = organization_id
            self._has_forbidden_processes = False
        return self._pool

    def _stop(self) -> None:
        if self._pool is not None:
            self._pool.__exit__(None, None, None)
            self._pool = None


def _forbid_processes() -> None:
    """Forbid the interpreter, a child of this process, to start more processes and threads than it has.

    The interpreter's process id is read from the descriptor with which this process waits for it. The limit counts all
    processes of its user, which may be any number: so it is zero, and not a few more than exist. A failure is ignored.
    """
    with suppress(OSError):
        for entry in os.listdir(FDINFO):  # noqa: PTH208 - only names are needed
            about = Path(FDINFO, entry).read_bytes()  # Bytes, since no codec can be loaded any more.
            if (found := PROCESS_ID.search(about)) is not None:
                resource.prlimit(int(found[1]), resource.RLIMIT_NPROC, (0, 0))


def _translate_error(error: MontyError, job: CodeJob) -> NodeError:
    """Return the `NodeError` for an exception of the code or its parser, with its type, message and line.

    Timeouts and lack of memory have codes of their own.
    """
    raised = error.exception()
    message = str(raised)
    if isinstance(raised, TimeoutError) and message.startswith(TIMEOUT_MESSAGES):
        return script_output.script_timeout(job.timeout_seconds)
    if isinstance(raised, MemoryError):
        return script_output.script_out_of_memory(job.max_memory_bytes)
    frames = error.traceback() if isinstance(error, MontyRuntimeError | MontySyntaxError) else []
    return script_output.code_error(type(raised).__name__, message, frames[-1].line if frames else None)
