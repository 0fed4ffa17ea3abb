"""Publication of values in the state of runs."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from engine.run_errors import NodeError
from execution.retry import until_available
from journal import run_state
from journal.run_state import PublishVerdict

if TYPE_CHECKING:
    from engine.services import RunCaller
    from models.database import Database


class StatePublisher:
    """Publisher of values; implements `engine.services.StateService`."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def publish(self, caller: RunCaller, key: str, value: bytes) -> None:
        """Store the value (JSON) of a key in the state of the caller's run, in place of an earlier one; nothing
        is stored for a run that has ended or is gone.

        Raises `NodeError` above the maximum size of a state. Waits while the database is unavailable.
        """
        publish = partial(run_state.publish_value, caller=caller, key=key, value=value)
        verdict = await until_available(
            lambda: self._database.transaction(publish, locks=caller.execution_id)
        )
        if verdict is PublishVerdict.TOO_LARGE:
            message = f"The state of an execution has at most {run_state.MAX_STATE_BYTES:,} bytes"
            raise NodeError(message, code="state-too-large")
