"""Request for a page, with which the page asks public routes for their answers.

A page has the rights of its visitor alone: each question is a request to a public route in this process, with
the same cookie or key, and passes through the same checks.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from time import monotonic
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import parse_qsl, urlencode

import msgspec

from concurrency.ttl_cache import TTLCache
from gateway.http import limits
from gateway.http.errors import ApiError
from json_text import decoding

if TYPE_CHECKING:
    from datetime import datetime

    from starlette.types import ASGIApp, Message, Scope

    from gateway.http.request import GatewayRequest

OK: Final = 200
WITH_BODY: Final = " with "
"""Text between a path and the body of a POST in the list of requests; an encoded path has no spaces."""
_FORWARDED: Final = frozenset({b"cookie", b"x-api-key", b"host", b"origin", b"sec-fetch-site"})
_CREDENTIALS: Final = frozenset({b"cookie", b"x-api-key"})
_recent: Final = TTLCache[Hashable, "tuple[float, Any]"](60.0, 500)
"""Time and value of answers that pages may show again, by their visitors."""
_OF_ORIGIN: Final = frozenset({b"origin", b"sec-fetch-site"})
_ABSENT: Final = frozenset({403, 404, 405})
"""Statuses of routes that do not exist, that the visitor may not use, or that do not apply to the object."""


class PageRequest:
    """Request for a page: its parameters, and the answers of public routes."""

    def __init__(self, scope: Scope, api: ASGIApp, now: datetime) -> None:
        """Set the request, the application that answers public routes, and the time of the database."""
        self._scope: Mapping[str, Any] = scope
        self._api = api
        self.now = now
        self.parameters: Mapping[str, str] = self._scope["path_params"]
        self.asked: list[str] = []
        """Paths with queries that the page has asked for, in order; those of a POST with its body."""
        self.tags: dict[str, str] = {}
        """`ETag` of each path whose answer had one, for a later `If-Match`."""

    @property
    def query(self) -> dict[str, str]:
        """Query parameters of the page; of a repeated one the last value; empty for over 50 parameters."""
        text = self._scope["query_string"].decode("latin-1")
        try:
            return dict(parse_qsl(text, max_num_fields=limits.QUERY_FIELDS))
        except ValueError:
            return {}

    async def get(self, path: str, **query: object) -> Any:  # noqa: ANN401 - any JSON value
        """Return the JSON answer of a public API route to GET, on behalf of the visitor, and add the request to
        `asked`.

        Parameters that are None or empty are left out. Raises error answers as `ApiError`.
        """
        text = urlencode({name: value for name, value in query.items() if value not in {None, ""}})
        self.asked.append(f"{path}?{text}" if text else path)
        status, body = await self._request(path, text)
        return _value_of(status, body)

    async def get_if_present(self, path: str, **query: object) -> Any:  # noqa: ANN401 - any JSON value
        """Return the JSON answer of an API route to GET; None if the status is 403, 404 or 405.

        That is, the object is missing, forbidden or not of this kind. Raises other error answers as
        `ApiError`.
        """
        count = len(self.asked)
        try:
            return await self.get(path, **query)
        except ApiError as error:
            if error.status not in _ABSENT:
                raise
            del self.asked[count:]
            return None

    async def get_recent(
        self, path: str, *, seconds: float, is_kept: Callable[[Any], bool] = lambda _: True
    ) -> Any:  # noqa: ANN401 - any JSON value
        """Return the answer of `get_if_present`, or an earlier one to the same visitor, at most `seconds` old.

        An answer, or None, for which `is_kept` is False is not shown again.
        """
        credentials = tuple(value for name, value in self._scope["headers"] if name in _CREDENTIALS)
        key = (id(self._api), credentials, path)
        found = _recent.get(key)
        if found is None or found[0] < monotonic() - seconds:
            found = (monotonic(), await self.get_if_present(path))
            if is_kept(found[1]):
                _recent.put(key, found)
        elif found[1] is not None:
            self.asked.append(path)
        return found[1]

    async def plan(self, path: str, **fields: object) -> Any:  # noqa: ANN401 - any JSON value
        """Return the JSON answer of a public API route to POST as a dry run: its body has `fields` and `dryRun`; raises
        its error answers as `ApiError`.

        A dry run changes nothing, so a link on another site may lead to a page that shows its plan.
        """
        return await self.preview(path, **fields, dryRun=True)

    async def preview(self, path: str, **fields: object) -> Any:  # noqa: ANN401 - any JSON value
        """Return the JSON answer of a route to a POST that changes nothing by its nature, such as a preview.

        `fields` are its body. It is sent as from our own page, so that a link on another site may lead to it. Raises
        error answers as `ApiError`.
        """
        body = msgspec.json.encode(fields)
        self.asked.append(f"{path}{WITH_BODY}{body.decode()}")
        return _value_of(*await self._request(path, "", body))

    async def preview_if_allowed(self, path: str, **fields: object) -> Any:  # noqa: ANN401 - any JSON value
        """Return the answer as `preview` does; None if the status is 403, 404 or 405. Raises other errors as
        `ApiError`.
        """
        count = len(self.asked)
        try:
            return await self.preview(path, **fields)
        except ApiError as error:
            if error.status not in _ABSENT:
                raise
            del self.asked[count:]
            return None

    async def plan_if_allowed(self, path: str, **fields: object) -> Any:  # noqa: ANN401 - any JSON value
        """Return the answer as `plan` does; None if the status is 403, 404 or 405. Raises other errors as
        `ApiError`.
        """
        return await self.preview_if_allowed(path, **fields, dryRun=True)

    async def _request(self, path: str, query: str, body: bytes | None = None) -> tuple[int, bytes]:
        """Call the API's application in this process with the visitor's credentials, as GET or with `body` as POST.

        Return status and body; an `ETag` of the answer is kept in `tags`.
        """
        status, pieces = 0, []
        headers = [pair for pair in self._scope["headers"] if pair[0] in _FORWARDED]
        if body is not None:
            headers = [pair for pair in headers if pair[0] not in _OF_ORIGIN]
            headers += [(b"content-type", b"application/json"), (b"sec-fetch-site", b"same-origin")]
        scope = {
            **self._scope,
            "method": "GET" if body is None else "POST",
            "path": path,
            "raw_path": path.encode(),
            "query_string": query.encode(),
            "headers": headers,
            "sent_with_answer": [],
            "holding": None,
        }

        async def receive() -> Message:
            return {"type": "http.request", "body": body or b"", "more_body": False}

        async def send(message: Message) -> None:
            nonlocal status
            status = message.get("status", status)
            tag = dict(message.get("headers", ())).get(b"etag")
            if tag is not None:
                self.tags[path] = tag.decode("latin-1")
            pieces.append(message.get("body", b""))

        await self._api(scope, receive, send)
        return status, b"".join(pieces)


def _value_of(status: int, body: bytes) -> Any:  # noqa: ANN401 - any JSON value
    """Return the JSON of an answer with status 200; raises others as `ApiError` with their code, message and
    details.
    """
    answer: Any = decoding.decode(body)
    if status != OK:
        error = answer["error"]
        raise ApiError(status, error["code"], error["message"], details=error["details"])
    return answer


def build_page_request(request: GatewayRequest) -> PageRequest:
    """Return the page request for a request of a browser, through which the page asks the API on behalf of
    the visitor.
    """
    return PageRequest(request.scope, request.scope["app"].state.router, request.gateway.clock())
