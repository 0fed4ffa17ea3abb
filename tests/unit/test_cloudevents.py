"""CloudEvents 1.0: requirements of the specification, in each of its HTTP forms."""

import json
from datetime import UTC, datetime

import pytest

from engine.values import Json
from senders import cloudevents, signatures
from senders.cloudevents import BATCHED_TYPE, STRUCTURED_TYPE
from senders.sender_event import EventBatch, SenderEvent
from senders.sender_request import RequestRefused
from tests.provider_requests import build_request

NOW = datetime(2026, 9, 1, 12, tzinfo=UTC)
EVENT: dict[str, Json] = {"specversion": "1.0", "id": "1", "source": "/beds/7", "type": "bed.watered"}
HEADERS = [(b"ce-" + name.encode(), str(value).encode()) for name, value in EVENT.items()]


def parse_structured_json(value: Json, content_type: str = STRUCTURED_TYPE) -> SenderEvent | EventBatch:
    headers = [(b"Content-Type", content_type.encode())]
    return cloudevents.parse_event(build_request(json.dumps(value).encode(), headers, NOW))


def parse_structured(**members: Json) -> SenderEvent:
    event = parse_structured_json({**EVENT, **members})
    assert isinstance(event, SenderEvent)
    return event


def parse_binary(body: bytes = b"", *headers: tuple[bytes, bytes]) -> SenderEvent:
    event = cloudevents.parse_event(build_request(body, [*HEADERS, *headers], NOW))
    assert isinstance(event, SenderEvent)
    return event


def test_source_and_id_together_identify_an_event() -> None:
    assert (
        parse_structured().key == parse_binary().key == signatures.delivery_key("cloudevents", "/beds/7", "1")
    )
    assert parse_structured(source="/beds/8").key != parse_structured().key != parse_structured(id="2").key


@pytest.mark.parametrize(
    ("members", "data"),
    [
        ({}, None),
        ({"data": None}, None),
        ({"data": {"litres": 12.5}}, {"litres": 12.5}),
        ({"data": "<a/>", "datacontenttype": "application/xml"}, "<a/>"),
        ({"data_base64": "AP8="}, {"data_base64": "AP8="}),
        ({"data_base64": None, "data": 1}, 1),
    ],
)
def test_event_data_of_any_type_is_kept(members: dict[str, Json], data: Json) -> None:
    assert parse_structured(**members).data == data


@pytest.mark.parametrize(
    ("content_type", "body", "data"),
    [
        (None, b"", None),
        (b"application/json", b'{"a": 1}', {"a": 1}),
        (b"application/vnd.beds+json; charset=utf-8", b"[1]", [1]),
        (b"text/plain", "água".encode(), "água"),
        (b"text/plain; charset=latin1", b"\xe9", {"data_base64": "6Q=="}),
        (b"text/plain", b"\xff", {"data_base64": "/w=="}),
        (b"image/png", b"\x00\xff", {"data_base64": "AP8="}),
        (None, b"a", {"data_base64": "YQ=="}),
    ],
)
def test_a_body_is_data_of_the_type_that_it_is_said_to_have(
    content_type: bytes | None, body: bytes, data: Json
) -> None:
    headers = [] if content_type is None else [(b"Content-Type", content_type)]
    event = parse_binary(body, *headers)
    assert event.data == data
    assert event.attributes == ({} if content_type is None else {"datacontenttype": content_type.decode()})


def test_further_attributes_of_an_event_are_kept() -> None:
    more: dict[str, Json] = {
        "subject": "Euro € 😀",
        "time": "2026-09-01T11:59:55.123456789+02:00",
        "dataschema": "https://in.test/schema",
        "sequence": 7,
        "sampled": True,
        "absent": None,
    }
    assert parse_structured(**more).attributes == {
        name: value for name, value in more.items() if value is not None
    }


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (b"Euro%20%E2%82%AC%20%F0%9F%98%80", "Euro € 😀"),
        (b'"a \\"b\\" %25"', 'a "b" %'),
        (b"a%2525", "a%25"),
        (b'"', '"'),
    ],
)
def test_headers_are_unquoted_and_then_decoded_once(value: bytes, text: str) -> None:
    assert parse_binary(b"", (b"CE-Subject", value)).attributes == {"subject": text}


@pytest.mark.parametrize(
    "members",
    [
        {"id": None},
        {"id": ""},
        {"id": 7},
        {"source": None},
        {"source": "a b"},
        {"type": None},
        {"type": "a b"},
        {"type": "a" * 201},
        {"specversion": None},
        {"specversion": "0.3"},
        {"specversion": 1.0},
        {"subject": ""},
        {"subject": "a\nb"},
        {"time": "yesterday"},
        {"time": "2026-09-01"},
        {"time": "2026-02-30T00:00:00Z"},
        {"time": True},
        {"Extension": "a"},
        {"data-type": "a"},
        {"extension": {}},
        {"extension": []},
        {"extension": 1.5},
        {"extension": 2**31},
        {"data": 1, "data_base64": "AP8="},
        {"data_base64": "not base64"},
        {"data_base64": "é"},
        {"data_base64": 7},
    ],
)
def test_events_outside_the_specification_are_refused(members: dict[str, Json]) -> None:
    with pytest.raises(RequestRefused) as refused:
        parse_structured(**members)
    assert refused.value.code == "invalid-event"


@pytest.mark.parametrize(
    "headers",
    [
        [(b"ce-subject", b"%")],
        [(b"ce-subject", b"%ff")],
        [(b"ce-subject", b"%0a")],
        [(b"ce-data_base64", b"AP8=")],
        [(b"ce-datacontenttype", b"text/plain")],
        [(b"ce-", b"a")],
    ],
)
def test_headers_that_are_no_attributes_are_refused(headers: list[tuple[bytes, bytes]]) -> None:
    with pytest.raises(RequestRefused) as refused:
        parse_binary(b"", *headers)
    assert refused.value.code == "invalid-event"


def test_an_attribute_given_twice_is_refused() -> None:
    with pytest.raises(RequestRefused) as refused:
        parse_binary(b"", (b"ce-id", b"2"))
    assert refused.value.code == "duplicate-header"


@pytest.mark.parametrize("count", [0, 1, 3])
def test_a_batch_is_all_its_events(count: int) -> None:
    batch = parse_structured_json([{**EVENT, "id": str(number + 1)} for number in range(count)], BATCHED_TYPE)
    assert isinstance(batch, EventBatch)
    assert [event.id for event in batch.events] == [str(number + 1) for number in range(count)]


def test_one_wrong_event_is_enough_to_refuse_a_batch() -> None:
    with pytest.raises(RequestRefused):
        parse_structured_json([EVENT, {**EVENT, "id": None}], BATCHED_TYPE)


@pytest.mark.parametrize(
    ("value", "content_type", "code"),
    [
        ({}, BATCHED_TYPE, "invalid-event"),
        ([], STRUCTURED_TYPE, "invalid-event"),
        (EVENT, "application/cloudevents+xml", "unsupported-media-type"),
        (EVENT, "application/cloudevents", "unsupported-media-type"),
        (EVENT, f"{STRUCTURED_TYPE}; charset=latin1", "unsupported-media-type"),
        ([EVENT] * (cloudevents.MAX_EVENTS + 1), BATCHED_TYPE, "too-large"),
        ({**EVENT, **{f"x{number}": 1 for number in range(200)}}, STRUCTURED_TYPE, "too-large"),
        ({**EVENT, "source": "a" * 3_000}, STRUCTURED_TYPE, "too-large"),
    ],
)
def test_forms_that_are_not_spoken_and_events_without_end_are_refused(
    value: Json, content_type: str, code: str
) -> None:
    with pytest.raises(RequestRefused) as refused:
        parse_structured_json(value, content_type)
    assert refused.value.code == code
