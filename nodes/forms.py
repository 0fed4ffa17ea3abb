"""Whether data is what a JSON Schema of a user's asks for; found out in a child process, since either may be a trap."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Final

import msgspec

from concurrency import offload
from engine.run_errors import NodeError
from engine.values import encode_json
from nodes.frames import FormJob
from nodes.processes import Kind, Listener, Processes

if TYPE_CHECKING:
    from engine.values import Json

SECONDS: Final = 3.0
"""For one answer; an honest one takes milliseconds."""
PROCESSES: Final = 2


class Wrong(msgspec.Struct, frozen=True):
    """One thing that the data is not."""

    path: str
    keyword: str
    message: str


class InvalidSchema(ValueError):
    """The schema can't be read, or takes more time or memory than a form needs."""


class Forms:
    """The processes that check answers; none before the first is given."""

    def __init__(self) -> None:
        self._processes = Processes(Kind.FORMS, limit=PROCESSES)

    async def check(self, organization_id: str, schema: Mapping[str, Json], data: Json) -> Sequence[Wrong]:
        """Return what is wrong with data; raises `InvalidSchema`, and `NodeError` where no process is free."""
        job = await offload.run(_job, schema, data)
        try:
            result = await self._processes.run(
                job, Listener(_unheard, []), organization_id=organization_id, seconds=SECONDS
            )
        except NodeError as error:
            if error.retryable:
                raise
            raise InvalidSchema(_REASONS.get(error.code, error.message)) from error
        return msgspec.convert(result.output, list[Wrong])

    async def close(self) -> None:
        """End the processes."""
        await self._processes.close()


_REASONS: Final[Mapping[str, str]] = {
    "timeout": f"it takes more than {SECONDS:g} s to check",
    "crashed": "it takes more memory than there is for a check",
    "out-of-memory": "it takes more memory than there is for a check",
}


def _job(schema: Mapping[str, Json], data: Json) -> bytes:
    return msgspec.json.encode(FormJob(msgspec.Raw(encode_json(schema)), msgspec.Raw(encode_json(data))))


def _unheard(_level: str, _message: str) -> None:
    pass
