"""Session with a tool server: versions, lists of tools and calls, over the outbound HTTP client with its checks.

No redirect is followed: a key goes to the address of its data source alone. A call whose answer is lost is not
repeated here; the code of its error says whether it may have been done.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Collection, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from http.client import responses as reasons
from typing import TYPE_CHECKING, Any, Final

import msgspec

from engine.run_errors import NodeError
from nodes import redaction
from nodes.ai import provider_json
from nodes.ai.event_stream import EventStreamParser, EventTooLarge
from nodes.mcp import mcp_errors, mcp_messages, tool_definitions
from nodes.mcp.mcp_messages import HANDSHAKE_VERSIONS, STATELESS_VERSION, ServerRefusal
from nodes.outbound_http import OutboundClient, OutboundError, OutboundPolicy

if TYPE_CHECKING:
    from engine.values import Json
    from nodes.mcp.tool_definitions import ToolDefinition
    from nodes.outbound_http import IpNetwork, OutboundStream

IDLE_SECONDS: Final = 60.0
"""Maximum time until the headers of an answer, and between two pieces of it."""
TOTAL_SECONDS: Final = 300.0
"""Maximum time of an answer, also of one that reports its progress again and again."""
END_SECONDS: Final = 2.0
MAX_ANSWER_BYTES: Final = 4_000_000
MAX_ERROR_BYTES: Final = 65_536
MAX_PAGES: Final = 50
MAX_TOOLS: Final = 256
MAX_LISTED_BYTES: Final = 1_000_000
MAX_SERVER_REQUESTS: Final = 20
MAX_RETRY_AFTER_SECONDS: Final = 3_600.0
MAX_SESSION_ID_CHARACTERS: Final = 1_000
_KEY_REFUSED: Final = frozenset({401, 403})
_BUSY: Final = frozenset({429, 503})
_NOT_FOUND: Final = 404
_REDIRECTS: Final = range(300, 400)
_OK: Final = range(200, 300)
_FIRST_SERVER_ERROR: Final = 500


def open_outbound(networks: Sequence[IpNetwork], hosts: Collection[str]) -> OutboundClient:
    """Return a new HTTP client that reaches only public tool servers, and those that the operator allows by network or
    host.
    """
    policy = OutboundPolicy(
        tuple(networks), frozenset(hosts), "tool_server_hosts", max_response_bytes=MAX_ANSWER_BYTES
    )
    return OutboundClient(policy)


class ToolServerAddress(msgspec.Struct, frozen=True):
    """Address of a tool server, and the key for it."""

    url: str
    key: str = ""
    key_header: str = ""
    """Header of the key; empty for `Authorization: Bearer`."""

    def __repr__(self) -> str:
        return "ToolServerAddress(…)"

    def build_key_headers(self) -> dict[str, str]:
        """Return the header with the key; empty without a key."""
        if not self.key:
            return {}
        if self.key_header:
            return {self.key_header: self.key}
        return {"Authorization": f"Bearer {self.key}"}


def build_address(settings: Mapping[str, Json], secrets: Mapping[str, str]) -> ToolServerAddress:
    """Return the address of a tool server from settings and secrets of its data source."""
    return ToolServerAddress(
        str(settings["url"]), secrets.get("key", ""), str(settings.get("keyHeader") or "")
    )


class _SessionExpired(Exception):
    """Server that doesn't know the session any more, and has not carried out the request."""


@asynccontextmanager
async def open_session(
    outbound: OutboundClient, address: ToolServerAddress, *, version: str | None = None
) -> AsyncIterator[McpSession]:
    """Negotiate a version with a tool server, and yield the session, which is ended after the block.

    `version` is that of an earlier session, which saves a request; None if it is unknown. Raises `NodeError`; the key
    is redacted in its message, and in that of a `NodeError` which the block raises.
    """
    session = McpSession(outbound, address)
    with redaction.redact_errors([address.key]):
        try:
            await session.negotiate(version)
            yield session
        finally:
            await session.end()


class McpSession:
    """Session with one tool server."""

    def __init__(self, outbound: OutboundClient, address: ToolServerAddress) -> None:
        self._outbound = outbound
        self._address = address
        self._session_id: str | None = None
        self._number = 0
        self._answered = 0
        self.version: str | None = None
        """Negotiated version of the protocol."""

    async def negotiate(self, version: str | None) -> None:
        """Agree on a protocol version with the server: the version without sessions if the server supports it, else
        another one by a handshake, which begins a session.

        `version` is that of an earlier session, so that the server isn't asked for its versions; None if it is unknown.
        Raises `NodeError`.
        """
        if version == STATELESS_VERSION or (version is None and await self._ask_for_stateless_version()):
            self.version = STATELESS_VERSION
        else:
            await self._begin_session()

    async def list_tools(self) -> Sequence[ToolDefinition]:
        """Return the tools that the server lists on all its pages.

        Raises `NodeError`, also for a list that is too long, has no end, or has two tools with one name.
        """
        found: list[ToolDefinition] = []
        cursor: str | None = None
        cursors: set[str] = set()
        for _ in range(MAX_PAGES):
            params = {} if cursor is None else {"cursor": cursor}
            page = await self._request(mcp_messages.LIST_TOOLS, params)
            listed = page.get("tools")
            if not isinstance(listed, list) or not all(isinstance(tool, dict) for tool in listed):
                raise mcp_errors.build_invalid_answer("a list of tools that is none")
            found += [self._read_definition(tool) for tool in listed if isinstance(tool, dict)]
            _require_valid_list(found)
            following = page.get("nextCursor")
            if not isinstance(following, str):
                return found
            if following in cursors:
                raise mcp_errors.build_invalid_answer("a list of tools without an end")
            cursors.add(following)
            cursor = following
        raise mcp_errors.build_invalid_answer(f"a list of tools of more than {MAX_PAGES} pages")

    def _read_definition(self, listed: Mapping[str, Json]) -> ToolDefinition:
        """Return the definition of a listed tool, with the key redacted in its texts: they are stored and shown.

        Its hash stays that of the definition as it was sent.
        """
        found = tool_definitions.read_definition(listed)
        secrets = [self._address.key]
        return msgspec.structs.replace(
            found,
            title=redaction.redact_excerpt(found.title, secrets),
            description=redaction.redact_excerpt(found.description, secrets),
            input_schema=redaction.redact_value(dict(found.input_schema), secrets),
            problem=redaction.redact_excerpt(found.problem, secrets),
        )

    async def call_tool(
        self, tool: ToolDefinition, arguments: Mapping[str, Any], *, idempotency_key: str
    ) -> Mapping[str, Json]:
        """Call a tool once, and return its result as the server sends it; raises `NodeError`.

        A call that the server refuses since its session has expired is sent again in a new session. `idempotency_key`
        is for servers that recognize a repeated call by it.
        """
        headers = {"Idempotency-Key": idempotency_key}
        if self.version == STATELESS_VERSION:
            headers |= mcp_messages.build_parameter_headers(tool.input_schema, arguments)
        return await self._request(
            mcp_messages.CALL_TOOL,
            {"name": tool.name, "arguments": dict(arguments)},
            name=tool.name,
            headers=headers,
            meta={mcp_messages.KEY_META: idempotency_key},
        )

    async def end(self) -> None:
        """End the session at the server; does nothing without a session.

        Failures are ignored: a session expires at the server by itself.
        """
        if self._session_id is None:
            return
        headers = {
            **mcp_messages.build_headers(self.version, self._session_id, "", ""),
            **self._address.build_key_headers(),
        }
        with suppress(OutboundError):
            await self._outbound.request(
                "DELETE",
                self._address.url,
                headers=headers,
                timeout_seconds=END_SECONDS,
                follow_redirects=False,
            )

    # ── versions ────────────────────────────────────────────────────────────────────────────────────────────────

    async def _ask_for_stateless_version(self) -> bool:
        """Ask the server for its versions; return whether it answers without sessions, False if it refuses or
        misunderstands the question.

        Raises `NodeError` for a server that can't be reached, refuses the key, or has only unknown versions.
        """
        self.version = STATELESS_VERSION
        try:
            found = await self._request(mcp_messages.DISCOVER, {})
        except ServerRefusal as refusal:
            if refusal.number != mcp_messages.UNSUPPORTED_VERSION:
                return False
            offered = mcp_messages.read_supported_versions(refusal.data, "supported")
            if offered and not set(offered) & {STATELESS_VERSION, *HANDSHAKE_VERSIONS}:
                raise _build_version_failure(", ".join(offered)) from refusal
            return STATELESS_VERSION in offered
        except NodeError as error:
            if error.code in {mcp_errors.REFUSED, mcp_errors.FAILED, mcp_errors.INVALID_ANSWER}:
                return False
            raise
        finally:
            self.version = None
        return STATELESS_VERSION in mcp_messages.read_supported_versions(dict(found), "supportedVersions")

    async def _begin_session(self) -> None:
        """Begin a session by a handshake; raises `NodeError`, also for an unknown version."""
        self.version = self._session_id = None
        self._number += 1
        body = mcp_messages.build_handshake(self._number)
        found = await self._exchange(mcp_messages.INITIALIZE, body, self._number, {})
        version = str(found.get("protocolVersion"))
        if version not in HANDSHAKE_VERSIONS:
            raise _build_version_failure(version[:50])
        self.version = version
        await self._notify(mcp_messages.build_notification(mcp_messages.INITIALIZED))

    # ── messages ────────────────────────────────────────────────────────────────────────────────────────────────

    async def _request(
        self,
        method: str,
        params: Mapping[str, Any],
        *,
        name: str = "",
        headers: Mapping[str, str] | None = None,
        meta: Mapping[str, str] | None = None,
    ) -> Mapping[str, Json]:
        """Send a request and return its result; if the session has expired, send it once more in a new session.

        `name` is that of a called tool, and `meta` is added to the parameters. Raises `NodeError`.
        """
        for is_repeated in (False, True):
            self._number += 1
            body = mcp_messages.build_request(
                self._number, method, params, version=self.version or "", meta=meta or {}
            )
            try:
                return await self._exchange(method, body, self._number, headers or {}, name)
            except _SessionExpired as error:
                if is_repeated:
                    message = "The tool server ends its sessions at once"
                    raise NodeError(message, code=mcp_errors.REFUSED) from error
                await self._begin_session()
        raise AssertionError("the loop returns or raises")

    async def _exchange(
        self, method: str, body: bytes, number: int, headers: Mapping[str, str], name: str = ""
    ) -> Mapping[str, Json]:
        """Post a request, and return the result in its answer.

        Raises `_SessionExpired`, and `NodeError` for every other failure.
        """
        try:
            async with self._post(method, body, headers, name) as stream:
                if stream.status not in _OK:
                    await self._raise_for_status(stream)
                if method == mcp_messages.INITIALIZE:
                    self._session_id = _read_session_id(stream.headers)
                return await self._find_answer(stream, number)
        except OutboundError as error:
            raise mcp_errors.build_transport_failure(error) from error

    @asynccontextmanager
    async def _post(
        self, method: str, body: bytes, headers: Mapping[str, str] | None = None, name: str = ""
    ) -> AsyncIterator[OutboundStream]:
        """Post a message, and yield the response while it arrives; raises `OutboundError`."""
        sent = {
            **mcp_messages.build_headers(self.version, self._session_id, method, name),
            **(headers or {}),
            **self._address.build_key_headers(),
        }
        async with self._outbound.stream(
            "POST",
            self._address.url,
            headers=sent,
            body=body,
            idle_seconds=IDLE_SECONDS,
            total_seconds=TOTAL_SECONDS,
        ) as stream:
            yield stream

    async def _notify(self, body: bytes) -> None:
        """Post a message without an answer; raises `NodeError` if it is refused."""
        try:
            async with self._post("", body) as stream:
                if stream.status not in _OK:
                    await self._raise_for_status(stream)
        except OutboundError as error:
            raise mcp_errors.build_transport_failure(error) from error
        except _SessionExpired as error:
            raise NodeError("The tool server refuses its own session", code=mcp_errors.REFUSED) from error

    async def _find_answer(self, stream: OutboundStream, number: int) -> Mapping[str, Json]:
        """Return the result for request `number` from one document or a stream of events.

        Messages with other ids are ignored, and requests of the server are answered. Raises `NodeError`, and
        `OutboundError` if the response breaks off.
        """
        async for data in _read_documents(stream):
            for message in mcp_messages.read_messages(data):
                found = mcp_messages.read_answer(message, number)
                if found is not None:
                    return found
                if "method" in message and message.get("id") is not None:
                    await self._answer_server(message)
        raise mcp_errors.build_invalid_answer("no answer to the request")

    async def _answer_server(self, request: Mapping[str, Json]) -> None:
        """Answer a request of the server, which may wait for it; failures to send the answer are ignored.

        Raises `NodeError` after 20 requests.
        """
        self._answered += 1
        if self._answered > MAX_SERVER_REQUESTS:
            raise mcp_errors.build_invalid_answer("too many requests of its own")
        with suppress(NodeError):
            await self._notify(mcp_messages.build_reply(request))

    async def _raise_for_status(self, stream: OutboundStream) -> None:
        """Raise `NodeError` for the error status of a response, or `_SessionExpired` if the server has lost the
        session.
        """
        status = stream.status
        body = await _read_start(stream)
        answered = f"The tool server answered {status} {reasons.get(status, '')}".rstrip()
        if status in _KEY_REFUSED:
            raise NodeError(_add_reason(answered, body), code=mcp_errors.KEY_REFUSED)
        if status in _REDIRECTS:
            message = f"{answered}: redirects are not followed. Correct the `url` of the tool server"
            raise NodeError(message, code=mcp_errors.REDIRECTED)
        if status in _BUSY:
            raise NodeError(
                _add_reason(answered, body),
                code=mcp_errors.BUSY,
                retryable=True,
                retry_after_seconds=_read_seconds(stream.headers),
            )
        if status == _NOT_FOUND and self._session_id is not None and self.version is not None:
            raise _SessionExpired
        refusal = _find_refusal(body)
        if refusal is not None:
            raise refusal
        if status >= _FIRST_SERVER_ERROR:
            raise NodeError(_add_reason(answered, body), code=mcp_errors.FAILED, retryable=True)
        raise NodeError(_add_reason(answered, body), code=mcp_errors.REFUSED)


def _require_valid_list(found: Sequence[ToolDefinition]) -> None:
    """Raise `NodeError` for a list of over 256 tools or a megabyte, and for two tools with one name."""
    if len(found) > MAX_TOOLS:
        raise mcp_errors.build_invalid_answer(f"more than {MAX_TOOLS} tools")
    if len(msgspec.json.encode(found)) > MAX_LISTED_BYTES:
        raise mcp_errors.build_invalid_answer(f"tools of more than {MAX_LISTED_BYTES:,} bytes")
    duplicate = tool_definitions.find_duplicate(found)
    if duplicate is not None:
        raise mcp_errors.build_invalid_answer(f"two tools with the name {duplicate!r}")


def _build_version_failure(offered: str) -> NodeError:
    known = ", ".join((STATELESS_VERSION, *HANDSHAKE_VERSIONS))
    message = f"The tool server has the protocol versions {offered[:200]}; supported are {known}"
    return NodeError(message, code=mcp_errors.WRONG_VERSION)


def _read_session_id(headers: Mapping[str, str]) -> str | None:
    """Return the id of the session in the answer to a handshake; None without one.

    Raises `NodeError` for an id that can't be sent back as a header.
    """
    found = headers.get(mcp_messages.SESSION_HEADER)
    if found is None:
        return None
    if not (found.isascii() and found.isprintable()) or len(found) > MAX_SESSION_ID_CHARACTERS:
        raise mcp_errors.build_invalid_answer("an invalid session id")
    return found


async def _read_documents(stream: OutboundStream) -> AsyncIterator[bytes]:
    """Yield the JSON documents of a response: the data of each event, or the whole body.

    Raises `OutboundError`, and `NodeError` for an event that is too large and another type of content.
    """
    media_type = stream.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media_type == "application/json":
        yield b"".join([piece async for piece in stream])
        return
    if media_type != "text/event-stream":
        raise mcp_errors.build_invalid_answer("an answer that is neither JSON nor a stream of events")
    events = EventStreamParser()
    try:
        async for piece in stream:
            for data in events.feed(piece):
                if data:
                    yield data
        for data in events.finish():
            if data:
                yield data
    except EventTooLarge as error:
        raise mcp_errors.build_invalid_answer("an event that is too large") from error


async def _read_start(stream: OutboundStream) -> bytes:
    """Return the start of the body of an error response, about 64 KiB."""
    found = bytearray()
    async for piece in stream:
        found += piece
        if len(found) >= MAX_ERROR_BYTES:
            break
    return bytes(found)


def _find_refusal(body: bytes) -> ServerRefusal | None:
    """Return the error of the protocol in the body of a refused request; None for other bodies."""
    try:
        messages = mcp_messages.read_messages(body)
    except NodeError:
        return None
    return next(
        (mcp_messages.read_refusal(one) for one in messages if isinstance(one.get("error"), dict)), None
    )


def _add_reason(answered: str, body: bytes) -> str:
    """Return the message `answered` with the reason in a JSON body added; other bodies, which may be internal pages,
    add nothing.
    """
    said, _ = provider_json.read_error(body)
    return f"{answered}: {said}" if said else answered


def _read_seconds(headers: Mapping[str, str]) -> float | None:
    """Return the seconds of `Retry-After`, up to an hour; None without a number."""
    text = headers.get("retry-after", "").strip()
    return min(float(text), MAX_RETRY_AFTER_SECONDS) if text.isdecimal() else None
