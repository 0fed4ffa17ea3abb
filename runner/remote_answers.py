"""Open answers of models in a pod, sent to the gateway while a client follows their run."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Final

from engine.run_errors import NodeError
from execution.live_answers import FollowRequest, LiveAnswers
from execution.pod_api import OpenAnswersRequest, OpenAnswersResponse
from models.errors import DatabaseUnavailable
from runner.gateway_client import CallRefused

if TYPE_CHECKING:
    from collections.abc import Sequence
    from contextlib import AbstractContextManager

    from engine.services import AnswerOrigin, LiveAnswer
    from execution.live_answers import AnswerPiece
    from runner.gateway_client import GatewayClient

ASK_SECONDS: Final = 1.0
"""Interval of the question whether somebody follows, while an answer is open."""
REFUSED_SECONDS: Final = 60.0
"""Pause after a refusal, such as that of a gateway of an earlier version."""
GATEWAY: Final = "gateway"
"""The only follower: the gateway passes the texts on."""


class RemoteAnswers:
    """Sends the texts of models to the gateway while clients follow them;
    implements `engine.services.LiveAnswerService`.
    """

    def __init__(self, gateway: GatewayClient) -> None:
        self._gateway = gateway
        self._live = LiveAnswers(self._send)
        self._asking: asyncio.Task[None] | None = None
        self._next_at = 0.0
        """Time of the next question, by the event loop's clock."""

    def open(self, origin: AnswerOrigin) -> AbstractContextManager[LiveAnswer]:
        """Open an answer to write, complete after the block; meanwhile ask the gateway
        once a second whether clients follow it.
        """
        opened = self._live.open(origin)
        if self._asking is None or self._asking.done():
            self._asking = asyncio.create_task(self._ask())
        return opened

    async def close(self) -> None:
        """Stop asking the gateway and sending texts, and wait until both have ended."""
        if self._asking is not None:
            self._asking.cancel()
            await asyncio.gather(self._asking, return_exceptions=True)
        await self._live.close()

    async def _ask(self) -> None:
        """Ask the gateway once a second for the runs that clients follow,
        whose texts are then sent, until no answer is open.
        """
        loop = asyncio.get_running_loop()
        while True:
            await asyncio.sleep(max(self._next_at - loop.time(), 0.0))
            open_runs = self._live.list_runs()
            if not open_runs:
                return
            self._next_at = loop.time() + ASK_SECONDS
            answer = await self._call(OpenAnswersRequest(open_runs))
            for execution_id in answer.followed:
                is_repeated = execution_id in answer.repeated
                self._live.follow(FollowRequest(execution_id, GATEWAY, is_repeated=is_repeated))

    async def _send(self, _channel: str, pieces: Sequence[AnswerPiece]) -> bool:
        """Send pieces of texts to the gateway; return whether clients still follow all their runs."""
        answer = await self._call(OpenAnswersRequest(pieces=list(pieces)))
        return {piece.execution_id for piece in pieces} <= set(answer.followed)

    async def _call(self, call: OpenAnswersRequest) -> OpenAnswersResponse:
        """Return the answer of the gateway, an empty one if it fails or refuses;
        after a refusal, ask only a minute later.
        """
        try:
            return await self._gateway.call("/open-answers", call, OpenAnswersResponse)
        except CallRefused:
            self._next_at = asyncio.get_running_loop().time() + REFUSED_SECONDS
        except (DatabaseUnavailable, NodeError):
            pass  # its text is lost: the recorded answer has it
        return OpenAnswersResponse()
