"""S3 bucket of a user, through the HTTP client that connects only to checked addresses.

An S3 library would resolve the endpoint itself, behind that check, and use credentials of the machine if a user gave
none. The requests are few and simple, so they are signed here instead.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from datetime import datetime
from ipaddress import ip_address
from typing import TYPE_CHECKING, Protocol
from urllib.parse import unquote

from msgspec import Struct

from concurrency.loop_share import LoopShare
from engine.run_errors import NodeError
from engine.services import StoredObject
from models.timestamps import DatabaseClock
from nodes import http_errors, url_targets
from nodes.connections import aws_signature, object_keys
from nodes.connections.aws_signature import AwsSigner
from nodes.formats import xml_reader
from nodes.outbound_http import IpNetwork, OutboundClient, OutboundPolicy

if TYPE_CHECKING:
    from engine.values import Json
    from nodes.connections.data_source import ConnectionSource
    from nodes.outbound_http import OutboundResponse

MAX_OBJECT_BYTES = 50_000_000
LONGEST_SECONDS = 600
"""Maximum time of one exchange; the caller limits the time of an operation."""
MAX_PAGE = 1_000
REGION_PATTERN = re.compile(r"[a-z0-9-]{1,40}")
BUCKET_PATTERN = re.compile(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]")
ERROR_CODE = re.compile(rb"<Code>([A-Za-z0-9]{1,64})</Code>")
TOTAL = re.compile(r"bytes \d+-\d+/(\d{1,18})")

FIRST_ERROR = 400
FORBIDDEN = frozenset({401, 403})
NOT_FOUND = 404
NOT_SATISFIABLE = 416
REDIRECT_STATUSES = range(300, 400)
RETRYABLE_BELOW_500 = frozenset({408, 409, 425, 429})
FIRST_SERVER_ERROR = 500


class S3Policy(Protocol):
    """Permissions of the operator."""

    @property
    def allowed_networks(self) -> tuple[IpNetwork, ...]: ...
    @property
    def clock(self) -> DatabaseClock: ...


async def open_bucket(source: ConnectionSource, policy: S3Policy) -> S3Bucket:
    """Return the bucket of a data source without sending a request.

    Raises `NodeError` for unusable settings.
    """
    way_out = OutboundPolicy(allowed_networks=policy.allowed_networks, max_response_bytes=MAX_OBJECT_BYTES)
    place = S3Location.from_settings(source.settings)
    return S3Bucket(place, _build_signer(source, place.region), policy.clock, lambda: OutboundClient(way_out))


class S3Location(Struct, frozen=True):
    """Validated location of objects."""

    origin: str
    """`https://bucket.s3.eu-west-1.amazonaws.com`."""
    host: str
    root: str
    """Prefix of every key in a path: empty, or the name of the bucket."""
    prefix: str
    """Prefix of every key: empty, or ends in a slash."""
    region: str

    @classmethod
    def from_settings(cls, settings: Mapping[str, Json]) -> S3Location:
        """Return the location in the settings of an S3 data source.

        The bucket is part of the path with `pathStyle`, if its name has dots, and at an endpoint with an IP address;
        otherwise of the host. Raises `NodeError` for an unusable bucket, region, prefix or endpoint.
        """
        bucket, region = _text_setting(settings, "bucket"), _text_setting(settings, "region") or "us-east-1"
        if not BUCKET_PATTERN.fullmatch(bucket) or ".." in bucket:
            raise _invalid_source("`bucket` must be the name of a bucket")
        if not REGION_PATTERN.fullmatch(region):
            raise _invalid_source("`region` must be the name of a region")
        prefix = _text_setting(settings, "prefix").strip("/")
        if prefix:
            object_keys.require_object_key(prefix)
            prefix += "/"
        try:
            target = url_targets.parse_target(
                _text_setting(settings, "endpoint") or f"https://s3.{region}.amazonaws.com"
            )
        except ValueError as error:
            raise _invalid_source(f"`endpoint` can't be used: {error}") from error
        if target.path != "/" or target.query:
            raise _invalid_source("`endpoint` must be an address without a path")
        # Wildcard certificates cover one label, and an IP address has no subdomains.
        in_path = settings.get("pathStyle") is True or "." in bucket or _is_numeric_host(target.host)
        host = target.authority if in_path else f"{bucket}.{target.authority}"
        return cls(f"{target.scheme}://{host}", host, f"{bucket}/" if in_path else "", prefix, region)


class S3Bucket:
    """Implements `engine.services.ObjectBucket`; keeps nothing open between operations."""

    def __init__(
        self,
        place: S3Location,
        signer: AwsSigner,
        clock: DatabaseClock,
        open_client: Callable[[], OutboundClient],
    ) -> None:
        """Create a bucket; each operation opens and closes a client of its own."""
        self._place = place
        self._signer = signer
        self._clock = clock
        self._open_client = open_client

    async def get(self, key: str, *, max_bytes: int, timeout_seconds: float) -> bytes:
        """Return the content of an object, at most `max_bytes`.

        Raises `NodeError` for a missing or larger object, of which no more is sent, if S3 fails, and at the time limit.
        """
        # One more byte is requested, to detect an object that is too large.
        headers = {"range": f"bytes=0-{max_bytes}"}
        async with self._client(timeout_seconds) as client:
            response = await self._send(
                client,
                "GET",
                self._full_key(key),
                headers=headers,
                about=f"the object {key!r}",
                accepted=frozenset({NOT_SATISFIABLE}),
            )
        if response.status == NOT_SATISFIABLE:
            return b""  # No range is satisfiable for an empty object.
        if len(response.body) > max_bytes:
            total = TOTAL.fullmatch(response.headers.get("content-range", ""))
            size = f"{int(total[1]):,}" if total else f"more than {max_bytes:,}"
            message = f"The object {key!r} has {size} bytes; at most {max_bytes:,} are read"
            raise NodeError(message, code="object-too-large")
        return response.body

    async def put(self, key: str, content: bytes, *, media_type: str, timeout_seconds: float) -> str:
        """Write an object atomically, replacing an existing object, and return its tag.

        Raises `NodeError` for content over 50 MB, if S3 fails or refuses it, and at the time limit.
        """
        if len(content) > MAX_OBJECT_BYTES:
            message = f"The content has {len(content):,} bytes; at most {MAX_OBJECT_BYTES:,} are written"
            raise NodeError(message, code="object-too-large")
        headers = {"content-type": media_type}
        async with self._client(timeout_seconds) as client:
            response = await self._send(client, "PUT", self._full_key(key), headers=headers, body=content)
        return response.headers.get("etag", "").strip('"')

    async def list(self, prefix: str, *, max_objects: int, timeout_seconds: float) -> Sequence[StoredObject]:
        """Return all objects whose key begins with the prefix, sorted by key, read page by page.

        Raises `NodeError` for more than `max_objects`, if S3 fails, and at the time limit.
        """
        found: list[StoredObject] = []
        token: str | None = ""
        async with self._client(timeout_seconds) as client:
            while token is not None:
                page = await self._read_page(client, prefix, token, found=len(found), max_objects=max_objects)
                found += page.objects
                token = page.token
        return found

    @asynccontextmanager
    async def _client(self, timeout_seconds: float) -> AsyncIterator[OutboundClient]:
        client = self._open_client()
        try:
            async with asyncio.timeout(timeout_seconds):
                yield client
        except TimeoutError as error:
            message = f"The bucket at {self._place.host} took longer than {timeout_seconds:g} s"
            raise NodeError(message, code="timed-out", retryable=True) from error
        finally:
            await client.close()

    async def _read_page(
        self, client: OutboundClient, prefix: str, token: str, *, found: int, max_objects: int
    ) -> ListingReader:
        """Return one page of a listing, at most 1,000 objects.

        `found` objects were on earlier pages, and `token` ("" at first) names the page. Raises `NodeError` as soon as
        there are more than `max_objects` in all, and for an unreadable answer.
        """
        query = {
            "list-type": "2",
            "prefix": self._place.prefix + object_keys.require_key_prefix(prefix),
            "max-keys": str(min(max_objects + 1 - found, MAX_PAGE)),
            "encoding-type": "url",
            **({"continuation-token": token} if token else {}),
        }
        response = await self._send(client, "GET", "", query=query)
        listing = ListingReader(self._place.prefix, found=found, max_objects=max_objects)
        await xml_reader.read_xml(response.body, listing, LoopShare())
        if listing.is_truncated and listing.token in {None, token}:
            raise _unreadable_answer()
        return listing

    def _full_key(self, key: str) -> str:
        return self._place.prefix + object_keys.require_object_key(key)

    async def _send(
        self,
        client: OutboundClient,
        method: str,
        key: str,
        *,
        query: Mapping[str, str] | None = None,
        headers: Mapping[str, str] | None = None,
        body: bytes = b"",
        about: str = "the bucket",
        accepted: frozenset[int] = frozenset(),
    ) -> OutboundResponse:
        """Send a signed request and return the response; redirects are not followed.

        `key` includes the prefix of the location, or is empty for the bucket. Raises `NodeError`, which mentions
        `about`, for a redirect or error status that is not in `accepted`, and if there is no response.
        """
        place, query = self._place, query or {}
        path = f"/{place.root}{key}"
        now = self._clock.now()
        signed = self._signer.headers(method, place.host, path, query, headers or {}, body, now)
        url = f"{place.origin}{aws_signature.encode_path(path)}"
        with http_errors.NamedRequest(method, url):
            response = await client.request(
                method,
                f"{url}?{aws_signature.encode_query(query)}" if query else url,
                headers=signed,
                body=body or None,
                timeout_seconds=LONGEST_SECONDS,
                follow_redirects=False,
            )
            if response.status not in accepted:
                _require_success(response, about)
        return response


class ListingReader:
    """Parser of one page of a listing; stops at the first object beyond the limit."""

    def __init__(self, root: str, *, found: int, max_objects: int) -> None:
        self._found = found
        self._max_objects = max_objects
        self.objects: list[StoredObject] = []
        self.is_truncated = False
        self.token: str | None = None
        self._root = root
        self._fields: dict[str, str] = {}
        self._texts: list[str] = []

    def start(self, name: str, _attributes: Mapping[str, str]) -> None:
        self._texts.clear()
        if name == "Contents":
            self._fields.clear()

    def text(self, text: str) -> None:
        self._texts.append(text)

    def end(self, name: str) -> None:
        text = "".join(self._texts)
        match name:
            case "Key" | "Size" | "ETag" | "LastModified":
                self._fields[name] = text
            case "IsTruncated":
                self.is_truncated = text == "true"
            case "NextContinuationToken":
                self.token = text
            case "Contents":
                self.objects.append(self._build_object())
                if self._found + len(self.objects) > self._max_objects:
                    message = f"More than {self._max_objects:,} objects are there: take a longer prefix"
                    raise NodeError(message, code="too-many-objects")

    def _build_object(self) -> StoredObject:
        try:
            return StoredObject(
                key=unquote(self._fields["Key"], errors="strict").removeprefix(self._root),
                size=int(self._fields["Size"]),
                etag=self._fields.get("ETag", "").strip('"'),
                modified_at=datetime.fromisoformat(self._fields["LastModified"]),
            )
        except (KeyError, ValueError) as error:
            raise _unreadable_answer() from error


def _require_success(response: OutboundResponse, what: str) -> None:
    """Raise `NodeError` for a redirect or an error response, with a code of our own such as `access-denied`.

    `what` names the object or bucket. The message may name S3's error code, but never quotes S3's message.
    """
    status = response.status
    if status in REDIRECT_STATUSES:
        region = response.headers.get("x-amz-bucket-region", "")
        hint = f"in {region}" if REGION_PATTERN.fullmatch(region) else "elsewhere"
        raise NodeError(f"The bucket is {hint}: correct the region or endpoint", code="wrong-region")
    if status < FIRST_ERROR:
        return
    match = ERROR_CODE.search(response.body)
    reason = match[1].decode() if match else ""
    if status == NOT_FOUND and reason != "NoSuchBucket":
        raise NodeError(f"S3 did not find {what}", code="object-not-found")
    message = f"S3 answered {status} {reason} about {what}".replace("  ", " ")
    code = "access-denied" if status in FORBIDDEN else f"s3-{status}"
    is_retryable = status in RETRYABLE_BELOW_500 or status >= FIRST_SERVER_ERROR
    raise NodeError(message, code=code, retryable=is_retryable)


def _build_signer(source: ConnectionSource, region: str) -> AwsSigner:
    access_key_id = _text_setting(source.settings, "accessKeyId")
    secret_access_key = source.secrets.get("secretAccessKey", "")
    if not access_key_id or not secret_access_key:
        raise _invalid_source("`accessKeyId` and `secretAccessKey` are required")
    return AwsSigner(access_key_id, secret_access_key, region, source.secrets.get("sessionToken") or None)


def _text_setting(settings: Mapping[str, Json], name: str) -> str:
    value = settings.get(name)
    return value if isinstance(value, str) else ""


def _is_numeric_host(host: str) -> bool:
    try:
        ip_address(host)
    except ValueError:
        return False
    return True


def _invalid_source(message: str) -> NodeError:
    return NodeError(f"The data source can't be used: {message}", code="invalid-data-source")


def _unreadable_answer() -> NodeError:
    return NodeError("The bucket's listing can't be read", code="invalid-response")
