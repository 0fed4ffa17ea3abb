"""HTML page of the OpenAPI document: one file without scripts or external resources."""

from __future__ import annotations

import base64
import re
import shlex
from collections.abc import Iterable, Iterator, Mapping
from hashlib import sha256
from html import escape
from http import HTTPStatus
from importlib import resources
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import urlencode

import msgspec

from gateway.openapi.openapi_document import ANY_SERVER, ITEM_SCHEMA
from gateway.openapi.operation_docs import JSON
from gateway.openapi.refusals import GENERAL

if TYPE_CHECKING:
    from engine.values import Json
    from gateway.openapi.openapi_document import Part

STYLE: Final = resources.files(__package__).joinpath("page.css").read_text()
ICON: Final = resources.files(__package__).joinpath("favicon.svg").read_bytes()
POLICY: Final = (
    f"default-src 'none'; style-src 'sha256-{base64.b64encode(sha256(STYLE.encode()).digest()).decode()}'; "
    "img-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
"""Content-Security-Policy of the page: it may load its own style sheet and the server's icon only."""

_CODE: Final = re.compile(r"`([^`]+)`")
_CONSTRAINTS: Final[Mapping[str, str]] = {
    "minimum": "from {}",
    "exclusiveMinimum": "more than {}",
    "maximum": "up to {}",
    "minLength": "at least {} characters",
    "maxLength": "at most {} characters",
    "maxItems": "at most {} items",
    "maxProperties": "at most {} keys",
    "pattern": "matching {}",
    "default": "{} if absent",
}


def render_page(document: Part) -> str:
    """Render the document as HTML."""
    info = document["info"]
    operations = [
        (path, method, operation)
        for path, methods in document["paths"].items()
        for method, operation in methods.items()
    ]
    by_tag = {
        tag["name"]: [one for one in operations if tag["name"] in one[2]["tags"]] for tag in document["tags"]
    }
    return "".join(
        [
            f"<!doctype html><html lang=en><meta charset=utf-8><title>{escape(info['title'])} API</title>",
            '<link rel=icon href=favicon.svg type="image/svg+xml">',
            f'<meta name=viewport content="width=device-width,initial-scale=1"><style>{STYLE}</style>',
            "<nav><p><a href=#top>",
            escape(info["title"]),
            "</a></p>",
            *(_entries(tag, found) for tag, found in by_tag.items()),
            "<p><a href=#schemas>Schemas</a></p><p><a href=#refusals>Refusals</a></p></nav><main>",
            f"<header id=top><h1>{escape(info['title'])} API <small>{escape(info['version'])}</small></h1>",
            _text(info["description"]),
            "<p>The examples take two variables of the shell:</p>",
            _block(f"export SERVER={_server(document)} KEY=sk-..."),
            "<p>The same for programs: <a href=openapi.json>openapi.json</a>.</p></header>",
            *(_section(tag, by_tag[tag["name"]], document) for tag in document["tags"]),
            _schemas(document["components"]["schemas"]),
            _codes(document["x-refusals"]),
            "</main></html>",
        ]
    )


def _server(document: Part) -> str:
    """Return the server URL of the examples, quoted for a shell."""
    url: str = document["servers"][0]["url"]
    return "http://127.0.0.1:8000" if url == ANY_SERVER else shlex.quote(url)


def _entries(tag: str, operations: Iterable[tuple[str, str, Part]]) -> str:
    entries = (
        f'<li><a href="#{operation["operationId"]}">{_method(method)}{escape(_short(path))}</a>'
        for path, method, operation in operations
    )
    return f"<p><a href=#{_anchor(tag)}>{escape(tag)}</a></p><ul>{''.join(entries)}</ul>"


def _section(tag: Part, operations: Iterable[tuple[str, str, Part]], document: Part) -> str:
    shown = (_operation(path, method, operation, document) for path, method, operation in operations)
    name = tag["name"]
    return f"<section><h2 id={_anchor(name)}>{escape(name)}</h2>{_text(tag['description'])}{''.join(shown)}</section>"


# ── an operation ────────────────────────────────────────────────────────────────────────────────────────────


def _operation(path: str, method: str, operation: Part, document: Part) -> str:
    head = f"{_method(method)}<code>{escape(path)}</code> <span>{_inline(operation['summary'])}</span>"
    body = operation.get("requestBody")
    return "".join(
        [
            # The anchor is inside, so that a link to it opens the enclosing `details`.
            f'<details class=operation><summary>{head}</summary><div id="{operation["operationId"]}">',
            _text(operation["description"]),
            _parameters(operation["parameters"]),
            "" if body is None else _body(body),
            _requests(path, method, operation),
            *(
                _answer(status, response)
                for status, response in operation["responses"].items()
                if "$ref" not in response
            ),
            _refusals(operation["responses"], document),
            "</div></details>",
        ]
    )


def _requests(path: str, method: str, operation: Part) -> str:
    """Render the first example as a command, and the bodies of the other examples."""
    bodies = operation["requestBody"]["content"][JSON]["examples"] if "requestBody" in operation else {}
    first, *others = bodies or [""]
    named = f": {escape(first)}" if first else ""
    return f"<h4>Example{named}</h4>{_block(curl(path, method, operation))}" + "".join(
        f"<h4>Example: {escape(other)}</h4>{_block(_json(bodies[other]['value']))}" for other in others
    )


def curl(path: str, method: str, operation: Part) -> str:
    """Return the curl command for an operation's first example."""
    names, query = (
        {
            one["name"]: _in_url(one["example"])
            for one in operation["parameters"]
            if one["in"] == place and "example" in one
        }
        for place in ("path", "query")
    )
    url = path.format(**names) + ("?" + urlencode(query, safe=":,") if query else "")
    verb = "" if method == "get" else f"-X {method.upper()} "
    lines = [f'curl -sS {verb}"$SERVER{url}"']
    if operation["security"]:
        lines.append('-H "X-API-Key: $KEY"')
    if "requestBody" in operation:
        example = next(iter(operation["requestBody"]["content"][JSON]["examples"].values()))
        lines.append("-H 'Content-Type: application/json'")
        lines.append("-d '" + _json(example["value"]).replace("'", "'\\''") + "'")
    return " \\\n  ".join(lines)


def _in_url(value: Json) -> str:
    """Return a value as URL text."""
    match value:
        case str():
            return value
        case list():
            return ",".join(map(_in_url, value))
        case _:
            return _json(value)


def _parameters(parameters: Iterable[Part]) -> str:
    rows = [
        f"<tr><td><code>{escape(one['name'])}</code><td>{one['in']}<td>{_type(one['schema'])}"
        f"<td>{_inline(one['description'])}"
        for one in parameters
    ]
    return f"<h4>Parameters</h4>{_table(('name', 'in', 'type', 'meaning'), rows)}" if rows else ""


def _body(body: Part) -> str:
    need = "" if body["required"] else ", or none"
    return f"<h4>Body</h4><p>{_type(body['content'][JSON]['schema'])}{need}</p>"


def _answer(status: str, response: Part) -> str:
    heading = f"<h4>{status} {escape(HTTPStatus(int(status)).phrase)}</h4>"
    meaning = response["description"]
    said = "" if meaning == HTTPStatus(int(status)).phrase else f"<p>{_inline(meaning)}</p>"
    headers = [
        f"<tr><td><code>{escape(name)}</code><td>{_inline(header['description'])}"
        for name, header in response["headers"].items()
        if "$ref" not in header
    ]
    shown = [
        f"<p>{_type(content.get(ITEM_SCHEMA, content['schema']))} as <code>{escape(media_type)}</code></p>"
        + (_block(_shown(content["example"])) if "example" in content else "")
        for media_type, content in response.get("content", {}).items()
    ]
    return heading + said + _table(("header", "meaning"), headers) + "".join(shown)


def _refusals(responses: Mapping[str, Part], document: Part) -> str:
    found: list[str] = []
    for response in responses.values():
        if "$ref" in response:
            shared = document["components"]["responses"][response["$ref"].rpartition("/")[2]]
            found += shared["content"][JSON]["examples"]
    if not found:
        return ""
    rows = [_code(code, document["x-refusals"][code]) for code in found if code not in GENERAL]
    general = ", ".join(f"<code>{code}</code>" for code in found if code in GENERAL)
    intro = "Also, as for" if rows else "As for"
    return (
        f"<h4>Refusals</h4>{_table(('status', 'code', 'meaning'), rows)}"
        f"<p class=soft>{intro} <a href=#refusals>every operation</a>: {general}.</p>"
    )


# ── schemas and codes ───────────────────────────────────────────────────────────────────────────────────────


def _schemas(schemas: Mapping[str, Part]) -> str:
    shown = (
        f"<details><summary><code>{escape(name)}</code> <span>{_inline(schema.get('description', ''))}</span></summary>"
        f'<div id="schema-{escape(name)}">{_fields(schema)}</div></details>'
        for name, schema in schemas.items()
    )
    return f"<section><h2 id=schemas>Schemas</h2>{''.join(shown)}</section>"


def _fields(schema: Part) -> str:
    if "properties" not in schema:
        return f"<p>{_type({key: one for key, one in schema.items() if key != 'description'})}</p>"
    rows = [
        f"<tr><td><code>{escape(name)}</code>{'' if name in schema.get('required', ()) else ' <i>optional</i>'}"
        f"<td>{_type(field)}<td>{_inline(field.get('description', ''))}"
        for name, field in schema["properties"].items()
    ]
    return _table(("field", "type", "meaning"), rows)


def _codes(refusals: Mapping[str, Part]) -> str:
    rows = [_code(code, refusal) for code, refusal in refusals.items()]
    return f"<section><h2 id=refusals>Refusals</h2>{_table(('status', 'code', 'meaning'), rows)}</section>"


def _code(code: str, refusal: Part) -> str:
    return f"<tr><td>{refusal['status']}<td><code>{escape(code)}</code><td>{_inline(refusal['meaning'])}"


def _type(schema: Part) -> str:
    """Describe the type of a schema in a few words."""
    match schema:
        case {"$ref": str(ref)}:
            name = escape(ref.rpartition("/")[2])
            kind = f'<a href="#schema-{name}">{name}</a>'
        case {"anyOf": choices}:
            kind = " or ".join(map(_type, choices))
        case {"const": value}:
            kind = f"<code>{escape(_json(value))}</code>"
        case {"enum": values}:
            kind = ", ".join(f"<code>{escape(str(value))}</code>" for value in values)
        case {"type": "array", "items": items}:
            kind = f"list of {_type(items)}"
        case {"type": "object", "additionalProperties": dict(items)} if items:
            kind = f"object, its values {_type(items)}"
        case {"type": [str(name), "null"]}:
            return f"null or {_type({**schema, 'type': name})}"
        case {"type": str(name)}:
            kind = schema.get("format", name)
        case _:
            kind = "any JSON"
    return ", ".join([kind, *_constraints(schema)])


def _constraints(schema: Part) -> Iterator[str]:
    for key, sentence in _CONSTRAINTS.items():
        if key in schema:
            yield sentence.format(f"<code>{escape(str(schema[key]))}</code>")


# ── pieces of text ──────────────────────────────────────────────────────────────────────────────────────────


def _text(text: str) -> str:
    return "".join(f"<p>{_inline(paragraph)}</p>" for paragraph in text.strip().split("\n\n"))


def _inline(text: str) -> str:
    return _CODE.sub(r"<code>\1</code>", escape(text, quote=False))


def _table(columns: Iterable[str], rows: list[str]) -> str:
    if not rows:
        return ""
    head = "".join(f"<th>{column}" for column in columns)
    return f"<table><thead><tr>{head}<tbody>{''.join(rows)}</table>"


def _block(text: str) -> str:
    return f"<pre>{escape(text, quote=False)}</pre>"


def _shown(example: Any) -> str:  # noqa: ANN401 - any JSON value
    return example if isinstance(example, str) else _json(example)


def _json(value: Any) -> str:  # noqa: ANN401 - any JSON value
    return msgspec.json.format(msgspec.json.encode(value), indent=2).decode()


def _method(method: str) -> str:
    return f"<b class={method}>{method.upper()}</b>"


def _short(path: str) -> str:
    return path.removeprefix("/api/v1")


def _anchor(tag: str) -> str:
    return f"tag-{tag.lower().replace(' ', '-')}"
