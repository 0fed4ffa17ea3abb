"""Addresses of pages with their filters."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING
from urllib.parse import urlencode

if TYPE_CHECKING:
    from gateway.dashboard.page import PageFrame


def list_address(frame: PageFrame, path: str, query: Mapping[str, str]) -> str:
    """Return the address of a dashboard page below the public path; parameters of `query` with empty values
    are left out.
    """
    text = urlencode({name: value for name, value in query.items() if value})
    return f"{frame.root}{path}" + (f"?{text}" if text else "")
