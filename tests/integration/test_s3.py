"""Buckets of users: requests signed as S3 requires, and addresses restricted by the operator."""

from __future__ import annotations

import os
import re
import time
from collections.abc import AsyncIterator, Sequence
from datetime import UTC, datetime, timedelta
from ipaddress import ip_network
from typing import Any
from urllib.parse import urlsplit
from uuid import uuid4

import pytest
from msgspec.structs import replace

from engine.run_errors import NodeError
from models.timestamps import DatabaseClock
from nodes.connections.aws_signature import AwsSigner
from nodes.connections.data_source import ConnectionSource
from nodes.connections.data_source_policy import ConnectionPolicy
from nodes.connections.s3_bucket import MAX_OBJECT_BYTES, S3Bucket, S3Location, open_bucket
from nodes.outbound_http import OutboundClient, OutboundPolicy
from tests import fake_s3
from tests.fake_s3 import FakeS3, S3Error

SECONDS = 5.0
LOCAL = ConnectionPolicy(allowed_networks=(ip_network("127.0.0.0/8"),))
KEYS = ["a.txt", "räume/1 2.txt", "a+b&c=d%20~(1)*'!.csv", "deep/er/ß/🙂", "x//y", "-_.~"]


@pytest.fixture
async def s3() -> AsyncIterator[FakeS3]:
    async with fake_s3.serve_fake_s3() as s3:
        yield s3


def bucket_source(s3: FakeS3, *, secrets: dict[str, str] | None = None, **settings: Any) -> ConnectionSource:  # noqa: ANN401 - settings
    return ConnectionSource(
        id="ds_1",
        organization_id="org_1",
        type="s3",
        revision=1,
        settings={
            "bucket": "bucket",
            "region": s3.region,
            "endpoint": s3.url,
            "accessKeyId": s3.access_key_id,
            **settings,
        },
        secrets=secrets or {"secretAccessKey": s3.secret_access_key},
    )


async def open_test_bucket(s3: FakeS3, **settings: Any) -> S3Bucket:  # noqa: ANN401 - settings of the source
    return await open_bucket(bucket_source(s3, **settings), LOCAL)


async def put_object(bucket: S3Bucket, key: str, content: bytes = b"hello") -> str:
    return await bucket.put(key, content, media_type="text/plain", timeout_seconds=SECONDS)


async def read(bucket: S3Bucket, key: str, max_bytes: int = 1_000) -> bytes:
    return await bucket.get(key, max_bytes=max_bytes, timeout_seconds=SECONDS)


# ── the signature ─────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("method", "path", "query", "headers", "body", "signature"),
    [
        (
            "GET",
            "/test.txt",
            {},
            {"Range": "bytes=0-9"},
            b"",
            "f0e8bdb87c964420e857bd35b5d6ed310bd44f0170aba48dd91039c6036bdb41",
        ),
        (
            "PUT",
            "/test$file.text",
            {},
            {"Date": "Fri, 24 May 2013 00:00:00 GMT", "x-amz-storage-class": "REDUCED_REDUNDANCY"},
            b"Welcome to Amazon S3.",
            "98ad721746da40c64f1a55b78f14c238d841ea1380cd77a1b5971af0ece108bd",
        ),
        (
            "GET",
            "/",
            {"lifecycle": ""},
            {},
            b"",
            "fea454ca298b7da1c68078a5d1bdbfbbe0d65c699e0f91ac7a200a0136783543",
        ),
        (
            "GET",
            "/",
            {"prefix": "J", "max-keys": "2"},
            {},
            b"",
            "34b48302e7b5fa45bde8084f4b7868a86f0a534bc59db6670ed5711ef69dc6f7",
        ),
    ],
)
def test_requests_are_signed_as_in_the_examples_that_amazon_publishes(
    method: str, path: str, query: dict[str, str], headers: dict[str, str], body: bytes, signature: str
) -> None:
    signer = AwsSigner("AKIAIOSFODNN7EXAMPLE", "wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY", "us-east-1")
    host, now = "examplebucket.s3.amazonaws.com", datetime(2013, 5, 24, tzinfo=UTC)
    sent = signer.headers(method, host, path, query, headers, body, now)
    assert sent["authorization"].endswith(f"Signature={signature}")
    assert "wJalr" not in repr(signer)


# ── objects ───────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("key", KEYS)
async def test_an_object_comes_back_under_any_key_that_s3_takes(s3: FakeS3, key: str) -> None:
    bucket = await open_test_bucket(s3)
    etag = await put_object(bucket, key)
    assert await read(bucket, key) == b"hello"
    assert f'"{etag}"' == s3.objects[key].etag
    assert s3.objects[key].headers["Content-Type"] == "text/plain"


async def test_a_bucket_with_a_prefix_reaches_nothing_outside_of_it(s3: FakeS3) -> None:
    bucket = await open_test_bucket(s3, prefix="ours")
    await put_object(bucket, "a.txt")
    await put_object(await open_test_bucket(s3), "theirs/b.txt")
    assert sorted(s3.objects) == ["ours/a.txt", "theirs/b.txt"]
    (only,) = await bucket.list("", max_objects=10, timeout_seconds=SECONDS)
    assert only.key == "a.txt"
    for key in ("../theirs/b.txt", "./a.txt", "x/../../theirs/b.txt", "/a.txt", "", "a\n", "ü" * 600):
        with pytest.raises(NodeError) as raised:
            await read(bucket, key)
        assert raised.value.code == "invalid-key"


async def test_a_session_token_is_signed_too(s3: FakeS3) -> None:
    s3.session_token = "a token"
    secrets = {"secretAccessKey": s3.secret_access_key, "sessionToken": "a token"}
    await put_object(await open_bucket(bucket_source(s3, secrets=secrets), LOCAL), "a.txt")
    with pytest.raises(NodeError):
        await put_object(await open_test_bucket(s3), "a.txt")


async def test_requests_are_signed_with_the_time_of_the_database(s3: FakeS3) -> None:
    clock = DatabaseClock()
    bucket = await open_bucket(bucket_source(s3), replace(LOCAL, clock=clock))
    clock.learn(datetime.now(UTC) + timedelta(days=1), time.monotonic())
    with pytest.raises(NodeError):
        await put_object(bucket, "a.txt")
    clock.learn(datetime.now(UTC), time.monotonic())
    await put_object(bucket, "a.txt")


async def test_a_bucket_is_a_part_of_the_host_unless_it_can_t_be(s3: FakeS3) -> None:
    asked: list[str] = []

    async def resolve(name: str) -> Sequence[str]:
        asked.append(name)
        return ["127.0.0.1"]

    endpoint = f"http://s3.test:{s3.port}"
    place = S3Location.from_settings(
        {"bucket": "bucket", "endpoint": endpoint, "region": s3.region, "prefix": "p"}
    )
    signer = AwsSigner(s3.access_key_id, s3.secret_access_key, s3.region)
    policy = OutboundPolicy(allowed_networks=LOCAL.allowed_networks)
    bucket = S3Bucket(place, signer, DatabaseClock(), lambda: OutboundClient(policy, resolve))
    await put_object(bucket, "a b.txt")
    assert await read(bucket, "a b.txt") == b"hello"
    assert [one.key for one in await bucket.list("a", max_objects=1, timeout_seconds=SECONDS)] == ["a b.txt"]
    assert set(asked) == {"bucket.s3.test"}
    assert s3.requests[0] == f"PUT bucket.s3.test:{s3.port} /p/a%20b.txt"


@pytest.mark.parametrize(
    ("settings", "origin"),
    [
        ({}, "https://bucket.s3.us-east-1.amazonaws.com"),
        ({"region": "eu-west-1", "pathStyle": True}, "https://s3.eu-west-1.amazonaws.com"),
        ({"bucket": "with.dots"}, "https://s3.us-east-1.amazonaws.com"),
        ({"endpoint": "https://[2001:db8::1]:9000"}, "https://[2001:db8::1]:9000"),
        ({"endpoint": "https://Minio.Example.com"}, "https://bucket.minio.example.com"),
    ],
)
def test_where_a_bucket_is_follows_from_its_settings(settings: dict[str, Any], origin: str) -> None:
    assert S3Location.from_settings({"bucket": "bucket", **settings}).origin == origin


@pytest.mark.parametrize(
    "settings",
    [
        {"bucket": "evil.com/"},
        {"bucket": "a@b"},
        {"bucket": "a..b"},
        {"bucket": ""},
        {"region": "evil.com/?"},
        {"endpoint": "https://example.com/path"},
        {"endpoint": "https://user:secret@example.com"},
        {"endpoint": "file:///etc"},
        {"endpoint": "https://example.com?x=1"},
    ],
)
def test_settings_that_lead_elsewhere_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(NodeError) as raised:
        S3Location.from_settings({"bucket": "bucket", **settings})
    assert raised.value.code == "invalid-data-source"


async def test_credentials_are_the_data_source_s_and_never_the_machine_s(
    s3: FakeS3, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", s3.access_key_id)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", s3.secret_access_key)
    with pytest.raises(NodeError) as raised:
        await open_bucket(bucket_source(s3, secrets={"sessionToken": "x"}), LOCAL)
    assert raised.value.code == "invalid-data-source"


# ── limits and failures ───────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("size", [0, 1, 999, 1_000])
async def test_an_object_of_any_size_that_is_allowed_is_read(s3: FakeS3, size: int) -> None:
    bucket = await open_test_bucket(s3)
    await put_object(bucket, "a", b"x" * size)
    assert await read(bucket, "a", 1_000) == b"x" * size


async def test_an_object_that_is_too_large_is_refused_and_not_fetched(s3: FakeS3) -> None:
    bucket = await open_test_bucket(s3)
    await put_object(bucket, "a", b"x" * 5_000)
    with pytest.raises(NodeError) as raised:
        await read(bucket, "a", 4_999)
    assert raised.value.code == "object-too-large"
    assert raised.value.message == "The object 'a' has 5,000 bytes; at most 4,999 are read"
    with pytest.raises(NodeError) as raised:
        await put_object(bucket, "b", bytes(MAX_OBJECT_BYTES + 1))
    assert raised.value.code == "object-too-large"


async def test_a_listing_goes_over_pages_and_tells_names_as_they_are(s3: FakeS3) -> None:
    bucket = await open_test_bucket(s3)
    for key in KEYS:
        await put_object(bucket, key, key.encode())
    s3.page_size = 2
    found = await bucket.list("", max_objects=len(KEYS), timeout_seconds=SECONDS)
    assert [one.key for one in found] == sorted(KEYS)
    assert {one.key: one.size for one in found} == {key: len(key.encode()) for key in KEYS}
    assert all(one.modified_at.tzinfo is not None and one.etag for one in found)
    assert [one.key for one in await bucket.list("deep/", max_objects=5, timeout_seconds=SECONDS)] == [
        "deep/er/ß/🙂"
    ]
    with pytest.raises(NodeError) as raised:
        await bucket.list("", max_objects=len(KEYS) - 1, timeout_seconds=SECONDS)
    assert raised.value.code == "too-many-objects"


@pytest.mark.parametrize(
    ("refused", "code", "is_retryable"),
    [
        (S3Error(403, "AccessDenied"), "access-denied", False),
        (S3Error(404, "NoSuchKey"), "object-not-found", False),
        (S3Error(404, "NoSuchBucket"), "s3-404", False),
        (S3Error(400, "ExpiredToken"), "s3-400", False),
        (S3Error(503, "SlowDown"), "s3-503", True),
        (S3Error(500, "InternalError"), "s3-500", True),
        (S3Error(301, "PermanentRedirect"), "wrong-region", False),
    ],
)
async def test_s3_errors_have_their_code_and_say_if_a_retry_may_help(
    s3: FakeS3, refused: S3Error, code: str, *, is_retryable: bool
) -> None:
    bucket = await open_test_bucket(s3)
    s3.failures = [refused]
    with pytest.raises(NodeError) as raised:
        await read(bucket, "a")
    assert (raised.value.code, raised.value.retryable) == (code, is_retryable)
    assert re.match(r"GET http://127\.0\.0\.1:\d+/[a-z-]+/a: \w", raised.value.message)
    assert "It was refused" not in raised.value.message


async def test_no_error_contains_a_secret(s3: FakeS3) -> None:
    s3.secret_access_key = "another"
    of_user = bucket_source(s3, secrets={"secretAccessKey": "canary-secret", "sessionToken": "canary-token"})
    bucket = await open_bucket(of_user, LOCAL)
    with pytest.raises(NodeError) as raised:
        await read(bucket, "a")
    shown = [
        repr(of_user),
        repr(bucket),
        repr(bucket.__dict__),
        str(raised.value),
        repr(raised.value.__cause__),
    ]
    assert "canary" not in "".join(shown)


async def test_a_bucket_that_stays_silent_is_given_up_in_time(s3: FakeS3) -> None:
    bucket = await open_test_bucket(s3)
    s3.is_silent = True
    with pytest.raises(NodeError) as raised:
        await bucket.get("a", max_bytes=1, timeout_seconds=0.1)
    assert (raised.value.code, raised.value.retryable) == ("timed-out", True)


@pytest.mark.parametrize(
    "endpoint",
    ["http://127.0.0.1:{port}", "http://localhost:{port}", "http://[::1]:{port}", "http://169.254.169.254"],
)
async def test_a_private_endpoint_is_refused_unless_the_operator_allows_it(s3: FakeS3, endpoint: str) -> None:
    of_user = bucket_source(s3, endpoint=endpoint.format(port=s3.port), pathStyle=True)
    bucket = await open_bucket(of_user, ConnectionPolicy())
    with pytest.raises(NodeError) as raised:
        await read(bucket, "a")
    assert raised.value.code == "address-not-allowed"
    assert s3.requests == []


async def test_a_name_with_a_private_address_is_refused_like_the_address(s3: FakeS3) -> None:
    async def resolve(_name: str) -> Sequence[str]:
        return ["93.184.216.34", "127.0.0.1"]

    place = S3Location.from_settings({"bucket": "bucket", "endpoint": f"http://s3.test:{s3.port}"})
    signer = AwsSigner(s3.access_key_id, s3.secret_access_key, s3.region)
    bucket = S3Bucket(place, signer, DatabaseClock(), lambda: OutboundClient(OutboundPolicy(), resolve))
    with pytest.raises(NodeError) as raised:
        await read(bucket, "a")
    assert raised.value.code == "address-not-allowed"
    assert s3.requests == []


@pytest.mark.parametrize("listing", ["<a", "<!DOCTYPE a [<!ENTITY b 'c'>]><a>&b;</a>", "{}"])
async def test_a_listing_that_is_none_is_refused(
    s3: FakeS3, listing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def answer(_s3: FakeS3, *_: object) -> Any:  # noqa: ANN401 - an answer
        from aiohttp import web  # noqa: PLC0415 - here alone

        return web.Response(text=listing)

    monkeypatch.setattr(FakeS3, "_list", answer)
    with pytest.raises(NodeError):
        await (await open_test_bucket(s3)).list("", max_objects=1, timeout_seconds=SECONDS)


async def test_a_real_s3_agrees() -> None:
    named = os.environ.get("TEST_S3_URL")
    if named is None:
        pytest.skip("TEST_S3_URL names no real S3: http://key:secret@host:port/bucket?region=us-east-1")
    parts = urlsplit(named)
    host = f"{parts.hostname}:{parts.port}" if parts.port else f"{parts.hostname}"
    settings: dict[str, Any] = {
        "bucket": parts.path.strip("/"),
        "endpoint": f"{parts.scheme}://{host}",
        "region": parts.query.removeprefix("region=") or "us-east-1",
        "accessKeyId": parts.username,
        "pathStyle": True,
        "prefix": f"pilotflame-{uuid4().hex}",
    }
    everywhere = ConnectionPolicy(allowed_networks=(ip_network("0.0.0.0/0"), ip_network("::/0")))
    of_user = ConnectionSource(
        id="ds_1",
        organization_id="org_1",
        type="s3",
        revision=1,
        settings=settings,
        secrets={"secretAccessKey": parts.password or ""},
    )
    bucket = await open_bucket(of_user, everywhere)
    for key in KEYS:
        await put_object(bucket, key, key.encode())
        assert await read(bucket, key) == key.encode()
    found = await bucket.list("", max_objects=len(KEYS), timeout_seconds=SECONDS)
    assert sorted(one.key for one in found) == sorted(KEYS)
