"""Fields that every log line of one task gets: the id of its request, run, node and trace."""

from __future__ import annotations

from collections.abc import Mapping
from contextvars import ContextVar
from typing import Final

fields: Final[ContextVar[Mapping[str, str]]] = ContextVar("log_fields")
"""Fields by name; unset outside of requests and runs. Fields of a log call replace those of the same name."""
EMPTY: Final[Mapping[str, str]] = {}
