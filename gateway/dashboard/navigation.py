"""Main navigation of the dashboard: one entry for each page that people look for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from msgspec import Struct


class NavigationEntry(Struct, frozen=True):
    """Link of the main navigation; `g` and `key` go there."""

    name: str
    label: str
    path: str
    icon: str
    key: str
    scope: str | None = None
    """Scope without which the page has nothing to show; the entry is left out then."""
    is_counted: bool = False
    """Whether the number of its objects that wait for a person is shown."""


ENTRIES: Final[Sequence[NavigationEntry]] = (
    NavigationEntry("overview", "Overview", "/dashboard/overview", "home", "o", "workflows:read"),
    NavigationEntry("workflows", "Workflows", "/dashboard/workflows", "graph", "w", "workflows:read"),
    NavigationEntry("runs", "Runs", "/dashboard/runs", "list", "r", "workflows:read"),
    NavigationEntry(
        "approvals", "Approvals", "/dashboard/approvals", "person", "a", "workflows:read", is_counted=True
    ),
    NavigationEntry(
        "dead-letters",
        "Dead letters",
        "/dashboard/dead-letters",
        "dead",
        "d",
        "workflows:read",
        is_counted=True,
    ),
    NavigationEntry("deliveries", "Deliveries", "/dashboard/deliveries", "inbox", "e", "workflows:read"),
    NavigationEntry("schedule", "Schedule", "/dashboard/schedule", "clock", "s", "workflows:read"),
    NavigationEntry("sources", "Data sources", "/dashboard/sources", "db", "b", "datasources:read"),
    NavigationEntry("models", "Models and tools", "/dashboard/models", "fx", "m", "models:read"),
    NavigationEntry("keys", "Keys and users", "/dashboard/keys", "key", "k"),
    NavigationEntry("audit", "Audit", "/dashboard/audit", "audit", "u", "users:write"),
    NavigationEntry("health", "Health", "/dashboard/health", "health", "h", "workflows:read"),
)
