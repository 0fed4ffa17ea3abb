"""Request as handlers see it: with the caller, the gateway's state, its query, and a bounded body.

Bodies are decompressed in pieces and up to a limit.
"""

from __future__ import annotations

import asyncio
import zlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import lru_cache
from io import BytesIO
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import parse_qsl

from msgspec import Struct
from starlette.requests import ClientDisconnect
from starlette.requests import Request as StarletteRequest

from engine import name_suggestions
from gateway.http import errors, idempotency, limits
from gateway.http.errors import ApiError, invalid_query
from gateway.http.parameters import LIMIT, OFFSET, IntegerParameter, PageBounds, QueryParameter, Value
from gateway.http.preconditions import RequestedObject
from gateway.http.sender import refuse_sender
from senders.sender_request import RequestHeaders, SenderRequest

if TYPE_CHECKING:
    from starlette.datastructures import Headers
    from starlette.types import Receive, Scope

    from engine.values import Json
    from gateway.http.protocol import RequestHolding
    from gateway.http.sender import RequestSender
    from gateway.state import GatewayState
    from journal.store import IdempotencyKey
    from models.access import ApiCaller
    from nodes.catalog import NodeCatalog

MAX_LENGTH_DIGITS = 15
"""Longer values of `Content-Length` exceed any limit."""

PIECE_BYTES: Final = 262_144
"""Maximum decompressed bytes of one piece."""
ACCEPTED: Final = "gzip, deflate"
_GZIP_WINDOW: Final = 31
_RAW_WINDOW: Final = -15
_ZLIB_METHOD: Final = 0x08

REMEMBERED_BYTES = 100
"""Maximum length of a query whose parsed form is cached, such as that of a poll."""
MAX_SHOWN_NAME = 64


class GatewayRequest(StarletteRequest):
    """Request that a handler receives."""

    def __init__(
        self,
        scope: Scope,
        receive: Receive,
        gateway: GatewayState,
        caller: ApiCaller | None,
        parameters: Collection[QueryParameter[Any]],
        sender: RequestSender | None = None,
    ) -> None:
        super().__init__(scope, receive)
        self.gateway = gateway
        self._caller = caller
        self._parameters = parameters
        self._sender = sender
        self.warnings: list[dict[str, Json]] = []
        """Warnings for the answer about fields of the body that have no meaning here."""

    @property
    def caller(self) -> ApiCaller:
        """Caller of the request's key or session; raises LookupError on public routes, which have none."""
        if self._caller is None:
            raise LookupError("A public route has no caller")
        return self._caller

    @property
    def known_sender(self) -> RequestSender | None:
        """Sender by key, token or browser session; None for an anonymous request, and on routes not for senders."""
        return self._sender

    @property
    def sender(self) -> RequestSender:
        """Sender by key, token or browser session; raises a 401 error without one, and for a token that may not send to
        the workflow of the path.
        """
        workflow_id = self.path_params.get("id")
        if self._sender is None or not (workflow_id is None or self._sender.may_send_to(workflow_id)):
            raise refuse_sender()
        return self._sender

    @property
    def requested_object(self) -> RequestedObject:
        """Object that the path names, with the caller and `If-Match`; only for routes with a caller."""
        return RequestedObject(self.path_params["id"], self.caller, self.headers.get("if-match"))

    @property
    def has_key(self) -> bool:
        """Whether an API key or a browser session authenticates the request, not a token in its URL."""
        return self._caller is not None and (self._sender is None or self._sender.token is None)

    async def catalog(self) -> NodeCatalog:
        """Return the node types of the caller's organization."""
        return await self.gateway.catalogs.of(self.caller.organization_id)

    @property
    def id(self) -> str:
        """Request id, as in the answer and the log."""
        return str(self.scope["request_id"])

    @property
    def query(self) -> QueryString:
        """Query string, split into its parameters; `query[PARAMETER]` converts and checks a declared one.

        Raises a 400 error for too many parameters.
        """
        return QueryString(self.scope["query_string"], self._parameters)

    def idempotency_key(self, body: Json, *, workflow_id: str = "") -> IdempotencyKey | None:
        """Return the idempotency key of the request, None without one; raises a 400 error for an invalid one.

        Requests are equal when one user, or tokens of one workflow, send them to one route and workflow with one key;
        the `body` of equal requests is then compared. A large `body` takes a while: call it in a thread.
        """
        key = read_idempotency_key(self.headers)
        if key is None:
            return None
        route = f"{self.method} {self.scope['route'].path}\n{workflow_id}"
        return idempotency.build_key(key, self._sender_identity(), route, body)

    def _sender_identity(self) -> str:
        """Return a text for the sender of equal requests: the user, or the workflow of a token."""
        if self._sender is None or self._sender.token is None:
            return self.caller.user_id
        # A token's sender isn't the user whom it acts for. Its retries stay equal even when the token was
        # replaced.
        token = self._sender.token
        return f"{token.kind}-token:{token.workflow_id or token.id}"

    def to_sender_request(
        self, content: bytes, *, path: str = "", query: Mapping[str, Sequence[str]] | None = None
    ) -> SenderRequest:
        """Return the request in the form that sender adapters (checks of providers' signatures) use, with a
        body that was read.

        It has no path by default, since that may contain a token.
        """
        headers = RequestHeaders(self.scope["headers"])
        return SenderRequest(self.method, path, query or {}, headers, content, self.gateway.clock())

    def send_with_answer(self, name: str, value: str) -> None:
        """Add a header to the answer, whether it is a success or an error."""
        self.scope["sent_with_answer"].append((name.lower().encode(), value.encode()))

    def call_on_disconnect(self, callback: Callable[[], None]) -> None:
        """Call `callback` as soon as the client leaves before its answer; at once if it has left already.

        It replaces the callback of an earlier call.
        """
        holding: RequestHolding | None = self.scope.get("holding")
        if holding is not None:
            holding.call_on_disconnect(callback)

    def bound_silence(self, seconds: float) -> None:
        """End the connection if the client does not acknowledge sent bytes for this many seconds."""
        holding: RequestHolding | None = self.scope.get("holding")
        if holding is not None:
            holding.bound_silence(seconds)

    def release_body(self) -> None:
        """Release the body's bytes from the memory budget early, when nothing refers to it and the answer
        takes a while.
        """
        holding: RequestHolding | None = self.scope.get("holding")
        if holding is not None:
            holding.body.release()

    async def body(self) -> bytes:
        """Return the whole body, decompressed, up to the server's limit; raises the errors of `body_up_to`."""
        return await self.body_up_to(BodyLimit(self.gateway.settings.max_body_bytes))

    async def body_up_to(self, limit: BodyLimit) -> bytes:
        """Return the whole body, decompressed; it can be read once.

        Raises a 413 error as soon as the body exceeds the limit, 415 for an unknown `Content-Encoding`, 400
        for malformed compression, 503 when the memory budget has dropped it, and `ClientDisconnect`.
        """
        holding: RequestHolding | None = self.scope.get("holding")
        declared = self.headers.get("content-length", "0")
        if len(declared) > MAX_LENGTH_DIGITS or (declared.isdecimal() and int(declared) > limit.bytes):
            raise limit.exceeded()
        decoder = ContentDecoder(self.headers.get("content-encoding", ""))
        # A buffer holds a large body once: a list of pieces would need twice the memory until they are
        # joined.
        body = BytesIO()
        size = 0
        has_more = True
        while has_more:
            message = await self.receive()
            _require_not_evicted(holding)
            if message["type"] == "http.disconnect":
                raise ClientDisconnect
            received = message.get("body", b"")
            for piece in decoder.decode(received) if decoder.is_needed else (received,):
                size += body.write(piece)
                if size > limit.bytes:
                    raise limit.exceeded()
                if decoder.is_needed:
                    if holding is not None:
                        holding.body.add(len(piece))
                        _require_not_evicted(holding)
                    await asyncio.sleep(0)  # a small body may decompress to a large one
            has_more = message.get("more_body", False)
        decoder.finish()
        return body.getvalue()


def read_idempotency_key(headers: Headers) -> str | None:
    """Return the value of the header `Idempotency-Key`; None without it.

    Raises a 400 error for several, and unless it has 1 to 255 visible ASCII characters.
    """
    keys = headers.getlist("idempotency-key")
    if not keys:
        return None
    if len(keys) > 1 or not idempotency.is_key(keys[0]):
        text = f"Idempotency-Key must have 1 to {limits.IDEMPOTENCY_KEY_LENGTH} visible ASCII characters"
        raise ApiError(400, "invalid-idempotency-key", text)
    return keys[0]


def _require_not_evicted(holding: RequestHolding | None) -> None:
    """Raise a 503 error if the budget has evicted the bytes of this request."""
    if holding is not None and holding.body.is_evicted:
        raise errors.busy("Too many bytes of request bodies at once")


class ContentDecoder:
    """Decoder of one body by its `Content-Encoding` (RFC 9110, section 8.4.1)."""

    def __init__(self, encoding: str) -> None:
        """Create a decoder for a `Content-Encoding`; raises a 415 error for others than gzip, deflate and identity."""
        name = encoding.strip().lower().removeprefix("x-")
        if name not in {"", "identity", "gzip", "deflate"}:
            message = "Send the body uncompressed, or compressed with gzip or deflate"
            raise ApiError(415, "unsupported-media-type", message, headers={"Accept-Encoding": ACCEPTED})
        self.is_needed = name in {"gzip", "deflate"}
        self._decompressor = zlib.decompressobj(_GZIP_WINDOW) if name == "gzip" else None
        self._has_begun = False
        self._is_over = False

    def decode(self, data: bytes) -> Iterator[bytes]:
        """Yield the decompressed pieces (up to 256 kB) of the next bytes of a body; raises a 400 error for
        malformed bytes.

        Bytes behind the end of the compressed data are malformed too.
        """
        if self._is_over and data:
            raise _refuse_compression()
        has_more = bool(data)
        while has_more and not self._is_over:
            decompressor = self._decompressor or self._begin(data)
            try:
                piece = decompressor.decompress(data, PIECE_BYTES)
            except zlib.error as error:
                raise _refuse_compression() from error
            data = decompressor.unconsumed_tail
            # zlib may have consumed all input and still hold output that did not fit into the piece.
            has_more = bool(data) or len(piece) == PIECE_BYTES
            self._has_begun = True
            self._is_over = decompressor.eof
            if piece:
                yield piece
            if decompressor.unused_data:
                raise _refuse_compression()

    def finish(self) -> None:
        """Raise a 400 error if the compressed body is cut short; an empty body is valid."""
        if self._has_begun and not self._is_over:
            raise _refuse_compression()

    def _begin(self, data: bytes) -> zlib._Decompress:
        """Return the decompressor of deflate, chosen by the first byte.

        Some senders omit the zlib wrapper that RFC 9110 requires.
        """
        window = zlib.MAX_WBITS if data[0] & 0x0F == _ZLIB_METHOD else _RAW_WINDOW
        self._decompressor = zlib.decompressobj(window)
        return self._decompressor


def _refuse_compression() -> ApiError:
    message = "The body is not compressed as its Content-Encoding declares, or is cut short"
    return ApiError(400, "malformed-body", message)


class BodyLimit(Struct, frozen=True):
    """Maximum bytes of a body after decompression."""

    bytes: int
    setting: str = "PILOTFLAME_MAX_BODY_BYTES"
    """Setting to name in the refusal; empty when no setting changes the limit."""

    def exceeded(self) -> ApiError:
        """Return the 413 error for a larger body, which names the limit and the setting that changes it."""
        return errors.too_large(self.bytes, self.setting)


@lru_cache(maxsize=1_000)
def _parse_query(raw: bytes) -> Mapping[str, Sequence[str]]:
    """Return the values of each query parameter by its name, without empty values, so possibly none.

    Raises a 400 error for more than 50 parameters.
    """
    try:
        pairs = parse_qsl(raw.decode("latin-1"), keep_blank_values=True, max_num_fields=limits.QUERY_FIELDS)
    except ValueError as error:
        text = f"The query has more than {limits.QUERY_FIELDS} parameters"
        raise ApiError(400, "invalid-query", text) from error
    given: dict[str, list[str]] = {}
    for name, value in pairs:
        values = given.setdefault(name, [])
        if value:
            values.append(value)
    return given


class QueryString:
    """Query string of one request, with the parameters that its route declares."""

    def __init__(self, raw: bytes, declared: Collection[QueryParameter[Any]]) -> None:
        self._given = _parse_query(raw) if len(raw) <= REMEMBERED_BYTES else _parse_query.__wrapped__(raw)
        self._declared = declared

    def require_known(self) -> None:
        """Raise a 400 error for a parameter that the route doesn't declare, with a suggestion of similar names."""
        known = {parameter.name for parameter in self._declared}
        for name in self._given:
            if not any(parameter.has_name(name) for parameter in self._declared):
                shown, near = name[:MAX_SHOWN_NAME], name_suggestions.suggest_names(name, known)
                hint = (
                    f"did you mean {' or '.join(near)}?"
                    if near
                    else f"there is {', '.join(sorted(known)) or 'none'}"
                )
                raise invalid_query(shown, "unknown-parameter", f"{shown} is not a parameter here: {hint}")

    def __getitem__(self, parameter: QueryParameter[Value]) -> Value:
        """Return the value of a declared parameter.

        Raises a 400 error for an invalid value, LookupError for a parameter that isn't declared.
        """
        if parameter not in self._declared:
            raise LookupError(f"The route doesn't declare the parameter {parameter.name}")
        return parameter.read(parameter.collect(self._given))

    def page(self, limit: IntegerParameter = LIMIT) -> PageBounds:
        """Return the page that `limit` and `offset` request; raises a 400 error for an invalid value.

        `limit` is the route's parameter of that name.
        """
        return PageBounds(self[limit], self[OFFSET])
