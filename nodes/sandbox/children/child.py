"""Main loop of a child process: confines itself, then performs one job after another until its pipe closes."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from importlib import import_module
from typing import TYPE_CHECKING, Final, Protocol, TypeAlias, cast

import msgspec

from engine import run_limits
from engine.node_api import OUTPUT, NodeResult
from engine.run_errors import NodeError
from engine.values import InvalidJson, encode_json
from nodes.output_sizes import MAXIMUM_BYTES
from nodes.sandbox.frames import HEADER, FailureFrame, FrameTag, encode_frame, encode_value, parse_header

if TYPE_CHECKING:
    from engine.values import Json

STDIN: Final = 0
STDOUT: Final = 1
STDERR: Final = 2
JOB_MODULES: Final[Mapping[str, str]] = {
    "library": "nodes.sandbox.children.library_jobs",
    "forms": "nodes.sandbox.children.form_jobs",
    "monty": "nodes.sandbox.code.monty_process",
    "python": "nodes.sandbox.code.python_process",
    "sqlite": "nodes.connections.sqlite_process",
}
MAX_MESSAGE_LENGTH: Final = 8_192


class JobReporter:
    """Reports of a job besides its result."""

    def log(self, level: str, message: str) -> None:
        _write(encode_frame(FrameTag.LOG, msgspec.json.encode((level, _to_encodable(message)))))

    def unresolved(self, paths: list[str]) -> None:
        _write(encode_frame(FrameTag.UNRESOLVED, msgspec.json.encode(paths)))


PerformJob: TypeAlias = "Callable[[bytes, JobReporter], Json | NodeResult]"
"""Function that performs one job; raises `NodeError`."""


class JobModule(Protocol):
    """Module for one kind of job."""

    def load(self) -> PerformJob:
        """Load everything that jobs need, since files are out of reach afterwards, and return the function that
        performs jobs.
        """

    def confine(self, parent: int) -> None:
        """Drop every privilege that jobs don't need; `parent` is the worker's process id."""


def main(kind: str, parent: int) -> None:
    """Perform jobs of a kind in this child process and reply to each, until the parent closes its end of the pipe.

    `parent` is the parent's process id; before the first job, the child gives up all privileges that its jobs don't
    need.
    """
    work = cast("JobModule", import_module(JOB_MODULES[kind]))
    perform = work.load()
    _close_log()
    work.confine(parent)
    reporter = JobReporter()
    _write(encode_frame(FrameTag.READY))
    while (job := _read_job()) is not None:
        _perform_and_reply(perform, job, reporter)


def _close_log() -> None:
    """Discard standard error from now on: failures up to here concern the operator and belong in the worker's log."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, STDERR)
    os.close(nowhere)


def _perform_and_reply(perform: PerformJob, job: bytes, reporter: JobReporter) -> None:
    """Perform a job, and write its result or its failure to the pipe; no exception of a job ends the process."""
    try:
        outcome = perform(job, reporter)
        port = outcome.port if isinstance(outcome, NodeResult) else OUTPUT
        value = outcome.output if isinstance(outcome, NodeResult) else outcome
        _check_result(value)
        for each in encode_value(value):
            _write(each)
    except NodeError as error:
        _report_failure(error.code, error.message, retryable=error.retryable)
    except InvalidJson as error:
        _report_failure(error.code, error.message)
    except MemoryError:
        _report_failure("out-of-memory", "The node ran out of memory")
    except Exception as error:  # noqa: BLE001 - an exception of a node ends that node, not the process
        _report_failure("node-error", f"{type(error).__name__}: {error}")
    else:
        _write(encode_frame(FrameTag.DONE, msgspec.json.encode(port)))


def _check_result(value: Json) -> None:
    """Raise `NodeError` for a result of more than ten million bytes, `InvalidJson` for one that isn't JSON."""
    try:
        encode_json(value, max_bytes=MAXIMUM_BYTES)
    except InvalidJson as error:
        if error.code != "too-large":
            raise
        name = run_limits.setting_name("max_output_bytes")
        message = f"The output exceeds the limit of {MAXIMUM_BYTES:,} bytes ({name})"
        raise NodeError(message, code="output-too-large") from error


def _report_failure(code: str, message: str, *, retryable: bool = False) -> None:
    _write(
        encode_frame(
            FrameTag.FAILED, msgspec.json.encode(FailureFrame(code, _to_encodable(message), retryable))
        )
    )


def _to_encodable(text: str) -> str:
    """Return a text cut to 8,192 characters, with `?` for halves of surrogate pairs, which can't be encoded."""
    return text[:MAX_MESSAGE_LENGTH].encode(errors="replace").decode()


# ── pipes ───────────────────────────────────────────────────────────────────────────────────────────────────


def _read_job() -> bytes | None:
    head = _read(HEADER.size)
    if head is None:
        return None
    length, _tag = parse_header(head)
    return _read(length)


def _read(length: int) -> bytes | None:
    """Return this number of bytes of standard input; None if it ends before."""
    pieces: list[bytes] = []
    while length:
        piece = os.read(STDIN, length)
        if not piece:
            return None
        pieces.append(piece)
        length -= len(piece)
    return b"".join(pieces)


def _write(message: bytes) -> None:
    left = memoryview(message)
    while left:
        left = left[os.write(STDOUT, left) :]
