"""Keys and users: API keys with their scopes, sessions of browsers, and the users of the organization."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

from gateway.dashboard.formats import parse_instant
from gateway.dashboard.page import Page, PageData, PageFrame

if TYPE_CHECKING:
    from gateway.dashboard.page_request import PageRequest

LIMIT: Final = 100
UNUSED_DAYS: Final = 90


async def load(page: PageRequest) -> PageData:
    """Ask the API for up to 100 keys, and for sessions; for users and invitations if the visitor may see them.

    Forbidden parts are None. Raises `ApiError`.
    """
    keys, sessions, users, invitations = await asyncio.gather(
        page.get_if_present("/api/v1/auth/keys", limit=LIMIT),
        page.get("/api/v1/auth/sessions"),
        page.get_if_present("/api/v1/auth/users", limit=LIMIT),
        page.get_if_present("/api/v1/auth/invitations", limit=LIMIT),
    )
    return {"keys": keys, "sessions": sessions, "users": users, "invitations": invitations}


def view(data: PageData, frame: PageFrame) -> Mapping[str, Any]:
    """Return the template values: keys with their state, sessions, users, and open or expired invitations."""
    users = data["users"]
    resources = list_resources(data["keys"])
    keys = [] if data["keys"] is None else data["keys"]["keys"]
    return {
        "title": "Keys and users",
        "crumbs": (("Keys and users", ""),),
        "resources": resources,
        "keys": [
            {**key, "state": _state_of(key, frame), "rights": list_rights(key["scopes"], resources)}
            for key in keys
        ],
        "key_names": {key["id"]: key["name"] or f"{key['prefix']}…" for key in keys},
        "may_change_keys": frame.may("keys:write"),
        "sessions": data["sessions"]["sessions"],
        "users": None if users is None else users["users"],
        "names": {}
        if users is None
        else {user["id"]: user["name"] or user["email"] for user in users["users"]},
        "invitations": [
            one
            for one in (data["invitations"] or {}).get("invitations", ())
            if one["state"] in {"open", "expired"}
        ],
        "scopes": sorted(frame.visitor["scopes"]) if frame.visitor else [],
    }


def list_resources(listed: Mapping[str, Any] | None) -> Sequence[str]:
    """Return the kinds of objects that any listed key has a scope for, in alphabetical order."""
    keys = () if listed is None else listed["keys"]
    return sorted({scope.partition(":")[0] for key in keys for scope in key["scopes"]})


def list_rights(scopes: Sequence[str], resources: Sequence[str]) -> Sequence[str]:
    """Return a key's actions on each kind of objects, such as `read, write`; empty without any."""
    rights = [scope.partition(":") for scope in scopes]
    return [", ".join(action for kind, _, action in rights if kind == resource) for resource in resources]


def _state_of(key: Mapping[str, Any], frame: PageFrame) -> str:
    """Return the state of an API key: `revoked`, `expired`, `unused` for 90 days, or `valid`."""
    if key["revokedAt"]:
        return "revoked"
    expires_at = parse_instant(key["expiresAt"])
    if expires_at is not None and expires_at <= frame.now:
        return "expired"
    used_at = parse_instant(key["lastUsedAt"] or key["createdAt"])
    is_unused = used_at is not None and (frame.now - used_at).days >= UNUSED_DAYS
    return "unused" if is_unused else "valid"


PAGE: Final = Page("/dashboard/keys", "access.html", load, view, "keys")
