"""Send an HTTP request; the kind of failure decides whether a retry makes sense."""

from __future__ import annotations

import re
from base64 import b64decode, b64encode
from collections.abc import Iterator, Mapping, Sequence
from enum import StrEnum
from http.client import responses as reasons
from typing import TYPE_CHECKING
from urllib.parse import quote, urlencode

from concurrency import offload
from engine import approval_links
from engine.run_errors import NodeError
from engine.values import InvalidJson, decode_json, encode_json, value_as_text
from nodes import callback_requests, config_fields, http_errors, redaction, url_targets
from nodes.outbound_http import OutboundResponse
from telemetry import tracing

if TYPE_CHECKING:
    from engine.node_api import AnswerWait, NodeCall
    from engine.services import HttpResponse
    from engine.values import Json

FIRST_ERROR_STATUS = 400
RETRYABLE_BELOW_500 = frozenset({408, 425, 429})
FIRST_SERVER_ERROR = 500
SHOWN_BYTES = 200
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
JSON_TYPE = re.compile(r"[\w.+-]+/(?:[\w.+-]+\+)?json\b", re.IGNORECASE)
CHARSET = re.compile(r"""charset\s*=\s*["']?([\w.:-]+)""", re.IGNORECASE)
# Some codecs of Python take unbounded time (punycode) or produce characters that can't be stored (unicode_escape).
CHARSETS = frozenset(
    {
        "ascii", "us-ascii", "utf-8", "utf8", "utf-16", "iso-8859-1", "latin-1", "iso-8859-2", "iso-8859-15",
        "windows-1250", "windows-1251", "windows-1252", "koi8-r", "shift_jis", "euc-jp", "euc-kr", "big5",
        "gb2312", "gbk", "gb18030",
    }
)  # fmt: skip


class HttpMethod(StrEnum):
    GET = "GET"
    HEAD = "HEAD"
    OPTIONS = "OPTIONS"
    POST = "POST"
    PUT = "PUT"
    PATCH = "PATCH"
    DELETE = "DELETE"


class HttpResponseType(StrEnum):
    AUTO = "auto"
    JSON = "json"
    TEXT = "text"
    BASE64 = "base64"


READ_METHODS = frozenset({HttpMethod.GET, HttpMethod.HEAD, HttpMethod.OPTIONS})


async def run(call: NodeCall) -> Json | AnswerWait:
    response_type = config_fields.read_choice(call.config, "responseType", HttpResponseType)
    fails_on_error = config_fields.read_flag(call.config, "failOnError")
    method = config_fields.read_choice(call.config, "method", HttpMethod)
    url = _build_url(call.config)
    waits = config_fields.read_flag(call.config, "waitForCallback")
    if waits:
        callback_requests.require_writing_method(method, is_read=method in READ_METHODS)
    secrets = await _read_secret_headers(call, url)
    with http_errors.NamedRequest(method, url):
        response = await _send_request(call, method, url, secrets, waits=waits)
        if (fails_on_error or waits) and response.status >= FIRST_ERROR_STATUS:
            raise _status_error(response, url)
        if waits:
            return callback_requests.build_wait(call, method.value, url)
        body = await offload.run(_decode_body, response, response_type)
    return {
        "status": response.status,
        "headers": dict(response.headers),
        "body": body,
        "url": response.url,
    }


async def _send_request(
    call: NodeCall, method: HttpMethod, url: str, secrets: Mapping[str, str], *, waits: bool
) -> HttpResponse:
    """Send the configured request with `secrets`, headers of the data source, and return the response with all secrets
    redacted.

    Writes get an idempotency key, requests of traced runs the headers of traces, and placeholders of approval links
    become links. With `waits`, a signed callback URL is added. Raises `NodeError`, `OutboundError` and ValueError.
    """
    config = call.config
    headers = _read_headers(config)
    content, tokens = config.get("body"), []
    if waits:
        callback_url = await call.services.callbacks.create_url(
            call.caller, node_id=call.node_id, iteration=call.iteration
        )
        content = callback_requests.add_url(content, callback_url)
        headers[callback_requests.HEADER] = callback_url
        tokens.append(callback_url.rpartition("token=")[2])
    body, content_type = await offload.run(_encode_body, content)
    if content_type is not None:
        _set_default_header(headers, "Content-Type", content_type)
    if method not in READ_METHODS:
        _set_default_header(headers, "Idempotency-Key", call.idempotency_key)
    if tracing.tracer is not None:
        sent = tracing.tracer.outgoing_headers(url, call.node_id, call.iteration, call.attempt)
        for name, value in sent.items():
            _set_default_header(headers, name, value)
    links = await _create_approval_links(call, url, body, headers)
    if links:
        # Only now, so that the recorded request, its errors and its trace have the placeholders.
        url = approval_links.replace_places(url, links)
        body = approval_links.replace_places(body.decode(), links).encode() if body is not None else None
        headers = {name: approval_links.replace_places(value, links) for name, value in headers.items()}
    if waits:
        headers = _replace_headers(headers, await callback_requests.sign(call, body))
    response = await call.services.http.request(
        method,
        url,
        headers=_replace_headers(headers, secrets),
        body=body,
        timeout_seconds=config_fields.read_timeout_seconds(config),
        follow_redirects=config_fields.read_flag(config, "followRedirects"),
    )
    tokens += [link.rpartition("/")[2] for link in links.values()]
    return _redact_response(response, [*secrets.values(), *tokens])


async def _create_approval_links(
    call: NodeCall, url: str, body: bytes | None, headers: Mapping[str, str]
) -> Mapping[approval_links.Place, str]:
    """Create the approval links whose placeholders a request contains; return their URLs by place, empty without
    placeholders.

    Raises `NodeError`.
    """
    texts = [url, *headers.values(), *([] if body is None else [body.decode()])]
    places = [*approval_links.find_places(texts)]
    if not places:
        return {}
    links = await call.services.approvals.create_links(call.caller, places)
    return dict(zip(places, links, strict=True))


# ── request ─────────────────────────────────────────────────────────────────────────────────────────────────


def _build_url(config: Mapping[str, Json]) -> str:
    url = config_fields.read_text(config, "url")
    parameters: list[tuple[str, str]] = []
    for name, given in config_fields.read_mapping(config, "query").items():
        values = given if isinstance(given, list) else [given]
        parameters.extend((name, value_as_text(value)) for value in values if value is not None)
    if not parameters:
        return url
    before_fragment = url.partition("#")[0]
    separator = "&" if "?" in before_fragment else "?"
    return f"{before_fragment}{separator}{urlencode(parameters)}"


def _read_headers(config: Mapping[str, Json]) -> dict[str, str]:
    given = config_fields.read_mapping(config, "headers")
    return {name: value_as_text(value) for name, value in given.items() if value is not None}


async def _read_secret_headers(call: NodeCall, url: str) -> Mapping[str, str]:
    """Return the secret headers that the data source of the config adds to a request to `url`; empty without a data
    source.

    They are never recorded. Raises `NodeError` for a data source that the run may not use, and for hosts that it
    doesn't list.
    """
    if call.config.get("dataSource") is None:
        return {}
    return await call.services.data_sources.headers(
        call.caller, config_fields.read_text(call.config, "dataSource"), url
    )


def _replace_headers(headers: Mapping[str, str], others: Mapping[str, str]) -> dict[str, str]:
    """Return `headers` with `others` added; these replace headers of the same name, in upper or lower case."""
    names = {name.lower() for name in others}
    return {**{name: value for name, value in headers.items() if name.lower() not in names}, **others}


def _encode_body(body: Json) -> tuple[bytes | None, str | None]:
    """Return the request body and its content type: a text as it is, another value as JSON.

    Both are None without a body. Raises `InvalidJson`.
    """
    if body is None:
        return None, None
    if isinstance(body, str):
        return body.encode(), "text/plain; charset=utf-8"
    return encode_json(body), "application/json"


def _set_default_header(headers: dict[str, str], name: str, value: str) -> None:
    if name.lower() not in map(str.lower, headers):
        headers[name] = value


# ── response ────────────────────────────────────────────────────────────────────────────────────────────────


def _redact_response(response: HttpResponse, secrets: Sequence[str]) -> HttpResponse:
    """Return a response with the secrets of the request redacted, in each form in which a server may repeat them.

    Its readers may not be permitted to use the data source, or to answer a question by its link.
    """
    if not secrets:
        return response
    forms = {form for value in secrets for form in _secret_forms(value)}
    return OutboundResponse(
        response.status,
        {name: redaction.redact_text(value, forms) for name, value in response.headers.items()},
        redaction.redact_body(response.body, forms),
        redaction.redact_text(response.url, forms),
    )


def _secret_forms(value: str) -> Iterator[str]:
    """Yield the forms in which a server may repeat the secret value of a header: whole, its credentials alone, a login
    decoded; each also escaped.
    """
    scheme, _, credentials = value.partition(" ")
    said = {value, credentials}
    if scheme == "Basic":
        login = b64decode(credentials).decode()
        said |= {login, login.partition(":")[2]}
    for text in said:
        yield from (text, encode_json(text).decode()[1:-1], quote(text, safe=""))


def _status_error(response: HttpResponse, url: str) -> NodeError:
    """Return the error for a response with an error status; it names the status, and quotes the beginning of
    the body.
    """
    status, last_url = response.status, url_targets.redact_url(response.url)
    redirected = "" if last_url == url_targets.redact_url(url) else f" of {last_url}"
    answered = f"The answer{redirected} was {status} {reasons.get(status, '')}".rstrip()
    said = " ".join(_decode_text(response.body[:SHOWN_BYTES], _find_charset(response)).split())
    return NodeError(
        f"{answered}: {said}" if said else answered,
        code=f"http-{status}",
        retryable=status in RETRYABLE_BELOW_500 or status >= FIRST_SERVER_ERROR,
    )


def _decode_body(response: HttpResponse, response_type: HttpResponseType) -> Json:
    match response_type:
        case HttpResponseType.JSON:
            return _decode_json(response)
        case HttpResponseType.TEXT:
            return _decode_text(response.body, _find_charset(response))
        case HttpResponseType.BASE64:
            return b64encode(response.body).decode()
        case HttpResponseType.AUTO:
            return _decode_by_type(response)


def _decode_json(response: HttpResponse) -> Json:
    try:
        return decode_json(response.body.removeprefix(BYTE_ORDER_MARK)) if response.body else None
    except InvalidJson as error:
        message = (
            f"The response is not valid JSON: {error.message}. With `responseType: auto` it becomes a text"
        )
        raise NodeError(message, code="invalid-response") from error


def _decode_text(body: bytes, charset: str) -> str:
    """Return the body as text, with U+FFFD for invalid bytes and NUL."""
    return body.decode(charset, errors="replace").replace("\0", "\ufffd")


def _decode_by_type(response: HttpResponse) -> Json:
    """Return the body of a response by its content type: JSON if it is valid, else a text, else Base64; null
    if it is empty.
    """
    if not response.body:
        return None
    if JSON_TYPE.match(_find_content_type(response)):
        try:
            return decode_json(response.body.removeprefix(BYTE_ORDER_MARK))
        except InvalidJson:
            pass
    try:
        text = response.body.decode(_find_charset(response))
    except UnicodeDecodeError:
        return b64encode(response.body).decode()
    return b64encode(response.body).decode() if "\0" in text else text


def _find_charset(response: HttpResponse) -> str:
    named = CHARSET.search(_find_content_type(response))
    return named[1] if named and named[1].lower() in CHARSETS else "utf-8"


def _find_content_type(response: HttpResponse) -> str:
    return response.headers.get("content-type", "")
