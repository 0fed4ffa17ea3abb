"""API shape of browser sessions."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime

import msgspec

from engine.values import fingerprint
from gateway.http.wire import Instant, WireStruct, instant
from models.browser_session import BrowserSession


class SessionShape(WireStruct):
    """Session of a browser, which stands for an API key and ends with it."""

    id: str
    user_id: str
    key_id: str
    user_agent: str
    """Browser, as its header `User-Agent` named it at the sign-in."""
    created_at: Instant
    last_seen_at: Instant
    """Time of its last request, to a minute."""
    ends_at: Instant
    """End without another request: 12 hours after the last one, and at most 7 days after the sign-in."""
    is_current: bool
    """Whether the request was made with this session."""


class SessionList(WireStruct):
    """Sessions that have not ended, newest first."""

    count: int
    sessions: Sequence[SessionShape]


def show_session(
    row: BrowserSession, key_expires_at: datetime | None, current_id: str | None
) -> SessionShape:
    """Return a browser session as the API shows it; `is_current` is true for the session with the id `current_id`.

    `key_expires_at` is the expiry of its key, None without one; a session ends with it.
    """
    return SessionShape(
        id=row.id,
        user_id=row.user_id,
        key_id=row.key_id,
        user_agent=row.user_agent,
        created_at=instant(row.created_at),
        last_seen_at=instant(row.last_seen_at),
        ends_at=instant(row.ends_at(key_expires_at)),
        is_current=row.id == current_id,
    )


def hash_session(row: BrowserSession) -> str:
    """Return the SHA-256 of a session for the audit trail, without its secret and its last use."""
    return fingerprint(msgspec.to_builtins(row.model_dump(exclude={"hash", "last_seen_at"})))
