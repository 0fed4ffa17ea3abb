"""Addresses of pages with their filters."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING
from urllib.parse import urlencode

if TYPE_CHECKING:
    from gateway.dashboard.page import PageFrame


def page_address(frame: PageFrame, path: str, query: Mapping[str, str]) -> str:
    """Return the address of the dashboard page `path`, below the path of the public URL, with the non-empty values of
    `query`.
    """
    text = urlencode({name: value for name, value in query.items() if value})
    return f"{frame.root}{path}" + (f"?{text}" if text else "")
