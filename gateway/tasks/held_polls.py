"""Polls of task workers that stay open for minutes: their answer begins before the outcome is known.

The status 200 and a space every 25 seconds are sent first, and the JSON follows: JSON allows spaces before a value. All
refusals are decided before.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Final, TypeAlias

from msgspec import Struct

if TYPE_CHECKING:
    from starlette.types import Receive, Scope, Send

    from gateway.http.responses import JsonResponse
    from gateway.tasks.parked_polls import ParkedPoll, PollAnswer
    from gateway.tasks.poll_service import PollService
    from gateway.tasks.worker_presence import TaskWorkerPresence

LOST_SECONDS: Final = 30.0
"""Time without an acknowledgment of a heartbeat after which a client counts as gone."""
_HEARTBEAT: Final = b" "
_HEADERS: Final = [(b"content-type", b"application/json"), (b"x-accel-buffering", b"no")]
"""A buffering proxy would keep the heartbeats to itself, so that the client takes the connection for dead."""

AnswerEncoder: TypeAlias = "Callable[[PollAnswer], Awaitable[JsonResponse]]"


class HeldPoll(Struct, frozen=True):
    """Open poll with heartbeats, which keep its worker present."""

    parked: ParkedPoll
    polls: PollService
    presence: TaskWorkerPresence

    async def wait_first(self) -> PollAnswer | None:
        """Return the answer, None if a heartbeat is due before; the poll is then still open, otherwise closed.

        Raises 409 for a stopped worker, and the error of the first look for tasks.
        """
        answer = None
        is_open = False
        try:
            answer = await self.polls.wait_first(self.parked)
            is_open = answer is None
        finally:
            if not is_open:
                self.close()
        return answer

    async def wait_again(self) -> PollAnswer | None:
        """Record that the worker is present, and return the answer, None if a heartbeat is due before.

        It raises no 409: for a worker that has stopped meanwhile, the answer has `is_stopped`.
        """
        self.presence.note_open_poll(self.parked.poll.organization_id, self.parked.poll.worker_id)
        return await self.parked.wait()

    def close(self) -> None:
        """Remove the poll, since its client has the answer or is gone."""
        self.polls.close_poll(self.parked)


class HeldPollResponse:
    """Answer 200 to an open poll: spaces as heartbeats until the outcome is known, then JSON."""

    __slots__ = ("_encode", "_poll")

    def __init__(self, poll: HeldPoll, encode: AnswerEncoder) -> None:
        self._poll = poll
        self._encode = encode

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:  # noqa: ARG002 - ASGI's signature
        heartbeat = {"type": "http.response.body", "body": _HEARTBEAT, "more_body": True}
        try:
            await send({"type": "http.response.start", "status": 200, "headers": _HEADERS})
            await send(heartbeat)
            while (answer := await self._poll.wait_again()) is None:
                await send(heartbeat)
            body = (await self._encode(answer)).body
            await send({"type": "http.response.body", "body": body})
        finally:
            self._poll.close()
