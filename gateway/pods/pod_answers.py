"""Open answers of models in pods, passed on to the gateways that follow their runs."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Final

from sqlalchemy import select
from sqlmodel import col

from execution import answer_messages
from execution.answer_messages import FOLLOW_POD, PIECES
from execution.live_answers import (
    FOLLOW_SECONDS,
    MAX_FOLLOWED_RUNS,
    MAX_GATEWAYS,
    AnswerPieces,
    FollowRequest,
)
from execution.pod_api import OpenAnswersResponse
from gateway.pods.lease_checks import held_conditions
from messages.broker import GATEWAYS
from models.execution import Execution

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    from execution.live_answers import AnswerPiece
    from execution.pod_api import OpenAnswersRequest
    from gateway.pods.lease_checks import LeaseHolder
    from messages.broker import Broker, Notification
    from messages.message_seal import MessageSeal
    from models.database import Database

MAX_OVERDUE: Final = 1_000
"""Followed runs above which expired requests are removed."""


class PodAnswers:
    """Streamed answers of models in pods, passed on to the gateways that follow their runs.

    Each gateway stores the requests of all gateways to follow runs, since any may serve a pod.
    """

    def __init__(self, database: Database, broker: Broker, seal: MessageSeal) -> None:
        self._database = database
        self._broker = broker
        self._seal = seal
        self._followers: dict[str, dict[str, float]] = {}
        """Expiry by channel, by execution."""
        self._repeated: set[str] = set()
        """Executions with a lost piece, whose pod has to send open answers from their beginning."""

    async def start(self) -> None:
        """Listen to the requests of gateways to follow the answers of runs."""
        await self._broker.listen(self._handle_notification, subject=FOLLOW_POD)

    async def receive(self, holder: LeaseHolder, call: OpenAnswersRequest) -> OpenAnswersResponse:
        """Send the pieces of a pod's streamed answers to the gateways that follow their runs, and return the followed
        runs.

        Only runs that the pod holds count; without a follower, nothing is read. If the call names open answers, the
        result also names, once, the runs of which the pod has to send the answers from their beginning.
        """
        named = {*call.open, *(piece.execution_id for piece in call.pieces)}
        followed = await self._read_held(holder, [each for each in named if self._list_channels(each)])
        for execution_id in followed:
            pieces = [piece for piece in call.pieces if piece.execution_id == execution_id]
            if pieces:
                await self._pass_on(holder.owner, execution_id, pieces)
        repeated = sorted(self._repeated & set(followed)) if call.open else []
        self._repeated.difference_update(repeated)
        return OpenAnswersResponse(sorted(followed), repeated)

    async def _read_held(self, holder: LeaseHolder, execution_ids: Collection[str]) -> Sequence[str]:
        if not execution_ids:
            return ()
        statement = select(col(Execution.id)).where(
            col(Execution.id).in_(execution_ids), *held_conditions(holder)
        )
        async with self._database.read() as connection:
            return list(await connection.scalars(statement))

    async def _pass_on(self, owner: str, execution_id: str, pieces: Sequence[AnswerPiece]) -> None:
        content = AnswerPieces(owner, pieces)
        for channel in self._list_channels(execution_id):
            await answer_messages.send_sealed(self._broker, self._seal, channel, PIECES, content)

    def _list_channels(self, execution_id: str) -> Sequence[str]:
        """Return the channels of the gateways that follow a run."""
        now = asyncio.get_running_loop().time()
        return [channel for channel, until in self._followers.get(execution_id, {}).items() if until > now]

    def _handle_notification(self, notification: Notification) -> None:
        """Store that a gateway follows a run for a limited time, as its notification asks; other notifications are
        ignored.

        Nothing is stored for another gateway beyond the maximum of gateways of a run, or for another run beyond that of
        runs; a gateway that follows the run already extends its time in any case. A repeated request also lets the pod
        send the answers of the run from their beginning.
        """
        request = answer_messages.open_sealed(GATEWAYS, self._seal, notification, FOLLOW_POD, FollowRequest)
        if request is None:
            return
        if len(self._followers) >= MAX_OVERDUE:
            self._purge()
        now = asyncio.get_running_loop().time()
        stored = self._followers.get(request.execution_id, {})
        followers = {channel: until for channel, until in stored.items() if until > now}
        has_room = len(followers) < MAX_GATEWAYS and (followers or len(self._followers) < MAX_FOLLOWED_RUNS)
        if request.channel not in followers and not has_room:
            return
        self._followers[request.execution_id] = {**followers, request.channel: now + FOLLOW_SECONDS}
        if request.is_repeated:
            self._repeated.add(request.execution_id)

    def _purge(self) -> None:
        """Remove runs that nobody follows any more."""
        for execution_id in [each for each in self._followers if not self._list_channels(each)]:
            del self._followers[execution_id]
            self._repeated.discard(execution_id)
