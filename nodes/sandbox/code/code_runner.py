"""Code service that runs user code in child processes of one backend."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import msgspec

from concurrency import offload
from engine.run_errors import NodeError
from engine.values import encode_json
from nodes.sandbox.code.code_backend import CodeBackend
from nodes.sandbox.frames import CodeJob
from nodes.sandbox.processes import JobListener, ProcessKind, ProcessPool

if TYPE_CHECKING:
    from engine.services import PrintLine, RunCaller
    from engine.values import Json


PROCESS_KINDS: Mapping[CodeBackend, ProcessKind] = {
    CodeBackend.MONTY: ProcessKind.MONTY,
    CodeBackend.SUBPROCESS: ProcessKind.PYTHON,
}


class RefusedCode:
    """Code service that refuses every script, for processes that run none."""

    def __init__(self, reason: str) -> None:
        self._reason = reason

    async def run(
        self,
        _caller: RunCaller,
        _source: str,
        _inputs: Mapping[str, Json],
        /,
        *,
        timeout_seconds: float,
        max_memory_bytes: int,
        print_line: PrintLine,
    ) -> Json:
        del timeout_seconds, max_memory_bytes, print_line
        raise NodeError(self._reason, code="not-available")

    async def close(self) -> None:
        """Do nothing."""


class CodeRunner:
    """Implements `engine.services.CodeService`."""

    def __init__(self, backend: CodeBackend, *, limit: int) -> None:
        """`limit` is the number of scripts that run at once, of which `nodes.sandbox.fairness` allows more for
        fairness.
        """
        self._processes = ProcessPool(PROCESS_KINDS[backend], limit=limit)

    async def run(
        self,
        caller: RunCaller,
        source: str,
        inputs: Mapping[str, Json],
        /,
        *,
        timeout_seconds: float,
        max_memory_bytes: int,
        print_line: PrintLine,
    ) -> Json:
        """Run a script in a child process, by an interpreter that never runs scripts of two organizations, and return
        its result.

        `inputs` are its global variables; `print_line` gets its printed lines. Raises `NodeError` for a failing script
        and at its limits.
        """
        written = msgspec.Raw(await offload.run(encode_json, inputs))
        job = CodeJob(caller.organization_id, source, written, timeout_seconds, max_memory_bytes)
        result = await self._processes.run(
            msgspec.json.encode(job),
            JobListener(print_line, []),
            organization_id=caller.organization_id,
            seconds=timeout_seconds,
        )
        return result.output

    async def close(self) -> None:
        """End the idle child processes and wait for their end; no script may be running."""
        await self._processes.close()
