"""File descriptors that this process may open."""

from __future__ import annotations

import resource
from typing import Final

MAX_DESCRIPTORS: Final = 65_536
"""Enough for every budget of ours; some programs that a process starts take time and memory by this number."""


def raise_descriptor_limit() -> int:
    """Raise the soft limit of open descriptors to the hard one, at most to `MOST`, and return what it is then."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MAX_DESCRIPTORS if hard == resource.RLIM_INFINITY else min(hard, MAX_DESCRIPTORS)
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return MAX_DESCRIPTORS if soft == resource.RLIM_INFINITY else soft
    resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    return wanted
