"""Open answers of models in this process, sent piece by piece to the gateways that follow their runs.

Pieces are hints: they may be lost, and the recorded answer has the whole text. A gateway asks the process that holds a
run, and asks again every few seconds; until it does, nothing is sent, and an answer costs one list of its texts. That
list lets a client that comes late see an answer from its beginning.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Final, TypeAlias

import msgspec
from msgspec import Struct, field

if TYPE_CHECKING:
    from engine.services import AnswerOrigin

COALESCE_SECONDS: Final = 0.05
"""Time for which texts are collected before they are sent together."""
FOLLOW_SECONDS: Final = 15.0
"""Time after which a gateway that hasn't asked again gets nothing more."""
MAX_ANSWER_CHARACTERS: Final = 131_072
"""Part of an answer that is sent while it is written; the recorded answer has the rest."""
MAX_MESSAGE_CHARACTERS: Final = 1_000
"""Text of one message: sealed, it fits into a notification of PostgreSQL in any alphabet."""
MAX_FOLLOWED_RUNS: Final = 10_000
MAX_GATEWAYS: Final = 16
"""Gateways that follow the same run."""
INTERRUPTED: Final = "interrupted"
"""Reason of a dropped text whose call ended without an answer and without a failure of the model."""

ShortText: TypeAlias = Annotated[str, msgspec.Meta(max_length=500)]
"""Id or code in a message; pods may send anything."""
AnswerPlace: TypeAlias = tuple[str, str]
"""Node id and iteration; a node asks one model at a time."""


class AnswerPiece(msgspec.Struct, frozen=True, omit_defaults=True):
    """Part of the text of one call of a model."""

    execution_id: ShortText
    node_id: ShortText
    iteration: ShortText
    number: int
    """Number of the step of an agent; for other nodes, that of the answer within the node."""
    attempt: int
    model_call: int
    """Position among the calls of this attempt: a fallback is the next one."""
    model_id: ShortText
    offset: int
    """Number of characters before this piece."""
    text: Annotated[str, msgspec.Meta(max_length=MAX_MESSAGE_CHARACTERS)] = ""
    is_complete: bool = False
    is_dropped: bool = False
    """Whether the call has failed, so that its text is no part of an answer."""
    reason: ShortText = ""
    """Code of the last failed call of this attempt."""

    @property
    def place(self) -> AnswerPlace:
        return self.node_id, self.iteration


class AnswerPieces(msgspec.Struct, frozen=True):
    """Pieces from the process that holds their runs."""

    sender: str
    """Owner of the leases."""
    pieces: Sequence[AnswerPiece]


class FollowRequest(msgspec.Struct, frozen=True):
    """Request of a gateway for the answers of a run, valid for 15 seconds."""

    execution_id: str
    channel: str
    """Channel of the gateway."""
    is_repeated: bool = False
    """Whether to send open answers from their beginning again, since a piece was lost."""


SendPieces: TypeAlias = Callable[[str, Sequence[AnswerPiece]], Awaitable[bool]]
"""Sends pieces to a gateway; returns False if they are lost, and raises nothing."""


class WrittenAnswer:
    """Answer of one attempt; implements `engine.services.LiveAnswer`."""

    __slots__ = (
        "is_closed",
        "is_complete",
        "is_dropped",
        "length",
        "model_call",
        "model_id",
        "on_change",
        "origin",
        "reason",
        "texts",
    )

    def __init__(self, origin: AnswerOrigin, on_change: Callable[[str], None]) -> None:
        """`on_change` is called with the execution id after each change."""
        self.origin = origin
        self.on_change = on_change
        self.model_call = -1
        self.model_id = ""
        self.texts: list[str] = []
        self.length = 0
        self.is_complete = False
        self.is_dropped = False
        self.is_closed = False
        """Whether nothing follows, neither text nor another call."""
        self.reason = ""

    @property
    def place(self) -> AnswerPlace:
        return self.origin.node_id, self.origin.iteration

    def begin(self, model_id: str) -> None:
        """Begin the text of the next call of a model, in place of that of the call before."""
        self.model_call += 1
        self.model_id = model_id
        self.texts, self.length = [], 0
        self.is_dropped = False

    def add(self, text: str) -> None:
        """Add text, up to the maximum length of an answer."""
        left = MAX_ANSWER_CHARACTERS - self.length
        if not text or left <= 0:
            return
        text = text[:left]
        self.texts.append(text)
        self.length += len(text)
        self.on_change(self.origin.execution_id)

    def drop(self, reason: str) -> None:
        """Drop the text of a call that has failed; `reason` is the code of the failure."""
        if not self.is_dropped:
            self.is_dropped, self.reason = True, reason
            self.on_change(self.origin.execution_id)

    def complete(self) -> None:
        """Note that the text is complete."""
        self.is_complete = True
        self.on_change(self.origin.execution_id)

    @property
    def has_ended(self) -> bool:
        return self.is_complete or self.is_dropped


class _SentPart(Struct):
    """Part of an answer that one gateway has got."""

    call: tuple[int, int, int]
    """Number, attempt and call of the model."""
    texts: int = 0
    characters: int = 0
    has_end: bool = False

    def is_replaced_by(self, call: tuple[int, int, int]) -> bool:
        """Return whether `call` repeats the step of this call, of which the gateway has got text but no end."""
        return bool(self.characters) and not self.has_end and call[0] == self.call[0]


class AnswerFollower(Struct):
    """Gateway that follows a run."""

    until: float
    """Time by the event loop's clock."""
    sent: dict[AnswerPlace, _SentPart] = field(default_factory=dict)

    def take(self, answer: WrittenAnswer) -> Iterator[AnswerPiece]:
        """Yield the pieces of an answer that the gateway has not got, and note them as sent."""
        origin = answer.origin
        call = (origin.number, origin.attempt, answer.model_call)
        sent = self.sent.get(answer.place)
        if sent is None or sent.call != call:
            if sent is not None and sent.is_replaced_by(call):
                yield AnswerPiece(
                    *(origin.execution_id, *answer.place, *sent.call, "", sent.characters),
                    is_dropped=True,
                    reason=answer.reason or INTERRUPTED,
                )
            sent = self.sent[answer.place] = _SentPart(call)
        text = "" if answer.is_dropped else "".join(answer.texts[sent.texts :])
        ends = answer.has_ended and not sent.has_end and bool(sent.characters or text)
        if not text and not ends:
            return
        first = sent.characters
        sent.texts, sent.characters = len(answer.texts), first + len(text)
        sent.has_end = answer.has_ended
        for start in range(0, max(len(text), 1), MAX_MESSAGE_CHARACTERS):
            is_last = start + MAX_MESSAGE_CHARACTERS >= len(text)
            yield AnswerPiece(
                origin.execution_id,
                *answer.place,
                *call,
                answer.model_id,
                first + start,
                text[start : start + MAX_MESSAGE_CHARACTERS],
                is_complete=is_last and answer.is_complete,
                is_dropped=answer.is_dropped,
                reason=answer.reason,
            )


class LiveAnswers:
    """Answers that are being written in this process; implements `engine.services.LiveAnswerService`."""

    def __init__(self, send: SendPieces) -> None:
        self._send = send
        self._answers: dict[str, dict[AnswerPlace, WrittenAnswer]] = {}
        self._followers: dict[str, dict[str, AnswerFollower]] = {}
        """By execution and channel."""
        self._changed: set[str] = set()
        """Followed executions with unsent texts."""
        self._sending: asyncio.Task[None] | None = None
        self._purged_at = 0.0

    @contextmanager
    def open(self, origin: AnswerOrigin) -> Iterator[WrittenAnswer]:
        """Yield an answer to write; it is complete after the block, and dropped if the block raises."""
        execution_id = origin.execution_id
        answer = WrittenAnswer(origin, self._note_change)
        self._answers.setdefault(execution_id, {})[answer.place] = answer
        try:
            yield answer
        except BaseException:
            answer.drop(INTERRUPTED)
            raise
        else:
            answer.complete()
        finally:
            answer.is_closed = True
            if execution_id in self._followers:
                self._note_change(execution_id)
            else:
                self._forget_closed(execution_id)

    def follow(self, request: FollowRequest) -> None:
        """Send the answers of a run to a gateway for the next 15 seconds, open ones from their beginning.

        A request of a gateway that follows the run already only extends the time, unless it asks for a repetition. A
        new one is ignored if 16 gateways follow the run, or 10,000 runs are followed.
        """
        now = asyncio.get_running_loop().time()
        self._purge(now)
        followers = self._followers.setdefault(request.execution_id, {})
        follower = followers.get(request.channel)
        if follower is None and (len(followers) >= MAX_GATEWAYS or len(self._followers) > MAX_FOLLOWED_RUNS):
            if not followers:
                del self._followers[request.execution_id]
            return
        if follower is None or request.is_repeated:
            follower = followers[request.channel] = AnswerFollower(now)
        follower.until = now + FOLLOW_SECONDS
        self._note_change(request.execution_id)

    def list_runs(self) -> list[str]:
        """Return the ids of the executions with open answers."""
        return list(self._answers)

    async def close(self) -> None:
        """Send nothing more, and wait for the messages that are on their way."""
        self._followers.clear()
        self._changed.clear()
        if self._sending is not None:
            await asyncio.gather(self._sending, return_exceptions=True)

    def _note_change(self, execution_id: str) -> None:
        """Send the changed answers of a run soon, if a gateway follows it."""
        if execution_id not in self._followers:
            return
        self._changed.add(execution_id)
        if self._sending is None or self._sending.done():
            self._sending = asyncio.create_task(self._send_changes())

    async def _send_changes(self) -> None:
        """Send changed answers to their followers every 50 ms, until none are left."""
        while self._changed:
            await asyncio.sleep(COALESCE_SECONDS)
            changed, self._changed = self._changed, set()
            now = asyncio.get_running_loop().time()
            pieces: dict[str, list[AnswerPiece]] = {}
            for execution_id in changed:
                for channel, follower in self._list_followers(execution_id, now):
                    for answer in self._answers.get(execution_id, {}).values():
                        pieces.setdefault(channel, []).extend(follower.take(answer))
                self._forget_closed(execution_id)
            await asyncio.gather(*(self._send_pieces(*each) for each in pieces.items()))

    async def _send_pieces(self, channel: str, pieces: Sequence[AnswerPiece]) -> None:
        """Send pieces to a gateway in messages; once one is lost, it gets nothing until it asks again."""
        for message in _split_pieces(pieces):
            if not await self._send(channel, message):
                for execution_id in {piece.execution_id for piece in pieces}:
                    self._remove_follower(execution_id, channel)
                return

    def _list_followers(self, execution_id: str, now: float) -> Sequence[tuple[str, AnswerFollower]]:
        """Return the followers of a run with their channels; those expired by `now`, the time of the event loop, are
        removed, and not returned.
        """
        followers = self._followers.get(execution_id, {})
        for channel in [channel for channel, each in followers.items() if each.until <= now]:
            self._remove_follower(execution_id, channel)
        return list(followers.items())

    def _remove_follower(self, execution_id: str, channel: str) -> None:
        followers = self._followers.get(execution_id, {})
        followers.pop(channel, None)
        if not followers:
            self._followers.pop(execution_id, None)
            self._forget_closed(execution_id)

    def _forget_closed(self, execution_id: str) -> None:
        """Forget the closed answers of a run; its followers have got them, or never will."""
        answers = self._answers.get(execution_id, {})
        for place in [place for place, answer in answers.items() if answer.is_closed]:
            del answers[place]
            for follower in self._followers.get(execution_id, {}).values():
                follower.sent.pop(place, None)
        if not answers:
            self._answers.pop(execution_id, None)

    def _purge(self, now: float) -> None:
        """Remove the followers of all runs that have expired by `now`, the time of the event loop, at most every 15
        seconds.
        """
        if now - self._purged_at >= FOLLOW_SECONDS:
            self._purged_at = now
            for execution_id in list(self._followers):
                self._list_followers(execution_id, now)


def _split_pieces(pieces: Sequence[AnswerPiece]) -> Iterator[Sequence[AnswerPiece]]:
    """Yield pieces in messages of about a thousand characters."""
    message: list[AnswerPiece] = []
    characters = 0
    for piece in pieces:
        size = len(piece.text) + _PIECE_OVERHEAD
        if message and characters + size > MAX_MESSAGE_CHARACTERS + _PIECE_OVERHEAD:
            yield message
            message, characters = [], 0
        message.append(piece)
        characters += size
    if message:
        yield message


_PIECE_OVERHEAD: Final = 300
"""Characters of the ids of a piece."""
