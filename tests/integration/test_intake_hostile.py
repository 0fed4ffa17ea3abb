"""Hostile and broken inbound requests: refused or accepted, and never a fault of the server."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle
from typing import TYPE_CHECKING, Any, TypeAlias

import httpx2
import pytest
from sqlalchemy import func, select
from sqlmodel import col

from gateway.http.failed_attempts import MAX_FAILURES
from models.execution import Execution, ExecutionData
from tests import ingest_senders, signed_requests
from tests.ingest_senders import AllSenders
from tests.integration.gateway_harness import (
    EDGE,
    STEP,
    GatewayHarness,
    OrganizationUsers,
    UserClient,
    assert_refused,
)
from tests.signed_requests import BOUNDARY, FORM, sign_parts

if TYPE_CHECKING:
    from engine.values import Json

WORKFLOWS = "/api/v1/workflows"
EVENTS = f"{WORKFLOWS}/events"
JSON = "application/json"
URLENCODED = "application/x-www-form-urlencoded"
CLOUD_EVENTS = "application/cloudevents+json"
CLOUD_BATCH = "application/cloudevents-batch+json"
LARGE = 1_000_001
"""One byte more than this gateway's limit of bodies."""
DEEP = 100_000


@dataclass(frozen=True)
class IngestEntryPoints:
    """All ingest endpoints, with the credentials of each."""

    admin: UserClient
    senders: AllSenders
    open_hook: str
    """Webhook for anonymous senders."""
    token: str
    """Of the workflow with the queue."""

    @property
    def queue(self) -> str:
        return self.senders.one("a producer").path

    @property
    def mail(self) -> str:
        return self.senders.one("SendGrid").path

    @property
    def hook(self) -> str:
        return self.senders.one("GitHub").path

    @property
    def stripe(self) -> str:
        return self.senders.one("Stripe").path

    def requests(self, content_type: str, body: bytes) -> Iterator[tuple[str, dict[str, str], bytes]]:
        """Yield the requests that carry a body to each endpoint, signed where that is required."""
        of_admin = {"Content-Type": content_type, "X-API-Key": self.admin.key}
        for path in (self.queue, f"{self.queue}-batch", self.mail, EVENTS):
            yield path, of_admin, body
        of_nobody = {"Content-Type": content_type}
        yield f"{self.queue}?key={self.token}", of_nobody, body
        yield self.senders.one("SES").path, of_nobody, body
        yield self.open_hook, of_nobody, body
        push = {"X-GitHub-Event": "push", "X-Hub-Signature-256": f"sha256={sign_parts(body)}"}
        yield self.hook, of_nobody | push, body
        moment = str(int(time.time()))
        signature = f"t={moment},v1={sign_parts(moment.encode(), b'.', body)}"
        yield self.stripe, of_nobody | {"Stripe-Signature": signature}, body


@pytest.fixture(scope="module")
async def entry_points(harness: GatewayHarness) -> IngestEntryPoints:
    admin = (await harness.people()).admin

    async def post(path: str, body: dict[str, Json]) -> httpx2.Response:
        return await admin.api.post(f"/api/v1{path}", json=body)

    everybody = await ingest_senders.set_up(post, admin.key)
    trigger = {"id": "start", "nodeId": "webhook", "config": {"verification": {"provider": "none"}}}
    hook = await admin.create(nodes=[trigger, STEP], connections=[EDGE], status="active")
    queue = everybody.workflows[0]
    made = [await post(f"/workflows/{one}/trigger-token", {}) for one in (hook, queue)]
    of_hook, of_queue = (answer.json()["token"] for answer in made)
    return IngestEntryPoints(admin, everybody, f"/hooks/{of_hook}", of_queue)


# ── bodies ──────────────────────────────────────────────────────────────────────────────────────────────────

TEXTS: Sequence[bytes] = (
    b"",
    b" ",
    b"null",
    b"true",
    b"0",
    b'""',
    b"[]",
    b"{}",
    b"[" * DEEP,
    b"[" * DEEP + b"]" * DEEP,
    b'{"a":' * DEEP + b"1" + b"}" * DEEP,
    b'{"message":' + b"[" * 64 + b"]" * 64 + b"}",
    b'{"message":1,"message":2}',
    b'{"message":NaN}',
    b'{"message":1e999}',
    b'{"message":' + b"9" * 5_000 + b"}",
    b'{"message":-0,"priority":1e400}',
    b'{"priority":1e300,"message":1,"delaySeconds":1e300,"notBefore":"9999-12-31T23:59:59Z"}',
    b'{"message":1,"notBefore":"0001-01-01T00:00:00+14:00"}',
    b'{"message":"\\ud800"}',
    b'{"message":"\\u0000","\\u0000":1}',
    b'{"message":"\xff\xfe"}',
    '{"message":1}'.encode("utf-16"),
    b"\xef\xbb\xbf{}",
    b'{"message":{"__proto__":1,"constructor":2,"$blob":{"sha256":"../../x"},"{{ data }}":"{{ trigger }}"}}',
    b'{"message":1,"deduplicationId":"' + b"x" * 10_000 + b'"}',
    b'{"message":1,"source":"a\\nb","callbackUrl":"http://127.0.0.1:1/"}',
    b'{"messages":[' + b"1," * 2_000 + b"1]}",
    b'{"messages":{"a":1}}',
    b'{"messages":[{"message":1,"priority":"high"},null,[],{"data":2}],"callbackUrl":"file:///etc/passwd"}',
    b'{"event_type":"a b"}',
    b'{"event_type":"*","event_data":{}}',
    b'{"event_type":"' + b"a." * 5_000 + b'"}',
    b'{"event_type":"a.b","event_data":[],"source":""}',
    b'{"event_type":"' + signed_requests.EVENT_TYPE.encode() + b'","event_data":{"\\u0000":"\\u0000"}}',
    b'{"from":1,"to":[]}',
    b'{"from":"a@b","attachments":[1],"email_headers":{"Message-ID":' + b"[" * 60 + b"]" * 60 + b"}}",
    b'{"from":"a@b","email_headers":{"message-id":"' + b"x" * 100_000 + b'"}}',
    b'{"event-data":1,"signature":1}',
    b'{"event-data":{},"signature":{"timestamp":[],"token":{},"signature":null}}',
    b'{"Type":1,"MessageId":2,"TopicArn":3,"Signature":4}',
    b'{"Type":"Notification","MessageId":"\\u0000","TopicArn":"arn:aws:sns:..:1:x","Signature":""}',
    b'{"id":1,"type":{},"object":"event"}',
    b'{"id":"evt_1","type":"invoice.paid","object":"event","data":' + b"[" * 70 + b"]" * 70 + b"}",
    b'{"id":"\\u0000","type":"invoice.paid"}',
    b'{"id":"\\ud800","type":"\\ud800"}',
    b'{"specversion":"1.0","id":"1","source":"/","type":"a b"}',
    b'{"specversion":1,"id":[],"source":{},"type":null}',
    b'{"specversion":"1.0","id":"1","source":"/","type":"a.b","time":"yesterday","data_base64":"%%%"}',
    b'{"specversion":"1.0","id":"' + b"x" * 100_000 + b'","source":"/","type":"a.b","data":1}',
    b'[{"specversion":"1.0","id":"1","source":"/","type":"a.b"},1]',
    b'{"type":"url_verification","challenge":{"a":1}}',
    b"x" * LARGE,
    b'"' + b"x" * LARGE + b'"',
)
# Forms of one line.
FIELDS: Sequence[bytes] = (
    b"a=1&" * 3_000,
    b"a=%zz&%00=%ff&payload=%7B",
    b"payload=" + b"%5B" * 10_000,
    b"=" * 10_000,
    b"timestamp=1&token=2&signature=3&body-mime=%00%ff",
    b"timestamp=1&timestamp=2&token=" + b"a" * 50 + b"&signature=\xff&message-url=http://127.0.0.1/",
)
OTHER_TYPES = (
    *("text/plain", URLENCODED, CLOUD_EVENTS, CLOUD_BATCH, FORM, "multipart/form-data", "", "*/*"),
    *(
        "application/json; charset=utf-16",
        "application/octet-stream",
        "multipart/form-data; boundary=" + "x" * 500,
    ),
)


async def test_no_body_is_a_fault_of_ours(harness: GatewayHarness, entry_points: IngestEntryPoints) -> None:
    nobody = await harness.client()
    requests = [request for text in TEXTS for request in entry_points.requests(JSON, text)]
    requests += [request for text in FIELDS for request in entry_points.requests(URLENCODED, text)]
    await assert_no_faults(nobody, requests)
    await assert_alive(harness, entry_points)


async def test_no_body_with_a_wrong_media_type_is_an_internal_error(
    harness: GatewayHarness, entry_points: IngestEntryPoints
) -> None:
    nobody = await harness.client()
    said = zip(cycle(OTHER_TYPES), [*TEXTS, *FIELDS], strict=False)
    await assert_no_faults(nobody, [request for one in said for request in entry_points.requests(*one)])
    await assert_alive(harness, entry_points)


def form_body(*parts: tuple[bytes, bytes], end: bytes = b"--\r\n") -> bytes:
    mark = b"--" + BOUNDARY.encode()
    return (
        b"".join(mark + b"\r\n" + head + b"\r\n\r\n" + value + b"\r\n" for head, value in parts) + mark + end
    )


def form_part(name: str, value: bytes, more: str = "") -> tuple[bytes, bytes]:
    return f'Content-Disposition: form-data; name="{name}"{more}'.encode(), value


ENVELOPE = form_part("envelope", b'{"from":"a@example.org","to":["b@example.org"]}')
RAW = form_part("email", b"From: a@example.org\r\n\r\nHello\r\n")
FORMS = (
    form_body(),
    form_body(end=b""),
    form_body(ENVELOPE, RAW, end=b""),
    form_body(ENVELOPE, RAW)[:-30],
    form_body(*(form_part(f"f{number}", b"x") for number in range(10_000))),
    form_body(ENVELOPE, *(RAW for _ in range(1_000))),
    form_body((b"\r\n".join(b"X-%d: y" % number for number in range(10_000)), b"x")),
    form_body((b"Content-Disposition: form-data; name=" + b"x" * 100_000, b"x")),
    form_body((b"Content-Disposition", b""), (b": form-data", b""), (b"", b"")),
    form_body(form_part("envelope", b"[" * DEEP), RAW),
    form_body(form_part("envelope", b'{"from":{},"to":1}'), RAW),
    form_body(form_part("envelope", b'{"from":"\\ud800","to":["\\u0000"]}'), RAW),
    form_body(form_part("envelope", b"\xff\xfe\x00"), RAW),
    form_body(ENVELOPE, form_part("email", b"\x00\xff" * 1_000)),
    form_body(ENVELOPE, form_part("email", b"Message-ID: <" + b"x" * 500_000 + b">\r\n\r\n")),
    form_body(ENVELOPE, form_part("email", b"Message-ID: \x00\xff\r\n\r\n")),
    form_body(
        ENVELOPE, form_part("headers", b"\x00: \x00\r\n" * 1_000), form_part("charsets", b'{"text":"rot13"}')
    ),
    form_body(ENVELOPE, RAW, form_part("attachment1", b"x", '; filename="../../../etc/passwd"')),
    form_body(
        ENVELOPE, RAW, form_part("attachment1", b"x", "; filename=\"C:\\\\nul\"; filename*=utf-9''%zz")
    ),
    form_body(ENVELOPE, RAW, form_part("a\x00b", b"x", '; filename="\x00"')),
    form_body(ENVELOPE, RAW, form_part("attachment999999999999", b"x", '; filename="~/.ssh/id"')),
    form_body(
        form_part("timestamp", b"\xff"),
        form_part("token", b"\x00"),
        form_part("signature", b""),
        form_part("body-mime", b""),
    ),
)


async def test_no_form_is_a_fault_of_ours(harness: GatewayHarness, entry_points: IngestEntryPoints) -> None:
    nobody = await harness.client()
    await assert_no_faults(nobody, [request for one in FORMS for request in entry_points.requests(FORM, one)])
    await assert_alive(harness, entry_points)


# ── headers, queries and paths ──────────────────────────────────────────────────────────────────────────────

HEADERS: Sequence[Sequence[tuple[bytes, bytes]]] = (
    [(b"x-%d" % number, b"y") for number in range(10_000)],
    [(b"x-long", b"y" * 1_000_000)],
    [(b"content-type", b"text/plain"), (b"content-type", b"application/json")],
    [(b"content-type", b"application/json\x00\xff")],
    [(b"content-encoding", b"gzip")],
    [(b"content-length", b"9" * 5_000)],
    [(b"content-length", b"-1")],
    [(b"content-length", b"\xb2")],
    [(b"idempotency-key", b"x" * 100_000)],
    [(b"idempotency-key", b"a"), (b"idempotency-key", b"b")],
    [(b"idempotency-key", b"a\x00b")],
    [(b"idempotency-key", "schlüssel".encode())],
    [(b"x-github-event", b"\x00"), (b"x-github-delivery", b"\x00")],
    [(b"x-github-event", b"p" * 10_000), (b"x-github-delivery", b"\xff" * 10_000)],
    [(b"x-github-event", b"a"), (b"x-github-event", b"b")],
    [(b"x-hub-signature-256", b"sha256=\xff"), (b"x-hub-signature-256", b"")],
    [(b"stripe-signature", b"t=,v1="), (b"stripe-signature", b"t=1")],
    [(b"stripe-signature", b"t=99999999999999999999,v1=\xff" + b",v1=a" * 1_000)],
    [(b"x-slack-signature", b"v0=\xff"), (b"x-slack-request-timestamp", b"1" * 500)],
    [(b"webhook-id", b"\x00"), (b"webhook-timestamp", b"\xb2"), (b"webhook-signature", b"v1," * 500)],
    [(b"ce-specversion", b"1.0"), (b"ce-id", b"\x00"), (b"ce-source", b"%00%ff"), (b"ce-type", b"a.b%zz")],
    [(b"ce-specversion", b"1.0"), (b"ce-id", b"1" * 100_000), (b"ce-source", b"/"), (b"ce-type", b"\xff")],
    [
        (b"x-twilio-email-event-webhook-signature", b"\xff"),
        (b"x-twilio-email-event-webhook-timestamp", b"-1"),
    ],
    [(b"x-amz-sns-message-type", b"Notification"), (b"x-amz-sns-message-type", b"\x00")],
    [(b"x-amz-sns-rawdelivery", b"true")],
    [(b"authorization", b"Basic " + b"\xff" * 1_000)],
    [(b"authorization", b"Bearer \x00")],
)


async def test_no_header_is_a_fault_of_ours(harness: GatewayHarness, entry_points: IngestEntryPoints) -> None:
    nobody = await harness.client()
    requests = []
    for more in HEADERS:
        replaced = {name.lower() for name, _ in more}
        for path, headers, body in entry_points.requests(JSON, b'{"message":1,"event_type":"a.b"}'):
            own = [(name.encode(), value.encode()) for name, value in headers.items()]
            requests.append((path, [*(pair for pair in own if pair[0].lower() not in replaced), *more], body))
    await assert_no_faults(nobody, requests)
    await assert_alive(harness, entry_points)


async def test_no_query_and_no_path_is_a_fault_of_ours_or_opens_anything(
    harness: GatewayHarness, entry_points: IngestEntryPoints
) -> None:
    nobody = await harness.client()
    queries = (
        f"key={entry_points.token}&key={entry_points.token}",
        *("key=", "key", "key=%00", "key=%ff%fe", "key=tt-%00", "key=" + "t" * 10_000, "key[]=a&key.x=b"),
        "&".join(f"a{number}={number}" for number in range(2_000)) + f"&key={entry_points.token}",
        f"KEY={entry_points.token}",
        f"key=%20{entry_points.token}",
        f"key={entry_points.token}%00",
        f"key=et-{entry_points.token[3:]}",
    )
    for path in (entry_points.queue, f"{entry_points.queue}-batch", entry_points.mail, EVENTS):
        for query in queries:
            assert_refused(await nobody.post(f"{path}?{query}", json={}), *(401, "unauthorized"))
    for odd in (
        "..%2f..%2fetc",
        "%00",
        "a" * 10_000,
        "%ff",
        "wf_%0d%0aX: y",
        "'; DROP TABLE workflow;--",
        "%2e%2e",
    ):
        for path in (f"{WORKFLOWS}/{odd}/enqueue", f"{WORKFLOWS}/{odd}/email-trigger", f"/hooks/{odd}"):
            answer = await entry_points.admin.api.post(path, json={})
            assert answer.status_code in {404, 429}, (path, answer.text)
    await assert_alive(harness, entry_points)


# ── authentication ──────────────────────────────────────────────────────────────────────────────────────────


async def test_a_token_is_good_for_its_own_workflow_and_for_one_kind_of_door(
    harness: GatewayHarness, entry_points: IngestEntryPoints, people: OrganizationUsers
) -> None:
    nobody = await harness.client(address="10.9.9.1")
    theirs = await people.owner.create(
        nodes=[{"id": "start", "nodeId": "queue-trigger"}, STEP], connections=[EDGE], status="active"
    )
    made = await people.owner.api.post(f"{WORKFLOWS}/{theirs}/trigger-token", json={})
    token = made.json()["token"]
    of_events = entry_points.stripe.rpartition("=")[2]
    for path in (entry_points.queue, f"{entry_points.queue}-batch", entry_points.mail, EVENTS):
        assert_refused(await nobody.post(f"{path}?key={token}", json={"message": 1}), 401, "unauthorized")
    for path in (entry_points.queue, entry_points.mail):
        assert_refused(await nobody.post(f"{path}?key={of_events}", json={"message": 1}), 401, "unauthorized")
    assert_refused(await nobody.post(f"/hooks/{of_events}", json={}), 404, "not-found")
    assert_refused(await nobody.post(f"/hooks/{token}", json={}), 422, "no-webhook-trigger")
    for path in (f"{WORKFLOWS}/{theirs}", "/api/v1/deliveries/dlv_1", "/api/v1/auth/whoami"):
        answer = await nobody.get(f"{path}?key={token}", headers={"X-API-Key": token})
        assert_refused(answer, 401, "unauthorized")
    assert (await nobody.post(f"{WORKFLOWS}/{theirs}/enqueue?key={token}", json=1)).status_code == 201


async def test_of_tokens_that_are_replaced_at_once_while_they_are_used_one_is_left(
    harness: GatewayHarness, people: OrganizationUsers
) -> None:
    workflow_id = await people.owner.create(
        nodes=[{"id": "start", "nodeId": "queue-trigger"}, STEP], connections=[EDGE], status="active"
    )
    nobody = await harness.client(address="10.9.9.2")
    url = f"{WORKFLOWS}/{workflow_id}"
    first = (await people.owner.api.post(f"{url}/trigger-token", json={})).json()["token"]

    async def use(number: int) -> int:
        answer = await nobody.post(f"{url}/enqueue?key={first}", json={"message": number})
        return answer.status_code

    replaced, used = await asyncio.gather(
        asyncio.gather(*(people.owner.api.post(f"{url}/trigger-token", json={}) for _ in range(8))),
        asyncio.gather(*(use(number) for number in range(20))),
    )
    assert {answer.status_code for answer in replaced} == {201}
    assert set(used) <= {201, 401}
    shown = (await people.owner.api.get(f"{url}/inbound-address")).json()["tokens"]
    assert len(shown) == 1
    tokens = {answer.json()["id"]: answer.json()["token"] for answer in replaced}
    last = tokens.pop(shown[0]["id"])
    for token in tokens.values():
        assert_refused(await nobody.post(f"{url}/enqueue?key={token}", json=1), 401, "unauthorized")
    assert (await nobody.post(f"{url}/enqueue?key={last}", json=1)).status_code == 201
    async with harness.gateway.database.read() as connection:
        statement = select(func.count()).where(col(Execution.workflow_id) == workflow_id)
        assert await connection.scalar(statement) == used.count(201) + 1


async def test_a_sender_is_let_in_though_another_guesses_tokens_from_the_same_address(
    harness: GatewayHarness, entry_points: IngestEntryPoints
) -> None:
    shared = await harness.client(address="10.9.9.3")
    guesses = [f"/hooks/tt-00guess{number}" for number in range(MAX_FAILURES + 1)]
    answers = [await shared.post(path, json={}) for path in guesses]
    assert [answer.status_code for answer in answers] == [*[404] * MAX_FAILURES, 429]
    assert (await shared.post(f"{entry_points.queue}?key={entry_points.token}", json=1)).status_code == 201


# ── checks after each attack ────────────────────────────────────────────────────────────────────────────────


Headers: TypeAlias = "Mapping[str, str] | Sequence[tuple[bytes, bytes]]"


async def assert_no_faults(
    nobody: httpx2.AsyncClient, requests: Sequence[tuple[str, Headers, bytes]]
) -> None:
    answers = await asyncio.gather(
        *(nobody.post(path, headers=headers, content=body) for path, headers, body in requests)
    )
    assert not [
        (answer.status_code, path, [*answer.request.headers.items()][-1], body[:80], answer.text)
        for answer, (path, _, body) in zip(answers, requests, strict=True)
        if answer.status_code >= 500
    ]


async def assert_alive(harness: GatewayHarness, entry_points: IngestEntryPoints) -> None:
    """Check that a valid request is accepted, and that all earlier accepted data is JSON."""
    nobody = await harness.client()
    for one in entry_points.senders.all:
        answer = await one.post(nobody, one.make(one.delivery().number))
        assert ingest_senders.read_execution_id(answer)
    async with harness.gateway.database.read() as connection:
        for text in await connection.scalars(select(col(ExecutionData.trigger))):
            given: Any = json.loads(text)
            assert isinstance(given, dict)
