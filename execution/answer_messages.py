"""Messages between the processes that hold runs and the gateways that follow the answers of their models.

They are direct messages of the broker, which other users of Redis, and listeners of PostgreSQL, can neither read nor
forge: each is sealed for the channel of its receiver.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Final, TypeVar

import msgspec
import structlog

from json_text import decoding
from messages.broker import BrokerUnavailable, DirectMessage
from messages.message_seal import LIVE_ANSWERS, SealedMessage

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from engine.services import AnswerOrigin, LiveAnswer
    from execution.live_answers import AnswerPiece, LiveAnswers
    from messages.broker import Broker, Notification
    from messages.message_seal import MessageSeal

PIECES: Final = "answer_pieces"
"""Subject of messages to gateways, with pieces of answers."""
FOLLOW: Final = "follow_answers"
"""Subject of messages of gateways, which ask for the answers of a run."""
FOLLOW_POD: Final = "follow_pod_answers"
"""Subject of messages to all gateways, since any of them may serve the pod that holds a run."""

Content = TypeVar("Content")
log = structlog.get_logger()


class BrokerAnswers:
    """Texts that models are writing in this process, for the gateways that ask for them through the broker.

    Implements `engine.services.LiveAnswerService`. Most processes never call a model, and load nothing for it.
    """

    def __init__(self, broker: Broker, seal: MessageSeal) -> None:
        self._broker = broker
        self._seal = seal

    async def start(self) -> None:
        """Begin to listen for gateways that ask for the texts which models are writing for a run in this process."""
        await self._broker.listen(self._receive, subject=FOLLOW)

    def open(self, origin: AnswerOrigin) -> AbstractContextManager[LiveAnswer]:
        """Return a context manager of an answer to write; see `LiveAnswers.open`."""
        return self._live.open(origin)

    async def close(self) -> None:
        """Send nothing more, and wait for the messages that are on their way."""
        if "_live" in self.__dict__:
            await self._live.close()

    @cached_property
    def _live(self) -> LiveAnswers:
        from execution.live_answers import LiveAnswers  # noqa: PLC0415 - loaded with the first call of a model

        return LiveAnswers(self._send)

    async def _send(self, channel: str, pieces: Sequence[AnswerPiece]) -> bool:
        from execution.live_answers import AnswerPieces  # noqa: PLC0415 - as above

        content = AnswerPieces(self._broker.channel, pieces)
        return await send_sealed(self._broker, self._seal, channel, PIECES, content)

    def _receive(self, notification: Notification) -> None:
        from execution.live_answers import FollowRequest  # noqa: PLC0415 - as above

        request = open_sealed(self._broker.channel, self._seal, notification, FOLLOW, FollowRequest)
        if request is not None:
            self._live.follow(request)


async def send_sealed(
    broker: Broker, seal: MessageSeal, channel: str, subject: str, content: msgspec.Struct
) -> bool:
    """Send a message that only the process with this channel can read; return False if the broker is unavailable.

    `subject` names the kind of the message, by which `open_sealed` knows it.
    """
    sealed = seal.seal(LIVE_ANSWERS, channel, msgspec.json.encode(content))
    try:
        await broker.send(channel, {subject: msgspec.json.encode(sealed).decode()})
    except BrokerUnavailable as error:
        log.debug("live answers not sent", reason=str(error))
        return False
    return True


def open_sealed(
    channel: str, seal: MessageSeal, notification: Notification, subject: str, kind: type[Content]
) -> Content | None:
    """Return the content of a message of `send_sealed` with this subject to a channel; None for any other notification,
    for one sealed over a minute ago, and, with a warning, for an unreadable message.
    """
    if not isinstance(notification, DirectMessage) or subject not in notification.message:
        return None
    try:
        sealed = decoding.decode(notification.message[subject].encode(), SealedMessage)
        content = seal.open(LIVE_ANSWERS, channel, sealed)
        return None if content is None else decoding.decode(content, kind)
    except ValueError:
        log.warning("message unreadable", channel=channel, subject=subject)
        return None
