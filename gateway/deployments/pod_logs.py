"""Logs of pods, read through a deployer, since only deployers have access to the cluster."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

import msgspec

from gateway.http import errors
from gateway.http.shared_allowance import SharedAllowance
from json_text import decoding
from messages.broker import DirectMessage
from messages.deployer_messages import POD_LOGS, PodLogRequest
from models import ids

if TYPE_CHECKING:
    from messages.broker import Broker, Notification
    from models.access import ApiCaller

ANSWER_SECONDS: Final = 15.0
"""Longer than a deployer waits for its cluster."""
MAX_REQUESTS: Final = 100
_TOO_MANY: Final = "Too many requests wait here for pod logs: try again"


class PodLogEntry(msgspec.Struct):
    """Line of a pod's log; `at` is in RFC 3339, or None if the cluster records no times."""

    pod: str
    at: str | None
    text: str


class PodLogReader:
    """Reader of pod logs through deployers, with the requests of this gateway that have no answer yet."""

    def __init__(self, broker: Broker) -> None:
        self._broker = broker
        self._answers: dict[str, asyncio.Future[Sequence[PodLogEntry]]] = {}
        self._places = SharedAllowance(MAX_REQUESTS, _TOO_MANY)

    async def start(self) -> None:
        """Subscribe to the answers of deployers to requests for log lines of pods."""
        await self._broker.listen(self._receive, subject=POD_LOGS)

    async def read(self, workflow_id: str, caller: ApiCaller, limit: int) -> Sequence[PodLogEntry]:
        """Return the last lines of a workflow's pods, at most `limit`, from a deployer.

        Raises a 503 error if no deployer answers within 15 seconds, if the cluster doesn't return the logs, and if too
        many requests wait here; also `BrokerUnavailable`.
        """
        request_id = ids.new_id("logs")
        answer: asyncio.Future[Sequence[PodLogEntry]] = asyncio.get_running_loop().create_future()

        def evict() -> None:
            if not answer.done():
                answer.set_exception(errors.not_ready(_TOO_MANY))

        with self._places.take(caller.organization_id, caller.key_id, evict):
            self._answers[request_id] = answer
            try:
                await self._broker.notify_deployer(
                    PodLogRequest(
                        workflow_id, limit=limit, channel=self._broker.channel, request_id=request_id
                    )
                )
                async with asyncio.timeout(ANSWER_SECONDS):
                    return await answer
            except TimeoutError as error:
                raise errors.not_ready("No deployer has answered in time: try again") from error
            finally:
                del self._answers[request_id]

    def _receive(self, notification: Notification) -> None:
        """Hand the lines of a deployer's answer, or its error, to the request that waits for them."""
        if not isinstance(notification, DirectMessage):
            return
        answer = self._answers.get(notification.message.get(POD_LOGS, ""))
        if answer is None or answer.done():
            return
        lines = notification.message.get("lines")
        if lines is None:
            answer.set_exception(
                errors.not_ready(f"The cluster did not return the logs: {notification.message.get('error')}")
            )
        else:
            answer.set_result(decoding.decode(lines, list[PodLogEntry]))
