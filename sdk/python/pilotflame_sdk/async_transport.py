"""HTTP transport of the asynchronous client."""

from __future__ import annotations

import asyncio
import warnings
from collections.abc import AsyncIterator, Mapping
from typing import TYPE_CHECKING, Any

import httpx2

from pilotflame_sdk import request_coding
from pilotflame_sdk.errors import TransportError
from pilotflame_sdk.profiles import ServerAddress, find_server
from pilotflame_sdk.request_coding import ApiRequest
from pilotflame_sdk.retries import RequestAttempts, RetryPolicy
from pilotflame_sdk.server_events import EventParser, RunEvent

if TYPE_CHECKING:
    from typing_extensions import Self


class AsyncTransport:
    """Connections to one server, with retries."""

    def __init__(
        self,
        url: str | None = None,
        api_key: str | None = None,
        *,
        profile: str | None = None,
        retry: RetryPolicy | None = None,
        http: httpx2.AsyncClient | None = None,
    ) -> None:
        """Connect at the first request. `http` is a client of one's own, for certificates, proxies or tests."""
        self.address: ServerAddress = find_server(url, api_key, profile=profile)
        self._retry = retry or RetryPolicy()
        self._has_answered = False
        self._http = http or httpx2.AsyncClient(
            verify=request_coding.build_tls_context(self.address.url),
            trust_env=request_coding.uses_proxies(self.address.url),
            follow_redirects=False,
        )
        self._headers = request_coding.default_headers(self.address.api_key)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_error: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the connections; the client can't be used afterwards."""
        await self._http.aclose()

    async def request(  # noqa: PLR0913 - a parameter for each part of a request
        self,
        method: str,
        path: str,
        *,
        query: Mapping[str, Any] | None = None,
        json: Any = None,  # noqa: ANN401 - any JSON
        fields: Mapping[str, Any] | None = None,
        nullable: Mapping[str, Any] | None = None,
        headers: Mapping[str, str] | None = None,
        idempotency_key: str | None = None,
        is_keyed: bool = False,
        wait: float = 0.0,
        is_binary: bool = False,
    ) -> Any:  # noqa: ANN401 - any JSON
        """Send a request and return the JSON of the answer, its bytes with `is_binary`, None for an empty one.

        `json` is the body; `fields` is one without its values of None, `nullable` has fields whose None is sent. A key,
        `is_keyed` makes one, lets lost and temporary failures be repeated as the retry policy says. The answer may take
        `wait` more seconds than 15. Raises `APIError` and `TransportError`.
        """
        request = request_coding.build_request(
            method,
            path,
            query=query,
            json=json,
            fields=fields,
            nullable=nullable,
            headers=headers,
            idempotency_key=idempotency_key,
            is_keyed=is_keyed,
            wait=wait,
        )
        return request_coding.decode_answer(await self._send(request), self.address.url, is_binary=is_binary)

    async def iterate(
        self, path: str, list_field: str, query: Mapping[str, Any], *, has_cursor: bool = False
    ) -> AsyncIterator[Any]:
        """Yield the items of all pages of a list, 100 a page; with a cursor, each once while others are added.

        `list_field` is the field of the answer that has the items. Raises `APIError` and `TransportError`.
        """
        place = request_coding.first_place(query, has_cursor=has_cursor)
        while place is not None:
            page = await self.request("GET", path, query={**query, "limit": request_coding.PAGE, **place})
            for item in page[list_field]:
                yield item
            place = request_coding.next_place(place, page)

    async def stream(self, path: str) -> AsyncIterator[RunEvent]:
        """Yield the events of a run to its end; lost connections are resumed behind the last event.

        Raises `APIError` and `TransportError`.
        """
        parser = EventParser()
        while not parser.has_ended:
            request = request_coding.build_request("GET", path, headers=parser.headers(), wait=15.0)
            response = await self._send(request, is_streamed=True)
            try:
                if response.status_code >= request_coding.ERROR:
                    await response.aread()
                    request_coding.decode_answer(response, self.address.url)
                async for line in response.aiter_lines():
                    event = parser.feed(line)
                    if event is not None:
                        yield event
                    if parser.has_ended:
                        return
            except httpx2.TransportError:
                # The next request continues behind the last event.
                await asyncio.sleep(self._retry.first_pause)
            finally:
                await response.aclose()

    async def _send(self, request: ApiRequest, *, is_streamed: bool = False) -> httpx2.Response:
        """Send a request, repeated as the retry policy says, and return the last answer, which may be an error.

        Raises `TransportError` without an answer.
        """
        attempts = RequestAttempts(self._retry, request.method, is_keyed=request.is_keyed)
        built = self._http.build_request(
            request.method,
            self.address.url + request.path,
            content=request.body,
            headers={**self._headers, **request.headers},
            timeout=request.timeout,
        )
        while True:
            try:
                response = await self._http.send(built, stream=is_streamed)
            except httpx2.TransportError as error:
                was_sent = not isinstance(error, (httpx2.ConnectError, httpx2.ConnectTimeout))
                pause = attempts.pause_after_error(was_sent=was_sent, has_answered=self._has_answered)
                if pause is None:
                    raise request_coding.unreachable(self.address.url, error) from error
            except httpx2.InvalidURL as error:
                raise TransportError(f"{self.address.url} is no address of a server: {error}") from error
            else:
                self._has_answered = True
                pause = attempts.pause_after_answer(response)
                if pause is None:
                    return response
                await response.aclose()
            await asyncio.sleep(pause)


class AsyncResource:
    """Base of the groups of methods of a client."""

    def __init__(self, client: AsyncTransport) -> None:
        self._client = client
        self._quote = request_coding.quote_segment
        self._quote_type = request_coding.quote_type

    def _warn_renamed(self, old: str, new: str) -> None:
        """Warn the caller of a method by its old name."""
        warnings.warn(f"client.{old} is deprecated: use client.{new}", DeprecationWarning, stacklevel=3)
