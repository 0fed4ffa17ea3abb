"""A small S3 in memory, strict where a client may be wrong: signatures (SigV4), dates, payload hashes, encodings."""

from __future__ import annotations

import asyncio
import hmac
import re
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from hashlib import md5, sha256
from urllib.parse import parse_qsl, quote, unquote
from xml.etree import ElementTree as ET
from xml.sax.saxutils import escape

from aiohttp import web

NAMESPACE = "http://s3.amazonaws.com/doc/2006-03-01/"
AUTHORIZATION = re.compile(
    r"AWS4-HMAC-SHA256 Credential=([^/]+)/(\d{8})/([^/]+)/s3/aws4_request, ?SignedHeaders=([a-z0-9;-]+),"
    r" ?Signature=([0-9a-f]{64})"
)
TOLERANCE = timedelta(minutes=15)


@dataclass
class FakeObject:
    """An object."""

    content: bytes
    headers: Mapping[str, str]
    modified_at: datetime = field(default_factory=lambda: datetime.now(UTC))

    @property
    def etag(self) -> str:
        return f'"{md5(self.content, usedforsecurity=False).hexdigest()}"'


class S3Error(Exception):
    """Error in the form of S3."""

    def __init__(self, status: int, code: str) -> None:
        super().__init__(code)
        self.status = status
        self.code = code


@dataclass
class FakeS3:
    """One S3 with one account; tests read and change its fields."""

    region: str = "eu-test-1"
    access_key_id: str = "AKIATEST"
    secret_access_key: str = "s3-secret-canary"
    session_token: str | None = None
    domain: str = "s3.test"
    """Suffix of virtual-hosted bucket names."""
    buckets: dict[str, dict[str, FakeObject]] = field(default_factory=lambda: {"bucket": {}})
    behind: timedelta = timedelta()
    """Amount by which the dates of its objects are too early."""
    requests: list[str] = field(default_factory=list)
    """Method, host and raw path of each."""
    failures: list[S3Error] = field(default_factory=list)
    """Answers to the next requests."""
    is_silent: bool = False
    ending: asyncio.Event = field(default_factory=asyncio.Event)
    page_size: int = 1_000
    port: int = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def objects(self) -> dict[str, FakeObject]:
        """The objects of the bucket that there is from the start."""
        return self.buckets["bucket"]

    async def answer(self, request: web.Request) -> web.StreamResponse:
        """Answer one request of any kind."""
        self.requests.append(f"{request.method} {request.headers['Host']} {request.raw_path}")
        body = await request.read()
        if self.is_silent:
            await self.ending.wait()
        try:
            if self.failures:
                raise self.failures.pop(0)
            self._check_signature(request, body)
            bucket, key = self._split_address(request)
            return self._perform(request, self._bucket(bucket), key, body)
        except S3Error as refused:
            text = f"<Error><Code>{refused.code}</Code><Message>It was refused</Message></Error>"
            return web.Response(status=refused.status, text=text, content_type="application/xml")

    # ── authentication and addressing ───────────────────────────────────────────────────────────────────────

    def _check_signature(self, request: web.Request, body: bytes) -> None:
        """Raise `S3Error` unless AWS Signature Version 4 with the credentials of this server signs the request."""
        match = AUTHORIZATION.fullmatch(request.headers.get("Authorization", ""))
        if match is None:
            raise S3Error(403, "AccessDenied")
        access_key_id, day, region, names, signature = match.groups()
        if access_key_id != self.access_key_id:
            raise S3Error(403, "InvalidAccessKeyId")
        if region != self.region:
            raise S3Error(400, "AuthorizationHeaderMalformed")
        if request.headers.get("x-amz-security-token") != self.session_token:
            raise S3Error(400, "InvalidToken")
        self._check_date(request.headers["x-amz-date"], day)
        canonical = _canonical_request(request, names, body)
        scope = f"{day}/{region}/s3/aws4_request"
        digest = sha256(canonical.encode()).hexdigest()
        text = f"AWS4-HMAC-SHA256\n{request.headers['x-amz-date']}\n{scope}\n{digest}"
        key = f"AWS4{self.secret_access_key}".encode()
        for part in scope.split("/"):
            key = hmac.digest(key, part.encode(), sha256)
        if not hmac.compare_digest(hmac.digest(key, text.encode(), sha256).hex(), signature):
            raise S3Error(403, "SignatureDoesNotMatch")

    def _check_date(self, date: str, day: str) -> None:
        moment = datetime.strptime(date, "%Y%m%dT%H%M%SZ").replace(tzinfo=UTC)
        if abs(datetime.now(UTC) - moment) > TOLERANCE or not date.startswith(day):
            raise S3Error(403, "RequestTimeTooSkewed")

    def _split_address(self, request: web.Request) -> tuple[str, str]:
        host = request.headers["Host"].partition(":")[0]
        path = unquote(request.raw_path.partition("?")[0]).removeprefix("/")
        if host.endswith(f".{self.domain}"):
            return host.removesuffix(f".{self.domain}"), path
        bucket, _, key = path.partition("/")
        return bucket, key

    def _bucket(self, name: str) -> dict[str, FakeObject]:
        if name not in self.buckets:
            raise S3Error(404, "NoSuchBucket")
        return self.buckets[name]

    # ── operations ──────────────────────────────────────────────────────────────────────────────────────────

    def _perform(
        self, request: web.Request, objects: dict[str, FakeObject], key: str, body: bytes
    ) -> web.StreamResponse:
        """Carry out an operation of S3 on the objects of a bucket; raises `S3Error`, 501 for other operations."""
        query = dict(_parse_pairs(request.raw_path.partition("?")[2]))
        match request.method, key:
            case "GET", "" if query.get("list-type") == "2":
                return self._list(objects, query)
            case "POST", "" if "delete" in query:
                return _delete(objects, body)
            case "PUT", str() if key:
                kept = {
                    name: value
                    for name, value in request.headers.items()
                    if name.lower() == "content-type" or name.lower().startswith("x-amz-meta-")
                }
                objects[key] = FakeObject(body, kept, datetime.now(UTC) - self.behind)
                return web.Response(headers={"ETag": objects[key].etag})
            case "DELETE", str() if key:
                objects.pop(key, None)
                return web.Response(status=204)
            case "GET" | "HEAD", str() if key:
                return _get(objects, key, request.headers.get("Range"))
        raise S3Error(501, "NotImplemented")

    def _list(self, objects: dict[str, FakeObject], query: Mapping[str, str]) -> web.Response:
        """Return a page of the objects with a prefix, in the order of their keys."""
        prefix = query.get("prefix", "")
        after = query.get("continuation-token", query.get("start-after", ""))
        keys = sorted(key for key in objects if key.startswith(prefix) and key > after)
        size = min(int(query.get("max-keys", "1000")), self.page_size)
        shown = keys[:size]

        def written(text: str) -> str:
            return quote(text, safe="/-_.~*") if query.get("encoding-type") == "url" else escape(text)

        entries = "".join(
            f"<Contents><Key>{written(key)}</Key>"
            f"<LastModified>{objects[key].modified_at.strftime('%Y-%m-%dT%H:%M:%S.000Z')}</LastModified>"
            f"<ETag>{escape(objects[key].etag)}</ETag><Size>{len(objects[key].content)}</Size>"
            "<StorageClass>STANDARD</StorageClass></Contents>"
            for key in shown
        )
        more = len(keys) > size
        token = f"<NextContinuationToken>{escape(shown[-1])}</NextContinuationToken>" if more else ""
        text = (
            f'<?xml version="1.0" encoding="UTF-8"?><ListBucketResult xmlns="{NAMESPACE}"><Name>bucket</Name>'
            f"<Prefix>{written(prefix)}</Prefix><KeyCount>{len(shown)}</KeyCount><MaxKeys>{size}</MaxKeys>"
            f"<IsTruncated>{str(more).lower()}</IsTruncated>{token}{entries}</ListBucketResult>"
        )
        return web.Response(text=text, content_type="application/xml")


def _canonical_request(request: web.Request, names: str, body: bytes) -> str:
    """Return the text that a client must have signed. Refuses incomplete or differently encoded requests."""
    signed = names.split(";")
    needed = {"host", *(name.lower() for name in request.headers if name.lower().startswith("x-amz-"))}
    if signed != sorted(signed) or not needed <= set(signed):
        raise S3Error(403, "AccessDenied")
    payload = request.headers["x-amz-content-sha256"]
    if payload not in {"UNSIGNED-PAYLOAD", sha256(body).hexdigest()}:
        raise S3Error(400, "XAmzContentSHA256Mismatch")
    path, _, query = request.raw_path.partition("?")
    if quote(unquote(path), safe="/-_.~") != path:
        raise S3Error(400, "InvalidURI")
    pairs = sorted((quote(key, safe="-_.~"), quote(value, safe="-_.~")) for key, value in _parse_pairs(query))
    return "\n".join(
        [
            request.method,
            path,
            "&".join(f"{key}={value}" for key, value in pairs),
            *(f"{name}:{' '.join(request.headers[name].split())}" for name in signed),
            "",
            names,
            payload,
        ]
    )


def _parse_pairs(query: str) -> list[tuple[str, str]]:
    # A plus is a plus here: clients must encode a space as %20, or the signature differs.
    return parse_qsl(query.replace("+", "%2B"), keep_blank_values=True)


def _delete(objects: dict[str, FakeObject], body: bytes) -> web.Response:
    keys = [node.text or "" for node in ET.fromstring(body).iter() if node.tag.endswith("Key")]  # noqa: S314 - our own
    for key in keys:
        objects.pop(key, None)
    deleted = "".join(f"<Deleted><Key>{escape(key)}</Key></Deleted>" for key in keys)
    text = f'<DeleteResult xmlns="{NAMESPACE}">{deleted}</DeleteResult>'
    return web.Response(text=text, content_type="application/xml")


def _get(objects: dict[str, FakeObject], key: str, wanted: str | None) -> web.Response:
    """Return an object, or the requested range of its bytes; raises `S3Error`."""
    if key not in objects:
        raise S3Error(404, "NoSuchKey")
    stored = objects[key]
    headers = {
        **stored.headers,
        "ETag": stored.etag,
        "Last-Modified": stored.modified_at.strftime("%a, %d %b %Y %H:%M:%S GMT"),
        "Accept-Ranges": "bytes",
    }
    match = re.fullmatch(r"bytes=(\d+)-(\d+)", wanted or "")
    if match is None:
        return web.Response(body=stored.content, headers=headers)
    first, last, size = int(match[1]), int(match[2]), len(stored.content)
    if first >= size:
        raise S3Error(416, "InvalidRange")
    part = stored.content[first : last + 1]
    headers["Content-Range"] = f"bytes {first}-{first + len(part) - 1}/{size}"
    return web.Response(status=206, body=part, headers=headers)


@asynccontextmanager
async def serve_fake_s3() -> AsyncIterator[FakeS3]:
    """Serve an empty S3 as long as the context lasts."""
    s3 = FakeS3()
    app = web.Application(client_max_size=100_000_000)
    app.router.add_route("*", "/{path:.*}", s3.answer)
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=0)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    s3.port = runner.addresses[0][1]
    try:
        yield s3
    finally:
        s3.ending.set()
        await runner.cleanup()
