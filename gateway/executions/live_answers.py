"""Open answers of the models of runs, for the clients of this gateway.

The gateway asks the process that holds a run for its answers, and keeps one copy of each open text for all clients that
follow the run. Each client has a position in it: a slow one gets more text at once, never less, and delays nobody. A
copy is bounded, and is forgotten with the end of the answer, whose recorded step has the whole text.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final

from msgspec import Struct, field

from execution import answer_messages
from execution.answer_messages import FOLLOW, FOLLOW_POD, PIECES
from execution.live_answers import MAX_ANSWER_CHARACTERS, AnswerPieces, FollowRequest
from gateway.http.wire import WireStruct
from messages.broker import GATEWAYS
from models.pod_identity import POD_OWNER_PREFIX

if TYPE_CHECKING:
    from execution.live_answers import AnswerPiece, AnswerPlace
    from gateway.executions.agent_step_rows import StepFilter
    from messages.broker import Broker, Notification
    from messages.message_seal import MessageSeal

ASK_SECONDS: Final = 5.0
"""Interval at which the process that holds a run is asked again."""
MAX_CHARACTERS: Final = 32_000_000
"""Open texts of all runs; beyond it, texts grow no further here."""
MAX_POSITIONS: Final = 1_000
"""Open texts of one run, and texts of one client whose positions are remembered."""
MAX_WAITING_CHARACTERS: Final = 1_000_000
"""Ended texts that wait for a client that does not read; beyond it, the oldest are left to their steps."""
WORKER_LOST: Final = "worker-lost"
"""Reason of a dropped text whose run has gone to another process."""


class TokenShape(WireStruct):
    """Next part of a text that a model is writing."""

    node_id: str
    iteration: str
    """Iteration of a loop; empty outside of loops."""
    number: int
    """Number of the step; for nodes other than agents, that of the answer within the node."""
    attempt: int
    model: str
    """Id of the model."""
    offset: int
    """Number of characters of the text before this part."""
    text: str


class TextRetryShape(WireStruct):
    """Text that clients have to drop, since its answer will not be completed."""

    node_id: str
    iteration: str
    number: int
    attempt: int
    """Attempt whose text is dropped."""
    reason: str
    """Code of the failure, `worker-lost`, or `interrupted`."""


class OpenText(Struct, eq=False):
    """Text of one call of a model."""

    serial: int
    """Number among all texts of this process."""
    number: int
    call: tuple[int, int]
    """Attempt, and position of the call within it."""
    model_id: str
    text: str = ""
    is_complete: bool = False
    is_dropped: bool = False
    reason: str = ""
    is_cut: bool = False
    """Whether it grows no further here."""

    @property
    def has_ended(self) -> bool:
        return self.is_complete or self.is_dropped


class _Position(Struct):
    """Part of a text that a client has got; the text itself may be forgotten."""

    serial: int
    number: int
    attempt: int
    sent: int = 0


class AnswerReader(Struct, eq=False):
    """Texts of one run that one client has not got yet."""

    wanted: StepFilter
    changed: asyncio.Event = field(default_factory=asyncio.Event)
    _changed_texts: dict[AnswerPlace, OpenText] = field(default_factory=dict)
    _ended_characters: int = 0
    """Length of those that have ended."""
    _positions: dict[AnswerPlace, _Position] = field(default_factory=dict)
    _recorded: dict[AnswerPlace, int] = field(default_factory=dict)
    """Number of the last recorded answer of each node."""

    def note(self, place: AnswerPlace, text: OpenText) -> None:
        """Remember a changed text of the node and iteration `place` for the next `take`, and set `changed`;
        ignore it if the client does not want it.
        """
        node_id, iteration = place
        if self.wanted.node_id in {None, node_id} and self.wanted.iteration in {None, iteration}:
            self._changed_texts.pop(place, None)
            self._changed_texts[place] = text
            if text.has_ended:
                self._ended_characters += len(text.text)
                self._limit_ended()
            self.changed.set()

    def note_waiting(self) -> None:
        """Set `changed` if texts wait to be taken."""
        if self._changed_texts:
            self.changed.set()

    def note_recorded(self, place: AnswerPlace, number: int) -> None:
        """Stop sending texts of a node up to answer `number`, since the client has got its recorded step."""
        self._recorded[place] = max(number, self._recorded.pop(place, -1))
        _limit_size(self._recorded)
        position = self._positions.get(place)
        if position is not None and position.number <= number:
            del self._positions[place]

    def _limit_ended(self) -> None:
        """Drop the oldest ended texts if over a million characters of them or a thousand texts wait, until half of that
        is left.

        Nothing else keeps them in memory, so a client that never reads costs little.
        """
        if self._ended_characters <= MAX_WAITING_CHARACTERS and len(self._changed_texts) <= MAX_POSITIONS:
            return
        ended = {place: len(text.text) for place, text in self._changed_texts.items() if text.has_ended}
        characters = sum(ended.values())
        for number, (place, length) in enumerate(ended.items()):
            if characters <= MAX_WAITING_CHARACTERS // 2 and len(ended) - number <= MAX_POSITIONS // 2:
                break
            del self._changed_texts[place]
            characters -= length
        self._ended_characters = characters

    def take(self) -> list[tuple[str, TokenShape | TextRetryShape]]:
        """Return the parts of changed texts that the client has not got, as pairs of event name and content; never
        waits.

        Each part is returned once. `changed` is cleared.
        """
        self.changed.clear()
        changed, self._changed_texts, self._ended_characters = self._changed_texts, {}, 0
        events: list[tuple[str, TokenShape | TextRetryShape]] = []
        for place, text in changed.items():
            if text.number > self._recorded.get(place, -1):
                events.extend(self._take_text(place, text))
        return events

    def _take_text(
        self, place: AnswerPlace, text: OpenText
    ) -> Iterator[tuple[str, TokenShape | TextRetryShape]]:
        """Yield the events for the client about one changed text: its new part, or that it is dropped.

        If the client has got a part of an earlier text at this place that was not recorded, the first event drops that.
        """
        position = self._positions.get(place)
        if position is None or position.serial != text.serial:
            if position is not None and position.sent and text.number <= position.number:
                yield _build_retry(place, position, text.reason or WORKER_LOST)
            position = _Position(text.serial, text.number, text.call[0])
            # A complete text counts as sent until it is recorded, since its worker may be lost before.
            self._positions.pop(place, None)
            self._positions[place] = position
            _limit_size(self._positions)
        if text.is_dropped:
            del self._positions[place]
            if position.sent:
                yield _build_retry(place, position, text.reason)
            return
        part = text.text[position.sent :]
        if part:
            offset, position.sent = position.sent, len(text.text)
            yield (
                "token",
                TokenShape(
                    node_id=place[0],
                    iteration=place[1],
                    number=text.number,
                    attempt=text.call[0],
                    model=text.model_id,
                    offset=offset,
                    text=part,
                ),
            )


def _limit_size(places: dict[AnswerPlace, Any]) -> None:
    """Remove the oldest entries of a mapping that has more than a thousand."""
    while len(places) > MAX_POSITIONS:
        del places[next(iter(places))]


def _build_retry(place: AnswerPlace, position: _Position, reason: str) -> tuple[str, TextRetryShape]:
    """Return name and content of the event that makes clients drop a text."""
    shape = TextRetryShape(
        node_id=place[0],
        iteration=place[1],
        number=position.number,
        attempt=position.attempt,
        reason=reason,
    )
    return "retry", shape


class FollowedRun(Struct, eq=False):
    """Run that clients of this gateway follow."""

    readers: set[AnswerReader] = field(default_factory=set)
    texts: dict[AnswerPlace, OpenText] = field(default_factory=dict)
    """Texts that have not ended."""
    owner: str = ""
    """Process that holds the run, or was the last one to do so."""
    asked_at: float = 0.0
    """Time of the last request to it, by the event loop's clock."""
    has_gap: bool = False
    """Whether a piece was lost."""

    def note(self, place: AnswerPlace, text: OpenText) -> None:
        for reader in self.readers:
            reader.note(place, text)


class LiveAnswerHub:
    """Open texts of all runs that clients of this gateway follow."""

    def __init__(self, broker: Broker, seal: MessageSeal) -> None:
        self._broker = broker
        self._seal = seal
        self._runs: dict[str, FollowedRun] = {}
        self._characters = 0
        self._serial = 0

    async def start(self) -> None:
        """Subscribe to the pieces of answers that the processes with followed runs send to this gateway."""
        await self._broker.listen(self._handle_notification, subject=PIECES)

    @contextmanager
    def reader(
        self, execution_id: str, wanted: StepFilter, changed: asyncio.Event | None = None
    ) -> Iterator[AnswerReader]:
        """Yield a reader of the texts of a run, including the parts that are already written, during a block.

        It sets `changed`, by default an event of its own, when there are texts to take. Without readers, the texts of a
        run are forgotten.
        """
        run = self._runs.setdefault(execution_id, FollowedRun())
        reader = AnswerReader(wanted, changed or asyncio.Event())
        run.readers.add(reader)
        for place, text in run.texts.items():
            reader.note(place, text)
        try:
            yield reader
        finally:
            run.readers.discard(reader)
            if not run.readers:
                self._forget_texts(run)
                self._runs.pop(execution_id, None)

    async def follow(self, execution_id: str, owner: str) -> None:
        """Ask the process that holds a run for its answers, unless it was asked in the last five seconds and nothing
        was lost since; an unavailable broker is only logged.

        Nothing happens without readers. `owner` is the name of the process in the lease. If it is another one than
        before, the texts of the earlier one are dropped, and the new one is asked for its own from their beginning:
        gateways may have passed them on before. An empty name changes nothing, since the last texts of a run that has
        just left its process may still arrive.
        """
        run = self._runs.get(execution_id)
        if run is None or not owner:
            return
        if owner != run.owner:
            run.owner, run.has_gap = owner, True
            self._drop_texts(run)
        now = asyncio.get_running_loop().time()
        if now - run.asked_at < ASK_SECONDS and not run.has_gap:
            return
        request = FollowRequest(execution_id, self._broker.channel, is_repeated=run.has_gap)
        run.asked_at, run.has_gap = now, False
        to_pod = owner.startswith(POD_OWNER_PREFIX)
        channel, subject = (GATEWAYS, FOLLOW_POD) if to_pod else (owner, FOLLOW)
        await answer_messages.send_sealed(self._broker, self._seal, channel, subject, request)

    def receive(self, message: AnswerPieces) -> None:
        """Add pieces to the texts of followed runs; those of a process that no longer holds the run are ignored."""
        for piece in message.pieces:
            run = self._runs.get(piece.execution_id)
            if run is not None and message.sender == run.owner:
                self._add(run, piece)

    def has_gap(self, execution_id: str) -> bool:
        """Return whether a piece of a followed run was lost, and will be asked for again."""
        run = self._runs.get(execution_id)
        return run is not None and run.has_gap

    def _handle_notification(self, notification: Notification) -> None:
        message = answer_messages.open_sealed(
            self._broker.channel, self._seal, notification, PIECES, AnswerPieces
        )
        if message is not None:
            self.receive(message)

    def _add(self, run: FollowedRun, piece: AnswerPiece) -> None:
        """Add a piece to its text, or begin a text with it, and notify the readers; a part that was added before is
        left out.

        A piece behind a gap is left out too, and the run is marked, so that its process is asked for all of it again. A
        text that reaches the limit, of its own or of all texts, grows no further.
        """
        call = (piece.attempt, piece.model_call)
        text = run.texts.get(piece.place)
        if text is None or (text.number, text.call) != (piece.number, call):
            if piece.offset:
                run.has_gap = True
                return
            self._forget(run, piece.place)
            self._make_room(run)
            self._serial += 1
            text = OpenText(self._serial, piece.number, call, piece.model_id, reason=piece.reason)
            run.texts[piece.place] = text
        held = len(text.text)
        text.is_cut = text.is_cut or held >= MAX_ANSWER_CHARACTERS or self._characters >= MAX_CHARACTERS
        if not text.is_cut:
            if piece.offset > held:
                run.has_gap = True
                return
            text.text += piece.text[held - piece.offset :]
            self._characters += len(text.text) - held
        text.is_complete, text.is_dropped = piece.is_complete, piece.is_dropped
        text.reason = piece.reason or text.reason
        if text.has_ended:
            self._forget(run, piece.place)
        run.note(piece.place, text)

    def _make_room(self, run: FollowedRun) -> None:
        """Mark the oldest text of a run with a thousand open ones as complete, and forget it: a pod may begin
        any number of them.
        """
        if len(run.texts) < MAX_POSITIONS:
            return
        place, text = next(iter(run.texts.items()))
        text.is_complete = True
        self._forget(run, place)
        run.note(place, text)

    def _drop_texts(self, run: FollowedRun) -> None:
        """Make the readers of a run that has left its process drop all of its open texts, and forget the texts."""
        for place, text in run.texts.items():
            text.is_dropped, text.reason = True, WORKER_LOST
            run.note(place, text)
        self._forget_texts(run)

    def _forget_texts(self, run: FollowedRun) -> None:
        for place in list(run.texts):
            self._forget(run, place)

    def _forget(self, run: FollowedRun, place: AnswerPlace) -> None:
        text = run.texts.pop(place, None)
        if text is not None:
            self._characters -= len(text.text)
