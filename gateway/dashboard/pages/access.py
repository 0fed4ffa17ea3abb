"""Keys and users: API keys with their scopes and sessions, trigger tokens, and the users of the organization."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any, Final

from gateway.dashboard.addresses import page_address
from gateway.dashboard.formats import parse_instant
from gateway.dashboard.page import Page, PageData, PageFrame
from gateway.dashboard.sign_in_page import PROBLEMS

if TYPE_CHECKING:
    from gateway.dashboard.page_request import PageRequest

LIMIT: Final = 100
KEYS_LIMIT: Final = 25
"""Keys of a page: the row of each has a column for every kind of scope, and its sessions below."""
PATH: Final = "/dashboard/keys"
UNUSED_DAYS: Final = 90
TASKS_WORK: Final = "tasks:work"
"""Scope that only admins give."""
BROWSERS: Final = (
    *(("Edg/", "Edge"), ("OPR/", "Opera"), ("Firefox/", "Firefox"), ("FxiOS/", "Firefox")),
    *(("Chrome/", "Chrome"), ("CriOS/", "Chrome"), ("Safari/", "Safari")),
)
"""Signs in a header `User-Agent` and the browsers that they stand for; others call themselves Chrome and Safari too."""
SYSTEMS: Final = (
    *(("Android", "Android"), ("iPhone", "iPhone"), ("iPad", "iPad"), ("CrOS", "ChromeOS")),
    *(("Windows", "Windows"), ("Macintosh", "macOS"), ("Linux", "Linux")),
)
"""The same for operating systems; Android calls itself Linux too."""
NEW_ADDRESSES: Final = {"queue": "urls.api", "email": "urls.api", "webhook": "urls.webhook"}
"""Part of the answer to a new trigger token that a sender of a kind of trigger needs."""


async def load(page: PageRequest) -> PageData:
    """Ask the API for 25 keys, up to 100 trigger tokens, users and invitations each, and for sessions.

    Parts that the visitor may not see are None. Raises `ApiError`.
    """
    keys, sessions, tokens, users, invitations = await asyncio.gather(
        page.get_if_present("/api/v1/auth/keys", limit=KEYS_LIMIT, offset=page.query.get("offset")),
        page.get("/api/v1/auth/sessions"),
        page.get_if_present("/api/v1/auth/trigger-tokens", limit=LIMIT),
        page.get_if_present("/api/v1/auth/users", limit=LIMIT),
        page.get_if_present("/api/v1/auth/invitations", limit=LIMIT),
    )
    return {
        "keys": keys,
        "sessions": sessions,
        "tokens": tokens,
        "users": users,
        "invitations": invitations,
    }


def view(data: PageData, frame: PageFrame) -> Mapping[str, Any]:
    """Return the template values: keys with their state and sessions, sessions of unlisted keys, trigger tokens,
    users, and open or expired invitations.
    """
    users = data["users"]
    resources = list_resources(data["keys"])
    keys = [] if data["keys"] is None else data["keys"]["keys"]
    sessions = [
        {**session, "browser": name_browser(session["userAgent"])} for session in data["sessions"]["sessions"]
    ]
    key_ids = {key["id"] for key in keys}
    listed = data["keys"] or {"count": 0, "offset": 0}
    behind = listed["offset"] + len(keys)
    scopes = set(frame.visitor["scopes"]) - {TASKS_WORK} if frame.visitor else set()
    if frame.visitor and frame.visitor["role"] == "admin":
        scopes.add(TASKS_WORK)
    return {
        "title": "Keys and users",
        "problem": PROBLEMS.get(frame.query.get("problem", ""), ""),
        "crumbs": (("Keys and users", ""),),
        "resources": resources,
        "keys": [
            {
                **key,
                "state": _state_of(key, frame),
                "rights": list_rights(key["scopes"], resources),
                "sessions": [session for session in sessions if session["keyId"] == key["id"]],
            }
            for key in keys
        ],
        "key_count": listed["count"],
        "more_keys": page_address(frame, PATH, {"offset": str(behind)}) if behind < listed["count"] else "",
        "first_keys": page_address(frame, PATH, {}) if listed["offset"] else "",
        "may_change_keys": frame.may("keys:write"),
        "sessions": [session for session in sessions if session["keyId"] not in key_ids],
        "tokens": None
        if data["tokens"] is None
        else [_describe_token(token, frame) for token in data["tokens"]["tokens"]],
        "token_count": 0 if data["tokens"] is None else data["tokens"]["count"],
        "users": None if users is None else users["users"],
        "names": {}
        if users is None
        else {user["id"]: user["name"] or user["email"] for user in users["users"]},
        "invitations": [
            one
            for one in (data["invitations"] or {}).get("invitations", ())
            if one["state"] in {"open", "expired"}
        ],
        "scopes": [
            (kind, list(group)) for kind, group in groupby(sorted(scopes), lambda one: one.partition(":")[0])
        ],
        "proof": f"curl -sS -H 'X-API-Key: {{shown}}' '{frame.base_url}/api/v1/auth/whoami'",
    }


def name_browser(user_agent: str) -> str:
    """Return browser and system of a header `User-Agent`, such as `Firefox, Linux`; the header itself for unknown
    browsers.
    """
    browser = next((name for sign, name in BROWSERS if sign in user_agent), "")
    system = next((name for sign, name in SYSTEMS if sign in user_agent), "")
    return ", ".join(part for part in (browser, system) if part) if browser else user_agent


def list_resources(listed: Mapping[str, Any] | None) -> Sequence[str]:
    """Return the kinds of objects that any listed key has a scope for, in alphabetical order."""
    keys = () if listed is None else listed["keys"]
    return sorted({scope.partition(":")[0] for key in keys for scope in key["scopes"]})


def list_rights(scopes: Sequence[str], resources: Sequence[str]) -> Sequence[str]:
    """Return the actions of a key's scopes on each of the kinds of objects, in their order, such as `read,
    write`; empty texts without any.
    """
    rights = [scope.partition(":") for scope in scopes]
    return [", ".join(action for kind, _, action in rights if kind == resource) for resource in resources]


def _state_of(key: Mapping[str, Any], frame: PageFrame) -> str:
    """Return the state of an API key: `revoked`, `expired`, `unused` for 90 days, or `valid`."""
    if key["revokedAt"]:
        return "revoked"
    expires_at = parse_instant(key["expiresAt"])
    if expires_at is not None and expires_at <= frame.now:
        return "expired"
    return "unused" if _is_unused(key, frame) else "valid"


def _describe_token(token: Mapping[str, Any], frame: PageFrame) -> Mapping[str, Any]:
    """Return a trigger token with its state, and whether the visitor may replace it (`may_change`).

    `shows` is the field with the new address in the API's answer to a replacement, such as `urls.api`. The state is
    `replaced` until the overlap ends, `unused` for 90 days, or `valid`.
    """
    visitor = frame.visitor or {}
    is_owner = visitor.get("role") == "admin" or visitor.get("userId") == token["ownerId"]
    return {
        **token,
        "state": "replaced" if token["expiresAt"] else "unused" if _is_unused(token, frame) else "valid",
        "shows": NEW_ADDRESSES.get(token["triggerKind"] or "", "token"),
        "may_change": is_owner and frame.may("workflows:write"),
    }


def _is_unused(credential: Mapping[str, Any], frame: PageFrame) -> bool:
    """Return whether a key or token was not used for 90 days, or never since its creation 90 days ago."""
    used_at = parse_instant(credential["lastUsedAt"] or credential["createdAt"])
    return used_at is not None and (frame.now - used_at).days >= UNUSED_DAYS


PAGE: Final = Page(PATH, "access.html", load, view, "keys")
