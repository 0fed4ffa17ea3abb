"""One request as handlers see it: Starlette's, with who asks, what this process holds, and a bounded body."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING, Any

from starlette.requests import ClientDisconnect
from starlette.requests import Request as StarletteRequest

from gateway import errors
from gateway.query import Query

if TYPE_CHECKING:
    from starlette.types import Receive, Scope

    from gateway.parameters import Parameter
    from gateway.state import State
    from models.access import Caller

MAX_LENGTH_DIGITS = 15
"""More digits in a Content-Length are more than any limit."""


class Request(StarletteRequest):
    """What a handler is given."""

    def __init__(
        self,
        scope: Scope,
        receive: Receive,
        gateway: State,
        caller: Caller | None,
        parameters: Collection[Parameter[Any]],
    ) -> None:
        super().__init__(scope, receive)
        self.gateway = gateway
        self._caller = caller
        self._parameters = parameters

    @property
    def caller(self) -> Caller:
        """Whoever the key stands for; routes that take no key have none, and must not ask."""
        if self._caller is None:
            raise LookupError("A public route has no caller")
        return self._caller

    @property
    def id(self) -> str:
        """The request's id, as it is sent back and stands in the log."""
        return str(self.scope["request_id"])

    @property
    def query(self) -> Query:
        """The query string, to be read parameter by parameter."""
        return Query(self.scope["query_string"], self._parameters)

    async def body(self) -> bytes:
        """Return the whole body; raises 413 as soon as it is too large."""
        return await self.body_up_to(self.gateway.settings.max_body_bytes)

    async def body_up_to(self, limit_bytes: int) -> bytes:
        """Return the whole body; raises 413 as soon as it has more bytes."""
        declared = self.headers.get("content-length", "0")
        if len(declared) > MAX_LENGTH_DIGITS or (declared.isdecimal() and int(declared) > limit_bytes):
            raise errors.too_large(limit_bytes)
        chunks: list[bytes] = []
        size = 0
        has_more = True
        while has_more:
            message = await self.receive()
            if message["type"] == "http.disconnect":
                raise ClientDisconnect
            chunks.append(message.get("body", b""))
            size += len(chunks[-1])
            if size > limit_bytes:
                raise errors.too_large(limit_bytes)
            has_more = message.get("more_body", False)
        return b"".join(chunks)
