"""Validation of data by a user's JSON Schema, in a child process, since both can be malicious."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Final

import msgspec

from concurrency import offload
from engine.run_errors import NodeError
from engine.values import encode_json
from nodes.sandbox.frames import FormJob
from nodes.sandbox.processes import JobListener, ProcessKind, ProcessPool

if TYPE_CHECKING:
    from engine.values import Json

CHECK_SECONDS: Final = 3.0
"""Time limit of one answer; an honest one takes milliseconds."""
MAX_PROCESSES: Final = 2


class FormViolation(msgspec.Struct, frozen=True):
    """Violation of a schema by data."""

    path: str
    keyword: str
    message: str


class InvalidSchema(ValueError):
    """A schema that can't be read, or takes more time or memory than a form may."""


class FormChecker:
    """Validator of answers in child processes, which start with the first answer."""

    def __init__(self) -> None:
        self._processes = ProcessPool(ProcessKind.FORMS, limit=MAX_PROCESSES)

    async def check(
        self, organization_id: str, schema: Mapping[str, Json], data: Json
    ) -> Sequence[FormViolation]:
        """Return the violations of a form's schema in the answer `data`, an empty list if it is valid.

        It runs in a child process for three seconds at most. Raises `InvalidSchema` for a schema that can't be used or
        takes longer, and a retryable `NodeError` if too many checks wait for a child process, or none can be started.
        """
        job = await offload.run(_encode_job, schema, data)
        try:
            result = await self._processes.run(
                job, JobListener(_ignore_line, []), organization_id=organization_id, seconds=CHECK_SECONDS
            )
        except NodeError as error:
            if error.retryable:
                raise
            raise InvalidSchema(_REASONS.get(error.code, error.message)) from error
        return msgspec.convert(result.output, list[FormViolation])

    async def close(self) -> None:
        """End the child processes that check answers to forms, and wait for their end."""
        await self._processes.close()


_REASONS: Final[Mapping[str, str]] = {
    "timeout": f"it takes more than {CHECK_SECONDS:g} s to check",
    "crashed": "it takes more memory than there is for a check",
    "out-of-memory": "it takes more memory than there is for a check",
}


def _encode_job(schema: Mapping[str, Json], data: Json) -> bytes:
    return msgspec.json.encode(FormJob(msgspec.Raw(encode_json(schema)), msgspec.Raw(encode_json(data))))


def _ignore_line(_level: str, _message: str) -> None:
    pass
