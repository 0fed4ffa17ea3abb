"""Answers that wait for the end of the run that their request starts: `Prefer: wait=N` (RFC 7240)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Final

from msgspec import UNSET, Raw, Struct, UnsetType

from gateway.executions import execution_shapes
from gateway.executions.execution_shapes import ErrorText, Status
from gateway.http import limits
from gateway.http.errors import ApiError
from gateway.http.wire import WireStruct
from journal.store import ExecutionKey
from models.access import KeyScope
from models.errors import DatabaseUnavailable
from telemetry import tracing

if TYPE_CHECKING:
    from starlette.datastructures import Headers

    from gateway.executions.large_outputs import LargeOutputs
    from gateway.executions.long_poll import ExecutionAccess, ExecutionPollHub
    from models.access import ApiCaller

_WAIT: Final = re.compile(r'(?:^|[,;])\s*wait\s*=\s*(?:"(\d{1,9})"|(\d{1,9}))\s*(?=[,;]|$)', re.IGNORECASE)


class OutcomeShape(WireStruct):
    """Fields that the answer about a run has besides, if the run ended before the answer."""

    status: Status
    outputs: Mapping[str, Raw]
    """By node id, as in `progress`; empty if they are too large for this answer."""
    error: ErrorText | None
    outputs_omitted: bool | UnsetType = UNSET
    """`true` if the outputs have more than 1,000,000 characters: read them at the execution."""


class WaitPreference(Struct, frozen=True):
    """Wait that a request prefers, in seconds."""

    seconds: int

    @property
    def headers(self) -> Mapping[str, str]:
        """Header `Preference-Applied`, which tells the client the wait in seconds that was applied."""
        return {"Preference-Applied": f"wait={self.seconds}"}


def read_preference(headers: Headers, caller: ApiCaller | None) -> WaitPreference | None:
    """Return the wait in seconds that the `Prefer` header asks for, at most a minute; None without one.

    A malformed one is ignored, as RFC 7240 demands. So is that of a caller who may not read the outputs: a key without
    the scope for it, or a sender with a trigger token (caller None). With a result, the trace of the request is marked
    as awaited.
    """
    given = headers.getlist("prefer")
    found = _WAIT.search(", ".join(given)) if given else None
    if found is None or caller is None or not caller.has_scope(KeyScope.WORKFLOWS_READ):
        return None
    if tracing.tracer is not None:
        tracing.mark_awaited()
    return WaitPreference(min(int(found[1] or found[2]), limits.PREFERRED_WAIT_SECONDS))


class EndAwaiter:
    """Waits for the ends of runs on behalf of the requests that have started them."""

    def __init__(self, polls: ExecutionPollHub, access: ExecutionAccess, outputs: LargeOutputs) -> None:
        self._polls = polls
        self._access = access
        self._outputs = outputs

    async def wait_for_end(self, execution_id: str, caller: ApiCaller, seconds: float) -> OutcomeShape | None:
        """Wait at most `seconds` for the end of a run that the caller has just started, and return its outcome; None if
        it goes on.

        Outputs of over a million characters are omitted. None also if the run can't be read now: it is accepted, so no
        failure may cost the client its id, with which it polls next. After None, the caller may read the run at once.
        """
        try:
            found = await self._polls.wait_for_outcome(
                ExecutionKey(execution_id, caller.shard), caller, seconds
            )
        except (ApiError, DatabaseUnavailable):
            found = None
        if found is None:
            self._access.allow(execution_id, caller)
            return None
        is_too_large = sum(len(text) for _, text in found.outputs) > limits.AWAITED_OUTPUT_CHARACTERS
        shape = execution_shapes.show_progress(found, self._outputs.explain(execution_id))
        if is_too_large:
            return OutcomeShape(status=shape.status, outputs={}, error=shape.error, outputs_omitted=True)
        return OutcomeShape(status=shape.status, outputs=shape.outputs, error=shape.error)
