"""Texts that models are writing: from the process that holds a run to the clients of a gateway."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import TYPE_CHECKING, cast

import msgspec
import pytest

from engine.services import AnswerOrigin
from execution import answer_messages, live_answers
from execution.live_answers import AnswerPiece, AnswerPieces, FollowRequest, LiveAnswers
from execution.pod_api import OpenAnswersRequest
from gateway.executions import live_answers as gateway_answers
from gateway.executions.agent_step_rows import StepFilter
from gateway.executions.live_answers import AnswerReader, LiveAnswerHub, TextRetryShape, TokenShape
from gateway.pods import pod_answers
from gateway.pods.lease_checks import LeaseHolder
from gateway.pods.pod_answers import PodAnswers
from json_text import decoding
from messages.broker import GATEWAYS
from messages.local_broker import LocalBroker
from messages.message_seal import MessageSeal
from models.pod_identity import PodProcess
from models.timestamps import DatabaseClock

if TYPE_CHECKING:
    from models.database import Database

pytestmark = pytest.mark.anyio
PATIENCE_SECONDS = 60.0
RUN = "exec_1"
SEAL = MessageSeal(b"a secret of more than thirty-two characters", (), DatabaseClock())


def origin(number: int = 0, attempt: int = 1, node_id: str = "agent") -> AnswerOrigin:
    return AnswerOrigin(RUN, node_id, "", number, attempt)


async def wait_until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(PATIENCE_SECONDS):
        while not condition():  # noqa: ASYNC110 - texts are sent without an event
            await asyncio.sleep(0.01)


@dataclass
class ClientText:
    """Text as a client shows it by the documented rules."""

    reader: AnswerReader
    texts: dict[str, str] = field(default_factory=dict)
    names: list[str] = field(default_factory=list)
    reasons: list[str] = field(default_factory=list)

    def take(self) -> None:
        for name, shape in self.reader.take():
            self.names.append(name)
            if isinstance(shape, TextRetryShape):
                assert self.texts.pop(shape.node_id)
                self.reasons.append(shape.reason)
            else:
                assert isinstance(shape, TokenShape)
                # A text that begins anew follows a `retry`, or the step of the one before it.
                text = "" if shape.offset == 0 else self.texts[shape.node_id]
                assert len(text) == shape.offset
                self.texts[shape.node_id] = text + shape.text

    async def shows(self, text: str, node_id: str = "agent") -> None:
        async with asyncio.timeout(PATIENCE_SECONDS):
            while self.texts.get(node_id, "") != text:
                await self.reader.changed.wait()
                self.take()

    async def has_dropped(self, *reasons: str) -> None:
        async with asyncio.timeout(PATIENCE_SECONDS):
            while self.reasons != list(reasons):
                await self.reader.changed.wait()
                self.take()


@dataclass
class Connected:
    """Process that writes answers, and a gateway."""

    hub: LiveAnswerHub
    live: LiveAnswers = field(init=False)
    sent: list[Sequence[AnswerPiece]] = field(default_factory=list)
    owner: str = "worker"
    loses: Callable[[AnswerPiece], bool] = lambda _piece: False

    async def send(self, _channel: str, pieces: Sequence[AnswerPiece]) -> bool:
        self.sent.append(pieces)
        self.hub.receive(AnswerPieces(self.owner, [piece for piece in pieces if not self.loses(piece)]))
        return True

    async def follow(self, owner: str = "worker") -> None:
        """Let the gateway see which process holds the run, and ask it."""
        await self.hub.follow(RUN, owner)
        self.live.follow(FollowRequest(RUN, "gateway"))


@pytest.fixture
async def connected() -> AsyncIterator[Connected]:
    hub = LiveAnswerHub(LocalBroker(channel="gateway"), SEAL)
    found = Connected(hub)
    found.live = LiveAnswers(found.send)
    yield found
    await found.live.close()


async def test_nothing_is_sent_without_followers_and_a_late_client_sees_the_whole_text(
    connected: Connected,
) -> None:
    with connected.live.open(origin()) as answer:
        answer.begin("model_1")
        for _ in range(3):
            answer.add("word ")
        await asyncio.sleep(2 * live_answers.COALESCE_SECONDS)
        assert connected.sent == []
        with connected.hub.reader(RUN, StepFilter()) as reader:
            client = ClientText(reader)
            await connected.follow()
            await client.shows("word word word ")
            answer.add("end")
            await client.shows("word word word end")
            with (
                connected.hub.reader(RUN, StepFilter()) as later,
                connected.hub.reader(RUN, StepFilter("other")) as other,
            ):
                assert [shape.text for _, shape in later.take() if isinstance(shape, TokenShape)] == [
                    "word word word end"
                ]
                assert other.take() == []
    assert connected.sent[0][0].model_id == "model_1"


async def test_a_client_that_reads_late_gets_all_texts_together_and_delays_no_other(
    connected: Connected,
) -> None:
    with (
        connected.hub.reader(RUN, StepFilter()) as slow_reader,
        connected.hub.reader(RUN, StepFilter()) as reader,
    ):
        await connected.follow()
        client, slow = ClientText(reader), ClientText(slow_reader)
        with connected.live.open(origin()) as answer:
            answer.begin("model_1")
            shown = ""
            for number in range(5):
                answer.add(f"{number} ")
                shown += f"{number} "
                await client.shows(shown)
        slow.take()
        assert (slow.names, slow.texts) == (["token"], {"agent": "0 1 2 3 4 "})


async def test_a_failed_call_and_a_fallback_drop_the_text_before_them(connected: Connected) -> None:
    with connected.hub.reader(RUN, StepFilter()) as reader:
        client = ClientText(reader)
        await connected.follow()
        with connected.live.open(origin()) as answer:
            answer.begin("model_1")
            answer.add("Half an ans")
            await client.shows("Half an ans")
            answer.drop("model-unavailable")
            answer.begin("model_2")
            answer.add("Another")
            await client.shows("Another")
        # The second text was complete, but its step is never recorded: the next attempt replaces it.
        with suppress(LookupError), connected.live.open(origin(0, 2)) as again:
            again.begin("model_1")
            again.add("Third")
            await client.shows("Third")
            raise LookupError
        await client.has_dropped("model-unavailable", "worker-lost", "interrupted")
        assert client.texts == {}


async def test_the_next_answer_replaces_no_recorded_one_and_late_parts_of_it_are_left_out(
    connected: Connected,
) -> None:
    with connected.hub.reader(RUN, StepFilter()) as reader:
        client = ClientText(reader)
        await connected.follow()
        with connected.live.open(origin()) as answer:
            answer.begin("model_1")
            answer.add("First")
            await client.shows("First")
        reader.note_recorded(("agent", ""), 0)
        connected.hub.receive(
            AnswerPieces("worker", [AnswerPiece(RUN, "agent", "", 0, 1, 0, "model_1", 0, "First")])
        )
        with connected.live.open(origin(1)) as answer:
            answer.begin("model_1")
            answer.add("Second")
            await client.shows("Second")
        assert client.names == ["token", "token"]


async def test_another_worker_begins_the_text_again_and_the_first_one_is_not_heard_any_more(
    connected: Connected,
) -> None:
    with connected.hub.reader(RUN, StepFilter()) as reader:
        client = ClientText(reader)
        await connected.follow()
        with connected.live.open(origin()) as lost:
            lost.begin("model_1")
            lost.add("Half")
            await client.shows("Half")
            await connected.follow("another")
            await client.has_dropped("worker-lost")
            lost.add(" of it")
            connected.live.follow(FollowRequest(RUN, "gateway", is_repeated=True))
            seen = len(connected.sent)
            await wait_until(lambda: len(connected.sent) > seen)
            assert client.texts == {}
            connected.hub.receive(
                AnswerPieces("another", [AnswerPiece(RUN, "agent", "", 0, 2, 0, "model_1", 0, "Again")])
            )
            await client.shows("Again")
            assert client.reasons == ["worker-lost"]


async def test_a_lost_piece_is_asked_for_again(connected: Connected) -> None:
    with connected.hub.reader(RUN, StepFilter()) as reader:
        client = ClientText(reader)
        await connected.follow()
        with connected.live.open(origin()) as answer:
            answer.begin("model_1")
            answer.add("a")
            await client.shows("a")
            connected.loses = lambda piece: piece.offset == 1
            answer.add("b")
            await wait_until(lambda: len(connected.sent) >= 2)
            answer.add("c")
            await wait_until(lambda: len(connected.sent) >= 3)
            assert client.texts == {"agent": "a"}
            assert connected.hub.has_gap(RUN)
            connected.live.follow(FollowRequest(RUN, "gateway", is_repeated=True))
            await client.shows("abc")


async def test_a_long_text_is_cut_into_messages_and_ends_at_its_limit(
    connected: Connected, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(live_answers, "MAX_ANSWER_CHARACTERS", 2_500)
    with connected.hub.reader(RUN, StepFilter()) as reader:
        client = ClientText(reader)
        await connected.follow()
        with connected.live.open(origin()) as answer:
            answer.begin("model_1")
            for _ in range(30):
                answer.add("é" * 100)
            await client.shows("é" * 2_500)
    assert [len(piece.text) for pieces in connected.sent for piece in pieces] == [1_000, 1_000, 500]
    assert all(len(pieces) == 1 for pieces in connected.sent)


async def test_a_gateway_that_gets_no_message_is_forgotten_until_it_asks_again() -> None:
    calls: list[str] = []

    async def lose(channel: str, _pieces: Sequence[AnswerPiece]) -> bool:
        calls.append(channel)
        return False

    live = LiveAnswers(lose)
    with live.open(origin()) as answer:
        live.follow(FollowRequest(RUN, "gateway"))
        answer.begin("model_1")
        answer.add("a")
        await wait_until(lambda: bool(calls))
        answer.add("b")
        await asyncio.sleep(2 * live_answers.COALESCE_SECONDS)
        assert calls == ["gateway"]
    await live.close()


async def test_a_failed_text_is_dropped_although_its_fallback_writes_none(connected: Connected) -> None:
    """Clients that come later don't see it either."""
    with connected.hub.reader(RUN, StepFilter()) as reader:
        client = ClientText(reader)
        await connected.follow()
        with connected.live.open(origin()) as answer:
            answer.begin("model_1")
            answer.add("Half an ans")
            await client.shows("Half an ans")
            answer.drop("model-unavailable")
            answer.begin("model_2")
        await client.has_dropped("model-unavailable")
        with connected.hub.reader(RUN, StepFilter()) as later:
            assert later.take() == []


@pytest.mark.parametrize(("limit", "allowed"), [("MAX_WAITING_CHARACTERS", 60), ("MAX_POSITIONS", 6)])
async def test_a_client_that_does_not_read_keeps_a_limited_number_of_ended_texts(
    connected: Connected, monkeypatch: pytest.MonkeyPatch, limit: str, allowed: int
) -> None:
    monkeypatch.setattr(gateway_answers, limit, allowed)

    def receive(node_id: str, *, is_complete: bool) -> None:
        piece = AnswerPiece(*(RUN, node_id, "", 0, 1, 0, "model_1", 0, "x" * 10), is_complete=is_complete)
        connected.hub.receive(AnswerPieces("worker", [piece]))

    with connected.hub.reader(RUN, StepFilter()) as stuck:
        await connected.follow()
        receive("open", is_complete=False)
        for number in range(20):
            receive(f"llm{number}", is_complete=True)
        kept = [shape.node_id for _, shape in stuck.take()]
    assert kept[0] == "open"
    # The newest are kept: at least half as many as may be.
    assert kept[1:] == [f"llm{number}" for number in range(21 - len(kept), 20)]
    assert 4 <= len(kept) <= 7


async def test_texts_beyond_the_memory_of_a_gateway_are_cut_and_not_asked_for_again(
    connected: Connected, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gateway_answers, "MAX_CHARACTERS", 4)
    with connected.hub.reader(RUN, StepFilter()) as reader:
        await connected.follow()
        for offset, text in enumerate("abcdefgh"):
            piece = AnswerPiece(RUN, "agent", "", 0, 1, 0, "model_1", offset, text)
            connected.hub.receive(AnswerPieces("worker", [piece]))
        assert [shape.text for _, shape in reader.take() if isinstance(shape, TokenShape)] == ["abcd"]
        assert not connected.hub.has_gap(RUN)


async def test_a_run_has_a_limited_number_of_open_texts(
    connected: Connected, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pods may begin texts and never end them."""
    monkeypatch.setattr(gateway_answers, "MAX_POSITIONS", 3)
    with connected.hub.reader(RUN, StepFilter()) as stuck:
        await connected.follow()
        for number in range(20):
            piece = AnswerPiece(RUN, f"llm{number}", "", 0, 1, 0, "model_1", 0, "text")
            connected.hub.receive(AnswerPieces("worker", [piece]))
        with connected.hub.reader(RUN, StepFilter()) as later:
            assert [shape.node_id for _, shape in later.take()] == ["llm17", "llm18", "llm19"]
        kept = [shape.node_id for _, shape in stuck.take()]
        assert {"llm17", "llm18", "llm19"} <= set(kept)
        assert len(kept) <= 6


class HoldingDatabase:
    """Database in which the pod holds the run."""

    @asynccontextmanager
    async def read(self) -> AsyncIterator[HoldingDatabase]:
        yield self

    async def scalars(self, _statement: object) -> Sequence[str]:
        return [RUN]


async def test_only_gateways_that_follow_a_run_of_a_pod_now_count_toward_their_maximum(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(pod_answers, "MAX_GATEWAYS", 1)
    broker = LocalBroker(channel="gateway")
    answers = PodAnswers(cast("Database", HoldingDatabase()), broker, SEAL)
    await answers.start()
    holder = LeaseHolder("wf_1", "org_1", 0, PodProcess("pod", datetime.now(UTC)))

    async def follow(channel: str, seconds: float) -> None:
        monkeypatch.setattr(pod_answers, "FOLLOW_SECONDS", seconds)
        request = FollowRequest(RUN, channel)
        await answer_messages.send_sealed(broker, SEAL, GATEWAYS, answer_messages.FOLLOW_POD, request)
        await asyncio.sleep(0)

    async def is_followed() -> bool:
        return (await answers.receive(holder, OpenAnswersRequest([RUN]))).followed == [RUN]

    await follow("first", 60)
    assert await is_followed()
    await follow("first", 0)
    assert not await is_followed(), "its time was not replaced"
    await follow("second", 60)
    assert await is_followed(), "an expired one has kept its place"


@pytest.mark.parametrize("field_name", ["execution_id", "node_id", "iteration", "model_id", "text", "reason"])
def test_a_piece_of_a_pod_has_short_ids_and_a_short_text(field_name: str) -> None:
    piece = {"execution_id": RUN, "node_id": "agent", "iteration": "", "number": 0, "attempt": 1}
    piece |= {"model_call": 0, "model_id": "model_1", "offset": 0}
    decoding.decode(msgspec.json.encode({"pieces": [piece]}), OpenAnswersRequest)
    with pytest.raises(msgspec.ValidationError):
        decoding.decode(
            msgspec.json.encode({"pieces": [piece | {field_name: "x" * 1_001}]}), OpenAnswersRequest
        )
