"""Decisions of the bridge without a server: contents, ids, batches, pauses, settings."""

from __future__ import annotations

import importlib
import json
import sys
from typing import Any

import pytest
from pydantic import ValidationError

from bridge import queue_gateway as gateways
from bridge import retry
from bridge.bridge_errors import BridgeRefused, BridgeUnavailable, ContentRefused
from bridge.message_source import SourceMessage, UnreadableMessage, make_deduplication_id, to_json
from bridge.queue_gateway import QueueGateway
from bridge.queue_transfer import split_requests
from bridge.redis_stream import parse_entry
from bridge.settings import AwsCredentials, BridgeSettings, SqsBridgeSettings
from models.settings import InvalidSettings
from tests import fake_gateway
from tests.fake_gateway import BatchRefusal, FakeGateway

NEEDED: dict[str, Any] = {"api_key": "sk-1", "bridge_workflow": "wf_1"}
AMAZON = "https://sqs.eu-west-1.amazonaws.com/123456789012/orders"


@pytest.mark.parametrize(
    ("content", "meant"),
    [
        (b'{"order": 1.50, "note": "\xc3\xbc"}', b'{"order": 1.50, "note": "\xc3\xbc"}'),
        (b"12345678901234567890123", b"12345678901234567890123"),
        (b"just text", b'"just text"'),
        (b'{"cut off": ', b'"{\\"cut off\\": "'),
        (b"NaN", b'"NaN"'),
        (b"", b'""'),
    ],
)
def test_json_stays_as_it_is_and_any_other_text_is_a_string(content: bytes, meant: bytes) -> None:
    assert to_json(content) == meant


@pytest.mark.parametrize("content", [b"\xff", b'"\xff"', b"[" * 100_000])
def test_a_reference_of_an_unknown_kind_is_unreadable(content: bytes) -> None:
    with pytest.raises(UnreadableMessage):
        to_json(content)


def test_an_entry_with_a_non_numeric_priority_is_unreadable() -> None:
    with pytest.raises(UnreadableMessage, match="priority"):
        parse_entry({b"message": b"{}", b"priority": b"high"})
    assert parse_entry({b"priority": b"high"}) == (b'{"priority":"high"}', None)


def test_ids_have_only_characters_that_the_gateway_takes_and_stay_different() -> None:
    assert make_deduplication_id("redis:orders", "1-0") == "redis:orders/1-0"
    strange = {
        make_deduplication_id("rabbitmq:orders", one) for one in ("a b", "a  b", "ü", "x" * 255, "x" * 254)
    }
    assert len(strange) == 5
    assert all(len(one) <= 255 and one.isascii() and one.isprintable() and " " not in one for one in strange)


def test_messages_are_split_by_size_and_unreadable_ones_stand_alone() -> None:
    large = b'"' + b"x" * (gateways.MAX_PART_BYTES // 2) + b'"'
    given = [
        SourceMessage("1", "1", b"1"),
        SourceMessage("2", "2", large),
        SourceMessage("3", "3", large),
        SourceMessage("4", "4", problem="?"),
        SourceMessage("5", "5", b"5"),
        SourceMessage("6", "6", large * 3),
        SourceMessage("7", "7", b"7"),
    ]
    assert [[one.id for one in part] for part in split_requests(given)] == [
        ["1", "2"],
        ["3"],
        ["4"],
        ["5"],
        ["6"],
        ["7"],
    ]
    assert list(split_requests([])) == []


def test_pauses_grow_to_half_a_minute_and_respect_retry_after() -> None:
    assert 0.05 <= retry.pause_seconds(1, 0) <= 0.1
    assert 15 <= retry.pause_seconds(1_000, 0) <= 30
    assert 7 <= retry.pause_seconds(1, 7) <= 7.1
    assert retry.pause_seconds(1, 1e9) < 601


# ── the gateway ───────────────────────────────────────────────────────────────────────────────────────────


async def _enqueue(fake: FakeGateway, *bodies: object, **settings: str) -> list[str]:
    gateway = QueueGateway(BridgeSettings(url=fake.url, **{**NEEDED, "api_key": fake.key, **settings}))
    messages = [
        SourceMessage(str(index), f"id-{index}", json.dumps(one).encode()) for index, one in enumerate(bodies)
    ]
    try:
        return [answer.status for answer in await gateway.enqueue(messages, source="test")]
    finally:
        await gateway.close()


async def test_gateway_answers_determine_the_next_step() -> None:
    async with fake_gateway.serve_fake_gateway() as fake:
        assert await _enqueue(fake, "a", "poison") == ["accepted", "refused"]
        assert await _enqueue(fake, "a", "b") == ["duplicate", "accepted"]
        for status, code, kind in [
            (401, "unauthorized", BridgeRefused),
            (404, "not-found", BridgeRefused),
            (422, "no-queue-trigger", BridgeRefused),
            (307, "elsewhere", BridgeRefused),
            (409, "workflow-not-active", BridgeUnavailable),
            (429, "queue-full", BridgeUnavailable),
            (500, "internal-error", BridgeUnavailable),
            (400, "too-deep", ContentRefused),
            (422, "validation-failed", ContentRefused),
        ]:
            fake.refusals = [BatchRefusal(status, code, {"Retry-After": "9"})]
            with pytest.raises(kind) as raised:
                await _enqueue(fake, "c")
            assert getattr(raised.value, "retry_after_seconds", 9.0) == 9.0
        # A workflow with an invalid graph is no fault of its messages.
        for path, kind in [("messages.1.priority", ContentRefused), ("nodes.step", BridgeRefused)]:
            fake.refusals = [BatchRefusal(422, "validation-failed", path=path)]
            with pytest.raises(kind):
                await _enqueue(fake, "c")
        with pytest.raises(BridgeRefused, match="unauthorized"):
            await _enqueue(fake, "c", api_key="sk-another")
    with pytest.raises(BridgeUnavailable):
        await _enqueue(fake, "c")
    assert fake.messages == ["a", "b"]


async def test_a_body_that_is_too_large_is_refused_before_it_is_sent() -> None:
    async with fake_gateway.serve_fake_gateway() as fake:
        with pytest.raises(ContentRefused):
            await _enqueue(fake, "x" * 20_000_000)
        assert await _enqueue(fake, "x" * 5_000_000) == ["accepted"]


# ── optional parts ──────────────────────────────────────────────────────────────────────────────────────────


def test_without_its_library_the_rabbitmq_bridge_names_the_package_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delitem(sys.modules, "bridge.rabbitmq_queue", raising=False)
    monkeypatch.setitem(sys.modules, "aio_pika", None)
    with pytest.raises(InvalidSettings, match="pip install"):
        importlib.import_module("bridge.rabbitmq_queue")


# ── settings ──────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "wrong",
    [
        {"api_key": ""},
        {"api_key": "sk\n"},
        {"url": "gateway:8000"},
        {"url": "http://user:password@gateway"},
        {"bridge_workflow": "../x"},
        {"bridge_batch": 1_001},
        {"bridge_hold_seconds": 10},
        {"bridge_on_refused": "ignore"},
    ],
)
def test_settings_that_can_not_work_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        BridgeSettings(**{**NEEDED, **wrong})


def test_a_source_with_a_strange_name_has_to_be_given_another() -> None:
    with pytest.raises(InvalidSettings, match="PILOTFLAME_BRIDGE_NAME"):
        BridgeSettings(**NEEDED).label("rabbitmq", "new orders")
    assert BridgeSettings(**NEEDED, bridge_name="new").label("rabbitmq", "new orders") == "rabbitmq:new"


def test_credentials_for_sqs_come_from_the_environment_alone() -> None:
    settings = SqsBridgeSettings(**NEEDED, bridge_sqs_queue_url=AMAZON)
    with pytest.raises(InvalidSettings, match="AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY in"):
        AwsCredentials.from_environment(settings, {})
    given = {"AWS_ACCESS_KEY_ID": "AKIA", "AWS_SECRET_ACCESS_KEY": "secret-canary", "AWS_REGION": "us-east-1"}
    found = AwsCredentials.from_environment(settings, given)
    assert found.region == "eu-west-1"
    assert "secret-canary" not in repr(found)
    elsewhere = SqsBridgeSettings(**NEEDED, bridge_sqs_queue_url="http://localhost:9324/000000000000/orders")
    assert AwsCredentials.from_environment(elsewhere, given).region == "us-east-1"
    assert (elsewhere.endpoint, elsewhere.queue_name) == ("http://localhost:9324", "orders")
