"""Users who may see an object that has an owner, as pages name them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gateway.dashboard.page import PageFrame


def list_users(shared: Mapping[str, Any], users: Mapping[str, Any] | None, frame: PageFrame) -> Sequence[str]:
    """Return the names of the users besides admins that may see an object, its owner first; empty for a public object.

    `users` is the answer of the API about the users of the organization. Without it, and for users that it lacks, ids
    stand for names.
    """
    if shared["isPublic"]:
        return ()
    names = list_names(users, frame)
    return [names.get(user_id, user_id) for user_id in (shared["ownerId"], *shared["sharedWith"])]


def list_names(users: Mapping[str, Any] | None, frame: PageFrame) -> Mapping[str, str]:
    """Return names or mail addresses of users by id, from the answer of the API about them, and `you` for the visitor.

    Without that answer, the others have no names.
    """
    names = {user["id"]: user["name"] or user["email"] for user in users["users"]} if users else {}
    if frame.visitor:
        names[frame.visitor["userId"]] = "you"
    return names


def may_change(shared: Mapping[str, Any], scope: str, frame: PageFrame) -> bool:
    """Return whether the visitor may change an object and its visibility: as its owner or an admin with the scope."""
    visitor = frame.visitor
    if visitor is None or not frame.may(scope):
        return False
    return bool(visitor["role"] == "admin" or visitor["userId"] == shared["ownerId"])
