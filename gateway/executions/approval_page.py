"""Approval page: a link shows its question to an assignee without an account, and takes one answer.

Showing changes nothing, since mail programs and scanners open links. The page needs no script, loads nothing
from anywhere, and its address is sent to nobody.
"""

from __future__ import annotations

import hashlib
from base64 import b64encode
from collections.abc import Mapping, Sequence
from datetime import datetime
from html import escape
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import parse_qs

import msgspec
import structlog
from msgspec import Struct
from msgspec.structs import replace
from sqlalchemy import select
from sqlmodel import col

from engine import values
from engine.run_records import CANDIDATE_STATUSES
from engine.values import InvalidJson
from gateway.executions import answered_runs, input_checks, inputs
from gateway.http import errors
from gateway.http.errors import ApiError
from gateway.http.request import GatewayRequest
from gateway.http.request_origin import client_of_scope
from journal.store import ExecutionKey
from journal.waits import approvals, node_answers
from journal.waits.approvals import ApprovalDecision
from journal.waits.node_answers import AnswerReception, WaitingNode
from models.access import Organization, User
from models.approval import ApprovalLink
from models.column_types import build_row
from models.execution import Execution, SpanRow
from models.execution_status import TERMINAL_STATUSES
from models.ingest import INTAKE_KINDS
from models.workflow import Workflow

if TYPE_CHECKING:
    from sqlalchemy import Select
    from sqlalchemy.ext.asyncio import AsyncConnection
    from starlette.types import Receive, Scope, Send

    from engine.values import Json

log = structlog.get_logger()

MAX_FORM_BYTES: Final = 100_000
MAX_FIELDS: Final = 100
BY_LINK: Final = "approval-link"
"""Key of audit entries about answers by a link."""
CHOICE: Final = "choice"
FIELD: Final = "field."
NOTE: Final = "note"
NUMBERS: Final = frozenset({"integer", "number"})
_STYLE: Final = (
    ":root{color-scheme:light dark;--bg:#f7f6f3;--surface:#fff;--line:#e2e0da;--line2:#cfccc4;--edge:#85837b;"
    "--ink:#1b1c20;--ink2:#4d4f57;--flame:#c2500b;--blue:#1f52c4;--red:#96101e;--red-soft:#fdebe8;--red-fill:#c62a22}"
    "@media(prefers-color-scheme:dark){:root{--bg:#0e1013;--surface:#15171b;--line:#262a31;--line2:#3a3f49;"
    "--edge:#7b818d;--ink:#ececee;--ink2:#b4b7c0;--flame:#ff9a4a;--blue:#92b4ff;--red:#ff7580;--red-soft:#331413;"
    "--red-fill:#e34a47}}*{box-sizing:border-box}body{margin:0;background:var(--bg);color:var(--ink);"
    'font:1rem/1.5 -apple-system,"Segoe UI",Ubuntu,Cantarell,"Noto Sans",Roboto,"Helvetica Neue","Liberation Sans",'
    "Arial,system-ui,sans-serif}header{display:flex;gap:.5rem;align-items:center;padding:.75rem 1rem;font-size:.875rem;"
    "border-bottom:1px solid var(--line);background:var(--surface)}header svg{width:18px;height:18px;flex:none;"
    "fill:var(--flame)}header span{margin-left:auto;color:var(--ink2);text-align:right;overflow-wrap:anywhere}"
    "main{max-width:36rem;margin:0 auto;padding:1rem}h1{font-size:1.5rem;line-height:1.25;font-weight:650;"
    "letter-spacing:-.011em;margin:.5rem 0;overflow-wrap:anywhere}p{margin:.5rem 0;white-space:pre-wrap;"
    "overflow-wrap:anywhere}.soft{color:var(--ink2)}.hint,label .soft{font-size:.8125rem;font-weight:400}"
    "p.hint{margin-top:1.25rem}label{display:block;margin:1.25rem 0 .25rem;font-size:.875rem;font-weight:600}"
    "input,select,textarea,button{width:100%;min-height:48px;padding:.5rem .75rem;font:inherit;color:inherit;"
    "background:var(--surface);border:1px solid var(--edge);border-radius:6px}input[type=checkbox]{width:24px;"
    "min-height:24px}button{margin-top:.75rem;border-color:var(--line2);font-weight:500;cursor:pointer}"
    "button.main{margin-top:1.5rem;background:var(--ink);border-color:var(--ink);color:var(--bg)}"
    ":focus-visible{outline:2px solid var(--blue);outline-offset:2px}.bad{border-left:4px solid var(--red-fill);"
    "background:var(--red-soft);color:var(--red);padding:.5rem .75rem;border-radius:6px}"
)
_MARK: Final = (
    '<svg viewBox="0 0 16 16" aria-hidden="true"><path fill-rule="evenodd" d="M8.7 0c.2 2.7 3.8 4.5 3.8 8.2a4.5 4.5 0 0'
    " 1-9 0c0-2.1 1.1-3.3 2-4.3.2 1 .6 1.7 1.2 2.1.1-2.2.7-4.3 2-6zM8 7.6c-.9.9-1.5 1.5-1.5 2.5a1.5 1.5 0 0 0 3 0"
    'c0-1-.6-1.6-1.5-2.5z"/><path d="M3 14h10v1.8H3z"/></svg>'
)
_STYLE_HASH: Final = b64encode(hashlib.sha256(_STYLE.encode()).digest()).decode()
_HEADERS: Final = (
    (b"content-type", b"text/html; charset=utf-8"),
    (
        b"content-security-policy",
        f"default-src 'none'; style-src 'sha256-{_STYLE_HASH}'; form-action 'self'; base-uri 'none';"
        " frame-ancestors 'none'".encode(),
    ),
    (b"referrer-policy", b"no-referrer"),
    (b"cache-control", b"no-store"),
    (b"x-robots-tag", b"noindex, nofollow"),
    (b"x-content-type-options", b"nosniff"),
)


class ApprovalQuestion(Struct, frozen=True):
    """Question of a link, as it is stored now."""

    link: ApprovalLink
    key: ExecutionKey
    organization: str
    workflow: str
    asked: WaitingNode | None
    """None: the question is answered, has expired, or its run has ended."""
    assignee: str
    """Name of the assignee on the page."""
    is_self_approval: bool
    is_early: bool
    """Whether the run has not come to the question."""
    needs_own_link: bool
    """Whether the question is for other people: it was assigned to them, or the link is that of anyone."""


class LinkAuthor(Struct, frozen=True):
    """Assignee of a link as the author of a decision, for the audit trail."""

    organization_id: str
    shard: int
    user_id: str
    key_id: str = BY_LINK


class PageResponse(Struct, frozen=True):
    """Answer with an HTML page that is stored nowhere."""

    status: int
    title: str
    body: str
    headers: Sequence[tuple[bytes, bytes]] = ()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:  # noqa: ARG002 - ASGI's signature
        page = (
            '<!doctype html><html lang="en"><head><meta charset="utf-8">'
            '<meta name="viewport" content="width=device-width, initial-scale=1">'
            f"<title>{escape(self.title)} · Pilotflame</title><style>{_STYLE}</style></head>"
            f"<body>{self.body}</body></html>"
        ).encode()
        headers = [*_HEADERS, *self.headers, (b"content-length", b"%d" % len(page))]
        await send({"type": "http.response.start", "status": self.status, "headers": headers})
        await send({"type": "http.response.body", "body": b"" if scope["method"] == "HEAD" else page})


async def show(request: GatewayRequest) -> PageResponse:
    """Show the question of an approval link; nothing changes.

    The page explains a link that is used, early or closed (200), or may not answer (403); an unknown one gets 404, and
    429 after many of them.
    """
    question = await _find_question(request)
    return _refuse(request) if question is None else _show_question(question)


async def answer(request: GatewayRequest) -> PageResponse:
    """Answer the question of an approval link with the posted form, and use the link up.

    Invalid fields are shown in the page with 422; a link that is used, early or closed gets 409, one that may not
    answer 403, and an unknown one 404, or 429 after many of them.
    """
    question = await _find_question(request)
    if question is None:
        return _refuse(request)
    asked = question.asked
    is_closed = asked is None or question.link.used_at is not None
    if asked is None or is_closed or question.is_self_approval or question.needs_own_link:
        return _show_question(question, status=409)
    content = await request.body()
    try:
        form = _read_form(content)
        choice, data = _read_answer(asked, form)
        await input_checks.require_valid_inputs(
            request.gateway.forms, question.link.organization_id, asked.request, choice, data
        )
    except ValueError as error:
        return _show_question(question, status=422, problems=[str(error)])
    except ApiError as error:
        problems = [str(one["message"]) for one in error.details] or [error.message]
        return _show_question(question, status=error.status, problems=problems)
    return await _store_answer(request, question, asked, choice, data)


def _refuse(request: GatewayRequest) -> PageResponse:
    """Return the page for an unknown token, and count it: a client with too many gets 429.

    Tokens have 256 bits, so a known one works even for such a client.
    """
    refusal = request.gateway.approval_failures.fail(client_of_scope(request.scope), _UNKNOWN)
    if refusal is _UNKNOWN:
        return _GONE
    page = _show_message(refusal.status, "Too many attempts", f"{refusal.message}. Try again in a minute.")
    return replace(page, headers=[(b"retry-after", refusal.headers["Retry-After"].encode())])


async def _store_answer(
    request: GatewayRequest, question: ApprovalQuestion, asked: WaitingNode, choice: str | None, data: Json
) -> PageResponse:
    """Store an answer by a link with its audit entry, use the link up, and let the run continue once enough people have
    made the same choice; return the page to show.

    If the link was used or the question was closed (409) or assigned to others (403) meanwhile, nothing is stored, and
    the page says so.
    """
    gateway, link = request.gateway, question.link
    user_id = None if "@" in link.assignee or link.assignee == approvals.ANYONE else link.assignee
    decision = ApprovalDecision(link.assignee, user_id, choice, data, gateway.clock())
    author = LinkAuthor(link.organization_id, link.shard, link.assignee)

    async def work(connection: AsyncConnection) -> approvals.DecisionResult | None:
        if not await approvals.use_link(connection, link):
            return None
        given = await approvals.record_decision(connection, question.key, asked, decision)
        if given.answer.reception is not AnswerReception.TAKEN:
            raise inputs.refusal_of(given.answer.reception)
        await inputs.audit_decision(connection, question.key, asked, decision, author)
        return given

    try:
        given = await gateway.database.transaction(work, locks=question.key.execution_id)
    except ApiError as error:
        return _show_message(error.status, "Too late", error.message)
    if given is None:
        return _show_message(409, "Answered already", "This link has been used: it works for one answer.")
    await answered_runs.continue_run(
        gateway.database, gateway.acceptances, gateway.pod_services.poll_hub, given.answer
    )
    log.info("input answered", execution_id=question.key.execution_id, node_id=asked.node_id, by_link=True)
    if given.missing:
        return _show_message(200, "Thank you", f"Your answer counts. {given.missing} more must answer so.")
    return _show_message(
        200, "Thank you", "Your answer is stored, and the workflow continues. You can close this page."
    )


async def _find_question(request: GatewayRequest) -> ApprovalQuestion | None:
    """Return the question of the link with the token of the path, with its run and workflow; None for an unknown token
    and a deleted run.

    Its waiting node is None if the question is not asked yet (`is_early`), was answered or has expired, or the run has
    ended.
    """
    async with request.gateway.database.read() as connection:
        link = await approvals.find_link(connection, request.path_params["id"])
        if link is None:
            return None
        key = ExecutionKey(link.execution_id, link.shard)
        statement: Select[*tuple[Any, ...]] = (
            select(
                *(col(Execution.user_id), col(Execution.trigger_type), col(Execution.status)),
                *(col(Workflow.name), col(Organization.name).label("organization")),
            )
            .join(Workflow, col(Workflow.id) == col(Execution.workflow_id))
            .join(Organization, col(Organization.id) == col(Execution.organization_id))
            .where(
                col(Execution.id) == link.execution_id, col(Execution.organization_id) == link.organization_id
            )
        )
        run = (await connection.execute(statement)).first()
        if run is None:
            return None
        asked = [
            one
            for one in await node_answers.list_input_waits(connection, key)
            if (one.node_id, one.iteration) == (link.node_id, link.iteration)
        ]
        if asked and asked[0].expires_at is not None and asked[0].expires_at <= request.gateway.clock():
            asked = []
        user = None
        if "@" not in link.assignee:
            users = select(User).where(
                col(User.id) == link.assignee, col(User.organization_id) == link.organization_id
            )
            row = (await connection.execute(users)).mappings().first()
            user = None if row is None else build_row(User, row)
        is_early = (
            not asked and run.status not in TERMINAL_STATUSES and not await _was_reached(connection, link)
        )
    is_for_anyone = link.assignee == approvals.ANYONE
    request_body = asked[0].request if asked else {}
    may_self = bool(asked) and asked[0].request.get("allowSelf") is True
    is_started_by = link.assignee == run.user_id and run.trigger_type not in INTAKE_KINDS
    return ApprovalQuestion(
        link,
        key,
        run.organization,
        run.name,
        asked[0] if asked else None,
        "anyone who has this link"
        if is_for_anyone
        else (link.assignee if user is None else user.name or user.email),
        is_started_by and not may_self,
        is_early,
        not approvals.is_addressed(request_body, link, user)
        or (
            is_for_anyone
            and (bool(approvals.assignees_of(request_body)) or request_body.get("allowSelf") is False)
        ),
    )


async def _was_reached(connection: AsyncConnection, link: ApprovalLink) -> bool:
    """Return whether the node of a link has begun in its run, in the link's iteration."""
    statement = select(col(SpanRow.status)).where(
        col(SpanRow.execution_id) == link.execution_id,
        col(SpanRow.shard) == link.shard,
        col(SpanRow.node_id) == link.node_id,
        col(SpanRow.iteration) == link.iteration,
        col(SpanRow.status).not_in(CANDIDATE_STATUSES),
    )
    return await connection.scalar(statement) is not None


# ── forms ───────────────────────────────────────────────────────────────────────────────────────────────────


def _read_form(content: bytes) -> Mapping[str, str]:
    """Return the fields of a posted form, the last value of each.

    Raises ValueError for over 100,000 bytes or 100 fields, NUL, and text that is not UTF-8.
    """
    if len(content) > MAX_FORM_BYTES:
        raise ValueError("The answer is too long")
    if b"\0" in content or b"%00" in content:
        raise ValueError("The answer contains the character NUL")
    pairs = parse_qs(content.decode(), keep_blank_values=True, max_num_fields=MAX_FIELDS)
    return {name: values[-1] for name, values in pairs.items()}


def _read_answer(asked: WaitingNode, form: Mapping[str, str]) -> tuple[str | None, Json]:
    """Return the choice and the data of a form; None for either that it doesn't have, but empty data for a question
    with a schema.

    Fields are converted by the schema; empty ones are left out, except that an unchecked box is False. Without fields
    in the schema, the data is the `note`, if there is one. Raises ValueError for an invalid number or JSON.
    """
    properties = _read_properties(asked)
    data: dict[str, Json] = {}
    for name, schema in properties.items():
        text = form.get(FIELD + name, "").strip()
        if schema.get("type") == "boolean":
            data[name] = bool(text)
        elif text:
            data[name] = _read_value(name, text, schema)
    if not properties and form.get(NOTE, "").strip():
        data[NOTE] = form[NOTE].strip()
    return form.get(CHOICE) or None, data or (None if asked.request.get("schema") is None else {})


def _read_value(name: str, text: str, schema: Mapping[str, Any]) -> Json:
    """Return the JSON value of a form field by its schema: text, a number, or any JSON; raises ValueError."""
    kind = schema.get("type")
    if kind in {"string", None}:
        return text
    try:
        value = values.decode_json(text.encode())
    except InvalidJson as error:
        raise ValueError(f"{name} must be {'a number' if kind in NUMBERS else 'JSON'}") from error
    if kind in NUMBERS and (isinstance(value, bool) or not isinstance(value, int | float)):
        raise ValueError(f"{name} must be a number")
    return value


def _read_properties(asked: WaitingNode) -> Mapping[str, Mapping[str, Any]]:
    schema = asked.request.get("schema")
    properties = schema.get("properties") if isinstance(schema, dict) else None
    if not isinstance(properties, dict):
        return {}
    return {name: one if isinstance(one, dict) else {} for name, one in [*properties.items()][:MAX_FIELDS]}


# ── markup ──────────────────────────────────────────────────────────────────────────────────────────────────


def _render_head(name: str, reader: str = "") -> str:
    """Return the line above a page: the name of an organization, and for whom the page is."""
    right = f"<span>for {escape(reader)}</span>" if reader else ""
    return f"<header>{_MARK}<b>{escape(name)}</b>{right}</header>"


def _show_message(status: int, title: str, text: str) -> PageResponse:
    body = (
        f'{_render_head("Pilotflame")}<main><h1>{escape(title)}</h1><p class="soft">{escape(text)}</p></main>'
    )
    return PageResponse(status, title, body)


_UNKNOWN: Final = errors.not_found("question")
_GONE: Final = _show_message(
    404, "No such question", "This link is not valid, or its run is no longer stored."
)


def _show_question(
    question: ApprovalQuestion, *, status: int = 200, problems: Sequence[str] = ()
) -> PageResponse:
    """Return the page of an approval link: the question with its form, or the reason of a refusal.

    `problems` are shown above the form. A page about a missing right has 403, whatever `status` is.
    """
    asked = question.asked
    head = _render_head(question.organization, question.assignee)
    if question.link.used_at is not None:
        return _show_message(status, "Answered already", "This link has been used: it works for one answer.")
    if question.is_early:
        text = "The workflow has not come to this question. Open the link again later."
        return _show_message(status, "Not asked yet", text)
    if question.needs_own_link:
        text = "This question is for certain people, who answer by links of their own or with their accounts."
        return _show_message(403, "Not yours to answer", text)
    if asked is None:
        return _show_message(
            status,
            "Closed",
            "This question was answered, has expired, or its run has ended: nothing is to do.",
        )
    if question.is_self_approval:
        return _show_message(
            403, "Not yours to answer", "The user who started the run may not answer this question."
        )
    title = str(asked.request.get("title") or "")
    parts = [head, f"<main><h1>{escape(title)}</h1>"]
    if description := str(asked.request.get("description") or ""):
        parts.append(f'<p class="soft">{escape(description)}</p>')
    parts += [f'<p class="bad" role="alert">{escape(one)}</p>' for one in problems]
    parts.append('<form method="post">')
    properties = _read_properties(asked)
    schema = asked.request.get("schema")
    listed = schema.get("required") if isinstance(schema, dict) else None
    required = listed if isinstance(listed, list) else []
    for number, (name, one) in enumerate(properties.items()):
        parts.append(_render_field(f"f{number}", name, one, is_required=name in required))
    if not properties:
        parts.append(
            f'<label for="note">Note <span class="soft">optional</span></label>'
            f'<textarea id="note" name="{NOTE}" rows="2"></textarea>'
        )
    choices = input_checks.read_choices(asked.request) or [{"port": "", "label": "Send"}]
    for number, choice in enumerate(choices):
        kind = ' class="main"' if number == 0 else ""
        label = escape(str(choice.get("label") or choice["port"]))
        parts.append(
            f'<button{kind} name="{CHOICE}" value="{escape(str(choice["port"]))}" type="submit">{label}</button>'
        )
    whose = "This link" if question.link.assignee == approvals.ANYONE else "This link is yours and"
    until = "" if asked.expires_at is None else f" Open until {_format_minute(asked.expires_at)} UTC."
    parts.append(
        f'</form><p class="soft hint">{whose} works for one answer.{until} Asked by the workflow'
        f" “{escape(question.workflow)}”. You do not need an account.</p></main>"
    )
    return PageResponse(status, title, "".join(parts))


def _render_field(field_id: str, name: str, schema: Mapping[str, Any], *, is_required: bool) -> str:
    """Return label and input of a form field as HTML, by its JSON Schema; all texts are escaped."""
    label = escape(str(schema.get("title") or name))
    optional = "" if is_required else ' <span class="soft">optional</span>'
    head = f'<label for="{field_id}">{label}{optional}</label>'
    shared = f'id="{field_id}" name="{escape(FIELD + name)}"{" required" if is_required else ""}'
    default = schema.get("default")
    value = "" if default is None else escape(default if isinstance(default, str) else _as_json(default))
    if isinstance(schema.get("enum"), list):
        options = "".join(f"<option>{escape(str(one))}</option>" for one in schema["enum"])
        empty = "" if is_required else "<option></option>"
        return f"{head}<select {shared}>{empty}{options}</select>"
    match schema.get("type"), schema.get("format"):
        case "boolean", _:
            unrequired = f'id="{field_id}" name="{escape(FIELD + name)}"'
            return f'{head}<input {unrequired} type="checkbox" value="true">'
        case (("integer" | "number"), _):
            return f'{head}<input {shared} inputmode="decimal" value="{value}">'
        case _, "date":
            return f'{head}<input {shared} type="date" value="{value}">'
        case _:
            return f'{head}<input {shared} value="{value}">'


def _as_json(value: object) -> str:
    return msgspec.json.encode(value).decode()


def _format_minute(moment: datetime) -> str:
    return moment.strftime("%Y-%m-%d %H:%M")
