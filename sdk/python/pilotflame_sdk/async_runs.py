"""Handle of a run for the asynchronous client."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Mapping
from typing import TYPE_CHECKING, Any

from pilotflame_sdk import request_coding, run_states
from pilotflame_sdk.errors import RunTimeout

if TYPE_CHECKING:
    from pilotflame_sdk.async_transport import AsyncTransport
    from pilotflame_sdk.server_events import RunEvent


class AsyncRun(run_states.RunState):
    """Run of a workflow, with its state as of the last answer."""

    def __init__(
        self, client: AsyncTransport, execution_id: str, state: Mapping[str, Any] | None = None
    ) -> None:
        super().__init__(execution_id, state)
        self._client = client

    async def result(self, timeout: float | None = None) -> dict[str, Any]:
        """Wait for the end of the run, and return the outputs of its nodes by node id.

        `timeout` is in seconds; None waits without end. Raises `RunFailed` for a run that didn't complete,
        and `RunTimeout`; the run goes on then.
        """
        ended = await self.wait(timeout)
        return ended.outputs_or_raise()

    async def wait(self, timeout: float | None = None, *, since: float | None = None) -> AsyncRun:
        """Wait for the end of the run, however it ends, and return it with its outputs.

        `timeout` is in seconds from now, or from `since` by the monotonic clock; None waits without end.
        Raises `RunTimeout`; the run goes on then.
        """
        begun = time.monotonic() if since is None else since
        give_up_at = None if timeout is None else begun + timeout
        while not self.has_ended:
            left = None if give_up_at is None else give_up_at - time.monotonic()
            if left is not None and left <= 0 and timeout is not None:
                raise RunTimeout(self.id, timeout)
            if left is not None and left < 1:
                await asyncio.sleep(left)  # Requests wait for whole seconds.
                left = 0.0
            await self.refresh(wait=request_coding.POLL_SECONDS if left is None else left)
        if self.lacks_outputs:
            self.take_outputs(await self._client.request("GET", self.path, query={"expand": "blobs"}))
        return self

    async def refresh(self, *, wait: float = 0.0) -> AsyncRun:
        """Read the state of the run from the server, and return the run.

        With `wait`, the answer comes at the end of the run or after that many seconds, at most 30.
        """
        seconds = run_states.poll_seconds(wait)
        answer = await self._client.request(
            "GET", f"{self.path}/progress", query={"wait": seconds}, wait=seconds
        )
        self.take(answer)
        return self

    def stream(self) -> AsyncIterator[RunEvent]:
        """Yield the events of the run from its beginning to its end; lost connections are resumed without loss."""
        return self._client.stream(f"{self.path}/events")

    def stream_steps(self) -> AsyncIterator[RunEvent]:
        """Yield the events of the run's agents and of all its language models, to the end of the run.

        `step` has each state of a step of an agent. `token` adds text to an answer that a model is writing, and
        `retry` drops the text so far. After a lost connection, steps continue without loss, and the texts of open
        answers are sent again from their beginning: `offset` is the number of characters before a part.
        """
        return self._client.stream(f"{self.path}/steps")

    async def signal(
        self,
        name: str,
        payload: Any = None,  # noqa: ANN401 - any JSON value
        *,
        idempotency_key: str | None = None,
    ) -> None:
        """Send a signal to the run; returns after it is stored. Raises `ValidationFailed`, and `Conflict` after the
        end of the run.
        """
        await self._client.request(
            "POST",
            f"{self.path}/signals",
            fields={"name": name, "payload": payload},
            idempotency_key=idempotency_key,
            is_keyed=True,
        )

    async def cancel(self) -> None:
        """Ask the run to end at once, as `cancelled`; returns before it has ended."""
        await self._client.request("POST", f"{self.path}/cancel")

    async def stop(self) -> None:
        """Ask the run to end after the nodes that are running now, as `stopped`; returns before it has ended."""
        await self._client.request("POST", f"{self.path}/stop")
