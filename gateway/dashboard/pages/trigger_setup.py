"""Set-up of the trigger of one workflow: addresses, steps at each sender, a test, and the requests so far."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

from gateway.dashboard.addresses import page_address
from gateway.dashboard.page import Page, PageData, PageFrame
from gateway.http.errors import ApiError

if TYPE_CHECKING:
    from gateway.dashboard.page_request import PageRequest

START: Final = "start"
"""Cursor of the first page, as the API has it: a list by cursor does not count all rows."""
SHOWN_ROWS: Final = 8
REFUSED: Final = frozenset({"rejected", "shed"})
"""Outcomes of deliveries that the sender has to know of."""
SOURCES: Final = 100
PATH: Final = "/dashboard/workflows/{id}/trigger"
KINDS: Final = {
    "queue-trigger": "queue",
    "email-trigger": "email",
    "webhook": "webhook",
    "event-trigger": "event",
    "schedule-trigger": "schedule",
}
SENDERS: Final[Mapping[str, Sequence[tuple[str, str]]]] = {
    "email": (
        ("sendgrid", "SendGrid"),
        ("mailgun", "Mailgun"),
        ("ses", "Amazon SES"),
        ("other", "Another sender"),
    ),
    "webhook": (
        ("github", "GitHub"),
        ("stripe", "Stripe"),
        ("slack", "Slack"),
        ("other", "Another sender"),
    ),
}
"""Senders with steps of their own, by kind of trigger."""
TITLES: Final = {
    "queue": "Messages",
    "email": "Mail",
    "webhook": "Webhook",
    "event": "Events",
    "schedule": "Schedule",
}
BY_HAND: Final = frozenset({"manual", "rest-api"})
"""Types of nodes that start a run by hand or by the API."""
STARTS: Final[Sequence[tuple[str, str, str, Mapping[str, Any]]]] = (
    (
        "webhook",
        "A webhook",
        "Another system sends an HTTP request: GitHub, Stripe, Slack, or one of your own.",
        {},
    ),
    ("email-trigger", "A mail", "SendGrid, Mailgun, Amazon SES or your mail server delivers it.", {}),
    ("queue-trigger", "A message", "Your own programs send it, with an API key.", {}),
    (
        "schedule-trigger",
        "The clock",
        "Every day at 08:00 UTC, until you set other times.",
        {"cron": "0 8 * * *"},
    ),
)
"""Type, name, description and first config of the triggers that may take the place of a start by hand."""
MAX_CHANGED_NODES: Final = 30
"""Nodes of a graph that the page sends back whole with another trigger."""
REMEDIES: Final = {
    "unauthorized": "It reaches the address, but has no valid signature and no token. Finish the steps.",
    "missing-signature": "It reaches the address and does not sign yet. Turn the signature on at the sender.",
    "invalid-signature": "The secret here is not the sender's. Compare both, and the clock of the sender.",
    "stale-signature": "It was signed too long ago. Compare the clocks.",
    "no-secret": "It is signed, but no key is saved here. Save it on the left.",
    "no-verification": "Choose on the left how to verify senders, or accept requests without a signature.",
    "trigger-not-ready": "The data source of the trigger is not usable. Choose one of the right type.",
    "workflow-not-active": "Activate the workflow, then redrive the request.",
    "network-not-allowed": "Add the sender's network to allowedNetworks.",
    "validation-failed": "The content does not fit. The reason names the field.",
}
"""Advice by the code of a refusal."""


async def load(page: PageRequest) -> PageData:
    """Ask the API for a workflow, the addresses of its trigger, eight deliveries, eight refused requests, the data
    sources, the schedule, and the next times of a cron expression in the query.

    Parts that are forbidden or do not apply are None. Raises `ApiError`, but an error about the expression becomes
    the text `problem`.
    """
    path = f"/api/v1/workflows/{page.parameters['id']}"
    workflow = await page.get(path)
    node = find_trigger(workflow["nodes"])
    is_event = node is not None and KINDS[node["nodeId"]] == "event"
    names = ("inbound", "deliveries", "samples", "sources", "schedule")
    answers = await asyncio.gather(
        page.get_if_present(f"{path}/inbound-address"),
        # An event is for all workflows: its delivery names none.
        page.get_if_present("/api/v1/deliveries", route="events", limit=SHOWN_ROWS)
        if is_event
        else page.get_if_present(f"{path}/deliveries", limit=SHOWN_ROWS, after=START),
        page.get_if_present(f"{path}/intake-samples", limit=SHOWN_ROWS),
        page.get_if_present("/api/v1/datasources", limit=SOURCES),
        page.get_if_present(f"{path}/schedule"),
    )
    preview, problem = None, ""
    if node is not None and KINDS[node["nodeId"]] == "schedule" and page.query.get("cron"):
        try:
            wanted = {**read_saved_times(node["config"]), **read_times(page.query)}
            preview = await page.preview(f"{path}/schedule/preview", **wanted)
        except ApiError as error:
            problem = error.message
    found = dict(zip(names, answers, strict=True))
    return {
        "workflow": workflow,
        "tag": page.tags.get(path, ""),
        "preview": preview,
        "problem": problem,
        **found,
    }


def read_saved_times(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the time zone and random delay (jitter) in the saved config of a schedule, without those that are not set.

    The preview of its next times uses them unless the form of the schedule has others (`read_times`).
    """
    return {name: config[name] for name in ("timezone", "jitterSeconds") if config.get(name)}


def read_times(query: Mapping[str, str]) -> Mapping[str, str]:
    """Return the times that the form of a schedule asks for: a cron expression, and a time zone unless it is empty."""
    return {name: query[name] for name in ("cron", "timezone") if query.get(name)}


def view(data: PageData, frame: PageFrame) -> Mapping[str, Any]:
    """Return the template values: the trigger, the chosen sender, the addresses for it, and the requests so far.

    The page leads through the setup of a trigger, by the sender that the query names or the config suggests.
    """
    workflow, inbound = data["workflow"], data["inbound"] or {"urls": {}, "tokens": (), "warnings": ()}
    node = find_trigger(workflow["nodes"])
    kind = "" if node is None else KINDS[node["nodeId"]]
    config = {} if node is None else node["config"]
    senders = SENDERS.get(kind, ())
    asked = frame.query.get("sender", "")
    sender = asked if asked in dict(senders) else guess_sender(config, senders)
    deliveries = data["deliveries"]["deliveries"] if data["deliveries"] else ()
    samples = data["samples"]["samples"] if data["samples"] else ()
    here = PATH.format(id=workflow["id"])
    title = f"{TITLES.get(kind, 'Trigger')} for {workflow['name']}"
    return {
        "title": title,
        "crumbs": (
            ("Workflows", f"{frame.root}/dashboard/workflows"),
            (workflow["name"], f"{frame.root}/dashboard/workflows/{workflow['id']}"),
            (TITLES.get(kind, "Trigger"), ""),
        ),
        "workflow": workflow,
        "tag": data["tag"],
        "api": f"/api/v1/workflows/{workflow['id']}",
        "node": node,
        "kind": kind,
        "config": config,
        "starts": list_starts(workflow["nodes"]) if node is None and frame.may("workflows:write") else (),
        "senders": [
            (name, label, page_address(frame, here, {"sender": name}), name == sender)
            for name, label in senders
        ],
        "sender": sender,
        "sender_label": dict(senders).get(sender, ""),
        "urls": inbound["urls"],
        "plain_url": _plain_url(frame, workflow["id"], kind),
        "tokens": inbound["tokens"],
        "warnings": inbound["warnings"],
        "sources": _sources_by_type(data["sources"]),
        "verification": config.get("verification") or {},
        "deliveries": deliveries,
        "samples": samples,
        "kept_days": inbound.get("deliveriesKeptDays"),
        "has_arrived": bool(deliveries) or bool(samples),
        "has_sender": bool(samples) or any(not one["sender"].startswith("api-key:") for one in deliveries),
        "has_run": any(one["outcome"] == "accepted" for one in deliveries),
        "refusal": describe_refusals(samples, deliveries),
        "schedule": data["schedule"],
        "preview": data["preview"],
        "problem": data["problem"],
        "times": {**config, **read_times(frame.query)} if kind == "schedule" else {},
        "here": frame.root + here,
        "event_type": _sample_event_type(config.get("event_type")),
        "is_active": workflow["status"] == "active",
        "may_write": frame.may("workflows:write"),
        "may_run": frame.may("workflows:execute"),
        "may_write_sources": frame.may("datasources:write"),
        "may_write_tokens": frame.may("keys:write") and frame.may("users:write"),
        "base_url": frame.base_url,
        "list_page": page_address(
            frame,
            "/dashboard/deliveries",
            {"route": "events"} if kind == "event" else {"workflow_id": workflow["id"]},
        ),
    }


def find_trigger(nodes: Sequence[Mapping[str, Any]]) -> Mapping[str, Any] | None:
    """Return the trigger node of a graph that inbound requests or a schedule start; None for a graph that is
    started by hand.
    """
    return next((node for node in nodes if node["nodeId"] in KINDS), None)


def list_starts(nodes: Sequence[Mapping[str, Any]]) -> Sequence[tuple[str, str, str, Mapping[str, Any]]]:
    """Return type, name and description of each trigger that can replace the start by hand, with the workflow's changed
    fields.

    Empty for a large graph, and for one without a single start by hand.
    """
    begins = [node["id"] for node in nodes if node["nodeId"] in BY_HAND]
    if len(begins) != 1 or len(nodes) > MAX_CHANGED_NODES:
        return ()
    return [
        (
            type_,
            name,
            description,
            {
                "nodes": [
                    {**node, "nodeId": type_, "type": type_, "config": config}
                    if node["id"] == begins[0]
                    else node
                    for node in nodes
                ]
            },
        )
        for type_, name, description, config in STARTS
    ]


def guess_sender(config: Mapping[str, Any], senders: Sequence[tuple[str, str]]) -> str:
    """Return the sender that the config of a trigger names; `other` for an unlisted provider, else the first one.

    `senders` are names with labels; empty for no senders.
    """
    names = [name for name, _ in senders]
    provider = (config.get("verification") or {}).get("provider")
    if provider in names:
        return str(provider)
    if provider is not None and "other" in names:
        return "other"
    return next((name for name in names if name in config), names[0] if names else "")


def describe_refusals(
    samples: Sequence[Mapping[str, Any]], deliveries: Sequence[Mapping[str, Any]]
) -> Mapping[str, Any] | None:
    """Return the newest refusal with advice, and the number of refusals with its code; None after a later success, and
    without any.

    Samples are requests that were refused before they became deliveries.
    """
    refused = [
        *((one["createdAt"], *one["reason"].split(": ", 1)) for one in samples),
        *(
            (one["createdAt"], one["reason"]["code"], one["reason"]["message"])
            for one in deliveries
            if one["outcome"] in REFUSED
        ),
    ]
    newest = max(refused, default=None)
    accepted = max((one["createdAt"] for one in deliveries if one["outcome"] not in REFUSED), default="")
    if newest is None or newest[0] < accepted:
        return None
    code = newest[1]
    return {
        "code": code,
        "message": newest[-1],
        "count": sum(one[1] == code for one in refused),
        "remedy": REMEDIES.get(code, ""),
        "at": newest[0],
    }


def _plain_url(frame: PageFrame, workflow_id: str, kind: str) -> str:
    """Return the URL of a trigger without a token, for senders that sign or send a key; empty unless `kind`
    has one.

    Kinds with one are `email`, `queue` and `event`.
    """
    paths = {
        "email": f"/api/v1/workflows/{workflow_id}/email-trigger",
        "queue": f"/api/v1/workflows/{workflow_id}/enqueue",
        "event": "/api/v1/workflows/events",
    }
    return frame.base_url + paths[kind] if kind in paths else ""


def _sources_by_type(listed: Mapping[str, Any] | None) -> Mapping[str, Sequence[Mapping[str, Any]]]:
    """Return the data sources of an API answer by their type; empty if the visitor may not list them."""
    found: dict[str, list[Mapping[str, Any]]] = {}
    for source in listed["dataSources"] if listed else ():
        found.setdefault(source["type"], []).append(source)
    return found


def _sample_event_type(configured: str | Sequence[str] | None) -> str:
    """Return an event type that the trigger accepts, such as `order.test` for `order.*`; `test` if it accepts any."""
    first = configured if isinstance(configured, str) else next(iter(configured or ()), "test")
    return first.replace(".*", ".test")


PAGE: Final = Page(PATH, "trigger_setup.html", load, view, "workflows", ("deliveries",))
