"""Requests to a Kubernetes API server: pages, watches, answers as exceptions, and a budget that all requests share.

No other module speaks to it.
"""

from __future__ import annotations

import asyncio
import random
import socket
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from http import HTTPStatus
from pathlib import Path

import aiohttp
from kubernetes.aio import client as kubernetes_client
from kubernetes.aio import config as kubernetes_config

from json_text import decoding
from workers.cluster.driver import ClusterBusy, ClusterForbidden, ClusterRefused, ClusterUnavailable
from workers.cluster.manifests import Manifest

REQUEST_SECONDS = 10.0
CONCURRENT_REQUESTS = 16
REQUESTS_PER_SECOND = 20.0
"""As client-go gives to controllers, which may send 30 at once."""
BURST_SECONDS = 2.0
"""Requests of so long may be sent at once after a quiet time."""
BUSY_SECONDS = 30.0
"""How long a request is repeated that the API server puts off with 429."""
DEFAULT_RETRY_SECONDS = 1.0
MAX_RETRY_SECONDS = 60.0
PAGE_SIZE = 500
ATTEMPTS = 3
WATCH_GRACE_SECONDS = 15.0
"""A stream without its end by then is one whose other side is gone."""
APPLY = "application/apply-patch+yaml"
MERGE = "application/merge-patch+json"
JSON = "application/json"
_UNREACHED_WEBHOOK = "failed calling webhook"


class ObjectNotFound(Exception):
    """404."""


class ObjectConflict(Exception):
    """409: somebody was faster."""


class VersionExpired(Exception):
    """410: the API server has forgotten what is asked for; list again."""


async def connect_api(kubeconfig: Path | None, *, budget: RequestBudget | None = None) -> KubernetesApi:
    """Return an API server with the rights of a kubeconfig, or of the pod's own service account.

    Raises `ClusterRefused` for a configuration that names no cluster.
    """
    configuration = kubernetes_client.Configuration()
    try:
        if kubeconfig is None:
            kubernetes_config.load_incluster_config(client_configuration=configuration)
        else:
            await kubernetes_config.load_kube_config(
                config_file=str(kubeconfig), client_configuration=configuration, persist_config=False
            )
    except (kubernetes_config.ConfigException, OSError) as error:
        raise ClusterRefused(f"There is no way to a Kubernetes API server: {error}") from error
    return KubernetesApi(kubernetes_client.ApiClient(configuration), budget=budget)


class RequestBudget:
    """Token bucket for the requests of one client, with the pauses that the server asks for."""

    def __init__(
        self, per_second: float = REQUESTS_PER_SECOND, *, burst_seconds: float = BURST_SECONDS
    ) -> None:
        self._interval = 1 / per_second
        self._burst_seconds = max(burst_seconds - self._interval, 0.0)
        self._next_at = 0.0
        self._paused_until = 0.0

    async def acquire(self) -> None:
        """Wait until one more request may be sent; those who wait are served in their order."""
        loop = asyncio.get_running_loop()
        at = max(self._next_at, loop.time() - self._burst_seconds)
        self._next_at = at + self._interval
        while (seconds := max(at, self._paused_until) - loop.time()) > 0:  # noqa: ASYNC110 - a pause may grow meanwhile
            await asyncio.sleep(seconds)

    def pause(self, seconds: float) -> None:
        """Send nothing for so long, and a random bit longer: not all clients come back at once."""
        seconds *= random.uniform(1.0, 1.25)  # noqa: S311 - spreads retries, guards nothing
        self._paused_until = max(self._paused_until, asyncio.get_running_loop().time() + seconds)


class KubernetesApi:
    """One API server, with the client's own credentials and TLS.

    The client's typed methods would read manifests and answers by models of one Kubernetes version, and refuse what
    another one sends.

    Every method raises `ClusterUnavailable`, `ClusterBusy`, `ClusterForbidden` or `ClusterRefused`; those for single
    objects also `ObjectAbsent`, `ObjectConflict` and `VersionExpired`.
    """

    def __init__(
        self,
        client: kubernetes_client.ApiClient,
        *,
        request_seconds: float = REQUEST_SECONDS,
        budget: RequestBudget | None = None,
    ) -> None:
        self.request_seconds = request_seconds
        self._client = client
        self._budget = budget or RequestBudget()
        self._places = asyncio.Semaphore(CONCURRENT_REQUESTS)

    async def close(self) -> None:
        """Close the connections."""
        await self._client.close()

    async def list(self, path: str, label: str) -> tuple[Sequence[Manifest], str]:
        """Return all items, page by page, and the version that they are of."""
        for _ in range(ATTEMPTS):
            items: list[Manifest] = []
            query = {"labelSelector": label, "limit": str(PAGE_SIZE)}
            try:
                while True:
                    page = await self.request("GET", path, query=query)
                    items.extend(page["items"])
                    metadata = page["metadata"]
                    if not metadata.get("continue"):
                        return items, metadata["resourceVersion"]
                    query["continue"] = metadata["continue"]
            except VersionExpired:
                continue  # the pages before are of a state that the API server has forgotten
            except ObjectNotFound as error:  # an API server that has just started doesn't serve all paths yet
                raise ClusterUnavailable(f"The API server does not serve {path}: {error}") from error
        raise ClusterUnavailable(f"{path} changed faster than it could be listed")

    async def patch(
        self, path: str, body: Manifest, *, content_type: str, query: Mapping[str, str]
    ) -> Manifest:
        """Change an object, over conflicts with others, and return it."""
        for _ in range(ATTEMPTS):
            with suppress(ObjectConflict):
                return await self.request("PATCH", path, query=query, body=body, content_type=content_type)
        raise ClusterUnavailable(f"{path} was changed by others again and again")

    async def watch(
        self, path: str, query: Mapping[str, str], *, seconds: float, on_event: Callable[[Manifest], None]
    ) -> None:
        """Hand on each event until the stream ends; raises `VersionExpired` for a version too old."""
        query = {**query, "watch": "true", "allowWatchBookmarks": "true", "timeoutSeconds": f"{seconds:.0f}"}
        await self._budget.acquire()
        try:
            async with asyncio.timeout(seconds + WATCH_GRACE_SECONDS):
                response = await self.send("GET", path, query=query)
                async with response:
                    if response.status != HTTPStatus.OK:
                        raise self._error_for_response(response, await response.content.read())
                    _enable_keep_alive(response)
                    async for line in response.content:
                        event: Manifest = decoding.decode(line)
                        if event["type"] == "ERROR":
                            status = event["object"]
                            raise _error_for_status(status.get("code", 0), status.get("message", ""))
                        on_event(event)
        except (aiohttp.ClientError, OSError, ValueError, kubernetes_config.ConfigException) as error:
            raise ClusterUnavailable(f"The watch was cut off: {_describe_error(error)}") from error

    async def request(
        self,
        method: str,
        path: str,
        *,
        query: Mapping[str, str] | None = None,
        body: Manifest | None = None,
        content_type: str = JSON,
    ) -> Manifest:
        """Return the object of an answer."""
        answer = await self.read(method, path, query=query, body=body, content_type=content_type)
        try:
            decoded: Manifest = decoding.decode(answer)
        except ValueError as error:
            raise ClusterUnavailable(
                f"{method} {path} was answered with something that is not JSON"
            ) from error
        return decoded

    async def read(
        self,
        method: str,
        path: str,
        *,
        query: Mapping[str, str] | None = None,
        body: Manifest | None = None,
        content_type: str = JSON,
    ) -> bytes:
        """Return the content of an answer; a request that is put off with 429 is repeated for a while."""
        loop = asyncio.get_running_loop()
        gives_up_at = loop.time() + BUSY_SECONDS
        while True:
            await self._budget.acquire()
            response, answer = await self._send_and_read(
                method, path, query=query, body=body, content_type=content_type
            )
            if response.status < HTTPStatus.BAD_REQUEST:
                return answer
            failure = self._error_for_response(response, answer)
            if not isinstance(failure, ClusterBusy) or loop.time() + failure.retry_seconds > gives_up_at:
                raise failure

    async def _send_and_read(
        self,
        method: str,
        path: str,
        *,
        query: Mapping[str, str] | None,
        body: Manifest | None,
        content_type: str,
    ) -> tuple[aiohttp.ClientResponse, bytes]:
        try:
            async with asyncio.timeout(self.request_seconds), self._places:
                response = await self.send(method, path, query=query, body=body, content_type=content_type)
                answer: bytes = await response.content.read()
        except (
            aiohttp.ClientError,
            OSError,
            kubernetes_config.ConfigException,
        ) as error:  # TimeoutError is an OSError
            raise ClusterUnavailable(
                f"The API server did not answer {method} {path}: {_describe_error(error)}"
            ) from error
        return response, answer

    async def send(
        self,
        method: str,
        path: str,
        *,
        query: Mapping[str, str] | None = None,
        body: Manifest | None = None,
        content_type: str = JSON,
    ) -> aiohttp.ClientResponse:
        """Send one request, whatever the budget says, and return the answer as it begins."""
        request = await self._client.param_serialize(
            method=method,
            resource_path=path,
            query_params=list((query or {}).items()),
            header_params={"Accept": "application/json, */*", "Content-Type": content_type},
            body=body,
            auth_settings=["BearerToken"],
        )
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=self.request_seconds)
        answer = await self._client.call_api(*request, _request_timeout=timeout)
        response: aiohttp.ClientResponse = answer.response
        return response

    def _error_for_response(self, response: aiohttp.ClientResponse, answer: bytes) -> Exception:
        """Return the meaning of an answer other than success; 429 pauses all requests."""
        if response.status != HTTPStatus.TOO_MANY_REQUESTS:
            return _error_for_status(response.status, _error_message(answer))
        seconds = _parse_retry_after(response.headers.get("Retry-After", ""))
        self._budget.pause(seconds)
        return ClusterBusy(_error_message(answer), retry_seconds=seconds)


def _enable_keep_alive(response: aiohttp.ClientResponse) -> None:
    """Have a stream noticed within 25 s whose other side vanished without a word."""
    connection = response.connection
    found = None if connection is None else connection.transport.get_extra_info("socket")  # type: ignore[union-attr]
    if found is None:
        return
    found.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in (("TCP_KEEPIDLE", 10), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 3)):
        if hasattr(socket, option):
            found.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)


def _parse_retry_after(header: str) -> float:
    """Return the seconds of a `Retry-After`; a date, which no API server sends, is taken for the usual delay."""
    return min(float(header), MAX_RETRY_SECONDS) if header.isdecimal() else DEFAULT_RETRY_SECONDS


def _error_for_status(status: int, message: str) -> Exception:
    """Return the meaning of an answer other than success to the caller."""
    match status:
        case HTTPStatus.NOT_FOUND:
            return ObjectNotFound(message)
        case HTTPStatus.CONFLICT:
            return ObjectConflict(message)
        case HTTPStatus.GONE:
            return VersionExpired(message)
        case HTTPStatus.REQUEST_TIMEOUT | HTTPStatus.TOO_MANY_REQUESTS:
            return ClusterUnavailable(message)
    is_failure = status >= HTTPStatus.INTERNAL_SERVER_ERROR or status < HTTPStatus.BAD_REQUEST
    if is_failure and _UNREACHED_WEBHOOK not in message:
        return ClusterUnavailable(f"The API server failed ({status}): {message}")
    text = f"The API server refused it ({status}): {message}"
    return ClusterForbidden(text) if _is_forbidden(status, message) else ClusterRefused(text)


def _is_forbidden(status: int, message: str) -> bool:
    """Tell whether rights or a webhook are in the way: nothing is wrong with the request, nor known of the pods.

    A webhook chooses its own status, and one that can't be reached makes a 500; a quota answers 403, and says that the
    object itself is too much.
    """
    if ("admission webhook" in message and "denied the request" in message) or _UNREACHED_WEBHOOK in message:
        return True
    is_quota = "exceeded quota" in message
    return status == HTTPStatus.UNAUTHORIZED or (status == HTTPStatus.FORBIDDEN and not is_quota)


def _error_message(answer: bytes) -> str:
    try:
        return str(decoding.decode(answer)["message"])
    except (ValueError, KeyError, TypeError):
        return answer[:200].decode(errors="replace") or "no reason given"


def _describe_error(error: BaseException) -> str:
    return str(error) or type(error).__name__
